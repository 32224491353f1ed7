"""Rules of the operations that move elements: permute, slice, split, join, broadcast, pad."""

import numpy as np
import torch

from deploypipe.graph.labels import Labels, Vector, along, drop_axes, expand_along, tighten, varies
from deploypipe.graph.tracer import Call, Layers, Rule, Seen, State, constant, tensors_in


def _axis(call: Call, key: str = "dim") -> int:
    """Return a dimension argument as a non-negative axis of the first tensor."""
    value = int(call.args[key])
    first = call.args.get("self", call.args.get("input"))
    return value % first.dim() if isinstance(first, Seen) else value


def move(state: State, call: Call) -> Layers | list[Layers]:
    """An operation that only moves elements: apply it to the labels."""
    if "self" not in call.args:  # vstack and its like hand on a whole list
        state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: takes a list of tensors")
        return [()] * len(tensors_in(call.out))
    x = call.args["self"]
    in_place = call.name.endswith("_")  # the operation would change the shape of the labels that others know
    moved = [call.on(labels.detach() if in_place else labels) for labels in state.layers_of(x)]
    if isinstance(call.out, (tuple, list)):
        return [tuple(tighten(results[i]) for results in moved) for i in range(len(call.out))]
    return tuple(tighten(labels) for labels in moved)


def by_position(*keys: str) -> Rule:
    """Make the rule of a movement that picks positions along some axes: channels there stay whole."""

    def rule(state: State, call: Call) -> Layers | list[Layers]:
        x = call.args["self"]
        axes: set[int] = set()
        for key in keys:
            value = call.args.get(key)
            values = value if isinstance(value, (tuple, list)) else [0 if value is None else value]
            axes |= {int(v) % max(x.dim(), 1) for v in values}
        if call.name == "roll" and not call.args["dims"]:
            axes = set(range(x.dim()))
        on, off = state.split_on(x, axes)
        for labels in on:
            state.ledger.freeze(labels, f"{call.where}: channels are picked by position")
        return tuple(off) if call.name == "roll" and not on else move(state, call)

    return rule


def slice_(state: State, call: Call) -> Layers | list[Layers]:
    """A slice of the whole axis changes nothing; another one picks by position."""
    axis = _axis(call)
    if call.out.shape[axis] == call.args["self"].shape[axis]:
        return move(state, call)
    return by_position("dim")(state, call)


def index(state: State, call: Call) -> Layers:
    """Advanced indexing: channels along an indexed axis stay whole."""
    x, indices = call.args["self"], call.args["indices"]
    axes, axis = set(), 0
    for entry in indices:
        rank = entry.dim() if isinstance(entry, Seen) and entry.dtype == torch.bool else 1
        if entry is not None:
            axes |= set(range(axis, axis + rank))
        axis += rank
    on, off = state.split_on(x, axes)
    for labels in on:
        state.ledger.freeze(labels, f"{call.where}: channels are picked by position")
    return tuple(tighten(call.on(labels)) for labels in on + off)


def chunk(state: State, call: Call) -> list[Layers]:
    """Equal parts of an axis: the parts are tied, so that all keep the same number of channels."""
    return _chunk(state, call, call.args["self"], len(call.out), call.args["dim"])  # it may make fewer than it was asked for


def _chunk(state: State, call: Call, x: Seen, n: int, dim: int) -> list[Layers]:
    axis = dim % x.dim()
    on, off = state.split_on(x, {axis})
    results: list[list[Labels]] = [[] for _ in range(n)]
    for labels in on:
        if x.shape[axis] % n:
            state.ledger.freeze(labels, f"{call.where}: parts of unequal size")
        parts = labels.chunk(n, axis)
        for i, part in enumerate(parts):
            if part.shape == parts[0].shape:
                state.ledger.tie(part, parts[0], f"{call.where}: equal parts")
            results[i].append(part)
    for labels in off:
        for i, part in enumerate(labels.chunk(n, axis)):
            results[i].append(part)
    return [tuple(layers) for layers in results]


