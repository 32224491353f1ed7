"""How a long stage tells its caller where it is; the library itself never prints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Receives the course of a pipeline; passed in, never global."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; `total` steps are expected if known."""
        ...

    def advance(self, done: int, note: str = "") -> None:
        """`done` steps of the current stage are finished."""
        ...

    def reused(self, name: str) -> None:
        """A stage's stored result is used."""
        ...

    def note(self, text: str) -> None:
        """Something the user should read."""
        ...


class Silent:
    """A reporter for library use: says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignore it."""

    def advance(self, done: int, note: str = "") -> None:
        """Ignore it."""

    def reused(self, name: str) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class Recorder(Silent):
    """A reporter for tests: remembers which stages ran and which were reused."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.was_reused: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        """Remember the stage."""
        self.ran.append(name)

    def reused(self, name: str) -> None:
        """Remember the stage as reused."""
        self.was_reused.append(name)

    def note(self, text: str) -> None:
        """Remember the note."""
        self.notes.append(text)


@contextmanager
def counted(reporter: Reporter, name: str, total: int) -> Iterator[Reporter]:
    """Open a stage of `total` steps and close it at the full count."""
    reporter.stage(name, total)
    yield reporter
    reporter.advance(total)
