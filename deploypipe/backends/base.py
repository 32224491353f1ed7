"""What a backend is: it describes jobs and reads what they answered; a runner carries them out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deploypipe.job import Job, JobResult
from deploypipe.targets import Target

MAX_FOREIGN = 0.05  # share of our cores' time that others may take before a measurement counts as disturbed
Facts = dict[str, Any]  # plain JSON values: versions, CPU, threads
Arrays = dict[str, NDArray[np.generic]]
Source = Literal["onnx", "program"]  # an ONNX file; what torch.export.save wrote (.pt2)
SUFFIX: Mapping[Source, str] = {"onnx": ".onnx", "program": ".pt2"}
Pricing = Literal["kernels", "models", "never"]


@dataclass(frozen=True)
class Timing:
    """Latency of a whole model in microseconds, without profiling.

    `foreign_load` is the share of our cores' time that other programs took while we measured; None where the system
    does not tell. `cpu_us` is the median processor time of a run, for one thread only.
    """

    median_us: float
    p10_us: float
    p90_us: float
    runs: int
    foreign_load: float | None
    cpu_us: float | None = None

    @property
    def busy(self) -> bool:
        """Whether other programs disturbed the measurement."""
        return (self.foreign_load or 0.0) > MAX_FOREIGN

    @property
    def quiet_us(self) -> float:
        """Latency as far as it can be told: the median, or on a busy machine the processor time if that is less."""
        return min(self.median_us, self.cpu_us) if self.busy and self.cpu_us else self.median_us


@dataclass(frozen=True)
class KernelTime:
    """One kernel of the runtime, as it ran inside a model.

    Attributes:
        name: The runtime's name for it.
        op: Its operation.
        weight: Name of the layer's weight if the kernel is a layer of the model, else "".
        feeds: Weights of the nearest layers before it: the kernel's cost follows their widths.
        median_us: Median over runs; likewise `p10_us`, `p90_us`.
        runs: How many runs were counted.
    """

    name: str
    op: str
    weight: str
    feeds: tuple[str, ...]
    median_us: float
    p10_us: float
    p90_us: float
    runs: int

    def times(self, factor: float) -> "KernelTime":
        """Return the kernel with all times multiplied."""
        return replace(self, median_us=factor * self.median_us, p10_us=factor * self.p10_us, p90_us=factor * self.p90_us)


@dataclass(frozen=True)
class Profile:
    """Kernel times of one model, in the order of execution.

    `ratio` is given where profiling slows the model down as a whole, so that the backend scaled the kernels to the model's
    plain latency: their sum over it before that.
    """

    kernels: tuple[KernelTime, ...]
    foreign_load: float | None = None
    ratio: float | None = None

    @property
    def sum_us(self) -> float:
        """Sum of the medians."""
        return sum(kernel.median_us for kernel in self.kernels)


class Backend(Protocol):
    """A runtime. Pure: no process, no socket.

    Attributes:
        name: As a target file calls it.
        suffix: Of the built file.
        source: What it compiles: the files that its jobs are given, but for built ones.
        pricing: Where a latency table comes from: `kernels` timed alone by ONNX models of a few hundred bytes, and inside
            whole ones; times of whole `models`, to which layers are fitted; or `never`, if nothing can be run.
        times_layers: Whether it can be asked for a profile.
        tolerance: The most by which an output may differ, as a share of the largest one.
        two_four: Whether it has kernels that make use of 2:4 weights, and is told to look for them in every job.
        computes: Whether its jobs hand out what models compute; else outputs are compared on this machine only.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    source: ClassVar[Source]
    pricing: ClassVar[Pricing]
    times_layers: ClassVar[bool]
    tolerance: ClassVar[float]
    two_four: ClassVar[bool]
    computes: ClassVar[bool]

    def available(self) -> tuple[bool, str]:
        """Return whether this machine can prepare jobs for it, and else what is missing."""
        ...

    def describe_job(self, target: Target) -> Job:
        """Ask for versions and device facts."""
        ...

    def read_description(self, result: JobResult) -> Facts:
        """Read the answer of `describe_job`."""
        ...

    def stated(self, model: Path, target: Target) -> bytes:
        """Return `model` as the runtime is given it, with the target's precision written into it if need be."""
        ...

    def owner_job(self, models: Mapping[str, Path], target: Target) -> Job:
        """Ask for everything at once, where a person carries files that `stated` made to the device and the answer back.

        Raises:
            TargetError: The backend has no such job.
        """
        ...

    def by_hand(self, models: Mapping[str, str], target: Target) -> str:
        """Return in Markdown how to measure files (name -> file) without the job of `owner_job`; "" if there is no such way."""
        ...

    def channel_multiple(self, facts: Facts) -> int:
        """Return what widths worth choosing from are multiples of, by the facts of the device; asked if pricing is `models`."""
        ...

    def build_job(self, model: Path, target: Target) -> Job:
        """Compile `model`; the built file is pulled as `artifact` + suffix."""
        ...

    def verdict(self, built: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what the user should know about a built file, in sentences, from what the script found out about it."""
        ...

    def read_build(self, result: JobResult) -> tuple[str, ...]:
        """Return what the user should know about the built file, in sentences; UNVERIFIED at the start makes a warning."""
        ...

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time whole models, or built artefacts, interleaved so that drift meets all alike."""
        ...

    def read_bench(self, result: JobResult) -> dict[str, Timing]:
        """Read the answer of `bench_job`."""
        ...

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time the kernels of several models, interleaved."""
        ...

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Read the answer of `profile_job`; `models` are the same."""
        ...

    def run_job(self, model: Path, inputs: Arrays, target: Target) -> Job:
        """Run a model, or a built artefact, on several inputs (input name -> array whose first axis counts them)."""
        ...

    def read_run(self, result: JobResult) -> Arrays:
        """Read the outputs, stacked likewise, in the model's order."""
        ...
