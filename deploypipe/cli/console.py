"""What people see: answers on stdout, problems and progress on stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO

from deploypipe.progress import Reporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_BOLD, _RED, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


def answer(text: str) -> None:
    """Write a line, or lines, of the answer. A reader that has left (`| head`) is no failure."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process


def answer_json(value: object) -> None:
    """Write the answer for machines."""
    answer(json.dumps(value, indent=1, allow_nan=False, default=str))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows under a bold heading, in columns as wide as they need to be."""
    lines = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    answer(_styled(texts[0], _BOLD, sys.stdout))
    if texts[1:]:
        answer("\n".join(texts[1:]))


def pairs(rows: Iterable[Sequence[str]]) -> None:
    """Write (word, sentence) pairs, the words in bold and in one column."""
    rows = [tuple(row) for row in rows]
    width = max((len(word) for word, _ in rows), default=0)
    for word, sentence in rows:
        answer(f"{_styled(word.ljust(width), _BOLD, sys.stdout)}  {sentence}")


def problem(text: str) -> None:
    """Write an error; its first word is red on a colour terminal."""
    word, colon, rest = text.partition(":")
    _told(sys.stderr, _styled(word + colon, _RED, sys.stderr) + rest)


def _told(out: TextIO, text: str) -> None:
    """Write what is no answer. A reader that has left (`2> >(head)`) ends nothing: the work goes on."""
    with suppress(BrokenPipeError):
        print(text, file=out, flush=True)


def unanswered() -> redirect_stdout[TextIO]:
    """While work is done, what the user's own code prints goes to stderr: stdout is for answers, which may be JSON."""
    return redirect_stdout(sys.stderr)


@contextmanager
def progress() -> Iterator[Reporter]:
    """Yield a reporter for stderr: moving bars on a terminal, plain lines in a file or in continuous integration."""
    with unanswered(), _reporter() as reporter:
        yield reporter


@contextmanager
def _reporter() -> Iterator[Reporter]:
    if not _is_terminal(sys.stderr) or os.environ.get("CI"):
        lines = Lines(sys.stderr)
        yield lines
        lines.close()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *left, console=Console(stderr=True), transient=True) as bars:
        reporter = Bars(bars)
        yield reporter
        reporter.close()


class Lines:
    """A reporter that writes a line when a stage begins, ends or has gone on for a while."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, every_s: float = 10.0) -> None:
        self._out, self._clock, self._every_s = out, clock, every_s
        self._name, self._total, self._started, self._said = "", None, 0.0, 0.0

    _total: int | None

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; the same name again only tells its length."""
        if name != self._name:
            self.close()
            self._name, self._started = name, self._clock()
            self._write(f"{name} ...")
        self._total, self._said = total, self._clock()

    def advance(self, done: int, note: str = "") -> None:
        """Tell now and then how far the stage is."""
        now = self._clock()
        if self._name and now - self._said >= self._every_s:
            self._said = now
            of = f" of {self._total}, {_left(now - self._started, done, self._total)}" if self._total else ""
            self._write(f"{self._name} {done}{of}{'  ' + note if note else ''}")

    def reused(self, name: str) -> None:
        """A stored result is used."""
        self.close()
        self._write(f"{name} reused")

    def note(self, text: str) -> None:
        """Something to read."""
        self._write(f"note: {text}")

    def close(self) -> None:
        """The last stage has ended; only one that took a while is worth a line."""
        seconds = self._clock() - self._started
        if self._name and seconds >= 1:
            self._write(f"{self._name} done in {seconds:.1f} s")
        self._name = ""

    def _write(self, text: str) -> None:
        _told(self._out, text)


class Bars:
    """A reporter on moving bars; each finished stage leaves one line."""

    def __init__(self, bars: "Progress") -> None:
        self._bars, self._task, self._name, self._started = bars, None, "", 0.0

    _task: "TaskID | None"

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; the same name again only tells its length."""
        if name == self._name and self._task is not None:
            self._bars.reset(self._task, total=total)
            return
        self.close()
        self._name, self._started = name, time.monotonic()
        self._task = self._bars.add_task(name, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, note=note)

    def reused(self, name: str) -> None:
        """A stored result is used."""
        self.close()
        self._bars.console.print(f"[dim]{name:<12} reused[/dim]", highlight=False)

    def note(self, text: str) -> None:
        """Something to read."""
        self._bars.console.print(f"note: {text}", markup=False, highlight=False)

    def close(self) -> None:
        """The last stage has ended."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.console.print(
                f"{self._name:<12} {time.monotonic() - self._started:.1f} s", markup=False, highlight=False
            )
        self._task, self._name = None, ""


def _left(elapsed_s: float, done: int, total: int) -> str:
    return f"{elapsed_s / done * (total - done):.0f} s left" if done else "time left unknown"


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def _styled(text: str, style: str, stream: TextIO) -> str:
    return f"{style}{text}{_PLAIN}" if _is_terminal(stream) and not os.environ.get("NO_COLOR") else text
