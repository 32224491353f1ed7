"""How a job ended, in words: what every runner says about the same failure."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import SIGKILL

from deploypipe.errors import BackendError
from deploypipe.job import Job, JobResult
from deploypipe.runners.process import Ended

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # a shell's exit codes
_DISK_FULL = re.compile(
    r"No space left on device|Errno 28\b|ENOSPC|Disk quota exceeded|Wrote only \d+ of \d+ bytes|short write"
)
_LIBRARY = re.compile(r"error while loading shared libraries: ([^:\s]+)")
_FIX = re.compile(r"^fix: (.+)\n?", re.MULTILINE)  # how a backend's own program says what helps
_FOREIGN = re.compile(r"Exec format error|cannot execute binary file|not executable: \d+-bit ELF|\bELF\b.*not found")


def where(place: str, argv: Iterable[str]) -> str:
    """Return the place and the program, as an error names them."""
    return f"{place}: {' '.join(argv)}"


def last_lines(text: str, count: int = 3, width: int = 400) -> str:
    """Return the end of a program's output on one line; of a Python traceback, what it ends with."""
    _, traced, trace = text.rpartition("Traceback (most recent call last):\n")
    text = re.sub(r"\A(?:[ \t].*\n)+", "", trace) if traced else text
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-width:] or "it said nothing"


def succeeded(argv: Sequence[str], ended: Ended, place: str, *, by_shell: bool = False) -> None:
    """Return if the program did what it should.

    Args:
        argv: As it was started.
        ended: How it ended.
        place: Where it ran.
        by_shell: Whether a shell started it, which has exit codes for programs that it cannot start.

    Raises:
        BackendError: It did not; says why and what helps.
    """
    if ended.code == 0:
        return
    at, said = where(place, argv), last_lines(_FIX.sub("", ended.stderr or ended.stdout))
    if _DISK_FULL.search(ended.stderr):
        raise disk_full(place, at)
    if _FOREIGN.search(ended.stderr) or (by_shell and ended.code == NOT_EXECUTABLE):
        raise not_startable(argv[0], said, at)
    library = _LIBRARY.search(ended.stderr)
    if library:
        fix = "install the package that has it, or name its folder in LD_LIBRARY_PATH"
        raise BackendError(f"'{argv[0]}' cannot start without the library {library[1]}", at=at, fix=fix)
    if by_shell and ended.code == NOT_FOUND and not_there(ended):
        raise missing(argv[0], "there is no such program on the device", at)
    signal = ended.code - 128 if by_shell and 128 < ended.code < 160 else -ended.code
    how = f"was ended by signal {signal}" if signal > 0 else f"failed with exit code {ended.code}"
    raise BackendError(f"the job {how}: {said}", at=at, fix=_advice(argv[0], ended, signal))


def not_there(ended: Ended) -> bool:
    """Return whether a shell said that there is no such program."""
    return bool(re.search(r"not found|No such file", ended.stderr))


def missing(program: str, reason: str, at: str) -> BackendError:
    """Return the error for a program that cannot be started because it is not there."""
    return BackendError(f"cannot start '{program}': {reason}", at=at, fix="install it or put it on PATH")


def not_startable(program: str, said: str, at: str) -> BackendError:
    """Return the error for a program that is there but is none for this processor."""
    fix = "use the build for the device's processor and system; `uname -m` on the device names it"
    return BackendError(f"the device cannot execute '{program}': {said}", at=at, fix=fix)


def disk_full(place: str, at: str) -> BackendError:
    """Return the error for a device without space."""
    fix = "free some space there, or set [reach] workdir in the target file to a folder on a larger disk"
    return BackendError(f"the disk is full: {place} has no space left for the job's files", at=at, fix=fix)


def timed_out(job: Job, argv: Sequence[str], place: str) -> BackendError:
    """Return the error for a program that did not end in time."""
    fix = "measure fewer runs, or a smaller model"
    return BackendError(f"the job did not end within {job.timeout_s:g} s", at=where(place, argv), fix=fix)


def result(job: Job, argv: Sequence[str], ended: Ended, place: str, pulled: dict[str, Path]) -> JobResult:
    """Return what a job left.

    Raises:
        BackendError: A file that it should have left is not there.
    """
    for file in job.pull:
        if file not in pulled:
            fix = "this is a fault of the backend's program"
            raise BackendError(f"the job left no '{file}'", at=where(place, argv), fix=fix)
    return JobResult(ended.code, ended.stdout, ended.stderr, pulled, ended.seconds)


def _advice(program: str, ended: Ended, signal: int) -> str:
    if signal == SIGKILL:
        return "the system ended it, most likely for memory: free some, or use a smaller batch"
    stated = _FIX.search(ended.stderr)
    if stated:
        return stated[1]
    package = re.search(r"No module named '([^'.]+)", ended.stderr)
    if package:
        return f"install the missing Python package for this interpreter: {program} -m pip install {package[1]}"
    return "see the message above; `deploypipe doctor` checks the runtime"
