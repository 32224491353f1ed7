"""The chain from a trained model to a measured artifact, and the smaller commands beside it."""

from deploypipe.pipeline.commands import bench_artifact, inspect, profile_model
from deploypipe.pipeline.criteria import criteria
from deploypipe.pipeline.entry import build
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.returned import import_results
from deploypipe.pipeline.valuing import sensitivity

__all__ = ["Request", "bench_artifact", "build", "criteria", "import_results", "inspect", "profile_model", "sensitivity"]
