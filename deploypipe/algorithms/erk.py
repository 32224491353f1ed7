"""Layer densities by rule: Erdos-Renyi-Kernel (small layers stay denser), uniform, and uniform with guarded ends.

Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134, section 3, for convolutions;
"uniform+" is that of Gale et al., The State of Sparsity in Deep Neural Networks, 2019, arXiv:1902.09574. Inside a group the
filters with the largest L2 norms stay.

Deviations: the papers thin out single weights to a given density. Here channels go, and with them the weights that read and
those that make them, so that a layer's density is the product of two shares. For "erk" a layer asks of both sides the root of
its density, and a group takes the geometric mean of what its layers ask; "uniform" gives all groups one share. The overall
density is the largest with which the model fits the budget, and widths are the nearest that the table offers. Only layers that
channels can be dropped from take part; the last layer makes the logits, so that "uniform+" guards its inputs instead, as long
as the others can make up for it: where they are at their narrowest, the guard gives way as far as the budget asks.

The rule keeps small layers dense, since they have few weights. In most networks these come first, on large images, where a
channel takes the most time: under a latency budget everything behind them gets narrow for it, and "uniform" is the better
choice there.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from deploypipe.algorithms.base import Problem, Statistics, filter_norms, judged, signed
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import plan_of, ranking
from deploypipe.allocation.scaled import nearest_width, scaled_widths
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.shares import Products
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group

LAST = 0.2  # "uniform+" keeps at least this share of the last layer


@dataclass(frozen=True)
class Erk:
    """Give every layer a density by a rule, and keep its largest filters."""

    name: ClassVar[str] = "erk"
    rule: str = option("erk", "how the densities of layers differ", choices=("erk", "uniform", "uniform+"))

    def plan(self, problem: Problem) -> KeepPlan:
        """Find the largest overall density that fits the budget.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        weights, legal = Statistics(problem).weights, problem.table.candidates(problem.graph)
        bound = Products.of(problem.graph, problem.graph.kept()).groups

        def judge(group: Group) -> NDArray[np.float64]:
            if self.rule == "erk" and group.name not in bound:
                raise NotApplicable("no layer has a density that decides its share")
            norms: NDArray[np.float64] = filter_norms(group, weights, 2).cpu().numpy()
            return norms

        norms, skipped = judged(problem.graph, judge)
        orders = {name: ranking(norm) for name, norm in norms.items()}
        if self.rule == "uniform+" and (first := _first(problem.graph, orders)):
            skipped[first] = "uniform+ leaves the first layer whole"
            del orders[first]
        last = _last(problem.graph) if self.rule == "uniform+" else ()
        least = min((legal[name][0] / len(orders[name]) for name in orders if name not in last), default=LAST)
        shares = self._shares(problem.graph, orders, least)

        def widths(density: float) -> dict[str, int]:
            wanted = shares(density)
            return {name: nearest_width(legal[name], wanted[name] * len(orders[name])) for name in orders}

        kept, certificate = scaled_widths(problem.graph, widths, problem.table, problem.budget)
        if any(kept[name] < nearest_width(legal[name], LAST * len(orders[name])) for name in orders if name in last):
            problem.reporter.note(f"the budget leaves the last layer less than {LAST:.0%} of its inputs, which uniform+ guards")
        return signed(self, plan_of(problem.graph, orders, kept, certificate), skipped)

    def _shares(self, graph: Graph, groups: Collection[str], least: float = 1e-9) -> Callable[[float], dict[str, float]]:
        """Return the rule: overall density -> share of the channels that stays in each group.

        Below the density `least`, at which all other groups are at their narrowest, the guarded last layer gives way evenly.
        """
        last = _last(graph) if self.rule == "uniform+" else ()
        products = Products.of(graph, groups)

        def uniform(density: float) -> dict[str, float]:
            guarded = max(density, LAST * min(1.0, density / least))
            return {name: guarded if name in last else density for name in groups}

        def erk(density: float) -> dict[str, float]:
            return products.shares(erk_densities([graph.shapes[name] for name in products.layers], density))

        return erk if self.rule == "erk" else uniform


def erk_densities(shapes: Sequence[tuple[int, ...]], density: float) -> NDArray[np.float64]:
    """Return one density for each layer: `min(1, eps * sum(shape) / prod(shape))`, which sum up to the overall density.

    Layers that would exceed 1 stay whole, one at a time, and eps is computed again without them.

    Args:
        shapes: (n, c, k, k) or (n, c) of each weight.
        density: Share of all weights that stays.
    """
    n = np.array([prod(shape) for shape in shapes], dtype=np.float64)
    ends = np.array([sum(shape) for shape in shapes], dtype=np.float64)
    whole, densities = np.zeros(len(n), bool), np.ones(len(n))
    for _ in shapes:
        eps = (density * n.sum() - n[whole].sum()) / ends[~whole].sum()
        densities = np.where(whole, 1.0, eps * ends / n)
        if densities.max() <= 1.0 or whole.sum() == len(n) - 1:
            break
        whole[np.argmax(np.where(whole, 0.0, densities))] = True
    return densities.clip(0.0, 1.0)  # rounding


def _first(graph: Graph, groups: Collection[str]) -> str:
    """Return the group that the first layer makes; empty if it cannot be pruned."""
    return next((name for layer in graph.layers[:1] for name in layer.n_out.groups if name in groups), "")


def _last(graph: Graph) -> Collection[str]:
    """Return the groups that the last layer reads."""
    return graph.layers[-1].n_in.groups if graph.layers else ()
