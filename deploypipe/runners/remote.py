"""Jobs on a device that is not this machine: what the ways to reach one have in common.

A keeper (see `keeper.py`) has a folder on the device while we are connected; each job gets a folder in it.

All that is sent as a command line is fixed text and the folder's name. What a job brings along - program, arguments, file
names, environment - stands in a script that is pushed as a file, quoted by `shlex` and read by `sh` alone, whatever the user's
login shell is.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from shlex import quote
from typing import ClassVar, Protocol

from deploypipe.errors import BackendError, TargetError
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.runners import ending
from deploypipe.runners.describe import Machine, describe
from deploypipe.runners.elf import built_for, surely_foreign
from deploypipe.runners.keeper import MARK, tidy
from deploypipe.runners.process import Ended
from deploypipe.targets import Reach

TIDY_S = 20.0  # to end a job and remove its folder
TRANSFER_S = 3600.0  # for the files of one job; a connection that broke is noticed long before
PAUSES_S = (1.0, 4.0)  # before we try to reach again a device whose connection broke
_AGAIN = "then run the same command again: what has been measured is kept"


class Lost(Exception):
    """The connection broke; nothing is known of what ran over it."""


class Link(Protocol):
    """An open connection: a folder on the device, and the means to move files and to start programs.

    Attributes:
        folder: Absolute, and empty but for what we put there.
        arch: As `uname -m` says.
    """

    folder: str
    arch: str

    def put(self, number: str, files: Mapping[str, Path | bytes], timeout_s: float) -> Ended:
        """Make the folder of job `number`, and write files below ours, at relative paths."""
        ...

    def call(self, command: str, timeout_s: float) -> Ended:
        """Run a command line. Raises Lost; TimeoutError if it takes too long."""
        ...

    def get(self, number: str, names: Sequence[str], into: Path, timeout_s: float) -> dict[str, Path]:
        """Fetch those of the files of job `number` that are there, each complete or not at all."""
        ...

    def close(self) -> None:
        """Let the keeper tidy up, and leave."""
        ...


class Remote(ABC):
    """A device behind a link. Each way to reach one says how a link is opened."""

    here: ClassVar[bool] = False
    needs_host: ClassVar[bool] = True
    python: ClassVar[str] = "python3"

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.place = f"{reach.via} {reach.host}".strip()
        self._interpreter = reach.python or self.python
        self._link: Link | None = None
        self._numbers = count(1)

    @abstractmethod
    def connect(self) -> Link:
        """Open a link. Raises BackendError if the device cannot be reached."""

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`. If the connection breaks, it is done again, once.

        Raises:
            TargetError: The target does not say which device.
            BackendError: The device cannot be reached; the program is missing, failed, took too long, or left a file out.
        """
        argv = tuple(self._interpreter if part == PYTHON else part for part in job.argv)
        try:
            return self._once(job, argv, into)
        except Lost:
            self.close()
        # A job starts in an empty folder and nothing of it has arrived here, so it can simply be done again.
        self._reach_again(ending.where(self.place, argv))
        try:
            return self._once(job, argv, into)
        except Lost as error:
            self.close()
            fix = f"look at the device's network, power and memory; {_AGAIN}"
            raise BackendError(
                "the connection to the device broke, twice during the same job", at=ending.where(self.place, argv), fix=fix
            ) from error

    def describe(self) -> Machine:
        """Say what the device is and how it is set just now."""
        return describe(self.run)

    def close(self) -> None:
        """Leave the device; the next job connects again."""
        link, self._link = self._link, None
        if link:
            link.close()

    def _connected(self) -> Link:
        if not self.reach.host and self.needs_host:
            fix = (
                "say which: --host [user@]host[:port], or [reach] host in the target file; "
                'on the device itself, name a target with via = "local", such as cpu'
            )
            raise TargetError(f"the target is reached by {self.reach.via}, but names no device", at="reach.host", fix=fix)
        self._link = self._link or self.connect()
        return self._link

    def _reach_again(self, at: str) -> None:
        for left, pause in enumerate(PAUSES_S, start=1 - len(PAUSES_S)):
            time.sleep(pause)
            try:
                self._connected()
                return
            except BackendError as error:
                if left == 0:
                    message = f"the connection broke, and the device cannot be reached again: {error.message}"
                    raise BackendError(message, at=at, fix=f"{error.fix}; {_AGAIN}") from error

    def _once(self, job: Job, argv: tuple[str, ...], into: Path) -> JobResult:
        link, number = self._connected(), str(next(self._numbers))
        self._check(job, argv, link)
        try:
            self._put(link, number, job)
            ended = said(link.call(f"exec sh {quote(f'{link.folder}/{number}.run')}", job.timeout_s))
            self._judge(job, argv, ended)
            pulled = link.get(number, job.pull, into, TRANSFER_S)
        except TimeoutError as error:
            raise ending.timed_out(job, argv, self.place) from error
        finally:
            with contextlib.suppress(Lost, OSError):
                link.call(tidy(link.folder, number), TIDY_S)
        return ending.result(job, argv, ended, self.place, pulled)

    def _check(self, job: Job, argv: Sequence[str], link: Link) -> None:
        """Find what cannot work before anything is sent."""
        for source in job.push.values():
            if isinstance(source, Path) and not source.is_file():
                raise BackendError(f"there is no file '{source}' to run", at="local", fix="check the path, or build it again")
        for name, source in job.push.items():  # the program itself, and what it starts or loads
            built = built_for(source)
            if surely_foreign(built, link.arch):
                said = f"it was built for {built}, the device is {link.arch}"
                raise ending.not_startable(name, said, ending.where(self.place, argv))

    def _put(self, link: Link, number: str, job: Job) -> None:
        files: dict[str, Path | bytes] = {
            f"{number}.run": run_script(link.folder, number, job, self._interpreter).encode(),
            f"{number}.get": get_script(link.folder, number, job).encode(),
        }
        files |= {f"{number}/{name}": source for name, source in job.push.items()}
        ending.succeeded(("the transfer of files",), link.put(number, files, TRANSFER_S), self.place)

    def _judge(self, job: Job, argv: Sequence[str], ended: Ended) -> None:
        if job.argv[0] == PYTHON and ended.code == ending.NOT_FOUND and ending.not_there(ended):
            fix = "install Python there (Debian, Ubuntu: sudo apt install python3), or name another in [reach] python"
            raise BackendError(f"the device has no '{argv[0]}'", at=ending.where(self.place, argv), fix=fix)
        ending.succeeded(argv, ended, self.place, by_shell=True)


