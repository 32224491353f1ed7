"""L1 norm of each filter.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, section 3.1; `greedy` is its section 3.3.

Deviations: the paper sets the share of every layer by hand, after a look at how sensitive it is. Here widths come from the
exact allocator: it maximises the logarithm of the share of its norms that a group keeps, counted once for every layer that
reads the group. Coupled channels go together, those of a residual trunk as well: their norms are the mean over the layers that
make them, each layer's divided by their mean where filters differ in size. (The paper cuts the first layer of each block
alone, or lets the projection shortcut decide for the trunk.) `greedy` chooses channels anew, not their number. All layers are
cut at once, and fine-tuning is the run's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deploypipe.algorithms.base import Criterion, Problem, Statistics, by_values, filter_norms, producers
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import ranking
from deploypipe.errors import UsageError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group


@dataclass(frozen=True)
class L1(Criterion):
    """Rank filters by the sum of their absolute weights; in coupled layers by the mean over the layers."""

    name: ClassVar[str] = "l1"
    greedy: bool = option(False, "leave out the input channels that earlier layers have lost, when ranking")

    def score(self, group: Group, stats: Statistics) -> Tensor:
        """Return the (C,) L1 norms, higher = keep."""
        return filter_norms(group, stats.weights, 1)

    def plan(self, problem: Problem) -> KeepPlan:
        """Allocate by the norms of whole filters; if `greedy`, choose as many channels again in forward order.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: `greedy`, with widths by what the channels that stay are worth: other ones would stay.
        """
        if self.greedy and problem.allocator is not by_values:
            message = "greedy chooses channels anew once widths are known, so that nothing can be measured before"
            raise UsageError(message, at="--set greedy=true", fix="leave out greedy, or take --value scores")
        plan = super().plan(problem)
        return plan.replace(keep=_greedy(problem.graph, plan, Statistics(problem).weights)) if self.greedy else plan


def _greedy(graph: Graph, plan: KeepPlan, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    chosen: dict[str, tuple[int, ...]] = {}
    for group in graph.groups:
        if group.name not in plan.keep:
            continue
        left = {m.param: _without_lost(graph, m.param, weights[m.param], chosen) for m in producers(group, weights)}
        order = ranking(filter_norms(group, left, 1).cpu().numpy())
        chosen[group.name] = tuple(sorted(order[: len(plan.keep[group.name])].tolist()))
    return chosen


def _without_lost(graph: Graph, param: str, weight: Tensor, chosen: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return a copy of a weight with zeros where its input channels are already gone."""
    left = weight.clone()
    for axis in range(weight.dim()):
        for group, member in graph.cuts(param, axis):
            if member.role == "consumes" and group.name in chosen:
                lost = (member.owner >= 0) & ~np.isin(member.owner, chosen[group.name])
                left.index_fill_(axis, torch.from_numpy(np.flatnonzero(lost)).to(left.device), 0.0)
    return left
