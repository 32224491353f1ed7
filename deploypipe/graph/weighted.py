"""Rules of the operations that mix channels through a weight: convolution, linear, matrix product, embedding."""

from math import prod
from typing import Any

import numpy as np

from deploypipe.graph.dims import Dim
from deploypipe.graph.labels import Labels, Vector, along, drop_axes, flat, varies
from deploypipe.graph.tracer import Call, LayerCall, Seen, State, constant, spread
from deploypipe.types import Kind


def convolution(state: State, call: Call) -> tuple[Labels, ...]:
    """conv1d/2d/3d: consume the input's channels, emit the output's; depthwise passes them, groups tie them."""
    return _convolution(state, call, transposed=False)


def convolution_transposed(state: State, call: Call) -> tuple[Labels, ...]:
    """conv_transpose1d/2d/3d: the weight is (in, out / groups, ...)."""
    return _convolution(state, call, transposed=True)


def _channels(state: State, call: Call, x: Seen, axis: int) -> Vector:
    """Return the labels along the channel axis of a convolution's input; freeze those that lie elsewhere."""
    layers = state.layers_of(x)
    known = along(layers[0]) if len(layers) == 1 else None
    if known is not None and known[0] == axis:  # the quick case
        return known[1]
    on, off = state.split_on(x, {axis})
    for labels in off:
        state.ledger.freeze(labels, f"{call.where}: channels lie along a spatial axis")
    if not on:
        return constant(x.shape[axis])
    vector = state.collapse(on[0], axis, call.where)
    for labels in on[1:]:
        state.ledger.tie_flat(vector, state.collapse(labels, axis, call.where), call.where)
    return vector


def _convolution(state: State, call: Call, *, transposed: bool) -> tuple[Labels, ...]:
    x, weight, bias, groups = call.args["input"], call.args["weight"], call.args["bias"], int(call.args["groups"])
    n_space = weight.dim() - 2
    axis = x.dim() - n_space - 1
    n_in, n_out = x.shape[axis], call.out.shape[axis]
    vec = _channels(state, call, x, axis)
    kind: Kind
    if groups == 1:
        kind = "transposed" if transposed else "conv"
        state.attach(weight, 0 if transposed else 1, vec, "consumes", call.where)
        produced = state.along(weight, 1 if transposed else 0, call.where, "produces")
        out_vec = constant(n_out) if produced is None else produced
    elif groups == n_in:
        kind = "depthwise"
        out_vec = vec if n_out == n_in else np.repeat(vec, n_out // n_in)
        state.attach(weight, 0, vec if transposed else out_vec, "carries", call.where)
        _need_groups(state, call, vec, 1)
    else:
        kind = "grouped"
        out_vec = _grouped(state, call, vec, transposed=transposed)
    state.attach(bias, 0, out_vec, "carries" if kind == "depthwise" else "produces", call.where)
    state.attribute(call, "in_channels", vec)
    state.attribute(call, "out_channels", out_vec)
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_tuple(call.args[key], n_space) for key in ("stride", "dilation"))
    geometry = {
        "kernel": kernel,
        "stride": stride,
        "padding": _padding(call.args["padding"], kernel, dilation),
        "dilation": dilation,
        "in_size": tuple(x.shape[axis + 1 :]),
        "out_size": tuple(call.out.shape[axis + 1 :]),
        "batch": x.shape[0] if axis else 1,
        "positions": (x.shape[0] if axis else 1) * prod((x if transposed else call.out).shape[axis + 1 :]),
    }
    _record(state, call, kind, geometry, vec, out_vec, groups)
    return spread(out_vec, axis, call.out)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    """Bring aten's ways to write a size (int, list of one, list of n) into a tuple of n."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) if len(value) == n else tuple(value) * n


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Return padding in numbers, "same" and "valid" too: one for each axis, or all in front and then all behind."""
    if not isinstance(value, str):
        return _tuple(value, len(kernel))
    total = [gap * (size - 1) if value == "same" else 0 for size, gap in zip(kernel, dilation, strict=True)]
    front, behind = tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)
    return front if front == behind else front + behind