def run_script(folder: str, number: str, job: Job, interpreter: str) -> str:
    """Return what `sh` has to do for a job.

    Its process number is kept, so that the job can be ended with its children. It stays the program's parent: a shell knows by
    which signal a program was ended, SSH only says that there was one.
    """
    words = [home(interpreter) if part == PYTHON else quote(part) for part in job.argv]
    lines = [f"echo $$ > {quote(f'{folder}/{number}.pid')}", f"cd {quote(f'{folder}/{number}')} || exit 125"]
    lines += [f"export {name}={quote(value)}" for name, value in job.env.items()]
    return "\n".join([*lines, f"echo '{MARK}'; echo '{MARK}' >&2", " ".join(words), "exit $?"]) + "\n"


def get_script(folder: str, number: str, job: Job) -> str:
    """Return what `sh` has to do to write the pulled files as an archive; of those that are there."""
    names = " ".join(quote(f"./{name}") for name in job.pull)
    return (
        f"cd {quote(f'{folder}/{number}')} || exit 125\n"
        f'for f in {names}; do [ -f "$f" ] || continue; set -- "$@" "$f"; done\n'
        f"echo '{MARK}'\n"
        '[ $# -eq 0 ] || exec tar -c -f - "$@"\n'
    )


def home(path: str) -> str:
    """Quote a path for `sh`; `~/` at its beginning is the home folder on the device."""
    return f'"$HOME"/{quote(path[2:])}' if path.startswith("~/") else quote(path)


def said(ended: Ended) -> Ended:
    """Leave out what a login shell said before the program began."""
    return Ended(ended.code, _after_mark(ended.stdout), _after_mark(ended.stderr), ended.seconds)


def _after_mark(text: str) -> str:
    before, mark, after = text.partition(MARK + "\n")
    return after if mark else before
