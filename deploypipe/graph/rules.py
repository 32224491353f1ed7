"""The table: aten operation -> what it does to channel labels. An operation without a row is decomposed, else frozen."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploypipe.graph.labels import Labels, Vector, drop_axes, expand_along, tighten, varies
from deploypipe.graph.reshape import channel_shuffle, pixel_shuffle, pixel_unshuffle, reshape
from deploypipe.graph.tracer import Call, Rule, State, constant, spread
from deploypipe.graph.weighted import WEIGHTED

Layers = tuple[Labels, ...]


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among (nested) arguments."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []


# ---- element by element --------------------------------------------------------------------------------------------


def elementwise(state: State, call: Call) -> Layers:
    """Positions meet positions: tie the labels found there; a parameter that takes part becomes a member."""
    shape = call.out.shape
    operands = [t for t in tensors_in(tuple(call.args.values())) if t.numel() > 1]
    merged: list[Labels] = []
    for tensor in operands:
        for labels in state.layers_of(tensor):
            _merge(state, call, merged, labels.expand(shape))
    for labels in merged:
        for axis in varies(labels):
            for tensor in operands:
                _check_rigid(state, call, labels, axis, tensor)
    return tuple(merged)


def _merge(state: State, call: Call, merged: list[Labels], labels: Labels) -> None:
    """Add a layer to those of the result; layers that change along a common axis are tied."""
    mine = set(varies(labels))
    for i, other in enumerate(merged):
        theirs = set(varies(other))
        if mine & theirs:
            state.ledger.tie(other, labels, call.where)
            if not theirs >= mine:
                if not mine >= theirs:
                    state.ledger.freeze(labels, f"{call.where}: channels along crossing axes")
                merged[i] = labels
            return
    if mine:
        merged.append(labels)


def _check_rigid(state: State, call: Call, labels: Labels, axis: int, tensor: Tensor) -> None:
    """Freeze labels that meet a tensor which has a size of its own, but no channels, along `axis`."""
    axis -= labels.dim() - tensor.dim()
    if axis < 0 or tensor.size(axis) == 1 or tensor.stride(axis) == 0:
        return
    if not any(axis in varies(own) for own in state.layers_of(tensor)):
        state.ledger.freeze(labels, f"{call.where}: combined with a tensor of fixed size (an input, a mask or a constant)")


def same(state: State, call: Call) -> Layers:
    """The result has the shape and the channels of the first tensor."""
    return state.layers_of(tensors_in(tuple(call.args.values()))[0])


def overwrite(state: State, call: Call) -> Layers:
    """Writing into (a part of) another tensor: what is written and what is written to stay whole."""
    state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: written in place by position")
    return same(state, call)


def glu(state: State, call: Call) -> Layers:
    """Gated linear unit: the two halves of an axis are tied pairwise."""
    return _chunk(state, call, call.args["self"], 2, call.args["dim"])[0]


# ---- movement ------------------------------------------------------------------------------------------------------


def _axis(call: Call, key: str = "dim") -> int:
    """Return a dimension argument as a non-negative axis of the first tensor."""
    value = int(call.args[key])
    first = call.args.get("self", call.args.get("input"))
    return value % first.dim() if isinstance(first, Tensor) else value


def move(state: State, call: Call) -> Layers | list[Layers]:
    """An operation that only moves elements: apply it to the labels."""
    x = call.args["self"]
    moved = [call.args["func"](labels) for labels in state.layers_of(x)]
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
        rank = entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1
        if entry is not None:
            axes |= set(range(axis, axis + rank))
        axis += rank
    on, off = state.split_on(x, axes)
    for labels in on:
        state.ledger.freeze(labels, f"{call.where}: channels are picked by position")
    return tuple(tighten(call.args["func"](labels)) for labels in on + off)


def chunk(state: State, call: Call) -> list[Layers]:
    """Equal parts of an axis: the parts are tied, so that all keep the same number of channels."""
    return _chunk(state, call, call.args["self"], int(call.args["chunks"]), call.args["dim"])


def _chunk(state: State, call: Call, x: Tensor, n: int, dim: int) -> list[Layers]:
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
    tensors = call.args["tensors"]
    if not any(state.layers_of(tensor) for tensor in tensors):
        return ()
    parts = []
    for tensor in tensors:
        layers = [labels for labels in state.layers_of(tensor) if varies(labels)] or list(state.layers_of(tensor))
        if len(layers) > 1:
            state.freeze_all(tensors, f"{call.where}: joins tensors with channels along several axes")
            return ()
        parts.append(layers[0] if layers else torch.full((), -1, dtype=torch.int32).expand(tensor.shape))
    axis = int(call.args["dim"]) % call.out.dim()
    if call.name == "stack":
        parts = [labels.unsqueeze(axis) for labels in parts]
    calm = set(range(call.out.dim())) - {axis}.union(*(varies(labels) for labels in parts))
    joined = torch.cat([drop_axes(labels, calm) for labels in parts], axis).expand(call.out.shape)
    return (joined if len(parts) > 1 and varies(parts[0]) else tighten(joined),)


def expand(state: State, call: Call) -> Layers:
    """Broadcast; an axis of size 1 that is spread to a literal size is rigid from then on."""
    x, out = call.args["self"], call.out
    layers = tuple(labels.expand(out.shape) for labels in state.layers_of(x))
    lead = out.dim() - x.dim()
    for axis in range(out.dim()):
        grown = out.shape[axis] > 1 and (axis < lead or x.shape[axis - lead] == 1)
        written = call.sizes is not None and len(call.sizes) == out.dim()
        if grown and written and type(call.sizes[axis]) is int:  # type: ignore[index]
            layers += (expand_along(torch.from_numpy(constant(out.shape[axis])), axis, out.shape),)
    return layers


def pad_constant(state: State, call: Call) -> Layers:
    """Padding with a value: the new positions hold no channels."""
    pad = call.args["pad"]
    return tuple(tighten(torch.constant_pad_nd(labels, pad, -1)) for labels in state.layers_of(call.args["self"]))


# ---- space and reductions ------------------------------------------------------------------------------------------


def over_space(n: int) -> Rule:
    """Make the rule of pooling, resizing or padding over the last `n` axes."""

    def rule(state: State, call: Call) -> Layers | list[Layers]:
        x = tensors_in(tuple(call.args.values()))[0]
        out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
        layers = []
        for labels in state.layers_of(x):
            space = [d for d in varies(labels) if d >= x.dim() - n]
            calm = state.ledger.tie_all(labels, space, call.where) if space else labels
            layers.append(drop_axes(calm, range(x.dim() - n, x.dim())).expand(out.shape))
        return [tuple(layers) for _ in call.out] if isinstance(call.out, (tuple, list)) else tuple(layers)

    return rule


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
    assert isinstance(x, Tensor)
    dim = call.args.get("dim", call.args.get("dims"))
    if dim is None or dim == []:
        return set(range(x.dim()))
    return {int(d) % max(x.dim(), 1) for d in (dim if isinstance(dim, (tuple, list)) else [dim])}


def reduce(state: State, call: Call) -> Layers | list[Layers]:
    """A reduction: channels along the reduced axes stay whole, others pass."""
    x = tensors_in(tuple(call.args.values()))[0]
    axes = _reduced_axes(call)
    on, off = state.split_on(x, axes)
    for labels in on:
        state.ledger.freeze(labels, f"{call.where}: reduces over the channels")
    outs = call.out if isinstance(call.out, (tuple, list)) else [call.out]
    layers = []
    for labels in off:
        small = drop_axes(labels, axes)
        if outs[0].dim() < x.dim():
            small = small.squeeze(tuple(axes))
        layers.append(small.expand(outs[0].shape))
    return [tuple(layers) for _ in outs] if isinstance(call.out, (tuple, list)) else tuple(layers)


def along_axis(state: State, call: Call) -> Layers | list[Layers]:
    """Softmax, cumulative sums, sorting: channels along the axis stay whole, the shape is kept."""
    x = tensors_in(tuple(call.args.values()))[0]
    on, off = state.split_on(x, _reduced_axes(call))
    for labels in on:
        state.ledger.freeze(labels, f"{call.where}: runs across the channels")
    if isinstance(call.out, (tuple, list)):
        return [tuple(labels for labels in off if labels.shape == out.shape) for out in call.out]
    return tuple(off)


def attention(state: State, call: Call) -> Layers:
    """Fused attention: queries, keys and values stay whole."""
    state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: attention (heads share one projection)")
    return ()


def reads_values(state: State, call: Call) -> Layers:
    """A value is read into Python, where it may steer anything."""
    state.freeze_all(tensors_in(tuple(call.args.values())), f"{call.where}: values are read by Python code")
    return ()


# ---- normalisation -------------------------------------------------------------------------------------------------


def _carry(state: State, call: Call, vector: Vector, attribute: str) -> None:
    for key in ("weight", "bias", "running_mean", "running_var"):
        state.attach(call.args.get(key), 0, vector, "carries", call.where)
    state.attribute(call, attribute, vector)


def per_channel_norm(state: State, call: Call) -> Layers:
    """Batch and instance norm: statistics for each channel, so channels pass."""
    x = call.args["input"]
    layers = []
    for labels in state.layers_of(x):
        if varies(labels) and 1 not in varies(labels):
            state.ledger.freeze(labels, f"{call.where}: channels do not lie along axis 1")
            layers.append(labels)
            continue
        vector = state.collapse(labels, 1, call.where)
        _carry(state, call, vector, "num_features")
        layers.append(expand_along(torch.from_numpy(vector), 1, x.shape))
    return tuple(layers)


def layer_norm(state: State, call: Call) -> Layers:
    """Layer and RMS norm: statistics across channels; they may go, but that changes the statistics."""
    x, rank = call.args["input"], len(call.args["normalized_shape"])
    layers = []
    for labels in state.layers_of(x):
        inside = [d for d in varies(labels) if d >= x.dim() - rank]
        if len(inside) == 1:
            axis, position = inside[0], inside[0] - (x.dim() - rank)
            vector = state.collapse(labels, axis, call.where)
            for key in ("weight", "bias"):
                state.attach(call.args.get(key), position, vector, "carries", call.where)
            state.ledger.normalise(labels)
            if not state.attribute(call, "normalized_shape", vector, index=position) and not call.sizes:
                state.ledger.freeze(labels, f"{call.where}: normalised shape is written in forward")
            labels = expand_along(torch.from_numpy(vector), axis, x.shape)
        elif inside:
            state.ledger.freeze(labels, f"{call.where}: channels lie along several normalised axes")
        layers.append(labels)
    return tuple(layers)


def group_norm(state: State, call: Call) -> Layers:
    """Group norm: the unit that can go is a whole norm group; one group over all channels is like layer norm."""
    x, groups = call.args["input"], int(call.args["num_groups"])
    layers = []
    for labels in state.layers_of(x):
        vector = state.collapse(labels, 1, call.where)
        _carry(state, call, vector, "num_channels")
        if groups == 1:
            state.ledger.normalise(labels)
        else:
            first = np.repeat(vector.reshape(groups, -1)[:, 0], len(vector) // groups)
            state.ledger.tie_flat(vector, first, f"{call.where}: channels of one norm group")
            if not state.attribute(call, "num_groups", vector, divisor=len(vector) // groups):
                state.ledger.freeze(labels, f"{call.where}: the number of groups is written in forward, not in a module")
        layers.append(expand_along(torch.from_numpy(vector), 1, x.shape))
    return tuple(layers)


# ---- the table -----------------------------------------------------------------------------------------------------


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **WEIGHTED,
    **_rows(elementwise, "hardswish hardswish_ _prelu_kernel log_sigmoid rrelu hardsigmoid_ native_dropout fake_quantize_per_tensor_affine"),
    **_rows(same, "dropout dropout_ feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as requires_grad_ "
            "zeros_like ones_like empty_like full_like rand_like randn_like lift_fresh float half double bernoulli"),
    **_rows(overwrite, "copy_ index_put_ index_put scatter scatter_ index_copy_ index_add_ masked_scatter slice_scatter select_scatter"),
    **_rows(move, "permute transpose transpose_ t numpy_T matrix_H mT unsqueeze unsqueeze_ squeeze squeeze_ flip movedim moveaxis swapaxes "
            "swapdims repeat tile repeat_interleave atleast_2d atleast_3d rot90"),
    **_rows(by_position("dim"), "select unbind narrow split_with_sizes tensor_split index_select unfold gather diagonal"),
    **_rows(by_position("dims"), "roll"),
    **_rows(split, "split"),
    "slice": slice_,
    "index": index,
    "chunk": chunk,
    "glu": glu,
    **_rows(cat, "cat concat stack"),
    "constant_pad_nd": pad_constant,
    **_rows(expand, "expand expand_as broadcast_to"),
    **_rows(reshape, "view reshape flatten unflatten _unsafe_view view_as reshape_as ravel"),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **_rows(channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_rows(over_space(1), "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
            "reflection_pad1d replication_pad1d lp_pool1d"),
    **_rows(over_space(2), "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
            "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d grid_sampler grid_sampler_2d fractional_max_pool2d"),
    **_rows(over_space(3), "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
            "upsample_trilinear3d reflection_pad3d replication_pad3d"),
    "im2col": unfold,
    **_rows(reduce, "mean sum amax amin max min var std var_mean std_mean prod norm linalg_vector_norm logsumexp argmax argmin any all median"),
    **_rows(along_axis, "softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort topk softmin"),
    **_rows(attention, "scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_rows(reads_values, "item _local_scalar_dense is_nonzero equal allclose nonzero masked_select unique"),
    "batch_norm": per_channel_norm,
    "instance_norm": per_channel_norm,
    **_rows(layer_norm, "layer_norm rms_norm"),
    "group_norm": group_norm,
}

Decompose = Callable[..., Any]
Sizes = Sequence[Any] | None


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """Return the rule of an aten operation: its row, or `elementwise` if torch tags it as pointwise."""
    name = op._schema.name.rpartition("::")[2]
    if name in RULES:
        return RULES[name]
    return elementwise if torch.Tag.pointwise in op.tags else None