def _grouped(state: State, call: Call, vec: Vector, *, transposed: bool) -> Vector:
    """Tie what belongs to one group of a grouped convolution: the unit that can go is a whole group."""
    weight, groups = call.args["weight"], int(call.args["groups"])
    blocks = vec.reshape(groups, -1)
    why = f"{call.where}: channels of one convolution group"
    state.ledger.tie_flat(vec, np.repeat(blocks[:, 0], blocks.shape[1]), why)
    if transposed:
        state.attach(weight, 0, vec, "consumes", call.where)
        out_vec = np.repeat(blocks[:, 0], weight.shape[1])
    else:
        produced = state.along(weight, 0, call.where, "produces")
        out_vec = constant(weight.shape[0]) if produced is None else produced
        state.ledger.tie_flat(out_vec, np.repeat(blocks[:, 0], len(out_vec) // groups), why)
    _need_groups(state, call, vec, blocks.shape[1])
    return out_vec


def _need_groups(state: State, call: Call, vec: Vector, divisor: int) -> None:
    written = call.sizes[0] if call.sizes else None
    if isinstance(written, Dim) and written.source is not None:
        state.ledger.same_width.append((flat(written.source), vec, f"{call.where}: its groups are the width of another tensor"))
    elif not state.attribute(call, "groups", vec, divisor=divisor):
        state.ledger.frozen.append((vec, f"{call.where}: the number of groups is written in forward, not in a module"))


def linear(state: State, call: Call) -> tuple[Labels, ...]:
    """Linear over the last axis; channels that lie along other axes pass through."""
    x, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
    last = x.dim() - 1
    on, off = state.split_on(x, {last})
    vec = constant(x.shape[last])
    for i, labels in enumerate(on):
        vector = state.collapse(labels, last, call.where)
        if i:
            state.ledger.tie_flat(vec, vector, call.where)
        vec = vector
    state.attach(weight, 1, vec, "consumes", call.where)
    produced = state.along(weight, 0, call.where, "produces")
    out_vec = constant(call.out.shape[-1]) if produced is None else produced
    state.attach(bias, 0, out_vec, "produces", call.where)
    state.attribute(call, "in_features", vec)
    state.attribute(call, "out_features", out_vec)
    positions = prod(x.shape[:-1])
    geometry = {"batch": x.shape[0] if x.dim() > 1 else 1, "positions": positions}
    _record(state, call, "linear", geometry, vec, out_vec, 1)
    passing = tuple(drop_axes(labels, [last]).expand(call.out.shape) for labels in off)
    return passing + spread(out_vec, call.out.dim() - 1, call.out)


def _record(state: State, call: Call, kind: Kind, geometry: dict[str, Any], vec: Vector, out_vec: Vector, groups: int) -> None:
    weight, bias = call.args["weight"].name, "" if call.args.get("bias") is None else call.args["bias"].name
    owner = weight.rpartition(".")[0]
    name = owner if owner and weight.endswith(".weight") else weight or call.module
    group_labels = vec[:: len(vec) // groups] if groups > 1 else None
    call.out.layer = len(state.layers)
    state.layers.append(LayerCall(name, kind, weight, bias, geometry, vec, out_vec, groups, group_labels))


def matmul(state: State, call: Call) -> tuple[Labels, ...]:
    """Matrix product: channels along the summed axis are consumed, others pass to the result."""
    a, b = _operands(call)
    if a.dim() < 2 or b.dim() < 2:
        state.freeze_all((a, b), f"{call.where}: product with a vector")
        return ()
    contracted: list[Labels | None] = [None, None]
    passing: list[tuple[int, Labels]] = []
    for side, (tensor, summed) in enumerate(((a, a.dim() - 1), (b, b.dim() - 2))):
        on, off = state.split_on(tensor, {summed})
        for labels in on:
            if len(varies(labels)) > 1 or contracted[side] is not None:
                state.ledger.freeze(labels, f"{call.where}: channels lie along several axes (attention heads)")
            else:
                contracted[side] = labels
        passing += [(side, labels) for labels in off]
    _contract(state, call, a, b, contracted)
    results: list[Labels] = []
    for side, labels in passing:
        tensor, summed = ((a, a.dim() - 1), (b, b.dim() - 2))[side]
        view = drop_axes(labels, [summed]).expand(*call.out.shape[: -tensor.dim()], *_out_shape(call.out, tensor, side))
        results.append(view)
        if tensor.name or (tensor.weight and not (a, b)[1 - side].weight):
            state.set_role_by_labels(labels, "produces")
    _batch_axes(state, call, (a, b), passing)
    for weight, other, summed_labels in ((b, a, contracted[0]), (a, b, contracted[1])):
        if weight.dim() == 2 and (weight.name or (weight.weight and not other.weight)):
            _record_product(state, call, weight, other, summed_labels)
            break
    return tuple(results)


def _operands(call: Call) -> tuple[Seen, Seen]:
    keys = [key for key, value in call.args.items() if isinstance(value, Seen)]
    return call.args[keys[-2]], call.args[keys[-1]]


def _out_shape(out: Seen, tensor: Seen, side: int) -> list[int]:
    shape = list(out.shape[out.dim() - tensor.dim() :])
    shape[-1 if side == 0 else -2] = out.shape[-1 if side == 0 else -2]
    return shape


def _contract(state: State, call: Call, a: Seen, b: Seen, contracted: list[Labels | None]) -> None:
    left, right = contracted
    if left is not None and right is not None:
        state.ledger.tie_flat(
            state.collapse(left, a.dim() - 1, call.where), state.collapse(right, b.dim() - 2, call.where), call.where
        )
    for tensor, labels, other in ((a, left, right), (b, right, left)):
        if labels is None:
            continue
        if other is None:
            state.ledger.freeze(labels, f"{call.where}: multiplied with a matrix of fixed size")
        if tensor.weight:
            state.set_role_by_labels(labels, "consumes")
        elif not (a.weight or b.weight):  # with one of them masked nowhere, a dropped channel would stay in the sum
            state.ledger.freeze(labels, f"{call.where}: product of two activations, no weight reads the channels")


def _batch_axes(state: State, call: Call, pair: tuple[Seen, Seen], passing: list[tuple[int, Labels]]) -> None:
    """Freeze channels along a batch axis of a product: the other operand has that axis too (attention heads)."""
    for side, labels in passing:
        if any(d < pair[side].dim() - 2 for d in varies(labels)) and pair[1 - side].dim() > 2:
            state.ledger.freeze(labels, f"{call.where}: channels lie along a batch axis (attention heads)")


def _record_product(state: State, call: Call, weight: Seen, other: Seen, contracted: Labels | None) -> None:
    """Record a matrix product with a parameter, or a view of one, as a layer; its output axis is the one that is not summed."""
    right = int(weight is _operands(call)[1])
    summed = other.dim() - 1 if right else other.dim() - 2
    vec = constant(other.shape[summed]) if contracted is None else state.collapse(contracted, summed, call.where)
    in_vec, out_vec = state.along(weight, 1 - right, call.where, "consumes"), state.along(weight, right, call.where, "produces")
    born = [state.born(vector) for vector in (in_vec, out_vec) if vector is not None]
    name = weight.name or next((name for name in born if len(state.shapes.get(name, ())) == 2), "")
    if out_vec is None or not name:
        return  # made of no matrix
    geometry = {"batch": other.shape[0], "positions": other.numel() // other.shape[summed]}
    state.layers.append(LayerCall(name, "matmul", name, "", geometry, vec, out_vec, 1, None))


def embedding(state: State, call: Call) -> tuple[Labels, ...]:
    """Table look-up: emits the columns of the table."""
    produced = state.along(call.args["weight"], 1, call.where, "produces")
    if produced is None:
        return ()
    state.attribute(call, "embedding_dim", produced)
    return spread(produced, call.out.dim() - 1, call.out)


WEIGHTED = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution_transposed),
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "embedding": embedding,
}
