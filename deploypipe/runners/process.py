"""Start a program on this machine, and end it with all that it started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Ended:
    """What a program left: exit code (negative: the signal that ended it) and what it said."""

    code: int
    stdout: str
    stderr: str
    seconds: float


def finish(
    argv: Sequence[str],
    timeout_s: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: IO[Any] | None = None,
    stdout: IO[Any] | None = None,
) -> Ended:
    """Run a program to its end. Its output is returned, or goes into the file `stdout`.

    Raises:
        OSError: It cannot be started.
        TimeoutError: It did not end in time, and was ended with all that it started.
    """
    start = time.monotonic()
    # A session of its own, so that a timeout or Ctrl-C also ends what the program started.
    process = subprocess.Popen(
        argv, cwd=cwd, env=None if env is None else {**os.environ, **env}, start_new_session=True,
        stdin=stdin or subprocess.DEVNULL, stdout=stdout or subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        end(process)
        raise TimeoutError(f"did not end within {timeout_s:g} s") from error
    except BaseException:
        end(process)
        raise
    return Ended(process.returncode, _text(out), _text(err), time.monotonic() - start)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a program that has a session of its own, with all that it started there."""
    with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Not read to their end: somebody else may hold the other end, as an ssh connection that several programs share does.
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace").replace("\r\n", "\n")
