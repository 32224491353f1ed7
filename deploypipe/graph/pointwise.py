"""Rules of the operations that work element by element."""

from deploypipe.graph.labels import Labels, along, flat, varies, widen
from deploypipe.graph.tracer import Call, Layers, Seen, State, tensors_in


def elementwise(state: State, call: Call) -> Layers:
    """Positions meet positions: tie the labels found there; a parameter that takes part becomes a member."""
    shape = call.out.shape
    operands = [t for t in tensors_in(tuple(call.args.values())) if t.numel() > 1]
    found = [state.layers_of(t) for t in operands]
    if len(operands) == 1 and operands[0].shape == shape:
        return found[0]
    if len(operands) == 2 and _alike(operands, found):
        state.ledger.tie(found[0][0], found[1][0], call.where)
        return found[0]
    merged: list[Labels] = []
    for layers in found:
        for labels in layers:
            _merge(state, call, merged, widen(labels, shape))
    for labels in merged:
        for axis in varies(labels):
            for tensor in operands:
                _check_rigid(state, call, labels, axis, tensor)
    return tuple(merged)


def _alike(operands: list[Seen], found: list[Layers]) -> bool:
    """Say whether two tensors of one shape carry channels along the same single axis: the residual sum, and the quick case."""
    if operands[0].shape != operands[1].shape or len(found[0]) != 1 or len(found[1]) != 1:
        return False
    one, other = along(found[0][0]), along(found[1][0])
    return one is not None and other is not None and one[0] == other[0]


def _merge(state: State, call: Call, merged: list[Labels], labels: Labels) -> None:
    """Add a layer to those of the result; layers that change along a common axis are tied."""
    mine = set(varies(labels))
    for i, other in enumerate(merged):
        theirs = set(varies(other))
        if mine & theirs:
            state.ledger.tie(other, labels, call.where)
            if call.name.rstrip("_") in ("add", "sub") and all(t.weight for t in tensors_in(tuple(call.args.values()))):
                state.added.append((int(flat(other)[0]), int(flat(labels)[0])))  # where one is masked the other must be
            if not theirs >= mine:
                if not mine >= theirs:
                    state.ledger.freeze(labels, f"{call.where}: channels along crossing axes")
                merged[i] = labels
            return
    if mine:
        merged.append(labels)


def _check_rigid(state: State, call: Call, labels: Labels, axis: int, tensor: Seen) -> None:
    """Freeze labels that meet a tensor which has a size of its own, but no channels, along `axis`."""
    axis -= labels.dim() - tensor.dim()
    if axis < 0 or not tensor.rigid(axis):
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


def unlabelled(state: State, call: Call) -> Layers:
    """Something new that has nothing of the tensor but its type; sizes that were read off it are seen where they are read."""
    return ()
