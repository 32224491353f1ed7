"""The files of a job as one stream, for a connection that carries bytes."""

import shutil
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

from deploypipe.errors import BackendError
from deploypipe.runners.remote import MARK

_DATE = 1_000_000_000  # of every file: one that no device's clock takes for the future


def pack(folder: str, files: Mapping[str, Path | bytes], into: IO[bytes]) -> None:
    """Write an archive with an empty folder and `files`; a program stays executable."""
    # GNU's format: busybox reads it too, and any name fits.
    with tarfile.open(fileobj=into, mode="w", format=tarfile.GNU_FORMAT) as archive:
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o700, _DATE
        archive.addfile(entry)
        for name, source in files.items():
            entry = tarfile.TarInfo(name)
            entry.mtime = _DATE
            if isinstance(source, bytes):
                entry.size, entry.mode = len(source), 0o600
                archive.addfile(entry, BytesIO(source))
            else:
                with source.open("rb") as file:
                    facts = source.stat()
                    entry.size, entry.mode = facts.st_size, (facts.st_mode & 0o700) | 0o600
                    archive.addfile(entry, file)


def after_mark(stream: IO[bytes]) -> None:
    """Read past what a login shell said before the archive began."""
    wanted = f"{MARK}\n".encode()
    while (line := stream.readline()) and line != wanted:
        pass


def unpack(stream: IO[bytes], names: Sequence[str], into: Path) -> dict[str, Path]:
    """Take the files called `names` out of an archive, each complete or not at all; nothing else in it is looked at.

    Raises:
        BackendError: The archive is damaged.
    """
    found: dict[str, Path] = {}
    start = stream.tell()
    if not stream.read(1):  # there was nothing to send
        return found
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for entry in archive:
                name = entry.name.removeprefix("./")
                content = archive.extractfile(entry) if name in names and entry.isreg() else None
                if content is not None:
                    temporary = into / f".{name}.tmp"
                    with temporary.open("wb") as file:
                        shutil.copyfileobj(content, file)
                    found[name] = temporary.replace(into / name)
    except tarfile.TarError as error:
        raise BackendError(f"the results arrived damaged: {error}", at=str(into), fix="run it again") from error
    return found
