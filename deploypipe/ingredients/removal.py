"""Which groups may be left without channels, so that a whole branch goes: the network must still look at its input."""

from torch import nn

from deploypipe.branch import branch_of
from deploypipe.compact import alive, replaceable
from deploypipe.errors import ModelError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph


def removable(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Return the groups that may keep no channel, all at once or any of them, in the order of the graph.

    Such a group lies inside a branch that is added to something else (see `branch.branch_of`), and the network's output still
    depends on its input when the branches of all these groups are gone: tried on the model, twice forward if all may go.
    """
    offered = []
    for group in graph.prunable:
        try:
            branch = branch_of(graph, group.name)
        except ModelError:
            continue
        if replaceable(model, branch):
            offered.append(group.name)
    if not offered or alive(model, graph, _without(offered)):
        return tuple(offered)
    chosen: list[str] = []
    for name in offered:
        if alive(model, graph, _without([*chosen, name])):
            chosen.append(name)
    return tuple(chosen)


def _without(names: list[str]) -> KeepPlan:
    return KeepPlan(dict.fromkeys(names, ()))
