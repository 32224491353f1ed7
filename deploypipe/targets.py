"""Read `targets/*.toml`: the facts of what we deploy to, checked key by key."""

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from platformdirs import user_cache_dir, user_data_dir

from deploypipe.errors import TargetError, nearest

NOT_RUN = "not run on hardware"
_PACKAGE = Path(__file__).parent
_MOST_THREADS = 1024  # a runtime starts as many as it is told, and each takes memory
ALLOW_NOISE = "DEPLOYPIPE_ALLOW_NOISE"  # environment variable


@dataclass(frozen=True)
class Device:
    """What the hardware is: instruction set ("native" = that of the machine itself) and accelerator."""

    arch: str = "native"
    accelerator: str = "none"


@dataclass(frozen=True)
class Reach:
    """How to get there.

    Attributes:
        via: Name of a runner.
        host: Of the device, as the runner understands it; "" if the user has to say it.
        workdir: Folder on the device in which the jobs' folders are made, if not the usual one for temporary files.
        python: Interpreter on the device, if not the runner's usual one; `~/` is the home folder there.
    """

    via: str = "local"
    host: str = ""
    workdir: str = ""
    python: str = ""


@dataclass(frozen=True)
class BuildSpec:
    """What compiles the model, at which precision, from which ONNX operator set.

    `tool` is the runtime's program on the device, where the runtime is one and does not lie on PATH; `binary` a benchmark
    program of the runtime's on this machine, built for the device, which is pushed there.
    """

    backend: str
    precision: str = "fp32"
    opset: int = 20
    simplify: bool = True
    tool: str = ""
    binary: str = ""


@dataclass(frozen=True)
class MeasureSpec:
    """How latency is measured: untimed runs, timed runs, threads of the runtime.

    `batch` may be stated as 1 and is nothing to set: the model's example inputs decide how many images a run takes.

    A run of a model faster than `least_us` is as many as fit in: a short disturbance then weighs no more than for a slow one.
    """

    warmup: int = 10
    runs: int = 100
    threads: int = 1
    batch: int = 1
    least_us: float = 1500.0

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("runs", 1), ("threads", 1), ("least_us", 0)):
            _require_range("measure", name, getattr(self, name), least, _MOST_THREADS if name == "threads" else math.inf)
        if self.batch != 1:
            fix = "leave it out: the batch size that is built and measured is that of the model's example inputs"
            raise TargetError(f"batch is {self.batch}, and a target does not decide it", at="measure.batch", fix=fix)


@dataclass(frozen=True)
class Rates:
    """What an estimate computes with where no device is at hand; beside each figure stands the document that it comes from.

    Attributes:
        precision: That the figures hold for.
        tflops: Dense arithmetic, in 10^12 operations a second; a multiply-add is two.
        bandwidth_gb_s: Of the memory, in 10^9 bytes a second.
        quantum: Channels are computed in whole multiples of this.
        launch_us: What each kernel costs besides its work.
        sparse: Rate of arithmetic with 2:4 weights over the dense rate; 1 where there is no such unit.
    """

    precision: str = ""
    tflops: float = 0.0
    tflops_source: str = ""
    bandwidth_gb_s: float = 0.0
    bandwidth_source: str = ""
    quantum: int = 1
    quantum_source: str = ""
    launch_us: float = 0.0
    launch_source: str = ""
    sparse: float = 1.0
    sparse_source: str = ""

    def __post_init__(self) -> None:
        for name, least in (("tflops", 0), ("bandwidth_gb_s", 0), ("quantum", 1), ("launch_us", 0), ("sparse", 1)):
            _require_range("rates", name, getattr(self, name), least)

    @property
    def known(self) -> bool:
        """Whether there is anything to compute with."""
        return self.tflops > 0 and self.bandwidth_gb_s > 0


def _require_range(section: str, name: str, value: float, least: float, most: float = math.inf) -> None:
    if not (least <= value <= most and math.isfinite(value)):
        fix = f"use {least} or more" if most == math.inf else f"use {least} to {most}"
        raise TargetError(f"{name} is {value}", at=f"{section}.{name}", fix=fix)


@dataclass(frozen=True)
class Target:
    """What a model is deployed to. Facts only; `path` is the file they were read from.

    Attributes:
        like: Another target, whose facts hold here too where this one's file is silent, key by key within each table.
        note: What the user should know before choosing it.
        run_on_hardware: Whether anything has ever been built and measured there with this program.
        rates: For an estimate where no device is at hand.
    """

    name: str
    build: BuildSpec
    title: str = ""
    like: str = ""
    note: str = ""
    run_on_hardware: bool = True
    device: Device = field(default_factory=Device)
    reach: Reach = field(default_factory=Reach)
    measure: MeasureSpec = field(default_factory=MeasureSpec)
    rates: Rates = field(default_factory=Rates)
    path: str = field(default="", metadata={"file": False})

    def __post_init__(self) -> None:
        if self.reach.host and not self.away:
            message = f"host is '{self.reach.host}', and via '{self.reach.via}' is this machine"
            raise TargetError(message, at="reach.host", fix='write via = "ssh" or "adb" beside it, or leave the host out')

    @property
    def shown(self) -> str:
        """The name, with the device if it is not this machine."""
        return f"{self.name} at {self.reach.host}" if self.reach.host else self.name

    @property
    def away(self) -> bool:
        """Whether it is reached over a connection, by what the file says."""
        return self.reach.via != Reach.via

    def reached_at(self, host: str) -> "Target":
        """Return a copy for another device of this kind; a target on this machine becomes one that SSH reaches."""
        return self.replace(host=host, via=self.reach.via if self.away else "ssh")

    def replace(self, **changes: Any) -> "Target":
        """Return a copy with some facts changed, wherever in the tree they stand: `target.replace(threads=2)`.

        Raises:
            TargetError: No fact has this name.
        """
        state: dict[str, Any] = {name: changes.pop(name) for name in _names(Target) if name in changes}
        for section in ("device", "reach", "build", "measure"):
            part = state.get(section, getattr(self, section))
            state[section] = dataclasses.replace(part, **{n: changes.pop(n) for n in _names(type(part)) if n in changes})
        if changes:
            known = [name for part in (Device, Reach, BuildSpec, MeasureSpec) for name in _names(part)]
            raise TargetError(f"a target has no '{next(iter(changes))}'", at=self.name, fix=nearest(next(iter(changes)), known))
        return dataclasses.replace(self, **state)


