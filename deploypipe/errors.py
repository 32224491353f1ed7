"""Every failure a user can cause or meet, with its exit code.

    DeployPipeError
    |-- UsageError        2   an argument, a file or a folder given by the user
    |-- ModelError        3   the model, its weights, or its channel graph
    |-- TargetError       4   a target file or a latency profile
    |-- BackendError      5   a runtime is missing, or failed to build or to run
    `-- BudgetError       6   a budget or an accuracy floor that cannot be reached

Exit code 1 is a bug in deploypipe, 130 an interruption by the user, 143 one by the system (SIGTERM).
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class DeployPipeError(Exception):
    """What happened, where, and how to fix it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, at: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message, self.at, self.fix = message, at, fix

    def __str__(self) -> str:
        lines = [f"error: {self.message}"]
        if self.at:
            lines.append(f"   at: {self.at}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(DeployPipeError):
    """An argument, a file or a folder that the user named cannot be used."""

    exit_code = 2


class ModelError(DeployPipeError):
    """The model, its weights or its channel graph cannot be used."""

    exit_code = 3


class TargetError(DeployPipeError):
    """A target file or a latency profile is missing, broken or stale."""

    exit_code = 4


class BackendError(DeployPipeError):
    """A runtime is missing, or failed to build, to verify or to run."""

    exit_code = 5


class BudgetError(DeployPipeError):
    """The budget or the accuracy floor cannot be reached."""

    exit_code = 6


class NotApplicable(Exception):
    """An algorithm cannot judge a group; the group stays whole and the reason is reported."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" sentence for `name`, with the known names if none is close.

    >>> nearest("thinnet", ["l1", "thinet"])
    "did you mean 'thinet'? (known: l1, thinet)"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    listing = ", ".join(names)
    return f"did you mean '{close[0]}'? (known: {listing})" if close else f"known: {listing}"
