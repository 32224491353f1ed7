"""Run a job on this machine, in a folder of its own."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.runners import ending
from deploypipe.runners.describe import Machine, describe
from deploypipe.runners.process import finish
from deploypipe.targets import Reach


class Local:
    """This machine; the job's folder is temporary."""

    here: ClassVar[bool] = True
    place = "local"

    def __init__(self, reach: Reach) -> None:
        self.workdir = os.path.expanduser(reach.workdir) or None  # noqa: PTH111 - Path's own raises where there is no such user
        self.python = os.path.expanduser(reach.python) or sys.executable  # noqa: PTH111

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`.

        Raises:
            BackendError: The program is missing, failed, took too long, or left a pulled file out.
        """
        argv = tuple(self.python if part == PYTHON else part for part in job.argv)
        with self._folder() as name:
            folder = Path(name)
            try:
                for file, source in job.push.items():
                    _push(source, folder / file)
                ended = finish(argv, job.timeout_s, cwd=folder, env=job.env)
            except TimeoutError as error:
                raise ending.timed_out(job, argv, self.place) from error
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise ending.disk_full(self.place, ending.where(self.place, argv)) from error
                raise ending.missing(argv[0], error.strerror or str(error), ending.where(self.place, argv)) from error
            ending.succeeded(argv, ended, self.place)
            return ending.result(job, argv, ended, self.place, _pull(job, folder, into))

    def _folder(self) -> "tempfile.TemporaryDirectory[str]":
        try:
            return tempfile.TemporaryDirectory(dir=self.workdir, prefix="deploypipe-")
        except OSError as error:
            at, fix = (
                f"local: {error.filename or self.workdir}",
                "set [reach] workdir in the target file to a folder that takes files",
            )
            if error.errno == errno.ENOSPC:
                raise ending.disk_full(self.place, at) from error
            raise BackendError(f"no folder for jobs can be made: {error.strerror}", at=at, fix=fix) from error

    def describe(self) -> Machine:
        """Say what this machine is and how it is set just now."""
        return describe(self.run)

    def close(self) -> None:
        """There is nothing to leave."""


def _push(source: Path | bytes, target: Path) -> None:
    if isinstance(source, bytes):
        target.write_bytes(source)
    elif source.is_file():
        target.symlink_to(source.resolve())
    else:
        raise BackendError(f"there is no file '{source}' to run", at="local", fix="check the path, or build it again")


def _pull(job: Job, folder: Path, into: Path) -> dict[str, Path]:
    into.mkdir(parents=True, exist_ok=True)
    pulled = {}
    for file in job.pull:
        if (folder / file).is_file():
            # Complete files only: an interrupted copy must not look like a result.
            temporary = into / f".{file}.tmp"
            shutil.copyfile(folder / file, temporary)
            pulled[file] = temporary.replace(into / file)
    return pulled
