"""SMCP: input channels masked softly while training, chosen anew every few steps under a budget that falls.

Humble et al., Soft Masking for Cost-Constrained Channel Pruning, ECCV 2022, arXiv:2211.02206, section 3 and algorithm 1.

Deviations: groups are those of the channel graph: all layers that read the same channels, with everything that makes them. The
multiple-choice knapsack is our exact allocator, which prices both ends of a layer together; every group keeps at least its
narrowest legal width, and blocks do not vanish. Training goes on from the user's model, and the optimizer is the run's. Scales
Masked weights have the run's weight decay on top of `decay`. Scales of batch norms are not changed with the masks (an option
of the authors' code, off by default there too). At the end masked weights are set to zero, so that what was masked last scores
lowest. Filters that are masked count in the importance of what they read, and importance is by default the sum of |w|, as in
the authors' code; the paper's gradient term is `importance=taylor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import exp
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deploypipe.algorithms.base import Problem, allocated, by_values, judged, rows
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import cheapest_widths, prefix_sums, ranking
from deploypipe.compact import masked_slots
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.statistics import trained_weights, weights
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Group

RATE = 0.05  # of the exponential schedule


@dataclass(frozen=True)
class Smcp:
    """Mask input channels softly and choose again, until the budget is reached and the masks have settled."""

    name: ClassVar[str] = "smcp"
    train_epochs: int = option(5, "epochs of training with soft masks, before channels are chosen", low=0)
    every: int = option(80, "steps from one choice of channels to the next", low=1)
    warmup: float = option(0.1, "share of the training before the first choice", low=0, high=1)
    cooldown: float = option(0.3, "share of the training after the last choice, with fixed masks", low=0, high=1)
    decay: float = option(2e-4, "decay of masked weights", low=0)
    importance: str = option("magnitude", "what an input channel is worth: sum of |w|, or |sum of w dE/dw|",
                             choices=("magnitude", "taylor"))  # fmt: skip

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train with soft masks.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        graph = problem.graph
        cheapest_widths(graph, [group.name for group in graph.prunable], problem.table, problem.budget)  # else fail now
        n = trainer.n_steps(self.train_epochs)
        first = min(int(self.warmup * n), max(n - 1, 0))  # the last step chooses in any case
        times = [*range(first, max(first + 1, int((1 - self.cooldown) * n)), self.every)]
        return trainer.fit(problem.model, self.train_epochs, [SoftMasking(self, problem, times)])

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep the input channels with the largest magnitude that fit.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        worth = {name: weight.abs() for name, weight in trained_weights(problem.model).items()}
        return self.chosen(problem, worth)

    def chosen(self, problem: Problem, worth: Mapping[str, Tensor]) -> KeepPlan:
        """Return the plan of the largest summed importance, given what each weight is worth."""
        scores, skipped = judged(problem.graph, lambda group: input_importance(group, worth).cpu().numpy())
        orders = {name: ranking(score) for name, score in scores.items()}
        values = {name: prefix_sums(score[orders[name]]) for name, score in scores.items()}
        return allocated(self, problem, orders, values, skipped)


class SoftMasking(TrainHook):
    """The forward pass meets masked weights; the backward pass goes straight through to the full ones.

    Args:
        options: Of the method.
        problem: Its graph, table and final budget.
        times: Steps at which channels are chosen.
    """

    def __init__(self, options: Smcp, problem: Problem, times: list[int]) -> None:
        self._options, self._times = options, times
        self._problem = replace(problem, allocator=by_values)
        self._dense = problem.table.predict(problem.graph)
        self.plan = KeepPlan({})
        self._full: dict[str, Tensor] = {}
        self._handle: RemovableHandle | None = None
        self.key = f"soft {options!r} {problem.budget!r} {times}"

    def on_train_begin(self, model: nn.Module) -> None:
        """Mask the weights before every pass."""
        self._handle = model.register_forward_pre_hook(lambda m, args: self._mask(m))

    @torch.no_grad()
    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Put the full weights back, choose channels if it is time, and decay what is masked."""
        named = dict(model.named_parameters())
        self._unmask(model)
        if step in self._times:
            share = schedule(self._times.index(step) + 1, len(self._times))
            budget = self._dense + share * (self._problem.budget - self._dense)
            self.plan = self._options.chosen(replace(self._problem, budget=budget), self._worth(named))
        for name, axis, slots in masked_slots(self._problem.graph, self.plan):
            parameter = named.get(name)
            if parameter is not None and parameter.grad is not None:
                at = slots.to(parameter.device)
                parameter.grad.index_add_(axis, at, self._options.decay * parameter.index_select(axis, at))

    def on_train_end(self, model: nn.Module) -> None:
        """Set masked weights to zero for good; fixed ones stay."""
        if self._handle:
            self._handle.remove()
        self._mask(model)
        named = dict(model.named_parameters())
        self._full = {name: weight for name, weight in self._full.items() if name not in named}
        self._unmask(model)

    def state(self) -> Mapping[str, Tensor]:
        """Return which channels stay."""
        return {name: torch.tensor(kept) for name, kept in self.plan.keep.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the channels back."""
        self.plan = KeepPlan({name: tuple(kept.tolist()) for name, kept in state.items()})

    @torch.no_grad()
    def _mask(self, model: nn.Module) -> None:
        named = weights(model)
        for name, axis, slots in masked_slots(self._problem.graph, self.plan):
            self._full.setdefault(name, named[name].detach().clone())
            named[name].index_fill_(axis, slots.to(named[name].device), 0.0)

    @torch.no_grad()
    def _unmask(self, model: nn.Module) -> None:
        named = weights(model)
        for name, weight in self._full.items():
            named[name].copy_(weight)
        self._full = {}

    def _worth(self, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        if self._options.importance == "magnitude":
            return {name: parameter.detach().abs() for name, parameter in named.items()}
        return {name: -parameter.detach() * parameter.grad for name, parameter in named.items() if parameter.grad is not None}


def input_importance(group: Group, worth: Mapping[str, Tensor]) -> Tensor:
    """Return the (C,) absolute sums, over all layers that read a channel, of what its weights there are worth.

    Raises:
        NotApplicable: No trained weight reads the channels.
    """
    readers = [member for member in group.members if member.role == "consumes" and member.param in worth]
    if not readers:
        raise NotApplicable("no trained weight reads its channels")
    return torch.stack([rows(worth[member.param], member).double().sum(1) for member in readers]).sum(0).abs()


def schedule(t: int, n: int) -> float:
    """Return how much of the way to the budget the t-th of n choices goes; the last goes all of it.

    >>> schedule(4, 4), round(schedule(10, 40), 2)
    (1.0, 0.46)
    """
    return (1 - exp(-RATE * t)) / (1 - exp(-RATE * n))
