"""Whether a target's device can be used, step by step: what `deploypipe doctor --target` shows."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploypipe.backends import load_backend
from deploypipe.backends.base import Backend, Facts, Source
from deploypipe.device import at_home, require_arch
from deploypipe.errors import BackendError, DeployPipeError
from deploypipe.job import PYTHON
from deploypipe.profiler.probe import IDLE_OPS, chain
from deploypipe.runners import load_runner
from deploypipe.runners.base import Runner
from deploypipe.runners.describe import Machine
from deploypipe.targets import Target

COLUMNS = ("step", "state", "what was found", "how to fix it")
OK, FAILED, WARNING, SKIPPED = "ok", "failed", "note", "not tried"
_LITTLE_SPACE = 200 * 2**20
_OLDEST_PYTHON = (3, 8)
_HOT_C = 80.0
_STEADY = ("performance", "")  # governors under which the clock does not follow the load; "" where there is none to see


@dataclass(frozen=True)
class Step:
    """One step: its state is "ok", "failed", "note" (usable, but measurements may suffer) or "not tried"."""

    name: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Checkup:
    """What was found on a device; usable if no step failed."""

    target: str
    place: str
    steps: tuple[Step, ...]
    machine: Machine | None = None
    runtime: Facts | None = None

    @property
    def usable(self) -> bool:
        """Whether builds and measurements work there."""
        return all(step.state not in {FAILED, SKIPPED} for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "usable": self.usable}


def examine(target: Target) -> Checkup:
    """Look at a target's device; a step that cannot be taken because of an earlier one is listed all the same.

    Raises:
        TargetError: The target names no backend or runner that there is.
    """
    target = at_home(target)
    backend, runner = load_backend(target), load_runner(target)
    found = _Examination(target, backend, runner)
    try:
        return Checkup(target.name, runner.place, tuple(found.steps()), found.machine, found.runtime)
    finally:
        runner.close()


def rows(found: Checkup) -> list[tuple[str, str, str, str]]:
    """Return a row for each step, under COLUMNS."""
    return [(step.name, step.state, step.found, step.fix) for step in found.steps]


def verdict(found: Checkup) -> list[tuple[str, str]]:
    """Return what it comes to."""
    if not found.usable:
        failed = next(step for step in found.steps if step.state == FAILED)
        return [("result", f"not usable yet: {failed.name}"), ("next", failed.fix)]
    notes = sum(step.state == WARNING for step in found.steps)
    return [("result", "usable" + (f", with {notes} note{'s' * (notes != 1)} on how to measure well" if notes else ""))]


def _smallest(source: Source, folder: Path) -> Path:
    """Write a model of four operations in the form that a backend compiles."""
    if source == "program":
        import torch  # noqa: PLC0415 - takes seconds, and most devices are looked at without it
        from torch import nn  # noqa: PLC0415

        from deploypipe.export import export_program  # noqa: PLC0415

        return export_program(nn.Sequential(*(nn.ReLU() for _ in range(4))), torch.zeros(1, 8), folder / "smallest.pt2")
    model = folder / "smallest.onnx"
    model.write_bytes(chain(4, IDLE_OPS[0]))
    return model


class _Examination:
    """The steps in order; each is a method that returns what it found, or raises what is wrong."""

    machine: Machine | None = None
    runtime: Facts | None = None

    def __init__(self, target: Target, backend: Backend, runner: Runner) -> None:
        self.target, self.backend, self.runner = target, backend, runner

    def steps(self) -> list[Step]:
        order: dict[str, Callable[[], str]] = {
            "reachable": self._reach,
            "processor": self._processor,
            "space": self._space,
            "python": self._python,
            f"runtime {self.backend.name}": self._runtime,
            "measures": self._measure,
        }
        found: list[Step] = []
        for name, look in order.items():
            if any(step.state == FAILED for step in found):
                found.append(Step(name, SKIPPED, ""))
                continue
            try:
                found.append(Step(name, OK, look()))
            except DeployPipeError as error:
                found.append(Step(name, FAILED, error.message, error.fix))
        return [*found, *self._notes()]

    def _reach(self) -> str:
        self.machine = self.runner.describe()
        machine = self.machine
        return ", ".join(part for part in (machine.model or machine.soc, machine.os, machine.kernel) if part) or "answers"

    @property
    def _known(self) -> Machine:
        assert self.machine is not None
        return self.machine

    def _processor(self) -> str:
        if self.backend.pricing == "never":
            return f"{self._known.arch}, which converts for {self.target.device.arch}"
        require_arch(self.target, self._known.arch)
        return f"{self._known.arch}, {self._known.cpu or 'no name'}, {self._known.cores or '?'} cores"

    def _space(self) -> str:
        free = self._known.free_bytes
        if free is not None and free < _LITTLE_SPACE:
            fix = "free some, or set [reach] workdir in the target file to a folder on a larger disk"
            raise BackendError(f"only {free / 2**20:.0f} MiB are free for the jobs' folders", fix=fix)
        return "unknown" if free is None else f"{free / 2**30:.1f} GiB free"

    def _python(self) -> str:
        if self.backend.describe_job(self.target).argv[0] != PYTHON:
            return "not needed"
        if self._known.python is None:
            fix = "install it there (Debian, Ubuntu: sudo apt install python3), or name another in [reach] python"
            raise BackendError("there is no Python", fix=fix)
        version, path = self._known.python
        if tuple(map(int, version.split(".")[:2])) < _OLDEST_PYTHON:
            fix = "install Python 3.8 or newer there, and name it in [reach] python"
            raise BackendError(f"Python {version} is too old ({path})", fix=fix)
        return f"{version}, {path}"

    def _runtime(self) -> str:
        with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
            self.runtime = self.backend.read_description(self.runner.run(self.backend.describe_job(self.target), Path(folder)))
        return f"{self.runtime.get('runtime', self.backend.name)} {self.runtime.get('version', '')}".strip()

    def _measure(self) -> str:
        """Time the smallest model there is."""
        if self.backend.pricing == "never":
            return "nothing: what is built for this target cannot be run here"
        target = self.target.replace(runs=6, warmup=1)
        with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
            model = _smallest(self.backend.source, Path(folder))
            result = self.runner.run(self.backend.bench_job({"smallest": model}, target), Path(folder))
            return f"a model of four operations takes {self.backend.read_bench(result)['smallest'].median_us:.1f} us"

    def _notes(self) -> list[Step]:
        """Say what will make measurements unsteady."""
        if self.machine is None:
            return []
        notes, machine = [], self.machine
        if any(governor not in _STEADY for governor in machine.governor.split(",")):
            fix = "sudo sh -c 'echo performance | tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor'"
            notes.append(Step("clock", WARNING, f"the governor is {machine.governor}: the clock follows the load", fix))
        if machine.power_mode:
            fix = "choose the one of production (sudo nvpmodel -m N), then lock the clocks: sudo jetson_clocks"
            notes.append(Step("power", WARNING, f"power mode {machine.power_mode}", fix))
        if machine.temperature_c is not None and machine.temperature_c > _HOT_C:
            notes.append(Step("heat", WARNING, f"{machine.temperature_c:.0f} degrees Celsius", "let it cool, or add a fan"))
        return notes
