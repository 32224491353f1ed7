"""How far predictions have been off, by target, and whether they get worse: the ledger's rows summed up."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from deploypipe.errors import UsageError, nearest
from deploypipe.reports import ledger
from deploypipe.reports.figures import microseconds
from deploypipe.reports.ledger import Entry
from deploypipe.reports.render import Row

RECENT = 5  # runs that count as the present
LEAST_RUNS = 3  # fewer say nothing about the table: one may have met a busy machine
HIGH = 0.05  # a median error of the recent ratios that is too much, whatever it was before
WORSE, LEAST = 2.0, 0.02  # or one of more than twice what it was, and more than this
SHOWN = 10  # newest rows in the table for people
COLUMNS = ("target", "threads", "runtime", "processor", "runs", "first", "last", "ratio", "ratio, last 5", "us", "us, last 5")
NEWEST_COLUMNS = (
    *("date", "target", "model", "algorithm", "budget", "predicted", "measured", "ratio off", "us off"),
    *("foreign load", "corrections", "table", "run"),
)


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors: 0.03 = 3 % off."""

    median: float
    worst: float

    @classmethod
    def of(cls, errors: Iterable[float]) -> "Errors":
        """Sum up errors of either sign."""
        sizes = [abs(error) for error in errors]
        return cls(median(sizes), max(sizes))


@dataclass(frozen=True)
class Standing:
    """The predictions of one target, with one number of threads, one runtime version and one processor.

    Attributes:
        first: Date of the oldest run; likewise `last`.
        ratio: Of the predicted ratio of pruned to dense; `recent_ratio` over the last 5 runs.
        pruned: Of the predicted microseconds of the pruned model; likewise `recent_pruned`.
        warning: What is wrong and what to do, if predictions drift.
    """

    target: str
    threads: int
    runtime: str
    runtime_version: str
    processor: str
    n_runs: int
    first: str
    last: str
    ratio: Errors
    recent_ratio: Errors
    pruned: Errors
    recent_pruned: Errors
    warning: str


@dataclass(frozen=True)
class Overview:
    """What `deploypipe ledger` shows; the entries from old to new."""

    path: str
    standings: tuple[Standing, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with both errors of every entry."""
        errors = [{"ratio_error": entry.ratio_error, "pruned_error": entry.pruned_error} for entry in self.entries]
        rows = [asdict(entry) | error for entry, error in zip(self.entries, errors, strict=True)]
        return asdict(self) | {"schema": ledger.SCHEMA, "entries": rows}


def overview(target: str | None = None) -> Overview:
    """Read the ledger and sum it up, of one target or of all.

    Raises:
        UsageError: The ledger has no run on this target, or cannot be read.
    """
    found = ledger.read()
    known = {entry.target for entry in found.entries}
    if target is not None and known and target not in known:
        raise UsageError(f"no run on target '{target}' is in the ledger", at=str(found.path), fix=nearest(target, known))
    chosen = tuple(entry for entry in found.entries if target in (None, entry.target))
    return Overview(str(found.path), standings(chosen), chosen, found.notes)


def standings(entries: Iterable[Entry]) -> tuple[Standing, ...]:
    """Sum up entries by what decides a latency table, sorted."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        key = (entry.target, entry.threads, entry.runtime, entry.runtime_version, entry.processor, entry.source)
        groups.setdefault(key, []).append(entry)
    return tuple(_standing(groups[key]) for key in sorted(groups))


def _standing(entries: Sequence[Entry]) -> Standing:
    ratios, pruned = [entry.ratio_error for entry in entries], [entry.pruned_error for entry in entries]
    first, last = entries[0], entries[-1]
    return Standing(
        target=_target(last),
        threads=last.threads,
        runtime=last.runtime,
        runtime_version=last.runtime_version,
        processor=last.processor,
        n_runs=len(entries),
        first=first.date,
        last=last.date,
        ratio=Errors.of(ratios),
        recent_ratio=Errors.of(ratios[-RECENT:]),
        pruned=Errors.of(pruned),
        recent_pruned=Errors.of(pruned[-RECENT:]),
        warning="" if last.source else _warning(last.target, last.threads, ratios),  # of estimates, nothing is promised
    )


def _target(entry: Entry) -> str:
    """Return the target, and that the predictions are none of a measured table, if so."""
    return f"{entry.target} ({entry.source}, not measured)" if entry.source else entry.target


def _warning(target: str, threads: int, ratios: Sequence[float]) -> str:
    """Say so if the last ratios were predicted badly, or clearly worse than those before; the signs do not matter."""
    if len(ratios) < LEAST_RUNS:
        return ""
    recent, earlier = ratios[-RECENT:], ratios[:-RECENT]
    now, before = Errors.of(recent).median, Errors.of(earlier).median if earlier else None
    if before is not None and now > max(WORSE * before, LEAST):
        trend = f", {_percent(before)} before"
    elif now > HIGH:
        trend = ""
    else:
        return ""
    return (
        f"target {target}, {threads} thread{'s' * (threads != 1)}: the last {len(recent)} predicted ratios were off by "
        f"{_percent(now)} in the median{trend}; measure the table again: deploypipe profile --model MODEL --target {target} "
        f"--threads {threads} --fresh, and build into a new --out folder"
    )


def rows(found: Overview) -> tuple[Row, ...]:
    """Return one row for each standing: the columns are COLUMNS."""
    return tuple(_standing_row(standing) for standing in found.standings)


def newest_rows(found: Overview) -> tuple[Row, ...]:
    """Return the newest entries, the newest first: the columns are NEWEST_COLUMNS."""
    return tuple(_entry_row(entry) for entry in reversed(found.entries[-SHOWN:]))


def remarks(found: Overview) -> tuple[Row, ...]:
    """Return (word, sentence) pairs: what the figures are, what to worry about, where the file is."""
    warnings = [("warning", standing.warning) for standing in found.standings if standing.warning]
    meaning = "median (worst) error of predictions made before measuring; ratio is pruned / dense, us the pruned model alone"
    corrected = "runs with corrections measured again after these figures: `deploypipe report RUN` shows the last measurement"
    last = [("corrected", corrected)] if any(entry.n_corrections for entry in found.entries[-SHOWN:]) else []
    return (("errors", meaning), *last, *warnings, *(("note", note) for note in found.notes), ("ledger", found.path))


def _standing_row(s: Standing) -> Row:
    errors = (f"{_percent(e.median)} ({_percent(e.worst)})" for e in (s.ratio, s.recent_ratio, s.pruned, s.recent_pruned))
    runtime = f"{s.runtime} {s.runtime_version}".strip()
    return (s.target, str(s.threads), runtime, s.processor, str(s.n_runs), _day(s.first), _day(s.last), *errors)


def _entry_row(entry: Entry) -> Row:
    sides = ((entry.predicted_dense_us, entry.predicted_pruned_us), (entry.dense_us, entry.pruned_us))
    times = (f"{microseconds(dense)} -> {microseconds(pruned)}" for dense, pruned in sides)
    errors = (f"{100 * error:+.1f} %" for error in (entry.ratio_error, entry.pruned_error))
    load = "unknown" if entry.foreign_load is None else f"{100 * entry.foreign_load:.0f} %"
    what = (_target(entry), entry.model, entry.algorithm, entry.budget)
    return (
        _day(entry.date),
        *what,
        *times,
        *errors,
        load,
        str(entry.n_corrections),
        entry.table.rpartition("-")[2][:8],
        entry.run,
    )


def _day(date: str) -> str:
    return date[:16].replace("T", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
