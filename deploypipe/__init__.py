"""Prune a trained PyTorch CNN to a measured latency on a device, and prove every step.

import deploypipe as dp

graph = dp.trace(model, example_inputs)                  # which channels are tied together
table = dp.profile(model, example_inputs, target="cpu")  # what they cost on the target
plan = dp.allocate(graph, scores, table, budget_us)      # how many of each group to keep
small = dp.compact(model, graph, plan)                   # the smaller model
report = dp.build(model="demo", budget="50%")            # all of it, as the command line does
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploypipe.algorithms import algorithms as algorithms
    from deploypipe.allocation.allocate import allocate as allocate
    from deploypipe.compact import compact as compact
    from deploypipe.errors import DeployPipeError as DeployPipeError
    from deploypipe.graph import trace as trace
    from deploypipe.latency.table import LatencyTable as LatencyTable
    from deploypipe.models.plain import fold_weights as fold_weights
    from deploypipe.pipeline import build as build
    from deploypipe.pipeline.prune import prune as prune
    from deploypipe.plan import KeepPlan as KeepPlan
    from deploypipe.profiler.measure import profile as profile
    from deploypipe.reports.report import Report as Report
    from deploypipe.saved import load as load
    from deploypipe.targets import Target as Target
    from deploypipe.targets import load_target as load_target
    from deploypipe.types import Graph as Graph
    from deploypipe.types import Group as Group
    from deploypipe.types import Member as Member

__version__ = "0.1.0"

_EXPORTS = {  # name -> module, imported on first use: `import deploypipe` alone costs nothing
    "DeployPipeError": "deploypipe.errors",
    "Graph": "deploypipe.types",
    "Group": "deploypipe.types",
    "KeepPlan": "deploypipe.plan",
    "LatencyTable": "deploypipe.latency.table",
    "Member": "deploypipe.types",
    "Report": "deploypipe.reports.report",
    "Target": "deploypipe.targets",
    "algorithms": "deploypipe.algorithms",
    "allocate": "deploypipe.allocation.allocate",
    "build": "deploypipe.pipeline",
    "compact": "deploypipe.compact",
    "fold_weights": "deploypipe.models.plain",
    "load": "deploypipe.saved",
    "load_target": "deploypipe.targets",
    "profile": "deploypipe.profiler.measure",
    "prune": "deploypipe.pipeline.prune",
    "trace": "deploypipe.graph",
}

__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604 - names of the table above


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'deploypipe' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value


class _Package(ModuleType):
    """Keeps `dp.compact` the function: importing the file compact.py would bind its module to the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
