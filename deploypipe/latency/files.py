"""The files of a latency table: typed CSV columns for kernels, JSON for the device and for each profiled model."""

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from deploypipe.errors import TargetError
from deploypipe.latency.context import Context, Overhead, Price
from deploypipe.latency.widths import AllSteps, Steps, title
from deploypipe.types import Layer

SCHEMA = 5
_MEASURE = "measure it again: deploypipe profile --model MODEL --target TARGET"


@dataclass(frozen=True, order=True)
class Shape:
    """What decides a kernel's time besides its two widths.

    Attributes:
        per_group: Channels (in, out) of each group of a grouped convolution, whose widths are tied; (0, 0) if there is only
            one group.
        rows: For linear layers, the number of rows that the weight is applied to, batch included; 0 for convolutions.
    """

    kind: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    per_group: tuple[int, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    batch: int
    rows: int

    @classmethod
    def of(cls, layer: Layer) -> "Shape":
        """Return the shape of a layer."""
        flat = not layer.in_size
        per_group = (0, 0)
        if layer.groups > 1:
            dense_in, dense_out = _channels(layer)
            per_group = (dense_in, dense_out)
        return cls(
            layer.kind, layer.kernel, layer.stride, layer.padding, layer.dilation, per_group, layer.in_size, layer.out_size,
            0 if flat else layer.batch, layer.positions if flat else 0,
        )  # fmt: skip

    @property
    def tied(self) -> bool:
        """Whether one width decides the other."""
        return self.per_group != (0, 0)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution: of those with groups, only the sizes tell."""
        if self.kind not in ("depthwise", "grouped"):
            return self.kind == "transposed"
        n = len(self.kernel)
        both = self.padding if len(self.padding) == 2 * n else 2 * self.padding  # in front, then behind
        axes = zip(self.in_size, both[:n], both[n:], self.dilation, self.kernel, self.stride, strict=True)
        return self.out_size != tuple((size + a + b - gap * (taps - 1) - 1) // step + 1 for size, a, b, gap, taps, step in axes)

    @property
    def title(self) -> str:
        """The shape in words."""
        return title(self.kind, self.kernel, self.stride, self.in_size, self.rows)


Sparsity = Literal["dense", "2:4"]
SPARSITIES: tuple[Sparsity, ...] = ("dense", "2:4")


@dataclass(frozen=True)
class Entry:
    """The measured time of one kernel at two widths, without what profiling adds.

    `sparsity` says whether its weight was dense or held the 2:4 pattern, with a runtime that was allowed to make use of that.
    """

    shape: Shape
    n_in: int
    n_out: int
    median_us: float
    p10_us: float
    p90_us: float
    runs: int
    sparsity: Sparsity = "dense"

    @property
    def key(self) -> tuple[int, int]:
        """The widths that tell entries of one shape and sparsity apart."""
        return (0 if self.shape.tied else self.n_in, self.n_out)

    @property
    def place(self) -> tuple[Shape, tuple[int, int], Sparsity]:
        """What tells entries of a table apart."""
        return (self.shape, self.key, self.sparsity)


def hashed(state: Any) -> str:
    """Return a short key of plain values."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def write_table(
    folder: Path, facts: Mapping[str, Any], steps: AllSteps, kernels: Iterable[Entry], contexts: Iterable[Context]
) -> None:
    """Write a whole table; each file appears complete or not at all."""
    write_device(folder, facts, steps)
    write_kernels(folder, kernels)
    for context in contexts:
        write_context(folder, context)


def write_device(folder: Path, facts: Mapping[str, Any], steps: AllSteps) -> None:
    """Write `device.json`."""
    learned = {kind: asdict(item) for kind, item in steps.items()}
    write_file(folder / "device.json", json.dumps({"schema": SCHEMA, "facts": dict(facts), "steps": learned}, indent=1) + "\n")


def write_kernels(folder: Path, kernels: Iterable[Entry]) -> None:
    """Write `kernels.csv`, sorted, one row per shape, pair of widths and sparsity.

    The column `sparsity` is there if any kernel was measured with 2:4 weights: a table of dense kernels has the same file, and
    the same `identity`, as before that column existed.
    """
    write_file(folder / "kernels.csv", "\n".join(_lines(kernels)) + "\n")


def add_kernels(folder: Path, kernels: Iterable[Entry]) -> None:
    """Add to `kernels.csv`, or replace there, while other processes may do the same.

    Raises:
        TargetError: A row that is there is malformed.
    """
    with _locked(folder):
        stored = {entry.place: entry for entry in (*read_kernels(folder), *kernels)}
        write_kernels(folder, stored.values())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:  # stays: to remove it would let two processes hold two files of one name
        with suppress(OSError):  # without locks, rows of another process may be lost: they are measured again
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def identity(facts: Mapping[str, Any], steps: AllSteps, kernels: Iterable[Entry], contexts: Iterable[Context]) -> str:
    """Return a short key of all that a table predicts from, as its files hold it: the same before and after saving."""
    learned = {kind: asdict(item) for kind, item in steps.items()}
    models = {context.structure: _state(context) for context in contexts}
    state = {"facts": dict(facts), "steps": learned, "kernels": _lines(kernels)[1:], "models": models}
    return hashed(json.loads(json.dumps(state, sort_keys=True)))


