"""A folder that the user named for results: made, locked against other processes, its failures explained."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploypipe.errors import UsageError
from deploypipe.progress import Reporter

_LOCK = ".lock"
_GRACE_S = 5.0  # how long to wait for a lock whose owner is dead but whose worker processes still hold it
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded")  # libraries that hide the number
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_ELSEWHERE = "choose another --out folder"


def make_folder(folder: Path, elsewhere: str = _ELSEWHERE) -> None:
    """Make the folder and its parents; `elsewhere` says how the user names another.

    Raises:
        UsageError: A file is in the way, or the place takes no folders.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        what = "a file, not a folder" if blocking.exists() else "a link to nothing"
        raise UsageError(f"'{blocking}' is {what}", at=str(folder), fix=elsewhere) from error
    except FileNotFoundError as error:  # /proc and the like
        raise UsageError("no folder can be made there", at=str(folder), fix=elsewhere) from error
    except OSError as error:
        if error.errno in _FULL | _FORBIDDEN:
            raise
        raise UsageError(f"no folder can be made there: {error.strerror}", at=str(folder), fix=elsewhere) from error


def require_writable(folder: Path, elsewhere: str) -> None:
    """Make the folder and write into it, before something slow whose result is to lie there.

    Raises:
        UsageError: It takes no files; `elsewhere` says how the user names another.
    """
    with explained(folder, elsewhere):
        make_folder(folder, elsewhere)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")


def claim(folder: Path, reporter: Reporter) -> int:
    """Make the folder if need be, lock it, and return the descriptor that holds the lock.

    The system drops the lock when its owner dies, however it dies, so a stale lock cannot exist.

    Raises:
        UsageError: Another process holds the lock, or the folder cannot be made.
    """
    deadline = time.monotonic() + _GRACE_S
    while True:
        make_folder(folder)
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # the former owner has just removed the folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 256, 0).decode(errors="replace")
            os.close(descriptor)
            if _alive(owner) or time.monotonic() > deadline:
                raise _in_use(folder, owner) from None
            time.sleep(0.05)
            continue
        except OSError as error:
            reporter.note(f"this file system cannot lock ({error.strerror}): use {folder} from one process at a time")
        if _is_current(descriptor, folder / _LOCK):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return descriptor
        os.close(descriptor)  # the same, a moment later


def release(descriptor: int, folder: Path, *, remove_if_empty: bool) -> None:
    """Drop the lock; remove the folder if nothing but the lock is in it and `remove_if_empty` is set."""
    if remove_if_empty and [entry.name for entry in folder.iterdir()] == [_LOCK]:
        (folder / _LOCK).unlink()
        with suppress(OSError):  # the next owner is already in it
            folder.rmdir()
    else:
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


@contextmanager
def explained(folder: Path, elsewhere: str = _ELSEWHERE) -> Iterator[None]:
    """Turn a full or read-only disk into an error for people, whichever library met it first.

    Args:
        folder: Where is written.
        elsewhere: How the user names another.

    Raises:
        UsageError: In place of the library's error, with the path and what to do.
    """
    try:
        yield
    except UsageError:  # explained already, of a folder that is written to meanwhile
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        path = Path(str(getattr(error, "filename", None) or folder))
        if code in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            raise _full(path if path.parent.is_dir() else folder, code, elsewhere) from error
        if code in _FORBIDDEN and (path.is_relative_to(folder) or folder.is_relative_to(path)):
            fix = f"{elsewhere}, or change the folder's permissions"
            raise UsageError(f"the folder cannot be written: {os.strerror(code or 0)}", at=str(path), fix=fix) from error
        raise


def _full(path: Path, code: int | None, elsewhere: str) -> UsageError:
    left = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free / 1e6
    fix = f"free space ({left:.0f} MB are left there) or {elsewhere}; the same command then resumes"
    return UsageError(f"the disk is full: {os.strerror(code or errno.ENOSPC)}", at=str(path), fix=fix)


def _in_use(folder: Path, owner: str) -> UsageError:
    who = f" ({owner})" if owner else ""
    fix = "wait until it has finished, end it, or choose another --out folder"
    return UsageError(f"another process works on this run folder{who}", at=str(folder), fix=fix)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _alive(owner: str) -> bool:
    """Say whether the owner may be alive; an owner on another host, or without a name yet, may be."""
    words = owner.split()
    if len(words) != 4 or not words[1].isdecimal() or words[3] != socket.gethostname():
        return True
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
