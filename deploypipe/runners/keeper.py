"""The keeper: a shell that keeps a folder on a device for as long as we are connected, and tidies up when we are not.

It makes the folder, tells its name and waits for its input to end. It ends when we close the connection and also when the
connection breaks; then it kills what still runs in the folder and removes it. Where it could not (the power went), the next
keeper does.
"""

import contextlib
import os
import select
import shutil
import subprocess
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from deploypipe.runners.process import end

MARK = "deploypipe: from here on"  # what comes before it is a login shell that greets
_LEAVE_S = 15.0  # for the keeper to tidy up
# One line each, with neither single quotes nor backslashes nor exclamation marks, so that every login shell reads the same.
_KILL = 'k=$(cat "$p" 2>/dev/null) && { kill -9 -"$k" || kill -9 "$k"; } 2>/dev/null; '
_TIDY = 'p="$1/$2.pid"; ' + _KILL + 'rm -rf "$1/$2" "$1/$2".*'
_KEEP = (
    "umask 077; w=$1; u=$(id -u); "
    'case $w in "") w=${TMPDIR:-$2};; "~/"*) w=$HOME/${w#??};; esac; '
    'end() { for p in "$1"/*.pid; do ' + _KILL + 'done; rm -rf "$1"; }; '
    # Process numbers of before the device was started anew belong to others now: then nothing is killed.
    "b=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null); "
    'for o in "$w"/deploypipe-"$u"-*; do [ -d "$o" ] && [ -O "$o" ] && [ -f "$o"/keeper ] && { '
    'k=; c=; { read -r k; read -r c; } < "$o"/keeper; '
    'if [ "$c" = "$b" ]; then kill -0 "$k" 2>/dev/null || end "$o"; else rm -rf "$o"; fi; }; done; '
    'd=$(mktemp -d "$w/deploypipe-$u-XXXXXX") || exit 73; '
    # A connection that breaks ends our input and hangs up, too: a signal that comes while we tidy up must not end that.
    'leave() { trap "" HUP INT TERM PIPE; exit 0; }; '
    'bye() { end "$d"; }; trap bye EXIT; trap leave HUP INT TERM PIPE; '
    '{ echo $$; echo "$b"; } > "$d"/keeper || exit 74; '
    f'echo "{MARK}"; echo "$d"; uname -m; cat > /dev/null; leave'
)


def keep(workdir: str, usual: str) -> str:
    """Return the keeper's command line; `usual` is the folder for temporary files if the device does not name one."""
    return f"exec sh -c '{_KEEP}' sh {quote(workdir)} {quote(usual)}"


def tidy(folder: str, number: str) -> str:
    """Return the command line that ends a job with its children and removes its files."""
    return f"exec sh -c '{_TIDY}' sh {quote(folder)} {number}"


class Keeper:
    """The near end of a keeper: a local program that has it on the device, started with `argv`.

    `private` is a local folder that goes when we leave.
    """

    def __init__(self, argv: Sequence[str], private: Path) -> None:
        self._log = private / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.leave = weakref.finalize(self, _leave, self._process, private)

    def ready(self, timeout_s: float) -> tuple[str, str] | None:
        """Wait for the folder's name and what `uname -m` says there; None if it does not come."""
        out, text = self._process.stdout, b""
        assert out is not None
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
            part = os.read(out.fileno(), 4096)
            text += part
            lines = text.decode(errors="replace").partition(f"{MARK}\n")[2].splitlines(keepends=True)
            if len(lines) >= 2 and lines[1].endswith("\n"):
                return lines[0].strip(), lines[1].strip()
            if not part:
                break
        return None

    def give_up(self) -> str:
        """End the local program at once; return what it had to say."""
        end(self._process)
        said = self._log.read_text(errors="replace")
        self.leave()
        return said

    def gone(self) -> bool:
        """Return whether the connection is broken, as can be told a moment after something over it has failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.poll() is not None


def _leave(process: "subprocess.Popen[bytes]", private: Path) -> None:
    if process.stdin and not process.stdin.closed:
        process.stdin.close()
    try:
        process.wait(_LEAVE_S)
    except subprocess.TimeoutExpired:
        end(process)
    if process.stdout:
        process.stdout.close()
    shutil.rmtree(private, ignore_errors=True)
