"""2:4 sparsity: two of every four weights along the input channels are zero, which tensor cores since Ampere can skip.

Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378; permutations of channels after Pool and Yu,
Channel Permutations for N:M Sparsity, NeurIPS 2021. Deviations: the search is their greedy channel swap without regressions
(it stops in the first local optimum), and rows beyond a sample are left out of it; whether the result is better is then decided
on all rows, so that a permutation never loses magnitude.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploypipe.types import Graph, Group, Kept, Layer, Member

Floats = NDArray[np.floating]
PLAIN = ("conv", "linear")  # kinds of layers that have sparse kernels, and whose weights are (out, in, ...)
IN, OUT = 16, 8  # channels of eligible layers are multiples of these (Mishra et al.; NVIDIA's training tool refuses others)
_ROWS = 512  # that the search looks at
_PASSES = 4  # over all pairs of stripes
_BETTER = 1e-6  # of the total: a smaller gain is rounding


@dataclass(frozen=True)
class Eligibility:
    """Whether a layer's weight may hold the pattern, and else why not."""

    layer: str
    weight: str
    reason: str

    @property
    def eligible(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reason


def eligibility(graph: Graph, kept: Kept | None = None) -> tuple[Eligibility, ...]:
    """Return for every layer whether tensor cores could use 2:4 weights at these widths (those of the graph without `kept`)."""
    widths = graph.kept() if kept is None else kept
    return tuple(Eligibility(layer.name, layer.weight, _against(layer, widths)) for layer in graph.layers)


def allowed(n_in: int, n_out: int) -> bool:
    """Return whether tensor cores can use 2:4 weights at these widths."""
    return n_in % IN == 0 and n_out % OUT == 0


def _against(layer: Layer, kept: Kept) -> str:
    n_in, n_out = layer.n_in.at(kept), layer.n_out.at(kept)
    if layer.kind not in PLAIN:
        return f"{layer.kind}: only plain convolutions and linear layers have sparse kernels"
    if n_in % IN:
        return f"{n_in} input channels are no multiple of {IN}"
    return "" if n_out % OUT == 0 else f"{n_out} output channels are no multiple of {OUT}"


def mask(weight: Floats, axis: int = 1) -> NDArray[np.bool_]:
    """Return which weights stay: the two of largest magnitude in every four along `axis`; of equal ones the first.

    The axis must be a multiple of 4 long: padding would make zeros that win.
    """
    size = weight.shape[axis]
    if size % 4:
        raise ValueError(f"axis {axis} has {size} entries, no multiple of 4")
    fours = np.moveaxis(np.abs(weight), axis, -1).reshape(-1, 4)
    order = np.argsort(-fours, axis=1, kind="stable")
    kept = np.zeros(fours.shape, np.bool_)
    np.put_along_axis(kept, order[:, :2], True, axis=1)
    moved = np.moveaxis(weight, axis, -1).shape
    return np.moveaxis(kept.reshape(moved), -1, axis)


def project(weight: Floats, axis: int = 1) -> Floats:
    """Return the nearest weight (in the sum of squares) that holds the pattern along `axis`."""
    projected: Floats = np.where(mask(weight, axis), weight, np.zeros((), weight.dtype))
    return projected


def holds(weight: Floats, axis: int = 1) -> bool:
    """Return whether at least two of every four weights along `axis` are zero."""
    if weight.shape[axis] % 4:
        return False
    fours = np.moveaxis(weight, axis, -1).reshape(-1, 4)
    return bool((np.count_nonzero(fours, axis=1) <= 2).all())


def retained(weight: Floats, axis: int = 1) -> float:
    """Return the summed magnitude of the weights that stay."""
    return float(np.abs(weight[mask(weight, axis)]).sum())


# ---- permutations


def search(columns: Floats) -> NDArray[np.int64]:
    """Return an order of the columns whose stripes of four keep more magnitude; the identity if none is found.

    Args:
        columns: (rows, channels), channels a multiple of 4: all that reads these channels, row by row.
    """
    size = columns.shape[1]
    sizes = np.abs(columns)
    if len(sizes) > _ROWS:  # the rows that have most to lose
        sizes = sizes[np.argsort(-sizes.sum(axis=1), kind="stable")[:_ROWS]]
    order, n = np.arange(size), size // 4
    step, moved = 0, np.zeros(n, int)  # at which step a stripe was last changed ...
    settled = np.zeros((n, n), int)  # ... and a pair last found to have nothing to swap
    for _ in range(_PASSES):
        changed = False
        for left, right in combinations(range(n), 2):
            step += 1
            if settled[left, right] > max(moved[left], moved[right]):
                continue
            places = np.r_[4 * left : 4 * left + 4, 4 * right : 4 * right + 4]
            swapped = _best_swap(sizes[:, order[places]])
            if swapped is not None:
                order[places] = order[places][swapped]
                moved[left] = moved[right] = step
                changed = True
            else:
                settled[left, right] = step
        if not changed:
            break
    better = _kept(np.abs(columns)[:, order]) > (1 + _BETTER) * _kept(np.abs(columns))
    return order if better else np.arange(size)


_SWAPS = np.array(
    [[*range(8)], *([j if k == i else i if k == j else k for k in range(8)] for i in range(4) for j in range(4, 8))]
)


def _best_swap(stripes: Floats) -> NDArray[np.int64] | None:
    """Return the order of eight columns after the swap between both stripes that gains most, None if none gains."""
    fours = stripes[:, _SWAPS].reshape(len(stripes), len(_SWAPS), 2, 4)
    totals = np.partition(fours, 2, axis=-1)[..., 2:].sum(axis=(0, 2, 3))
    best = int(np.argmax(totals))
    return _SWAPS[best] if totals[best] > totals[0] * (1 + _BETTER) else None


def _kept(sizes: Floats) -> float:
    return float(np.partition(sizes.reshape(-1, 4), 2, axis=1)[:, 2:].sum())


def reads(graph: Graph, group: Group, weights: Mapping[str, Floats], eligible: Sequence[str]) -> Floats | None:
    """Return what reads the channels of a group in eligible weights, as (rows, channels); None if a swap there cannot matter.

    A weight counts if the group's channels lie in it one by one and begin on a multiple of four, as they do everywhere but
    behind a flattened map and in the middle of some concats.
    """
    parts = []
    for member in group.members:
        if member.role == "consumes" and member.param in eligible and member.axis == 1:
            slots = np.flatnonzero(member.owner >= 0)
            plain = (
                len(slots) == group.size and slots[0] % 4 == 0 and np.array_equal(member.owner[slots], np.arange(group.size))
            )
            if plain and np.array_equal(slots, np.arange(slots[0], slots[0] + group.size)):
                parts.append(np.moveaxis(weights[member.param], 1, -1)[..., slots].reshape(-1, group.size))
    return np.concatenate(parts) if parts and group.size % 4 == 0 and group.size > 4 else None


def permuted(tensor: Floats, members: Sequence[Member], order: NDArray[np.int64]) -> Floats:
    """Return a parameter with the channels of a group in another order, along every axis that `members` name."""
    for member in members:
        index = np.arange(len(member.owner))
        for place, channel in enumerate(order.tolist()):
            index[list(member.slots(place))] = member.slots(channel)
        tensor = np.take(tensor, index, axis=member.axis)
    return tensor


def reorder(model: nn.Module, graph: Graph, chosen: Sequence[str]) -> list[int]:
    """Put the channels of every group into the order in which the chosen weights keep most; what is computed stays the same.

    Returns:
        Where each input of the last layer was before.
    """
    last = graph.layers[-1].weight
    shape = graph.shapes[last]
    slots: Floats = np.arange(float(shape[1])).reshape(-1, *[1] * (len(shape) - 2)) + np.zeros(shape)
    named: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in graph.prunable:
        weights = {name: tensor.detach().numpy() for name, tensor in named.items()}
        columns = reads(graph, group, weights, chosen)
        order = None if columns is None else search(columns)
        if order is None or np.array_equal(order, np.arange(group.size)):
            continue
        for name in {member.param for member in group.members}:
            members = [member for member in group.members if member.param == name]
            moved = permuted(weights[name], members, order)
            slots = permuted(slots, members, order) if name == last else slots
            with torch.no_grad():
                named[name].copy_(torch.from_numpy(np.ascontiguousarray(moved)))
    return [int(slot) for slot in slots[0].reshape(shape[1], -1)[:, 0]]
