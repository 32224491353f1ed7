"""Channels that are dead already: nothing reads them, or nothing makes them.

Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, AAAI 2020,
arXiv:1907.03141, section 4.3: what pruning one side of a layer leaves without a purpose on the other.
"""

import copy

import torch
from torch import Tensor, nn

from deploypipe.compact import compact, difference, run
from deploypipe.ingredients.stacks import Stack, rows
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group

TOLERANCE = 1e-6  # of the largest output


def unread(model: nn.Module, group: Group) -> Tensor:
    """Return booleans (C,): every weight that reads the channel, a fixed one too, is zero there. All False if none reads it."""
    return _zero(model, group, "consumes")


def unmade(model: nn.Module, graph: Graph, group: Group) -> Tensor:
    """Return booleans (C,): what makes, scales and shifts the channel is zero, so that it carries zero up to an activation."""
    made = _zero(model, group, "produces")
    norms = [m for m in group.members if m.role == "carries" and m.param not in graph.buffers]
    named = dict(model.named_parameters())
    return made & _all_zero([rows(named[m.param].detach(), m) for m in norms], made, nothing=True)


def dead(model: nn.Module, graph: Graph) -> dict[str, tuple[int, ...]]:
    """Return group -> channels that can be cut without a change of the outputs, ascending; at least one is left in each group.

    That nobody reads a channel is enough. One that nobody makes is cut only if the model's output on the traced example stays,
    because an activation may turn zero into something else. Where a norm runs across the channels, none is dead: it counts in
    the mean.
    """
    found: dict[str, tuple[int, ...]] = {}
    reference = run(model, graph.example)
    for group in graph.prunable:
        if group.normalised:
            continue
        certain = unread(model, group)
        chosen = _listed(certain | unmade(model, graph, group))
        if len(chosen) > int(certain.sum()) and not _same(model, graph, group, chosen, reference):
            chosen = _listed(certain)
        if chosen:
            found[group.name] = chosen
    return found


def silenced(model: nn.Module, graph: Graph) -> nn.Module:
    """Return a copy in which what makes a channel that nobody reads is zero, too; the outputs stay as they are."""
    new = copy.deepcopy(model)
    named = dict(new.named_parameters())
    with torch.no_grad():
        for group in reversed(graph.prunable):  # a silenced filter no longer reads what lies before it
            gone = unread(new, group)
            makes = [m for m in group.members if m.role != "consumes" and m.param in named and named[m.param].dim() > 1]
            if gone.any() and makes and not group.normalised:  # where a norm runs across the channels all of them count
                stack = Stack(group.name, tuple(makes))
                stack.add(named, -stack.read(named) * gone[:, None])
    return new


def _zero(model: nn.Module, group: Group, role: str) -> Tensor:
    named = weights(model)
    members = [m for m in group.members if m.role == role and m.param in named]
    return _all_zero([rows(named[m.param], m) for m in members], torch.zeros(group.size, dtype=torch.bool))


def _all_zero(parts: list[Tensor], like: Tensor, nothing: bool = False) -> Tensor:
    """Return for every row whether it is zero in all parts; `nothing` if there is no part."""
    if not parts:
        return torch.full_like(like, nothing)
    return torch.stack([(part == 0).all(dim=1) for part in parts]).all(dim=0).cpu()


def _listed(gone: Tensor) -> tuple[int, ...]:
    channels = torch.nonzero(gone).flatten().tolist()
    return tuple(channels[: len(gone) - 1] if len(channels) == len(gone) else channels)


def _same(model: nn.Module, graph: Graph, group: Group, gone: tuple[int, ...], reference: list[Tensor]) -> bool:
    kept = tuple(channel for channel in range(group.size) if channel not in gone)
    small = compact(model, graph, KeepPlan({group.name: kept}), check=False)
    return difference(reference, run(small, graph.example)) <= TOLERANCE
