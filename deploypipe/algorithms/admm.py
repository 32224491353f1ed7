"""ADMM pruning: train while a proximal term pulls the weights towards a hard number of filters, channels or weights.

Zhang et al., A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers, ECCV 2018,
arXiv:1804.03294, equations 5 to 9; structured sets: Zhang et al., StructADMM, arXiv:1807.11091; the pattern of two in four:
Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, arXiv:2104.08378.

Deviations: one projection for each group of coupled channels, over the slices of all its layers together, where the paper
projects layer by layer; behind a batch norm the filter's scale and shift belong to its slice, because the filter alone can be
scaled at will. The cardinalities are not set by hand: structured ones follow from the budget by the allocator, with the norms
of the trained model, and are chosen anew after training, when all but the allowed channels are near zero; unstructured ones
are the same share of every layer. rho is of the order of the curvature and grows (the paper's 1e-4 goes with 150,000 steps of
Adam); the learning rate decays once over the whole training instead of within every outer iteration. How many epochs the pull
lasts is an option, not a test of the gap. Without a batch norm a filter's bias belongs to its slice. Retraining the survivors
is the fine-tuning that follows. 2:4 covers the layers whose shapes sparse tensor cores take, without a channel permutation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from deploypipe.algorithms.base import Problem, judged, shared_out
from deploypipe.algorithms.masking import masked_plan
from deploypipe.algorithms.options import option
from deploypipe.ingredients.density import Prices, prices, require_within, uniform
from deploypipe.ingredients.projections import KeepRows, KeepTwoInFour, KeepUnits
from deploypipe.ingredients.proximal import AdmmHook, Constraint
from deploypipe.ingredients.stacks import SIDES, Stack
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.training.masked import told_from_pruned
from deploypipe.training.trainer import Trainer
from deploypipe.two_four import eligibility


@dataclass(frozen=True)
class Admm:
    """Alternate between training with a pull towards the sparse set and projecting onto it."""

    name: ClassVar[str] = "admm"
    scheme: str = option("filter", "what becomes zero", choices=("filter", "channel", "unstructured", "2:4"))
    train_epochs: int = option(10, "epochs with the pull, before pruning", low=0)
    every: int = option(1, "epochs between two projections", low=1)
    rho: float = option(0.1, "strength of the pull at the start, of the order of the loss's curvature", low=0)
    growth: float = option(1.4, "factor on rho after every projection", low=1)

    @property
    def sparse(self) -> bool:
        """Whether the result is zeros inside weights, which no dense runtime skips."""
        return self.scheme not in SIDES

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train with the pull; weights of the unstructured schemes end on their projection.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        constraints = list((self._of_weights if self.sparse else self._of_groups)(problem))
        hook = AdmmHook(constraints, problem.model, self.rho, self.growth, self.every)
        model = trainer.fit(problem.model, self.train_epochs, [hook])
        gaps = hook.admm.gaps
        if len(gaps) > 1 and gaps[-1] >= gaps[0] > 0:  # no gap at all: the budget asks for nothing
            problem.reporter.note(
                f"the weights do not near their projection (gap {gaps[0]:.2g}, then {gaps[-1]:.2g}): raise rho"
            )
        if self.sparse:
            settle(model, constraints)
        return model

    def plan(self, problem: Problem) -> KeepPlan:
        """Project: the channels of the largest joint norm stay, in widths that the allocator chooses by these norms.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        if self.sparse:
            return masked_plan(self, problem)
        view = weights(problem.model)
        graph = problem.graph
        norms, skipped = judged(graph, lambda group: Stack.of_group(graph, group, self.scheme).norms(view).cpu().numpy())
        return shared_out(self, problem, norms, skipped, "shares")

    def _of_groups(self, problem: Problem) -> Iterator[Constraint]:
        """Yield for every group its slices and the number of channels that the budget allows."""
        for name, channels in self.plan(problem).keep.items():
            if len(channels) < problem.graph.group(name).size:
                stack = Stack.of_group(problem.graph, problem.graph.group(name), self.scheme)
                yield Constraint(stack, KeepRows(len(channels)))

    def _of_weights(self, problem: Problem) -> Iterator[Constraint]:
        price = prices(problem.model, problem.graph, problem.table.unit)
        found: Callable[[Problem, Prices], Mapping[str, KeepUnits | KeepTwoInFour]]
        found = _two_in_four if self.scheme == "2:4" else _entries
        for name, keep in found(problem, price).items():
            yield Constraint(Stack.of_weight(name, keep.shape), keep)


@torch.no_grad()
def settle(model: nn.Module, constraints: list[Constraint]) -> None:
    """Put every constrained part of the model onto its projection, in place."""
    named = dict(model.named_parameters())
    for constraint in constraints:
        values = constraint.stack.read(named)
        constraint.stack.add(named, told_from_pruned(values, constraint.keep(values)) - values)


def _entries(problem: Problem, price: Prices) -> dict[str, KeepUnits]:
    kept = uniform(price, problem.budget)
    return {name: KeepUnits("unstructured", n, problem.graph.shapes[name]) for name, n in kept.items()}


def _two_in_four(problem: Problem, price: Prices) -> dict[str, KeepTwoInFour]:
    against = {each.weight: each.reason for each in eligibility(problem.graph) if not each.eligible}
    for name in price.sizes:
        if name in against:
            problem.reporter.note(f"{name} stays dense: {against[name]}")
    found = {name: KeepTwoInFour(problem.graph.shapes[name]) for name in price.sizes if name not in against}
    halved = {name: size // 2 if name in found else size for name, size in price.sizes.items()}
    require_within(price.cost(halved), problem.budget, price)
    return found
