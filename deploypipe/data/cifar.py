"""CIFAR-10 as its authors publish it: binary records."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import UsageError

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar_folder(root: Path, spec: str) -> Path | None:
    """Return the folder with CIFAR-10's binary files, or None if `root` is laid out as an image folder."""
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / "data_batch_1.bin").is_file():
            return folder
    if (root / "train").is_dir():
        return None
    python = any((folder / "data_batch_1").is_file() for folder in (root, root / "cifar-10-batches-py"))
    message = "these are CIFAR-10's Python files, which are pickles and are not read" if python else "there is no CIFAR-10"
    fix = "unpack CIFAR-10's binary version (cifar-10-batches-bin), or lay images out as train/CLASS/ and test/CLASS/"
    raise UsageError(message, at=f"--data {spec}", fix=fix)


def cifar_records(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Read records of one label byte and 3x32x32 pixel bytes."""
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % 3073:
            what = "damaged" if path.is_file() else "missing"
            raise UsageError(f"'{name}' is {what}", at=str(path), fix="unpack cifar-10-binary.tar.gz again")
        parts.append(np.fromfile(path, dtype=np.uint8).reshape(-1, 3073))
    records = torch.from_numpy(np.concatenate(parts))
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long()
