"""Rules of the operations that split and merge axes: view and its relatives, shuffles."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deploypipe.graph.dims import Dim
from deploypipe.graph.labels import Labels, drop_axes, expand_along, flat, tighten, varies
from deploypipe.graph.tracer import Call, Seen, State

Layers = tuple[Labels, ...]


def reshape(state: State, call: Call) -> Layers:
    """view, reshape, flatten, unflatten: apply to the labels, then see which of the new axes can shrink.

    After a split (C -> groups, C / groups) one axis can be cut; the labels along the other axes are tied. It is the
    axis whose size was derived from the tensor (or left to -1); if both were written as numbers, the channels stay.
    """
    x, out = call.args["self"], call.out
    sizes = _written(state, call, x.dim(), out.dim())
    layers = []
    for before in state.layers_of(x):
        after = _reshaped(before, out.shape)
        axes = varies(after)
        derived = [d for d in axes if sizes is None or follows(state, call, sizes[d], before)]
        if not axes or (len(axes) == 1 and derived):
            layers.append(after)
        elif len(derived) == 1 or (len(axes) > 1 and derived and sizes is None):
            keep = max(derived, key=lambda d: after.shape[d])
            layers.append(state.ledger.tie_all(after, [d for d in axes if d != keep], f"{call.where}: split axis"))
        else:
            state.ledger.freeze(after, f"{call.where}: reshaped to a size that is written in forward")
            layers.append(after)
    _refuse_borrowed(state, call, sizes or [], layers)
    return tuple(layers)


def _refuse_borrowed(state: State, call: Call, sizes: Sequence[Any], layers: Sequence[Labels]) -> None:
    """Freeze channels whose number is written as the size of an axis on which no channels lie."""
    for axis, size in enumerate(sizes):
        if isinstance(size, Dim) and size.source is not None and not any(axis in varies(labels) for labels in layers):
            state.ledger.freeze(size.source, f"{call.where}: its number of channels is the size of another tensor's axis")


def _reshaped(labels: Labels, shape: Sequence[int]) -> Labels:
    """Reshape labels without spreading them out: runs of axes without channels are taken as one position."""
    small_in, small_out = list(labels.shape), list(shape)
    busy = set(varies(labels))
    for old, new in _blocks(labels.shape, shape):
        if not busy & set(old):
            for d in old:
                small_in[d] = 1
            for d in new:
                small_out[d] = 1
    first = drop_axes(labels, [d for d, n in enumerate(small_in) if n == 1])
    return tighten(first.reshape(small_out)).expand(shape)


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest runs of axes with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        mine, theirs = [], []
        left = right = 1
        while True:
            if left <= right and i < len(old):
                left *= old[i]
                mine.append(i)
                i += 1
            elif j < len(new):
                right *= new[j]
                theirs.append(j)
                j += 1
            else:
                break
            if left == right and mine and theirs:
                break
        yield mine, theirs


def _written(state: State, call: Call, rank_in: int, rank_out: int) -> list[Any] | None:
    """Return the sizes of the result as `forward` wrote them; None if all follow from the input."""
    if call.name in ("flatten", "ravel"):
        return None
    if call.name in ("view_as", "reshape_as"):
        return read_off(state, call.args["other"])
    if call.name == "unflatten":
        dim = int(call.args["dim"]) % rank_in
        sizes = list(call.sizes or call.args["sizes"])
        return [-1] * dim + sizes + [-1] * (rank_in - dim - 1)
    return list(call.sizes) if call.sizes is not None and len(call.sizes) == rank_out else None


def read_off(state: State, tensor: Seen) -> list[Any]:
    """Return the sizes of a tensor as if `forward` had read them: each knows the channels along its axis."""
    layers = state.layers_of(tensor)
    sources = [next((labels for labels in layers if axis in varies(labels)), None) for axis in range(tensor.dim())]
    return [Dim(size, source, lambda *_: None) for size, source in zip(tensor.shape, sources, strict=True)]


def follows(state: State, call: Call, size: Any, labels: Labels) -> bool:
    """Say whether an axis of this written size shrinks with the channels `labels`."""
    if isinstance(size, Dim):
        if size.source is None:
            return False
        if size.source is not labels:
            state.ledger.same_width.append(
                (flat(size.source), flat(labels), f"{call.where}: its size is taken from another tensor")
            )
        return True
    return bool(size == -1)


def pixel_shuffle(state: State, call: Call) -> Layers:
    """(C r r, H, W) -> (C, H r, W r): the r*r channels of one output channel meet in space, and go together."""
    r = int(call.args["upscale_factor"])
    layers = []
    for labels in state.layers_of(call.args["self"]):
        *lead, c, h, w = labels.shape
        if varies(labels) == (len(lead),):
            vector = state.collapse(labels, len(lead), call.where)
            first = vector.reshape(-1, r * r)[:, 0]
            state.ledger.tie_flat(vector, np.repeat(first, r * r), f"{call.where}: channels of one pixel")
            layers.append(expand_along(first, len(lead), call.out.shape))
            continue
        view = labels.reshape(*lead, c // (r * r), r, r, h, w)
        n = len(lead)
        moved = view.permute(*range(n), n, n + 3, n + 1, n + 4, n + 2)
        layers.append(tighten(moved.reshape(call.out.shape)))
    return tuple(layers)


def pixel_unshuffle(state: State, call: Call) -> Layers:
    """(C, H r, W r) -> (C r r, H, W): each channel becomes a run of r*r channels."""
    r = int(call.args["downscale_factor"])
    layers = []
    for labels in state.layers_of(call.args["self"]):
        *lead, c, h, w = labels.shape
        view = labels.reshape(*lead, c, h // r, r, w // r, r)
        n = len(lead)
        moved = view.permute(*range(n), n, n + 2, n + 4, n + 1, n + 3)
        layers.append(tighten(moved.reshape(call.out.shape)))
    return tuple(layers)


def channel_shuffle(state: State, call: Call) -> Layers:
    """(groups, C / groups) transposed: channels at the same place of every group are tied."""
    groups = int(call.args["groups"])
    layers = []
    for labels in state.layers_of(call.args["self"]):
        if set(varies(labels)) - {1}:
            state.ledger.freeze(labels, f"{call.where}: channels do not lie along axis 1")
        rest = [d for d in range(labels.dim()) if d != 1]
        vector = drop_axes(labels, rest).reshape(-1).numpy()
        blocks = vector.reshape(groups, -1)
        state.ledger.tie_flat(vector, np.tile(blocks[0], groups), f"{call.where}: shuffled groups")
        layers.append(labels.reshape(labels.shape[0], groups, -1, *labels.shape[2:]).transpose(1, 2).reshape(labels.shape))
    return tuple(tighten(labels) for labels in layers)
