"""What a runner is: it carries a job out somewhere and knows nothing of runtimes."""

from pathlib import Path
from typing import ClassVar, Protocol

from deploypipe.job import Job, JobResult


class Runner(Protocol):
    """Pushes files, starts a program, pulls files. Built from a target's `Reach`; reaches for the device when it has to.

    Attributes:
        here: Whether the target is this machine.
    """

    here: ClassVar[bool]

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`.

        Raises:
            TargetError: The target does not say which device.
            BackendError: The device cannot be reached; the program is missing, failed, took too long, or left a file out.
        """
        ...
