"""DepGraph: norms of whole groups of coupled parameters, made sparse while training.

Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900, equations 3 to 5 and section 3.3.

Deviations: the groups are those of our own channel graph. A channel's score is the mean of its squared norms over the layers
that make, carry or read it: weights and scales of norms, no biases. Training goes on from the user's model. Channels go in
`steps` rounds, the cost falling by equal amounts, and every round scores anew without what earlier rounds have cut; one
threshold over all groups, on scores divided by the mean of what their group has left, leaves each its narrowest legal width;
what it leaves of the budget is filled with the channels that come next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.algorithms.base import SHARED_OUT, Problem, by_values, judged, least_cost, relative, rows, shared_out
from deploypipe.algorithms.options import option
from deploypipe.compact import kept_slots
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.statistics import trained_weights
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph, Group, Member

TINY = 1e-30


@dataclass(frozen=True)
class DepGraph:
    """Train with a regulariser that decays weak groups most, then drop the channels with the smallest group norms."""

    name: ClassVar[str] = "depgraph"
    train_epochs: int = option(5, "epochs of training with the regulariser, before channels are chosen", low=0)
    reg: float = option(5e-4, "weight of the regulariser", low=0)
    alpha: float = option(4.0, "the weakest channel of a group decays 2^alpha times as fast as the strongest", low=0, high=20)
    steps: int = option(10, "rounds of scoring and cutting on the way to the budget", low=1)
    widths: str = option("threshold", "what decides widths: one threshold, equal shares, or the exact allocator",
                         choices=SHARED_OUT)  # fmt: skip

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train with the regulariser on all groups that may be cut."""
        return trainer.fit(problem.model, self.train_epochs, [GroupDecay(problem.graph, self.reg, self.alpha)])

    def plan(self, problem: Problem) -> KeepPlan:
        """Score and cut, round by round.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        graph, table = problem.graph, problem.table
        dense, least, plan = table.predict(graph), least_cost(problem), KeepPlan({})
        for step in range(1, self.steps + 1):
            scores, skipped = scores_after(plan, trained_weights(problem.model), graph)
            last = step == self.steps
            budget = problem.budget if last else max(least, dense + (problem.budget - dense) * step / self.steps)
            goal = replace(problem, budget=budget, allocator=problem.allocator if last else by_values)
            plan = shared_out(self, goal, scores, skipped, self.widths)
        return plan


def scores_after(
    plan: KeepPlan, weights: Mapping[str, Tensor], graph: Graph
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Return (C,) scores by group, higher = keep, without what a plan has cut, and why groups have none.

    They are divided by the mean of what the group has left: that it lost channels says nothing about the others.
    """
    squares, skipped = judged(graph, partial(group_squares, weights=left(weights, graph, plan)))
    return {name: relative(found.cpu().numpy()) for name, found in squares.items()}, skipped


class GroupDecay(TrainHook):
    """Adds `reg * gamma_k w[k]` to the gradient of everything that channel k owns, in every group that may be cut."""

    def __init__(self, graph: Graph, reg: float, alpha: float) -> None:
        self._graph, self._reg, self._alpha = graph, reg, alpha
        self.key = f"decay {reg!r} {alpha!r}"

    @torch.no_grad()
    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Add the gradient of the regulariser."""
        view, named = trained_weights(model), dict(model.named_parameters())
        for group in self._graph.prunable:
            members = scored_members(group, view)
            if not members:
                continue
            strength = self._reg * decay(group_squares(group, view), self._alpha)
            for member in members:
                parameter = named.get(member.param)
                if parameter is not None and parameter.grad is not None:
                    owner = torch.from_numpy(member.owner).to(parameter.device)
                    per_slot = torch.where(owner >= 0, strength[owner.clamp_min(0)], 0.0).to(parameter)
                    shape = [-1 if axis == member.axis else 1 for axis in range(parameter.dim())]
                    parameter.grad += per_slot.reshape(shape) * parameter


def scored_members(group: Group, weights: Mapping[str, Tensor]) -> list[Member]:
    """Return the members that count: weights, and scales of norms; no biases, shifts, statistics or fixed weights."""
    return [m for m in group.members if m.param in weights and (m.param.endswith("weight") or weights[m.param].dim() > 1)]


def group_squares(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the (C,) mean over members of the squared norm of what a channel owns: equation 4.

    Raises:
        NotApplicable: No weight belongs to the channels.
    """
    members = scored_members(group, weights)
    if not members:
        raise NotApplicable("no weight belongs to its channels")
    return torch.stack([rows(weights[m.param], m).double().square().sum(1) for m in members]).mean(0)


def decay(squares: Tensor, alpha: float) -> Tensor:
    """Return the (C,) shrinkage strengths `2^(alpha (I_max - I_k) / (I_max - I_min))`: equation 5."""
    most, least = squares.max(), squares.min()
    return 2.0 ** (alpha * (most - squares) / (most - least).clamp_min(TINY))


def left(weights: Mapping[str, Tensor], graph: Graph, plan: KeepPlan) -> dict[str, Tensor]:
    """Return copies of the weights with zeros where a plan has cut: at what makes lost channels and at what reads them."""
    cut = {m.param for name in plan.keep for m in graph.group(name).members if m.param in weights}
    found = dict(weights)
    for param in cut:
        tensor = weights[param].clone()
        for axis in range(tensor.dim()):
            gone = np.setdiff1d(np.arange(tensor.shape[axis]), kept_slots(graph, plan, param, axis))
            tensor.index_fill_(axis, torch.from_numpy(gone).to(tensor.device), 0.0)
        found[param] = tensor
    return found
