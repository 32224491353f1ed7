"""Rules of the normalisations."""

import numpy as np

from deploypipe.graph.labels import Labels, Vector, along, expand_along, varies
from deploypipe.graph.reshape import follows
from deploypipe.graph.tracer import Call, Layers, State


def _carry(state: State, call: Call, vector: Vector, attribute: str) -> None:
    tensors = [call.args.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    for owner in {tensor.name.rpartition(".")[0] for tensor in tensors if tensor is not None}:
        state.norm_calls[owner] += 1
    for tensor in tensors:
        state.attach(tensor, 0, vector, "carries", call.where)
        if tensor is not None and tensor.name and call.args["input"].layer >= 0:
            state.norms[call.args["input"].layer] = tensor.name.rpartition(".")[0]
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
        layers.append(labels if along(labels) else expand_along(vector, 1, x.shape))
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
            stated = state.attribute(call, "normalized_shape", vector, index=position)
            if not stated and not _read_off(state, call, position, labels):
                state.ledger.freeze(labels, f"{call.where}: normalised shape is written in forward")
            layers.append(expand_along(vector, axis, x.shape))
            continue
        if inside:
            state.ledger.freeze(labels, f"{call.where}: channels lie along several normalised axes")
        layers.append(labels)
    return tuple(layers)


def _read_off(state: State, call: Call, position: int, labels: Labels) -> bool:
    """Say whether the normalised size was read off a tensor and follows its channels."""
    return call.sizes is not None and len(call.sizes) > position and follows(state, call, call.sizes[position], labels)


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
        layers.append(expand_along(vector, 1, x.shape))
    return tuple(layers)
