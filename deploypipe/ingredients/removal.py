"""Which groups may be left without channels, so that a whole branch goes: the network must still look at its input."""

from torch import nn

from deploypipe.branch import branch_of
from deploypipe.compact import alive, compact, replaceable, run
from deploypipe.errors import ModelError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph


def removable(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """Return the groups that may keep no channel, all at once or any of them, in the order of the graph.

    Such a group lies inside a branch that is added to something else (see `branch.branch_of`), and the network's output still
    depends on its input when the branches of all these groups are gone: tried on the model, three passes if all may go. The
    pass without the branches also finds code elsewhere that reads one of their layers, as fused transformer layers do.
    """
    offered = []
    for group in graph.prunable:
        try:
            branch = branch_of(graph, group.name)
        except ModelError:
            continue
        if replaceable(model, branch):
            offered.append(group.name)
    if not offered or _runs_without(model, graph, offered):
        return tuple(offered)
    chosen: list[str] = []
    for name in offered:
        if _runs_without(model, graph, [*chosen, name]):
            chosen.append(name)
    return tuple(chosen)


def _runs_without(model: nn.Module, graph: Graph, names: list[str]) -> bool:
    """Say whether the model can be run, and its output depends on its input, when these groups have no channels."""
    plan = KeepPlan(dict.fromkeys(names, ()))
    if not alive(model, graph, plan):
        return False
    try:
        run(compact(model, graph, plan, check=False), graph.example)
    except Exception:  # the user's forward may raise anything
        return False
    return True