def load_target(name: str | Path) -> Target:
    """Return the target called `name`, or the one in the file `name`.

    A name is looked up in `./targets`, then among the targets that come with the package.

    Raises:
        TargetError: No such target or file, or the file is no valid target; names the key.
    """
    path = _find(str(name))
    target: Target = _read(Target, _whole(path), str(path), "")
    if target.name != path.stem:
        raise TargetError(
            f"target calls itself '{target.name}'", at=f"{path}: name", fix=f'write name = "{path.stem}" or rename the file'
        )
    return dataclasses.replace(target, path=str(path))


def _whole(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a file's facts, with those of the target that it is `like` where it is silent: in each table, key by key."""
    if path in seen:
        ring = " -> ".join(known.stem for known in (*seen, path))
        raise TargetError(f"the target is like itself: {ring}", at=f"{path}: like", fix="let one of them stand without like")
    state = _state(path)
    if not isinstance(state.get("like"), str) or not state["like"]:
        return state
    whole = _whole(_find(state["like"], path.parent), (*seen, path))
    for key, value in state.items():
        before = whole.get(key)
        whole[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return whole


def _state(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read target: {error}", at=str(path), fix="check the path and its permissions") from error
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"target is not TOML: {error}", at=str(path), fix="correct that line") from error


def list_targets() -> dict[str, Path]:
    """Return name -> file of every target that `load_target` finds by name."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _folders() -> Iterator[Path]:
    # The repository root comes last: it only exists beside the package in a checkout.
    return (folder for folder in (Path("targets"), _PACKAGE / "_data" / "targets", _PACKAGE.parent / "targets"))


def _find(name: str, beside: Path = Path()) -> Path:
    if name.endswith(".toml") or "/" in name or "\\" in name:
        place = os.path.expanduser(name)  # noqa: PTH111 - Path's own raise where there is no such user, or a name is too long
        found = [path for path in (beside / place, Path(place)) if os.path.isfile(path)]  # noqa: PTH113
        if not found:
            raise TargetError(f"there is no target file '{name}'", at=f"--target {name}", fix=nearest(name, list_targets()))
        return found[0]
    known = list_targets()
    if name not in known:
        raise TargetError(f"unknown target '{name}'", at=f"--target {name}", fix=nearest(name, known))
    return known[name]


def _names(cls: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if item.metadata.get("file", True)]


def _read(cls: Any, state: dict[str, Any], path: str, prefix: str) -> Any:
    """Build the dataclass `cls` from a TOML table; the key path of whatever does not fit goes into the error."""
    known, hints = _names(cls), get_type_hints(cls)
    values = {}
    for key, value in state.items():
        at = f"{path}: {prefix}{key}"
        if key not in known:
            raise TargetError(f"unknown key '{prefix}{key}'", at=at, fix=nearest(key, known))
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, dict):
                raise TargetError(f"'{prefix}{key}' must be a table", at=at, fix=f"write [{prefix}{key}]")
            values[key] = _read(wanted, value, path, f"{prefix}{key}.")
        elif type(value) is not wanted and not (
            wanted is float and type(value) is int
        ):  # not isinstance: TOML's true is no number
            raise TargetError(f"'{prefix}{key}' is {value!r}", at=at, fix=f"write a value of type {wanted.__name__}")
        else:
            values[key] = value
    for item in dataclasses.fields(cls):
        missing = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if missing and item.name not in values:
            raise TargetError(f"key '{prefix}{item.name}' is missing", at=path, fix=f"add {prefix}{item.name}")
    try:
        return cls(**values)
    except TargetError as error:
        raise TargetError(error.message, at=f"{path}: {error.at}", fix=error.fix) from error


def cache_folder() -> Path:
    """Return the user's cache for measurements; the environment variable DEPLOYPIPE_CACHE puts it elsewhere."""
    chosen = os.environ.get("DEPLOYPIPE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(user_cache_dir("deploypipe", appauthor=False))


def data_folder() -> Path:
    """Return the user's folder for what must outlive a cache; the environment variable DEPLOYPIPE_DATA puts it elsewhere."""
    chosen = os.environ.get("DEPLOYPIPE_DATA")
    return Path(chosen).expanduser() if chosen else Path(user_data_dir("deploypipe", appauthor=False))


def noise_accepted() -> bool:
    """Whether the user accepts measurements that other programs disturb: DEPLOYPIPE_ALLOW_NOISE is set, and not to 0."""
    return os.environ.get(ALLOW_NOISE, "0") not in ("", "0")
