"""What a runner is: it carries a job out somewhere and knows nothing of runtimes."""

from pathlib import Path
from typing import Protocol

from deploypipe.job import Job, JobResult


class Runner(Protocol):
    """Pushes files, starts a program, pulls files. Built from a target's `Reach`."""

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`.

        Raises:
            BackendError: The program is missing, failed, took too long, or left a pulled file out.
        """
        ...
