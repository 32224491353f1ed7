"""Labels: integers that name channels and travel beside the real tensors.

A *layer of labels* is an int32 tensor of the shape of the tensor it describes, expanded with stride 0 along every
axis where the label does not change, so it costs next to nothing. -1 stands for "no channel" (inputs, padding,
constants). An activation normally has one layer; a parameter has one for each axis.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Labels = Tensor
Vector = NDArray[np.int32]


def varies(labels: Labels) -> tuple[int, ...]:
    """Return the axes along which the labels change."""
    return tuple(d for d, (n, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)) if n > 1 and stride != 0)


def expand_along(vector: Tensor, axis: int, shape: Sequence[int]) -> Labels:
    """Spread a vector of labels along `axis` of `shape`."""
    view = [1] * len(shape)
    view[axis] = vector.numel()
    return vector.view(view).expand(shape)


def tighten(labels: Labels) -> Labels:
    """Return equal labels with stride 0 wherever they are constant (an op may have copied them out)."""
    for axis in varies(labels):
        first = labels.narrow(axis, 0, 1)
        if bool((labels == first).all()):
            labels = first.expand(labels.shape)
    return labels


def drop_axes(labels: Labels, axes: Iterable[int]) -> Labels:
    """Take index 0 along `axes` and keep them with size 1."""
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels


def flat(labels: Labels) -> Vector:
    """Return the labels as a flat numpy vector, one entry per distinct position."""
    result: Vector = drop_axes(labels, (d for d in range(labels.dim()) if d not in varies(labels))).reshape(-1).numpy()
    return result


class Ledger:
    """What one forward pass taught about the labels: ties, frozen labels, and why."""

    def __init__(self) -> None:
        self.count = 0
        self.ties: list[tuple[Vector, Vector]] = []
        self.frozen: list[tuple[Vector, str]] = []
        self.normalised: list[Vector] = []
        self.same_width: list[tuple[Vector, Vector, str]] = []
        self.couplings: list[tuple[int, int, str]] = []

    def fresh(self, n: int) -> Tensor:
        """Return `n` new labels."""
        self.count += n
        return torch.arange(self.count - n, self.count, dtype=torch.int32)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep the channels with these labels whole."""
        self.frozen.append((flat(labels), reason))

    def normalise(self, labels: Labels) -> None:
        """Remember that a normalisation runs across these channels."""
        self.normalised.append(flat(labels))

    def tie(self, a: Labels, b: Labels, why: str) -> None:
        """Tie the labels of two tensors of equal shape, position by position; a tie with -1 freezes."""
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape:
            return
        both = set(varies(a)) | set(varies(b))
        rest = [d for d in range(a.dim()) if d not in both]
        left: Vector = drop_axes(a, rest).reshape(-1).numpy()
        right: Vector = drop_axes(b, rest).reshape(-1).numpy()
        self.tie_flat(left, right, why)

    def tie_flat(self, left: Vector, right: Vector, why: str) -> None:
        """Tie two flat vectors of labels."""
        differ = left != right
        if not differ.any():
            return
        left, right = left[differ], right[differ]
        for one, other in ((left, right), (right, left)):
            alone = one[(one >= 0) & (other < 0)]
            if alone.size:
                self.frozen.append((alone, f"{why}: meets values that are no channels (an input, padding or a constant)"))
        real = (left >= 0) & (right >= 0)
        if real.any():
            self.ties.append((left[real], right[real]))
            self.couplings.append((int(left[real][0]), int(right[real][0]), why))

    def tie_all(self, labels: Labels, axes: Iterable[int], why: str) -> Labels:
        """Tie all labels along `axes` to the first ones there; return those, with stride 0 along `axes`."""
        first = drop_axes(labels, axes).expand(labels.shape)
        self.tie(labels, first, why)
        return first
