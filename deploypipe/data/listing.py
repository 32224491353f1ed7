"""What lies in a folder of images with one subfolder for each class."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deploypipe.errors import UsageError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """What lies in a folder with one subfolder per class.

    Attributes:
        root: The folder.
        classes: Names of its subfolders, sorted.
        files: Every image, class by class.
        labels: (N,) index into `classes`.
        key: Hash of names, sizes and modification times.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: Tensor
    key: str


def list_images(root: Path) -> Listing:
    """List the images under `root/<class>/`, in any depth.

    Raises:
        UsageError: There are no class folders, one of them holds no image, or something in them cannot be looked at.
    """
    with looking(root):
        return _listed(root)


@contextmanager
def looking(root: Path) -> Iterator[None]:
    """Say what under `root` cannot be looked at: a link to nothing, a link to itself, a folder that may not be read.

    Raises:
        UsageError: Something cannot.
    """
    try:
        yield
    except OSError as failure:
        place = failure.filename or root
        message = f"'{Path(place).name}' cannot be looked at: {failure.strerror}"
        raise UsageError(message, at=str(place), fix="correct or remove it") from failure


def _listed(root: Path) -> Listing:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        fix = f"make one folder per class: {root.name}/cat/1.png, {root.name}/dog/2.png, ..."
        raise UsageError("there are no classes", at=str(root), fix=fix)
    digest, files, labels = hashlib.sha256(), list[Path](), list[int]()
    for label, folder in enumerate(folders):
        _require_text(folder)
        found = sorted(_walk(str(folder)))
        if not found:
            fix = f"put images there ({', '.join(SUFFIXES)}) or remove the folder"
            raise UsageError(f"class '{folder.name}' holds no image", at=str(folder), fix=fix)
        for name, size_bytes, modified_ns in found:
            digest.update(os.fsencode(f"{name[len(str(root)) :]}\0{size_bytes}\0{modified_ns}\n"))
        files += [Path(name) for name, _, _ in found]
        labels += [label] * len(found)
    classes = tuple(folder.name for folder in folders)
    return Listing(root, classes, tuple(files), torch.tensor(labels), digest.hexdigest()[:16])


def _require_text(folder: Path) -> None:
    """Refuse a class whose name is no text: reports could not be written."""
    try:
        folder.name.encode()
    except UnicodeEncodeError as failure:
        shown = os.fsencode(folder).decode(errors="backslashreplace")
        raise UsageError("the name of a class is not UTF-8", at=shown, fix="rename the folder") from failure


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and modification time of the images under `folder`; links to a folder `above` lead nowhere new."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, here))
            elif entry.name.lower().endswith(SUFFIXES):
                facts = entry.stat()
                yield entry.path, facts.st_size, facts.st_mtime_ns