def write_context(folder: Path, context: Context) -> None:
    """Write `models/<structure>.json`."""
    state = {"schema": SCHEMA, **_state(context)}
    write_file(folder / "models" / f"{context.structure}.json", json.dumps(state, indent=1) + "\n")


def read_table(folder: Path) -> tuple[dict[str, Any], dict[str, Steps], tuple[Entry, ...], tuple[Context, ...]]:
    """Read facts, steps, kernels and contexts.

    Raises:
        TargetError: A file is missing, damaged, or of another schema.
    """
    state = _read(folder / "device.json")
    try:
        steps = {kind: Steps(**{**item, "small": tuple(item["small"])}) for kind, item in state["steps"].items()}
        facts = dict(state["facts"])
        contexts = tuple(_context(_read(path)) for path in sorted((folder / "models").glob("*.json")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TargetError(f"latency table is malformed: {error!r}", at=str(folder), fix=_MEASURE) from error
    return facts, steps, read_kernels(folder), contexts


def read_kernels(folder: Path) -> tuple[Entry, ...]:
    """Read `kernels.csv`; empty if there is none.

    Raises:
        TargetError: A row is malformed.
    """
    path = folder / "kernels.csv"
    if not path.is_file():
        return ()
    try:
        rows = list(csv.reader(path.read_text().splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise TargetError(f"latency table is damaged: {error}", at=str(path), fix=_MEASURE) from error
    sparse = bool(rows) and rows[0] == _columns(True)
    if not rows or rows[0] != _columns(sparse):
        raise TargetError("latency table has other columns than this version reads", at=str(path), fix=_MEASURE)
    entries = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            entries.append(_entry(row if sparse else [*row, "dense"]))
        except (ValueError, IndexError) as error:
            raise TargetError(f"latency table is malformed: {error}", at=f"{path}:{number}", fix=_MEASURE) from error
    return tuple(entries)


def _lines(kernels: Iterable[Entry]) -> list[str]:
    """Return the columns and the rows of `kernels.csv`."""
    ordered = sorted(kernels, key=lambda entry: (entry.shape, entry.n_in, entry.n_out, SPARSITIES.index(entry.sparsity)))
    sparse = any(entry.sparsity != "dense" for entry in ordered)
    lines = [",".join(_columns(sparse))]
    for entry in ordered:
        shape = [_packed(value) for value in vars(entry.shape).values()]
        times = [f"{value:.3f}" for value in (entry.median_us, entry.p10_us, entry.p90_us)]
        cells = [*shape, str(entry.n_in), str(entry.n_out), *times, str(entry.runs), *[entry.sparsity] * sparse]
        lines.append(",".join(cells))
    return lines


def _state(context: Context) -> dict[str, Any]:
    prices = {layer: vars(price) for layer, price in context.prices.items()}
    state = {**vars(context), "prices": prices, "overhead": [vars(kernel) for kernel in context.overhead]}
    return {name: value for name, value in state.items() if name != "held" or value}


def _columns(sparse: bool) -> list[str]:
    own = [item.name for item in fields(Entry) if item.name != "shape" and (sparse or item.name != "sparsity")]
    return [item.name for item in fields(Shape)] + own


def _entry(row: list[str]) -> Entry:
    kernel, stride, padding, dilation, per_group, in_size, out_size = (_unpacked(text) for text in row[1:8])
    shape = Shape(row[0], kernel, stride, padding, dilation, per_group, in_size, out_size, int(row[8]), int(row[9]))
    n_in, n_out, median, p10, p90, runs, sparsity = row[10:]
    if sparsity not in SPARSITIES:
        raise ValueError(f"sparsity is '{sparsity}', not one of {', '.join(SPARSITIES)}")
    times = (float(median), float(p10), float(p90))
    entry = Entry(shape, int(n_in), int(n_out), *times, int(runs), sparsity)
    if not (0 < entry.median_us < float("inf")):
        raise ValueError(f"latency is {entry.median_us}")
    return entry


def _context(state: dict[str, Any]) -> Context:
    state = {name: value for name, value in state.items() if name != "schema"}
    prices = {layer: Price(**price) for layer, price in state["prices"].items()}
    overhead = tuple(Overhead(**{**kernel, "layers": tuple(kernel["layers"])}) for kernel in state["overhead"])
    tuples = {"errors": tuple(state["errors"]), "held": tuple(state.get("held", ()))}
    return Context(**{**state, **tuples, "overhead": overhead, "prices": MappingProxyType(prices)})


def _channels(layer: Layer) -> tuple[int, int]:
    """Return the channels per group; the unit of a grouped convolution is a whole group, so they never change."""
    return _dense(layer.n_in, layer), _dense(layer.n_out, layer)


def _dense(width: Any, layer: Layer) -> int:
    if not width.parts:
        return int(width.const) // layer.groups
    per_unit, groups = sum(slots for _, slots in width.parts), sum(slots for _, slots in layer.n_groups.parts)
    return int(per_unit // groups) if groups else int(per_unit)


def _packed(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unpacked(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("x")) if text else ()


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
    except OSError as error:
        raise TargetError(f"cannot read latency table: {error.strerror}", at=str(path), fix=_MEASURE) from error
    except ValueError as error:
        raise TargetError(f"latency table is damaged: {error}", at=str(path), fix=_MEASURE) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else None
        raise TargetError(f"latency table has schema {found!r}, this version reads {SCHEMA}", at=str(path), fix=_MEASURE)
    return state


def write_file(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, whatever other processes write at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
