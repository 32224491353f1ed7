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
_ALONG = "_deploypipe_along"  # on labels that change along one axis only: that axis and the vector


def along(labels: Labels) -> tuple[int, Vector] | None:
    """Return the axis and the vector of labels that were spread along one axis: the common case, and the quick one."""
    found: tuple[int, Vector] | None = getattr(labels, _ALONG, None)
    return found


def varies(labels: Labels) -> tuple[int, ...]:
    """Return the axes along which the labels change."""
    spread = along(labels)
    if spread is not None:
        return (spread[0],)
    return tuple(d for d, (n, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)) if n > 1 and stride != 0)


def expand_along(vector: Vector, axis: int, shape: Sequence[int]) -> Labels:
    """Spread a vector of labels along `axis` of `shape`."""
    strides = [0] * len(shape)
    strides[axis] = 1
    vector = np.ascontiguousarray(vector)
    labels = torch.from_numpy(vector).as_strided(shape, strides)
    if len(vector) > 1:
        setattr(labels, _ALONG, (axis, vector))
    return labels


def widen(labels: Labels, shape: Sequence[int]) -> Labels:
    """Broadcast labels to `shape`, as the tensors that they describe were."""
    if labels.shape == shape:
        return labels
    spread = along(labels)
    if spread is not None:
        return expand_along(spread[1], spread[0] + len(shape) - labels.dim(), shape)
    return labels.expand(shape)


def tighten(labels: Labels) -> Labels:
    """Return equal labels with stride 0 wherever they are constant (an op may have copied them out)."""
    if along(labels) is not None:
        return labels
    busy, shape = varies(labels), labels.shape
    small = labels[tuple(slice(None) if axis in busy else slice(0, 1) for axis in range(len(shape)))]
    found = small.numpy()
    axes = []
    for axis in busy:
        if (found == found.take([0], axis)).all():
            found = found.take([0], axis)
        else:
            axes.append(axis)
    if len(axes) == 1:
        return expand_along(found.reshape(-1), axes[0], shape)
    return (small if len(axes) == len(busy) else torch.from_numpy(found)).expand(shape)


def drop_axes(labels: Labels, axes: Iterable[int]) -> Labels:
    """Take index 0 along `axes` and keep them with size 1."""
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels


def flat(labels: Labels) -> Vector:
    """Return the labels as a flat numpy vector, one entry per distinct position."""
    spread = along(labels)
    if spread is not None:
        return spread[1]
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

    def fresh(self, n: int) -> Vector:
        """Return `n` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int32)

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep the channels with these labels whole."""
        self.frozen.append((flat(labels), reason))

    def normalise(self, labels: Labels) -> None:
        """Remember that a normalisation runs across these channels."""
        self.normalised.append(flat(labels))

    def tie(self, a: Labels, b: Labels, why: str) -> None:
        """Tie the labels of two tensors of equal shape, position by position; a tie with -1 freezes."""
        if a is b:
            return
        one, other = along(a), along(b)
        if one is not None and other is not None and one[0] == other[0]:
            if one[1] is not other[1]:
                self.tie_flat(one[1], other[1], why)
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
