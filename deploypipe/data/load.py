"""Turn `--data` into a training and a test set: `demo`, `imagefolder:DIR`, `cifar10:DIR`, `file.py:factory`, or Datasets."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from deploypipe.data.batches import Augment, CropFlip, Data, Samples, count, labels_of, seeded, split, take
from deploypipe.data.cifar import CIFAR_CLASSES, cifar_folder, cifar_records
from deploypipe.data.images import (
    DIGITS_NORMALISE,
    DIGITS_SIZE,
    IMAGENET,
    SMALL,
    Images,
    Normalise,
    Size,
    load_images,
    native_size,
    resized,
)
from deploypipe.data.listing import Listing, list_images, looking
from deploypipe.errors import UsageError, nearest
from deploypipe.factory import find_factory, near_path, own_sources
from deploypipe.progress import Reporter, Silent
from deploypipe.targets import cache_folder

KINDS = ("demo", "imagefolder:DIR", "cifar10:DIR", "file.py:factory", "package.module:factory")
__all__ = ["KINDS", "Data", "load_data"]
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_SEED = 0  # of what the user's own code draws while data is made and described: not the run's, which decides splits only
_SCANNED = 2000  # samples looked at to learn the classes of a Dataset that does not name them


def load_data(
    spec: str | Samples | tuple[Samples, Samples] = "demo",
    *,
    normalise: Normalise | None = None,
    size: tuple[int, ...] | None = None,
    seed: int = 0,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> Data:
    """Load what `--data` names.

    Args:
        spec: One of `KINDS`, a (train, test) pair of Datasets, or one Dataset, of which a fifth becomes the test set.
        normalise: Mean and standard deviation per channel that the model wants. Default: ImageNet's for images in
            folders, the digits' own for `demo`. Datasets that are passed in are used as they are.
        size: (channels, height, width) or (height, width) that the model wants. Default: that of small images, else 3x224x224.
        seed: Decides the split of a single Dataset.
        cache: Folder for decoded images; default: the user's cache folder.
        reporter: Is told about long reading.

    Raises:
        UsageError: The specification is unknown, or the data is missing or cannot be used.

    >>> data = load_data("demo")
    >>> data.description, data.input_shape
    ('scikit-learn digits: 1442 training and 355 test images of 10 classes, 1x16x16', (1, 16, 16))
    """
    wanted = _as_size(size)
    if not isinstance(spec, str):
        return _from_datasets(spec, seed, "datasets passed in")
    kind, _, place = spec.partition(":")
    if spec == "demo":
        size = wanted or DIGITS_SIZE
        return _digits(size, _fitting(size, normalise or DIGITS_NORMALISE, "--data demo"))
    if kind in ("imagefolder", "cifar10"):
        root = _folder(place, spec)
        binary = cifar_folder(root, spec) if kind == "cifar10" else None
        if binary is not None:
            return _cifar10(binary, wanted or (3, 32, 32), normalise or IMAGENET)
        return _image_folder(root, wanted, normalise, cache or cache_folder() / "images", reporter or Silent())
    if place:
        made = _made(spec)
        return _from_datasets(made, seed, spec, [source.read_bytes() for source in own_sources(spec)])
    raise UsageError(f"unknown data '{spec}'", at=f"--data {spec}", fix=nearest(spec, KINDS))


def _made(spec: str) -> Any:
    """Return what the user's factory makes: the same at every start, though it may draw (a subset, synthetic images)."""
    with seeded(_SEED):
        factory = find_factory(spec, option="--data", error=UsageError)
    with seeded(_SEED):  # again: a file that is imported already draws nothing above
        return factory()


def _as_size(size: tuple[int, ...] | None) -> Size | None:
    if size is None:
        return None
    if len(size) not in (2, 3) or min(size) < 1:
        raise UsageError(f"{size} is not an image size", at="size", fix="give (channels, height, width) or (height, width)")
    return (size[0], size[1], size[2]) if len(size) == 3 else (3, size[0], size[1])


