"""A data set and its batches: sliced from tensors where they lie in memory, with seeded order and augmentation."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from deploypipe.data.images import Files, Images
from deploypipe.errors import UsageError
from deploypipe.factory import guarded

Samples = Dataset[Any]  # of (float tensor, integer label); it has a length
Augment = Callable[[Tensor, torch.Generator], Tensor]  # (B, C, H, W) -> the same shape


@dataclass(frozen=True)
class CropFlip:
    """Move every image by up to `padding` pixels in both directions, and mirror half of them if `flip`.

    Attributes:
        padding: Largest move, pixels.
        flip: Mirror left and right.
        fill: What moves in from outside, per channel; None mirrors the border. Networks for small images were trained
            with black there, and their batch norm statistics hold it: without it the published CIFAR ResNet-20 loses three
            points of accuracy when the statistics are estimated anew.
    """

    padding: int
    flip: bool
    fill: tuple[float, ...] | None = None

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a batch (B, C, H, W) of moved copies, in channels-last memory."""
        n, _, height, width = inputs.shape
        rows, columns = (self._positions(n, length, generator) for length in (height, width))
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = self._padded(inputs).permute(0, 2, 3, 1)
        return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _padded(self, inputs: Tensor) -> Tensor:
        """Return (B, C, H + 2 padding, W + 2 padding) in channels-last memory."""
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if self.fill is None:
            return F.pad(inputs, [self.padding] * 4, mode="reflect")
        fill = torch.tensor(self.fill).view(1, -1, 1, 1)
        return F.pad(inputs - fill, [self.padding] * 4) + fill

    def _positions(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """Return where in the padded image each of the `length` output positions is read, (n, length)."""
        return torch.arange(length) + torch.randint(0, 2 * self.padding + 1, (n, 1), generator=generator)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator that dropout and the user's transforms may use, and put their states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def count(dataset: Samples) -> int:
    """Return the number of samples.

    Raises:
        UsageError: The dataset has no length, or is empty.
    """
    try:
        n = len(dataset)  # type: ignore[arg-type]
    except TypeError as failure:
        raise UsageError("the dataset has no length", at=type(dataset).__name__, fix="use a map-style Dataset") from failure
    if n == 0:
        raise UsageError("the dataset is empty", at=type(dataset).__name__, fix="give at least one sample")
    return n


def take(dataset: Samples, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs (B, ...) float and labels (B,) int64 of the samples at `indices`.

    Raises:
        UsageError: A sample is not a pair of a float tensor and an integer.
    """
    if isinstance(dataset, Images | Files):
        return dataset.take(indices)
    if isinstance(dataset, Subset):
        return take(dataset.dataset, torch.as_tensor(dataset.indices)[indices])
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return _checked((dataset.tensors[0][indices], dataset.tensors[1][indices]), dataset)
    fix = "correct the dataset's __getitem__"
    samples = guarded(
        lambda: [dataset[i] for i in indices.tolist()], "a sample cannot be read", type(dataset).__name__, UsageError, fix
    )
    try:
        return _checked(default_collate(samples), dataset)
    except (TypeError, RuntimeError, KeyError) as failure:
        reason = str(failure).splitlines()[0]
        fix = "return (float tensor, integer label) pairs of one shape; transforms.ToTensor() makes tensors of images"
        raise UsageError(f"samples cannot be put into a batch: {reason}", at=type(dataset).__name__, fix=fix) from failure


def _checked(batch: Any, dataset: Samples) -> tuple[Tensor, Tensor]:
    at = type(dataset).__name__
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise UsageError("a sample is not a pair (input, label)", at=at, fix="return (float tensor, integer label) pairs")
    inputs, labels = batch
    if not inputs.is_floating_point():
        fix = "scale to float: image.float() / 255, normalised as the model expects"
        raise UsageError(f"inputs are {inputs.dtype}, not float", at=at, fix=fix)
    if labels.is_floating_point() or labels.dim() != 1:
        shape = tuple(labels.shape[1:])
        fix = "return the index of the class as a plain integer"
        raise UsageError(f"labels are {labels.dtype} of shape {shape}, not integers", at=at, fix=fix)
    return inputs, labels.long()


@dataclass(frozen=True, eq=False)
class Data:
    """A labelled data set.

    Attributes:
        train: Dataset of (float tensor, integer label); whatever is selected or tuned uses only this.
        test: The same, for the final accuracy.
        classes: Class names, in the order of the labels.
        key: Hash of what the data is, for stages that depend on it.
        augment: What training does to a batch; None for data that is passed in as Datasets.
        description: One line for the report.
    """

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    key: str
    augment: Augment | None
    description: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(take(self.train, torch.tensor([0]))[0].shape[1:])


def n_batches(dataset: Samples, batch_size: int, *, drop_last: bool = False, n_shards: int = 1) -> int:
    """Return how many batches `batches` yields."""
    n = count(dataset) // n_shards
    return max(1, n // batch_size) if drop_last else -(-n // batch_size)


def batches(
    dataset: Samples,
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    augment: Augment | None = None,
    drop_last: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs (B, ...) float and labels (B,) int64.

    Args:
        dataset: A map-style Dataset of (float tensor, integer label).
        batch_size: Samples per batch; the last batch may be smaller.
        shuffle_seed: Decides the order and the augmentation; None keeps the order of the dataset.
        augment: Applied to whole batches.
        drop_last: Leave a smaller last batch out, unless it is the only one.
        shard: (i, n): yield every n-th sample only, starting with the i-th; all shards are equally long.

    Raises:
        UsageError: A sample is not a pair of a float tensor and an integer.
    """
    generator = torch.Generator().manual_seed(shuffle_seed or 0)
    n = count(dataset)
    order = torch.arange(n) if shuffle_seed is None else torch.randperm(n, generator=generator)
    order = order[: n - n % shard[1]][shard[0] :: shard[1]]
    if drop_last and len(order) > batch_size:
        order = order[: len(order) - len(order) % batch_size]
    for inputs, labels in _fetched(dataset, torch.split(order, batch_size)):
        yield (augment(inputs, generator) if augment else inputs), labels


def _fetched(dataset: Samples, parts: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    if not isinstance(base, Files):
        yield from (take(dataset, part) for part in parts)
        return
    with ThreadPoolExecutor(1) as reader:  # reading files takes as long as a training step: one batch ahead
        ahead = reader.submit(take, dataset, parts[0])
        for part in parts[1:]:
            ready, ahead = ahead, reader.submit(take, dataset, part)
            yield ready.result()
        yield ahead.result()


def labels_of(dataset: Samples) -> Tensor | None:
    """Return all labels (N,) int64 if they can be had without reading the inputs."""
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, Images | Files):
        return dataset.labels
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return _classes_in(dataset.tensors[1])
    targets = getattr(dataset, "targets", None)  # torchvision's habit
    if isinstance(targets, list | Tensor) and len(targets) == count(dataset):
        return _classes_in(targets)
    return None


def _parts(sizes: Sequence[int], fraction: float, seed: int) -> list[int]:
    """Return how many of each class are a share of all: the share of each rounded, where that adds up to the share of all.

    Else, as with few samples of many classes, the largest remainders are rounded up; of equal ones the seed decides.
    """
    wanted, rounded = round(fraction * sum(sizes)), [round(fraction * size) for size in sizes]
    if sum(rounded) == wanted:
        return rounded
    found = [int(fraction * size) for size in sizes]
    luck = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    order = sorted(range(len(sizes)), key=lambda i: (found[i] - fraction * sizes[i], luck[i]))
    for i in order[: wanted - sum(found)]:
        found[i] += 1
    return found


def _classes_in(targets: Any) -> Tensor | None:
    """Return what a dataset calls its targets as (N,) int64; None if these are no labels: names, boxes, shares."""
    try:
        found = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None if found.dim() != 1 or found.is_floating_point() or found.is_complex() else found.long()


def split(train: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Split a training set into a part to fit and a part that is held out for selection, class by class where labels are known.

    Args:
        train: The training set.
        fraction: Share that is held out, 0 < fraction < 1.
        seed: Decides which samples.

    Raises:
        UsageError: The fraction is out of range, or a part would be empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"cannot hold out a share of {fraction}", at="split", fix="use a share between 0 and 1, such as 0.1")
    n = count(train)
    labels = labels_of(train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    groups = [order] if labels is None else [order[labels[order] == label] for label in torch.unique(labels)]
    counts = _parts([len(group) for group in groups], fraction, seed)
    held_out = torch.cat([group[:n] for group, n in zip(groups, counts, strict=True)])
    is_held_out = torch.zeros(n, dtype=torch.bool)
    is_held_out[held_out] = True
    if not 0 < len(held_out) < n:
        raise UsageError(f"{n} samples cannot be split with a share of {fraction}", at="split", fix="give more data")
    parts = (torch.nonzero(mask).flatten().tolist() for mask in (~is_held_out, is_held_out))
    fit, chosen = (Subset(train, indices) for indices in parts)
    return fit, chosen
