"""HALP: the most saliency that fits a latency, in steps, while the network adapts.

Shen et al., Structural Pruning via Latency-Saliency Knapsack, NeurIPS 2022, arXiv:2210.06659, section 3.

Deviations: the paper prices the j-th channel of a layer with the width of the layer before frozen, solves the knapsack by
dynamic programming over such marginal costs, and corrects afterwards. Here the exact allocator prices both ends of every layer
together, so that the predicted latency is that of the network that comes out, and prefixes are chosen by construction. Blocks
of channels are the steps between the widths that the table offers. The first layer is pruned like any other. Channels without
a batch norm are judged by the sum of w dE/dw of their filters, the bias included. The weights that adapt while the schedule
runs, on images that are not augmented and without weight decay, only serve to judge: the plan is carried out on the trained
weights and fine-tuned afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploypipe.algorithms.base import Problem, allocated, by_values, judged, labelled, least_cost
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import prefix_sums, ranking
from deploypipe.compact import masked_slots
from deploypipe.ingredients.curvature import Unit, derivatives, gates
from deploypipe.ingredients.statistics import batch_size
from deploypipe.plan import KeepPlan
from deploypipe.progress import Reporter, counted
from deploypipe.training.adapt import Adapting


@dataclass(frozen=True)
class Halp:
    """Keep the channels of highest first-order saliency that fit budgets which fall exponentially to the one asked for."""

    name: ClassVar[str] = "halp"
    steps: int = option(10, "pruning steps on the way to the budget", low=1)
    interval: int = option(20, "mini-batches before each step, whose saliencies are averaged", low=1)
    batch: int = option(64, "images of one mini-batch", low=2)
    lr: float = option(0.01, "learning rate while the network adapts; 0 only measures", low=0)

    def plan(self, problem: Problem) -> KeepPlan:
        """Alternate between training with the channels that are left and choosing anew for a smaller budget.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data, or the training diverges.
        """
        graph, dense, least = problem.graph, problem.table.predict(problem.graph), least_cost(problem)
        images = min(self.batch, batch_size(graph.example))
        run, plan = Adapting(problem.model, labelled(problem.data), self.lr, images, problem.seed), KeepPlan({})
        units, unjudged = judged(graph, gates(run.model, graph))
        with counted(problem.reporter, "halp", self.steps * self.interval) as reporter:
            for step in range(1, self.steps + 1):
                saliencies, skipped = self._saliencies(run, units, reporter, (step - 1) * self.interval)
                orders = {name: ranking(saliency) for name, saliency in saliencies.items()}
                values = {name: prefix_sums(saliency[orders[name]]) for name, saliency in saliencies.items()}
                goal = problem
                if step < self.steps:  # only what is carried out is decided by another allocator
                    budget = max(least, budget_at(step, self.steps, dense, problem.budget))
                    goal = replace(problem, budget=budget, allocator=by_values)
                plan = allocated(self, goal, orders, values, unjudged | skipped)
                run.hold(masked_slots(graph, plan))
        return plan

    def _saliencies(
        self, run: Adapting, units: Mapping[str, Unit], reporter: Reporter, done: int
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
        """Return the (C,) saliencies of every group, averaged over the next mini-batches, and why groups have none."""
        totals, skipped = dict[str, Tensor](), dict[str, str]()
        for batch, model in enumerate(run.steps(self.interval), 1):
            found, skipped = derivatives(model, units)
            for name, gradient in found.items():
                # The absolute value of every batch: near a minimum the gradients of batches cancel.
                totals[name] = totals.get(name, torch.zeros_like(gradient)) + gradient.abs() / self.interval
            reporter.advance(done + batch)
        return {name: total.cpu().numpy() for name, total in totals.items()}, skipped


def budget_at(step: int, steps: int, dense: float, budget: float) -> float:
    """Return the budget of one of the steps: each takes the same share of what is left, and the last ends at the budget.

    >>> [round(budget_at(step, 2, 100.0, 25.0), 9) for step in (0, 1, 2)]
    [100.0, 50.0, 25.0]
    """
    share = step / steps
    return budget if step == steps else float(np.exp(share * np.log(budget) + (1 - share) * np.log(dense)))
