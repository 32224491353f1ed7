"""Run a job on this machine, in a folder of its own."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.targets import Reach


class Local:
    """This machine; the job's folder is temporary."""

    def __init__(self, reach: Reach) -> None:
        self.workdir = reach.workdir or None

    def run(self, job: Job, into: Path) -> JobResult:
        """Carry out `job`; the pulled files lie in the folder `into`.

        Raises:
            BackendError: The program is missing, failed, took too long, or left a pulled file out.
        """
        argv = tuple(sys.executable if part == PYTHON else part for part in job.argv)
        with tempfile.TemporaryDirectory(dir=self.workdir, prefix="deploypipe-") as name:
            folder = Path(name)
            for file, source in job.push.items():
                _push(source, folder / file)
            start = time.monotonic()
            code, stdout, stderr = _start(argv, folder, job)
            seconds = time.monotonic() - start
            if code != 0:
                how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
                raise BackendError(f"the job {how}: {last_lines(stderr or stdout)}", at=_shown(job), fix=_advice(code, stderr))
            return JobResult(code, stdout, stderr, _pull(job, folder, into), seconds)


def last_lines(text: str, count: int = 3, width: int = 400) -> str:
    """Return the end of a program's output on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-width:] or "it said nothing"


def _push(source: Path | bytes, target: Path) -> None:
    if isinstance(source, bytes):
        target.write_bytes(source)
    elif source.is_file():
        target.symlink_to(source.resolve())
    else:
        raise BackendError(f"there is no file '{source}' to run", at="local", fix="check the path, or build it again")


def _start(argv: tuple[str, ...], folder: Path, job: Job) -> tuple[int, str, str]:
    env = {**os.environ, **job.env}
    try:
        # A session of its own, so that a timeout or Ctrl-C also ends what the program started.
        process = subprocess.Popen(
            argv, cwd=folder, env=env, text=True, errors="replace", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(f"cannot start '{argv[0]}': {reason}", at=_shown(job), fix="install it or put it on PATH") from error
    try:
        stdout, stderr = process.communicate(timeout=job.timeout_s)
    except subprocess.TimeoutExpired as error:
        _end(process)
        fix = "measure fewer runs, or a smaller model"
        raise BackendError(f"the job did not end within {job.timeout_s:g} s", at=_shown(job), fix=fix) from error
    except BaseException:
        _end(process)
        raise
    return process.returncode, stdout, stderr


def _end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _pull(job: Job, folder: Path, into: Path) -> dict[str, Path]:
    into.mkdir(parents=True, exist_ok=True)
    pulled = {}
    for file in job.pull:
        if not (folder / file).is_file():
            raise BackendError(f"the job left no '{file}'", at=_shown(job), fix="this is a fault of the backend's program")
        # Complete files only: an interrupted copy must not look like a result.
        temporary = into / f".{file}.tmp"
        shutil.copyfile(folder / file, temporary)
        pulled[file] = temporary.replace(into / file)
    return pulled


def _shown(job: Job) -> str:
    return "local: " + " ".join(job.argv)


def _advice(code: int, stderr: str) -> str:
    if code == -signal.SIGKILL:
        return "the system ended it, most likely for memory: free some, or use a smaller batch"
    missing = re.search(r"No module named '([^'.]+)", stderr)
    if missing:
        return f"install the missing Python package for this interpreter: pip install {missing[1]}"
    return "see the message above; `deploypipe doctor` checks the runtime"
