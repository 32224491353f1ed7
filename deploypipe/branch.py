"""What goes with a group when none of its channels stays: the layers of a branch, such as the body of a residual block."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from deploypipe.errors import ModelError
from deploypipe.types import Graph, HasKeep, Layer, Width

_REMOVABLE = ("conv", "depthwise", "grouped", "linear")


@dataclass(frozen=True)
class Branch:
    """The modules that do nothing once a group is empty.

    A layer that reads no channel gives zero, and so does the norm that its output goes straight into: the branch adds nothing
    to what it joins. (Left alone, that norm would still add a constant for each channel.)

    Attributes:
        layers: Modules that make, carry or read channels which are gone.
        ends: Those among `layers` that read them: their output is zero.
        norms: Modules of the norms behind them.
    """

    layers: tuple[str, ...]
    ends: tuple[str, ...]
    norms: tuple[str, ...]


def branch_of(graph: Graph, name: str) -> Branch:
    """Return what goes when the group `name` keeps no channel: everything up to where something else is added.

    Raises:
        ModelError: It cannot go. Whether the network still depends on its input without it is not known here; see `removal`.
    """
    gone = {group.name for group in graph.groups} - _reached(graph, name) if not graph.group(name).fixed else {name}
    found = [layer for layer in graph.layers if gone & {*layer.n_in.groups, *layer.n_out.groups}]
    if reason := _why_not(graph, found, gone):
        raise ModelError(f"group '{name}' cannot be left without channels: {reason}", at="keep plan", fix="keep at least one")
    layers = tuple(dict.fromkeys(layer.name for layer in found))
    ends = tuple(dict.fromkeys(layer.name for layer in found if gone & {*layer.n_in.groups} and layer.kind != "depthwise"))
    return Branch(layers, ends, tuple(sorted({layer.norm for layer in found if layer.norm})))


def branches(graph: Graph, plan: HasKeep | None) -> dict[str, Branch]:
    """Return the branches of all groups that keep no channel under `plan`."""
    return {name: branch_of(graph, name) for name, channels in (plan.keep if plan else {}).items() if not channels}


def removed_params(graph: Graph, gone: Iterable[Branch]) -> frozenset[str]:
    """Return the parameters and buffers of the modules of these branches."""
    modules = {module for branch in gone for module in (*branch.layers, *branch.norms)}
    return frozenset(name for name in graph.shapes if _owner(name) in modules) if modules else frozenset()


def together(graph: Graph, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each of these groups which others of them go when it goes: alone they would be paid for, and do nothing.

    The inner groups of a bottleneck go with each other; what a squeeze and excitation reads with goes with what it scales.
    """
    names = list(names)
    idle = {name: _idle(graph, name) for name in names}
    return {name: tuple(other for other in names if other != name and other in idle[name]) for name in names}


def _idle(graph: Graph, name: str) -> set[str]:
    """Return the groups that do nothing once `name` is empty: nothing reaches them, or all that reads them does nothing."""
    idle = {name} | (_reached(graph, "") - _reached(graph, name))
    while True:
        awake = [layer for layer in graph.layers if not (layer.n_out.groups and idle >= {*layer.n_out.groups})]
        read = {group for layer in awake for group in layer.n_in.groups}
        ever = {group for layer in graph.layers for group in layer.n_in.groups}
        more = {group.name for group in graph.prunable} & ever - read - idle
        if not more:
            return idle
        idle |= more


def _owner(param: str) -> str:
    return param.rpartition(".")[0]


def _reached(graph: Graph, without: str) -> set[str]:
    """Return the groups that still depend on the input when the group `without` is empty."""
    weights = {layer.weight for layer in graph.layers} | {layer.bias for layer in graph.layers}
    reads = {i: _groups(graph, layer, 1) for i, layer in enumerate(graph.layers)}
    reached = {g.name for g in graph.groups if any(m.role == "produces" and m.param not in weights for m in g.members)}
    waiting = dict(enumerate(graph.layers))
    while True:
        ready = {i: layer for i, layer in waiting.items() if not reads[i] or reads[i] & reached}
        if not ready:
            return reached
        for i, layer in ready.items():
            reached |= _groups(graph, layer, 0) - {without}
            del waiting[i]


def _groups(graph: Graph, layer: Layer, axis: int) -> set[str]:
    """Return the groups that a layer makes (axis 0) or reads (axis 1), fixed ones too if its weight tells them."""
    if layer.kind in {"conv", "linear"}:
        return {group.name for group, _ in graph.cuts(layer.weight, axis)}
    if layer.kind == "transposed":  # its weight is (in, out, ...)
        return {group.name for group, _ in graph.cuts(layer.weight, 1 - axis)}
    return {*(layer.n_in if axis else layer.n_out).groups}


def _why_not(graph: Graph, found: list[Layer], gone: set[str]) -> str:
    """Return why these layers do not stand and fall with the groups alone; empty if they do."""
    modules = {module for layer in found for module in (layer.name, layer.norm) if module}  # the root owns no branch
    groups = [graph.group(name) for name in gone]
    if fixed := next((group for group in groups if group.fixed), None):
        return f"it carries all of '{fixed.name}', which is fixed: {fixed.fixed}"
    if any(group.normalised for group in groups):
        return "a layer norm runs across its channels"
    if not any(gone & {*layer.n_in.groups} for layer in found):
        return "no layer reads it"
    calls = Counter(layer.weight for layer in graph.layers)
    for layer in found:
        if layer.kind not in _REMOVABLE or layer.weight != f"{layer.name}.weight":
            return f"{layer.name} is no plain convolution or linear layer"
        if calls[layer.weight] > 1:
            return f"{layer.name} is called several times"
        if any(_mixed(width, gone) for width in (layer.n_in, layer.n_out)):
            return f"{layer.name} has other channels too"
    strange = (m.param for group in groups for m in group.members if _owner(m.param) not in modules)
    return next((f"{param} belongs to no layer or norm" for param in strange), "")


def _mixed(width: Width, gone: set[str]) -> bool:
    """Say whether only a part of these channels is gone."""
    return bool(gone & {*width.groups}) and (width.const > 0 or not gone >= {*width.groups})
