"""The ledger: one row for every finished build whose latency was predicted and then measured, in the user's data folder.

    # deploypipe ledger, schema 1
    date,target,threads, ...
    "2026-11-24T08:00:00+00:00","cpu",1, ...

Texts stand in quotes, numbers do not, an unknown number is empty. Rows are only ever appended. A line that a dying process
left half-written stays, ends with a line break as soon as the next row comes, and is told from a row by its last column.
"""

import csv
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

from deploypipe.errors import UsageError
from deploypipe.targets import data_folder

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One prediction, made before anything was measured, beside the measurement that followed it.

    Attributes:
        date: When the row was written, ISO 8601 in UTC.
        processor: Of the device.
        budget: As the user wrote it.
        limit_us: What it allowed.
        predicted_dense_us: By the latency table as it was measured, never by one that the run corrected afterwards.
        predicted_pruned_us: Likewise, of the plan that was then built and measured.
        dense_us: Measured median; likewise the percentiles, and all of the pruned model, in turns with it.
        n_runs: Timed runs of each model.
        foreign_load: Share of our cores' time that other programs took meanwhile; None if unknown.
        n_corrections: How often the run corrected the table and planned again after this measurement.
        version: Of deploypipe.
        run: The run folder.
        table: `LatencyTable.id` of the table that predicted. Comes last: a half-written row lacks it or its closing quote.
    """

    date: str
    target: str
    threads: int
    runtime: str
    runtime_version: str
    processor: str
    model: str
    algorithm: str
    budget: str
    limit_us: float
    predicted_dense_us: float
    predicted_pruned_us: float
    dense_us: float
    dense_p10_us: float
    dense_p90_us: float
    pruned_us: float
    pruned_p10_us: float
    pruned_p90_us: float
    n_runs: int
    foreign_load: float | None
    n_corrections: int
    version: str
    run: str
    table: str

    @property
    def source(self) -> str:
        """Where the predicting table came from: "" if it was measured, else "estimated" or "calibrated"."""
        word, dash, _ = self.table.partition("-")
        return word if dash else ""

    @property
    def ratio_error(self) -> float:
        """Relative error of the predicted ratio of pruned to dense: 0.03 = predicted 3 % too high."""
        return self.predicted_pruned_us / self.predicted_dense_us / (self.pruned_us / self.dense_us) - 1

    @property
    def pruned_error(self) -> float:
        """Relative error of the predicted microseconds of the pruned model."""
        return self.predicted_pruned_us / self.pruned_us - 1


@dataclass(frozen=True)
class Ledger:
    """What was read: the file, its rows from old to new, and what could not be read."""

    path: Path
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()


_COLUMNS = [part.name for part in fields(Entry)]
_HEADER = f"# deploypipe ledger, schema {SCHEMA}\n{','.join(_COLUMNS)}\n".encode()
_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda text: float(text) if text else None,
}


def append(entry: Entry, folder: Path | None = None) -> str:
    """Append a row and return a note for the user, mostly empty. Several processes may do so at once.

    A measurement that stands in the ledger is not written twice: a report that is put together anew, after a crash or in a
    copied run folder, is no new measurement.

    Raises:
        OSError: The folder or the file cannot be written; the ledger is then as it was.
    """
    folder = folder or data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    foreign: list[Path] = []
    for path in _candidates(folder):
        with path.open("a+b", buffering=0) as file:
            with suppress(OSError):  # a file system without locks still appends one short write as a whole
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            if not _ours(content):
                foreign.append(path)
                continue
            if not any(_same(entry, old) for old in _parsed(content)[0]):
                _write(file, content, _line(entry))
            begun = foreign and not content
            return f"ledger {foreign[0]} has another schema and was left alone: {path} is begun" if begun else ""
    raise AssertionError("there is always another name")


def read(folder: Path | None = None) -> Ledger:
    """Read the ledger; without a file it is empty.

    Raises:
        UsageError: The file is there but cannot be read.
    """
    notes: list[str] = []
    for path in _candidates(folder or data_folder()):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return Ledger(path, (), tuple(notes))
        except OSError as error:
            fix = "change its permissions, or set DEPLOYPIPE_DATA to another folder"
            raise UsageError(f"cannot read the ledger: {error.strerror}", at=str(path), fix=fix) from error
        if _ours(content):
            entries, bad = _parsed(content)
            unreadable = [f"{path}: {len(bad)} unreadable line(s) left out: {', '.join(map(str, bad))}"] if bad else []
            return Ledger(path, tuple(entries), (*notes, *unreadable))
        notes.append(f"{path} has another schema than this version reads and is not shown")
    raise AssertionError("there is always another name")


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the names that the ledger may have: the next one where one is taken by a ledger of another schema."""
    yield folder / "ledger.csv"
    for number in count(1):
        yield folder / f"ledger-{SCHEMA}-{number}.csv"


def _ours(content: bytes) -> bool:
    """Say whether the file has our schema, is empty, or holds nothing but a half-written header of ours."""
    return content.startswith(_HEADER) or _HEADER.startswith(content)


def _same(new: Entry, old: Entry) -> bool:
    return replace(new, date="", run="") == replace(old, date="", run="")


def _write(file: BinaryIO, content: bytes, line: bytes) -> None:
    """Append in one write, after making good what a dead process left; the caller holds the lock."""
    before = len(content)
    if not content.startswith(_HEADER):
        before = 0
        line = _HEADER + line
    elif not content.endswith(b"\n"):
        line = b"\n" + line
    file.truncate(before)
    if file.write(line) != len(line):
        file.truncate(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    os.fsync(file.fileno())


def _line(entry: Entry) -> bytes:
    buffer = io.StringIO()
    values = [re.sub(r"[\r\n]", " ", value) if isinstance(value, str) else value for value in astuple(entry)]
    # None has no quotes of its own in this style of CSV, an empty text has: both are read by their column's type.
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerow(values)
    return buffer.getvalue().encode("utf-8", "backslashreplace")


def _parsed(content: bytes) -> tuple[list[Entry], list[int]]:
    """Return the rows, and the numbers of the lines that are none."""
    entries, bad = [], []
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[2:], start=3):
        try:
            if line:
                entries.append(_entry(line))
        except (ValueError, csv.Error):
            bad.append(number)
    return entries, bad


def _entry(line: str) -> Entry:
    """Read one row; raise ValueError or csv.Error if it is not whole."""
    (texts,) = csv.reader([line], strict=True)
    hints = get_type_hints(Entry)
    entry = Entry(**{name: _READERS[hints[name]](text) for name, text in zip(_COLUMNS, texts, strict=True)})
    times = (getattr(entry, name) for name in _COLUMNS if name.endswith("_us"))
    if not entry.table or not all(isfinite(us) and us > 0 for us in times):
        raise ValueError("no such row was ever written")
    return entry
