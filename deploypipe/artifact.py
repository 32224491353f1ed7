"""How long an artifact takes on a target: as a whole, and kernel by kernel."""

from dataclasses import asdict, dataclass
from typing import Any

from deploypipe.backends.base import KernelTime, Profile
from deploypipe.measurement import Latency
from deploypipe.reports.figures import microseconds
from deploypipe.reports.render import Row

COLUMNS = ("", "kernel", "operation", "layer", "median", "p10", "p90", "share of sum")


@dataclass(frozen=True)
class ArtifactTimes:
    """What `deploypipe bench` found.

    Attributes:
        whole: Of the whole model, without profiling.
        profile: Its kernels in the order of execution; None if they were not asked for.
    """

    artifact: str
    target: str
    threads: int
    whole: Latency
    profile: Profile | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what was not measured is null."""
        found: dict[str, Any] = {"artifact": self.artifact, "target": self.target, "threads": self.threads}
        found |= asdict(self.whole) | dict.fromkeys(("kernels", "kernels_sum_us", "kernels_ratio", "kernels_foreign_load"))
        if self.profile is not None:
            found["kernels"] = [self._kernel(kernel, self.profile.sum_us) for kernel in self.profile.kernels]
            found |= {"kernels_sum_us": self.profile.sum_us, "kernels_ratio": self.profile.ratio}
            found["kernels_foreign_load"] = self.profile.foreign_load
        return found

    @staticmethod
    def _kernel(kernel: KernelTime, sum_us: float) -> dict[str, Any]:
        times = {"median_us": kernel.median_us, "p10_us": kernel.p10_us, "p90_us": kernel.p90_us, "n_runs": kernel.runs}
        return {"name": kernel.name, "op": kernel.op, "weight": kernel.weight, **times, "share": kernel.median_us / sum_us}


def whole_pairs(times: ArtifactTimes) -> tuple[Row, ...]:
    """Return (word, value) pairs about the whole model."""
    latency = times.whole
    load = "unknown" if latency.foreign_load is None else f"{100 * latency.foreign_load:.0f} %"
    spread = f"p10 {microseconds(latency.p10_us)}, p90 {microseconds(latency.p90_us)}, {latency.n_runs} runs"
    return (
        ("artifact", times.artifact),
        ("target", f"{times.target}, {times.threads} thread{'s' * (times.threads != 1)}"),
        ("latency", f"{microseconds(latency.median_us)} ({spread}, foreign load {load})"),
    )


def kernel_rows(profile: Profile) -> tuple[Row, ...]:
    """Return one row for each kernel, in the order of execution: the columns are COLUMNS."""
    return tuple(_kernel_row(number, kernel, profile.sum_us) for number, kernel in enumerate(profile.kernels, start=1))


def sum_pairs(times: ArtifactTimes, profile: Profile) -> tuple[Row, ...]:
    """Return (word, sentence) pairs: how far the kernels' sum is from the whole model's latency, and what a layer's name is."""
    whole, total, n = times.whole.median_us, profile.sum_us, len(profile.kernels)
    off = f"{microseconds(abs(total - whole))} {'more' if total >= whole else 'less'} than the whole model"
    each = f", {microseconds((total - whole) / n)} a kernel" if total > whole else ""
    load = "" if profile.foreign_load is None else f"; foreign load while profiling {100 * profile.foreign_load:.0f} %"
    if profile.ratio:
        each = f"; scaled: as profiled they added up to {profile.ratio:.2f} times the whole"
    return (
        ("sum", f"{microseconds(total)}, {off}{each}: profiling adds time to every kernel{load}"),
        ("layer", "the weight's name in this file; a built artifact has the runtime's names, the .onnx file the model's"),
    )


def _kernel_row(number: int, kernel: KernelTime, sum_us: float) -> Row:
    times = (microseconds(us) for us in (kernel.median_us, kernel.p10_us, kernel.p90_us))
    return (str(number), kernel.name, kernel.op, kernel.weight, *times, f"{100 * kernel.median_us / sum_us:.1f} %")
