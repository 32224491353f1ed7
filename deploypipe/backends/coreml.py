"""Core ML: converts exported programs to `.mlpackage`; nothing here runs them."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NoReturn

from deploypipe.backends.base import Pricing, Profile, Source, Timing
from deploypipe.backends.scripted import Scripted
from deploypipe.errors import BackendError
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target


class CoreMl(Scripted):
    """The PyPI package `coremltools`, iOS 16 or later, fp16 or fp32; converts only.

    The artifact is a zip of `model.mlpackage`. Not run on hardware: Core ML exists on Apple's systems only, and this backend
    neither verifies nor times there yet.
    """

    name: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage.zip"
    script: ClassVar[str] = "ct_convert.py"
    source: ClassVar[Source] = "program"
    pricing: ClassVar[Pricing] = "never"
    times_layers: ClassVar[bool] = False
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)

    def build_job(self, model: Path, target: Target) -> Job:
        """Convert the program into one file."""
        artifact = "artifact" + self.suffix
        details = {"model": "model.pt2", "artifact": artifact, "precision": target.build.precision}
        return self.job("build", target, details, {"model.pt2": model}, (artifact,))

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Refuse.

        Raises:
            BackendError: Always.
        """
        _refuse(target)

    def read_bench(self, result: JobResult) -> dict[str, Timing]:
        """Return nothing: there is no job whose answer this could be."""
        return {}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Refuse.

        Raises:
            BackendError: Always.
        """
        _refuse(target)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return nothing: there is no job whose answer this could be."""
        return {}


def _refuse(target: Target) -> NoReturn:
    raise BackendError(
        "Core ML models are converted here, not run: no latency can be measured",
        at=f"target {target.name}",
        fix="plan by counts: --metric macs or --metric params, and measure on the device with Xcode",
    )
