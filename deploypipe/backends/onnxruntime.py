"""ONNX Runtime on the CPU: builds the optimised model, times it and its kernels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx

from deploypipe.backends.base import KernelTime, Profile
from deploypipe.backends.ort_origin import Origins
from deploypipe.backends.scripted import Scripted, answer
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target

_MAX_PROFILED = 100  # one profiled run of a 50-node model writes about 40 kB


class OnnxRuntime(Scripted):
    """The PyPI package `onnxruntime`, CPU provider, fp32. What it builds is bound to this kind of CPU."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    script: ClassVar[str] = "ort_measure.py"
    options: ClassVar[Mapping[str, Any]] = {"provider": "CPUExecutionProvider"}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time kernels; for models given as files also ask for the optimised graph, which tells what feeds each kernel."""
        optimised = {name: f"optimised-{i}.onnx" for i, (name, source) in enumerate(models.items()) if isinstance(source, Path)}
        return self.timed_kernels(models, optimised, target)

    def timed_kernels(self, models: Mapping[str, Path | bytes], optimised: Mapping[str, str], target: Target) -> Job:
        """Time kernels, and pull the optimised graphs (model -> file) that are asked for."""
        files = {f"model-{i}.onnx": source for i, source in enumerate(models.values())}
        target = target.replace(runs=min(target.measure.runs, _MAX_PROFILED))
        details = {"models": dict(zip(models, files, strict=True)), "optimised": optimised}
        return self.job("profile", target, details, files, tuple(optimised.values()))

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels; each knows its layer's weight or the layers that feed it."""
        found = answer(result)
        profiles = {}
        for index, (name, source) in enumerate(models.items()):
            seen = result.pulled.get(f"optimised-{index}.onnx")
            model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
            optimised = onnx.load(str(seen)) if seen else None
            profiles[name] = Profile(kernels(found["models"][name], model, optimised), found["foreign_load"])
        return profiles


def kernels(rows: list[list[Any]], model: onnx.ModelProto, optimised: onnx.ModelProto | None = None) -> tuple[KernelTime, ...]:
    """Tell which layers of the exported `model` the profiled kernels are.

    Args:
        rows: [node, operation, median, p10, p90, runs] in the order of execution.
        model: As it was profiled.
        optimised: What the runtime made of it; without it, a kernel that the runtime added follows what ran just before.
    """
    origins = Origins(model, optimised)
    found: list[KernelTime] = []
    feeds: tuple[str, ...] = ()
    for name, op, median, p10, p90, runs in rows:
        weight = origins.weight(name)
        # A node that the optimiser made without a name follows what ran just before it.
        feeds = () if weight else origins.feeds(name) or feeds
        found.append(KernelTime(name, op, weight, feeds, median, p10, p90, runs))
        feeds = feeds or (weight,)
    return tuple(found)
