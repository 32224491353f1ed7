"""Rules of pooling, resizing, reductions, softmax and attention."""

from collections.abc import Iterable, Sequence

import numpy as np

from deploypipe.graph.labels import Labels, along, drop_axes, expand_along, varies
from deploypipe.graph.tracer import Call, Layers, Rule, Seen, State, spread, tensors_in


def _stretched(labels: Labels, axes: Iterable[int], shape: Sequence[int]) -> Labels:
    """Return labels that do not change along `axes` for a result of another size there."""
    spread = along(labels)
    if spread is not None:
        return expand_along(spread[1], spread[0], shape)
    return drop_axes(labels, axes).expand(shape)


def over_space(n: int) -> Rule:
    """Make the rule of pooling, resizing or padding over the last `n` axes."""

    def rule(state: State, call: Call) -> Layers | list[Layers]:
        x = tensors_in(tuple(call.args.values()))[0]
        out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
        layers = []
        for labels in state.layers_of(x):
            space = [d for d in varies(labels) if d >= x.dim() - n]
            calm = state.ledger.tie_all(labels, space, call.where) if space else labels
            layers.append(_stretched(calm, range(x.dim() - n, x.dim()), out.shape))
        return [tuple(layers) for _ in call.out] if isinstance(call.out, (tuple, list)) else tuple(layers)

    return rule


def grid_sample(state: State, call: Call) -> Layers | list[Layers]:
    """Sampling at computed places: like resizing; the coordinates, which lie along an axis of the grid, stay whole."""
    state.freeze_all([call.args["grid"]], f"{call.where}: positions to read from")
    return over_space(2)(state, call)


def unfold(state: State, call: Call) -> Layers:
    """im2col: each channel becomes a run of kernel positions."""
    x, out = call.args["self"], call.out
    layers: Layers = ()
    for labels in state.layers_of(x):
        vector = state.collapse(labels, x.dim() - 3, call.where)
        layers += spread(np.repeat(vector, out.shape[-2] // len(vector)), out.dim() - 2, out)
    return layers


def _reduced_axes(call: Call) -> set[int]:
    x = call.args.get("self", call.args.get("input"))
    assert isinstance(x, Seen)
    dim = call.args.get("dim", call.args.get("dims"))
    if dim is None or dim == []:
        return set(range(x.dim()))
    return {int(d) % max(x.dim(), 1) for d in (dim if isinstance(dim, (tuple, list)) else [dim])}


def reduce(state: State, call: Call) -> Layers | list[Layers]:
    """A reduction: channels along the reduced axes alone stay whole; along others too, those that meet are tied."""
    x = tensors_in(tuple(call.args.values()))[0]
    axes = _reduced_axes(call)
    on, off = state.split_on(x, axes)
    for labels in on:
        if set(varies(labels)) <= axes:
            state.ledger.freeze(labels, f"{call.where}: reduces over the channels")
        else:
            off.append(state.ledger.tie_all(labels, axes & set(varies(labels)), call.where))
    outs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    layers = []
    for labels in off:
        spread = along(labels)
        if spread is not None:
            moved = spread[0] - (0 if outs[0].dim() == x.dim() else sum(d < spread[0] for d in axes))
            layers.append(expand_along(spread[1], moved, outs[0].shape))
            continue
        small = drop_axes(labels, axes)
        if outs[0].dim() < x.dim():
            small = small.squeeze(tuple(axes))
        layers.append(small.expand(outs[0].shape))
    return [tuple(layers) for _ in outs] if isinstance(call.out, (tuple, list)) else tuple(layers)


def along_axis(state: State, call: Call) -> Layers | list[Layers]:
    """Softmax, cumulative sums, sorting: channels along the axis stay whole, the shape is kept but for its size there."""
    x = tensors_in(tuple(call.args.values()))[0]
    axes = _reduced_axes(call)
    on, off = state.split_on(x, axes)
    for labels in on:
        if set(varies(labels)) <= axes:
            state.ledger.freeze(labels, f"{call.where}: runs across the channels")
        else:  # across branches of the same channels, as in attention over them: those that meet are tied
            off.append(state.ledger.tie_all(labels, axes & set(varies(labels)), call.where))
    if isinstance(call.out, (tuple, list)):
        return [tuple(_stretched(labels, axes, out.shape) for labels in off) for out in call.out]
    return tuple(off)


def attention(state: State, call: Call) -> Layers:
    """Fused attention: queries, keys and values stay whole."""
    state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: attention (heads share one projection)")
    return ()


def reads_values(state: State, call: Call) -> Layers:
    """A value is read into Python, where it may steer anything."""
    state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: values are read by Python code")
    return ()
