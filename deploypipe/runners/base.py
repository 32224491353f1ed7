"""What a runner is: it carries a job out somewhere and knows nothing of runtimes."""

from pathlib import Path
from typing import ClassVar, Protocol

from deploypipe.job import Job, JobResult
from deploypipe.runners.describe import Machine


class Runner(Protocol):
    """Pushes files, starts a program, pulls files. Built from a target's `Reach`; reaches for the device when it has to.

    Attributes:
        here: Whether the target is this machine.
        place: The device in words, for errors and reports.
    """

    here: ClassVar[bool]
    place: str

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`.

        Raises:
            TargetError: The target does not say which device.
            BackendError: The device cannot be reached; the program is missing, failed, took too long, or left a file out.
        """
        ...

    def describe(self) -> Machine:
        """Say what the device is and how it is set just now.

        Raises:
            TargetError, BackendError: As of `run`.
        """
        ...

    def close(self) -> None:
        """Leave the device; a later job reaches for it again."""
        ...