def split(state: State, call: Call) -> list[Layers]:
    """Parts of literal size stay whole; parts whose size was read off the tensor are equal parts."""
    x, axis = call.args["self"], _axis(call)
    n = len(call.out)
    if call.sizes and x.shape[axis] % n == 0 and len({part.shape[axis] for part in call.out}) == 1:
        return _chunk(state, call, x, n, axis)
    result = by_position("dim")(state, call) if n > 1 else move(state, call)
    assert isinstance(result, list)
    return result


def cat(state: State, call: Call) -> Layers:
    """Concatenation of labels; parts without channels count as constants. Also stack."""
    tensors = [tensor for tensor in call.args["tensors"] if tensor.shape != (0,)]  # torch lets a list begin with an empty one
    found = [state.layers_of(tensor) for tensor in tensors]
    if not any(found):
        return ()
    axis = int(call.args["dim"]) % call.out.dim()
    joined = _joined(found, axis) if call.name != "stack" else None
    if joined is not None:
        return (expand_along(joined, axis, call.out.shape),)
    parts = []
    for tensor, own in zip(tensors, found, strict=True):
        layers = [labels for labels in own if varies(labels)] or list(own)
        if len(layers) > 1:
            state.freeze_all(tensors, f"{call.where}: joins tensors with channels along several axes")
            return ()
        parts.append(layers[0] if layers else torch.full((), -1, dtype=torch.int32).expand(tensor.shape))
    if call.name == "stack":
        parts = [labels.unsqueeze(axis) for labels in parts]
    busy = {d for labels in parts for d in varies(labels)}
    if busy and axis not in busy:  # joined along tokens or batches: all parts must keep the same channels
        small = [drop_axes(labels, [axis]) for labels in parts]
        for labels in small[1:]:
            state.ledger.tie(small[0], labels, call.where)
        return (small[0].expand(call.out.shape),)
    calm = set(range(call.out.dim())) - busy - {axis}
    return (tighten(torch.cat([drop_axes(labels, calm) for labels in parts], axis)).expand(call.out.shape),)


def _joined(found: list[Layers], axis: int) -> Vector | None:
    """Return the labels along `axis` of the joined tensors, if channels lie there and nowhere else: the usual, quick case."""
    vectors = []
    for layers in found:
        spread = along(layers[0]) if len(layers) == 1 else None
        if spread is None or spread[0] != axis:
            return None
        vectors.append(spread[1])
    return np.concatenate(vectors)


def expand(state: State, call: Call) -> Layers:
    """Broadcast; an axis of size 1 that is spread to a literal size is rigid from then on."""
    x, out = call.args["self"], call.out
    layers = tuple(labels.expand(out.shape) for labels in state.layers_of(x))
    lead = out.dim() - x.dim()
    for axis in range(out.dim()):
        grown = out.shape[axis] > 1 and (axis < lead or x.shape[axis - lead] == 1)
        written = call.sizes is not None and len(call.sizes) == out.dim()
        if grown and written and type(call.sizes[axis]) is int:  # type: ignore[index]
            layers += (expand_along(constant(out.shape[axis]), axis, out.shape),)
    return layers


def pad_constant(state: State, call: Call) -> Layers:
    """Padding with a value: new positions along the channel axis hold no channels."""
    layers = []
    for labels in state.layers_of(call.args["self"]):
        busy, pad = varies(labels), list(call.args["pad"])
        for i in range(len(pad)):
            if labels.dim() - 1 - i // 2 not in busy:
                pad[i] = 0
            elif pad[i] < 0:
                state.ledger.freeze(labels, f"{call.where}: channels are cut off by position")
        calm = [d for d in range(labels.dim()) if d not in busy]
        layers.append(torch.constant_pad_nd(drop_axes(labels, calm), pad, -1).expand(call.out.shape))
    return tuple(layers)


def glu(state: State, call: Call) -> Layers:
    """Gated linear unit: the two halves of an axis are tied pairwise."""
    return _chunk(state, call, call.args["self"], 2, call.args["dim"])[0]
