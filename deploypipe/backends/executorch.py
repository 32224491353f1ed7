"""ExecuTorch with XNNPACK: builds `.pte` files from exported programs, times them and their kernels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from deploypipe.backends.base import KernelTime, Pricing, Profile, Source
from deploypipe.backends.scripted import Scripted, answer
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target


class ExecuTorch(Scripted):
    """The PyPI package `executorch`, XNNPACK on the CPU, fp32.

    Its kernels are named by type and number only; which layers they are follows from the order in which the lowered program
    holds them, hence not for a built file. Run on x86-64 only, where XNNPACK uses other kernels than on a phone.
    """

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    script: ClassVar[str] = "et_measure.py"
    source: ClassVar[Source] = "program"
    pricing: ClassVar[Pricing] = "models"
    tolerance: ClassVar[float] = 1e-4
    options: ClassVar[Mapping[str, Any]] = {"tolerance": tolerance}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time kernels; programs are lowered first."""
        files = {f"model-{i}.pt2": source for i, source in enumerate(models.values())}
        return self.job("profile", target, {"models": dict(zip(models, files, strict=True))}, files)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels; which layers feed those that are none is not known."""
        found = answer(result)
        return {name: Profile(tuple(map(_kernel, found["models"][name])), found["foreign_load"]) for name in models}


def _kernel(row: list[Any]) -> KernelTime:
    name, op, weight, median, p10, p90, runs = row
    return KernelTime(name, op, weight, (), median, p10, p90, runs)