def _fitting(size: Size, normalise: Normalise, at: str) -> Normalise:
    """Return the means and deviations if there are as many as channels, or one for all.

    Raises:
        UsageError: There are not.
    """
    if len(normalise[0]) not in {1, size[0]}:
        message, fix = (
            f"{len(normalise[0])} means are declared for {size[0]} channels",
            "declare one mean and one std per channel",
        )
        raise UsageError(message, at=at, fix=fix)
    return normalise


def _described(name: str, train: Samples, test: Samples, n_classes: int, shape: tuple[int, ...]) -> str:
    sizes = f"{count(train)} training and {count(test)} test images of {n_classes} classes"
    return f"{name}: {sizes}, {'x'.join(map(str, shape))}"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _augment(size: Size, normalise: Normalise) -> Augment:
    """An eighth of the side, as for CIFAR: 4 pixels of 32."""
    is_small = min(size[1:]) < SMALL
    return CropFlip(max(1, min(size[1:]) // 8), flip=True, fill=_black(normalise) if is_small else None)


def _black(normalise: Normalise) -> tuple[float, ...]:
    """Return what a black pixel becomes."""
    return tuple(-mean / std for mean, std in zip(*normalise, strict=True))


def _digits(size: Size, normalise: Normalise) -> Data:
    """Return scikit-learn's 1797 handwritten digits, scaled up from 8x8; of each class, every fifth one is for testing.

    Scaled up because on 8x8 maps the cost of a call outweighs that of a channel, and there would be no latency to prune.
    """
    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target).long()
    rank = torch.zeros_like(labels)
    for label in range(10):
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    is_test = rank % 5 == 4
    train, test = (resized(Images(pixels[mask], labels[mask], normalise), size) for mask in (~is_test, is_test))
    # A digit is not its mirror image, and two pixels out of sixteen already cut strokes off.
    description = _described("scikit-learn digits", train, test, 10, size)
    augment = CropFlip(max(1, min(size[1:]) // 16), flip=False, fill=_black(train.normalise))
    return Data(train, test, tuple("0123456789"), _key("digits", size, normalise), augment, description)


def _folder(place: str, spec: str) -> Path:
    if not place:
        raise UsageError("no folder is named", at=f"--data {spec}", fix=f"write {spec.rstrip(':')}:DIR")
    root = Path(os.path.expanduser(place))  # noqa: PTH111 - Path's own raise where there is no such user, or a name is too long
    if not os.path.isdir(root):  # noqa: PTH112
        what = "not a folder" if os.path.exists(root) else "missing"  # noqa: PTH110
        advice = near_path(root.resolve(), "folder", Path.is_dir)
        raise UsageError(f"data folder '{place}' is {what}", at=f"--data {spec}", fix=advice)
    return root


def _image_folder(root: Path, size: Size | None, normalise: Normalise | None, cache: Path, reporter: Reporter) -> Data:
    with looking(root):
        train_list, test_list = list_images(_train_folder(root)), list_images(_test_folder(root))
    if train_list.classes != test_list.classes:
        raise _class_mismatch(train_list, test_list)
    size = size or native_size(train_list)
    if size[0] not in {1, 3}:
        fix = "use a model of one or three input channels, or a Dataset that makes such inputs: --data file.py:factory"
        raise UsageError(f"images have 1 or 3 channels, the model takes {size[0]}", at=f"--data imagefolder:{root}", fix=fix)
    normalise = _fitting(size, normalise or (IMAGENET if size[0] == 3 else ((0.5,), (0.5,))), f"--data imagefolder:{root}")
    train, test = (load_images(listing, size, normalise, cache, reporter) for listing in (train_list, test_list))
    key = _key("folder", train_list.key, test_list.key, train_list.classes, size, normalise)
    description = _described(
        f"{root.resolve().name}/ train + {test_list.root.name}", train, test, len(train_list.classes), size
    )
    return Data(train, test, train_list.classes, key, _augment(size, normalise), description)


def _train_folder(root: Path) -> Path:
    if not (root / "train").is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        listing = f"it holds {', '.join(found[:8])}" if found else "it holds no folders"
        fix = f"{listing}; make train/ and test/ with one folder per class in each"
        raise UsageError("there is no training set", at=str(root / "train"), fix=fix)
    return root / "train"


def _test_folder(root: Path) -> Path:
    """Return the first of test/, val/, ... that has class folders: many published test sets come without labels."""
    present = [root / name for name in _TEST_FOLDERS if (root / name).is_dir()]
    if not present:
        fix = f"make {' or '.join(f'{name}/' for name in _TEST_FOLDERS[:2])} with the classes of train/"
        raise UsageError("there is no test set", at=str(root), fix=fix)
    labelled = [folder for folder in present if any(entry.is_dir() for entry in folder.iterdir())]
    return (labelled or present)[0]


def _class_mismatch(train: Listing, test: Listing) -> UsageError:
    def missing(there: Listing, here: Listing) -> str:
        names = sorted(set(there.classes) - set(here.classes))
        return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" or "none"

    message = (
        f"{train.root.name}/ has {len(train.classes)} classes and {test.root.name}/ has {len(test.classes)}, and they differ"
    )
    fix = f"only in {train.root.name}/: {missing(train, test)}; only in {test.root.name}/: {missing(test, train)}"
    return UsageError(message, at=str(train.root.parent), fix=fix)


def _cifar10(folder: Path, size: Size, normalise: Normalise) -> Data:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
    fitting = _fitting((3, *size[1:]), normalise, "--data cifar10")
    train, test = (resized(Images(*cifar_records(folder, part), fitting), size) for part in names)
    facts = [(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for part in names for name in part]
    description = _described("CIFAR-10", train, test, 10, size)
    return Data(train, test, CIFAR_CLASSES, _key("cifar10", facts, size, normalise), _augment(size, normalise), description)


def _from_datasets(given: Any, seed: int, name: str, sources: Sequence[bytes] = ()) -> Data:
    if isinstance(given, Dataset):
        train, test = split(given, 0.2, seed)
    elif isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Dataset) for part in given):
        train, test = given
    else:
        what = type(given).__name__
        if isinstance(given, tuple | list):
            what += (
                f" of {len(given)}: {', '.join(type(part).__name__ for part in given[:3])}{', ...' if len(given) > 3 else ''}"
            )
        raise UsageError(f"the data is {what}", at=name, fix="give a (train, test) pair of torch Datasets, or one Dataset")
    with seeded(_SEED):  # random transforms would give the same data another key at every start, and nothing would resume
        classes = _classes(given if isinstance(given, Dataset) else train, train)
        shape = tuple(take(train, torch.tensor([0]))[0].shape[1:])
        parts = [_fingerprint(part) for part in (train, test)]
    key, said = _key("datasets", parts, classes, sources), _described(name, train, test, len(classes), shape)
    return Data(train, test, classes, key, None, said)


def _classes(named: Samples, train: Samples) -> tuple[str, ...]:
    """Return the Dataset's own class names, else "0", "1", ... up to the largest label."""
    names = getattr(named, "classes", None)
    if isinstance(names, list | tuple) and names:
        return tuple(map(str, names))
    labels = labels_of(train)
    if labels is None:
        labels = take(train, _spread(train, _SCANNED))[1]
    return tuple(map(str, range(int(labels.max()) + 1)))


def _spread(dataset: Samples, n: int) -> Tensor:
    """Return up to `n` evenly spaced indices."""
    return torch.linspace(0, count(dataset) - 1, min(n, count(dataset))).long()


def _fingerprint(dataset: Samples) -> Mapping[str, object]:
    """Describe a Dataset by all that can be had without reading, which could take hours, and by a few of its samples."""
    inputs, labels = take(dataset, _spread(dataset, 16))
    known, held = labels_of(dataset), dataset
    parts = [inputs, labels, *(() if known is None else (known,))]
    while isinstance(held, Subset):
        parts.append(torch.as_tensor(held.indices))
        held = held.dataset
    parts += held.tensors if isinstance(held, TensorDataset) else ()
    return {"length": count(dataset), "shape": tuple(inputs.shape), "digests": [_digest(part) for part in parts]}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
