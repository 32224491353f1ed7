"""LAMP: one global threshold on magnitudes that were made comparable across layers.

Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611, section 2.

Deviations: the paper prunes single weights, and fixes the share of them that survives. Here channels go. By default
(`of=weights`) the paper's threshold on the scores of single weights says how dense every layer should be. A layer's density is
the product of the shares of channels that it reads and that it makes: it asks of both the root, and a group of coupled
channels takes the geometric mean of what its layers ask. With `of=channels` u is a channel and W[u]^2 the squared norm of the
filters that make it, summed over the layers that do, in one LAMP vector for each group of coupled layers. Either way the
channels with the largest norms stay, the threshold is the lowest with which the model fits the budget, and widths are the
nearest that the table offers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploypipe.algorithms.base import Problem, Statistics, judged, producers, rows, signed
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import plan_of, ranking
from deploypipe.allocation.scaled import nearest_width, scaled_widths
from deploypipe.allocation.threshold import threshold_widths
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.shares import Products
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.types import Group

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Lamp:
    """Give layers the densities of one threshold on LAMP scores, and keep the channels with the largest norms."""

    name: ClassVar[str] = "lamp"
    of: str = option("weights", "what is scored: single weights, for densities of layers, or channels",
                     choices=("weights", "channels"))  # fmt: skip

    def plan(self, problem: Problem) -> KeepPlan:
        """Score, and lower the one threshold until the model fits no more.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        weights = Statistics(problem).weights
        bound = Products.of(problem.graph, problem.graph.kept()).groups

        def judge(group: Group) -> Scores:
            if self.of == "weights" and group.name not in bound:
                raise NotApplicable("no layer has a density that decides its share")
            return squared_norms(group, weights)

        squared, skipped = judged(problem.graph, judge)
        orders = {name: ranking(norms) for name, norms in squared.items()}
        if self.of == "weights":
            kept, certificate = _by_densities(problem, orders, weights)
        else:
            scores = {name: lamp(norms[orders[name]]) for name, norms in squared.items()}
            kept, certificate = threshold_widths(problem.graph, scores, problem.table, problem.budget)
        return signed(self, plan_of(problem.graph, orders, kept, certificate), skipped)


def squared_norms(group: Group, weights: Mapping[str, Tensor]) -> Scores:
    """Return the (C,) squared norms of what makes the channels, biases and norms left out.

    Raises:
        NotApplicable: No weight produces the channels.
    """
    squares = [rows(weights[member.param], member).double().square().sum(1) for member in producers(group, weights)]
    norms: Scores = torch.stack(squares).sum(0).cpu().numpy()
    return norms


def lamp(squared: Scores) -> Scores:
    """Return `W[u]^2 / sum of W[v]^2 over all v that stay at least as long as u`: the largest channel scores exactly 1.

    Args:
        squared: (C,) squared norms, descending.
    """
    first = np.arange(len(squared)) == 0
    scores: Scores = np.divide(squared, np.cumsum(squared), out=first.astype(np.float64), where=squared > 0)
    return scores


def densities(squared: Sequence[Scores]) -> Callable[[float], Scores]:
    """Return a function: share of all weights that stays -> share of every layer's, by one threshold on their LAMP scores.

    Every layer keeps its largest weight, whose score is 1.

    Args:
        squared: The squared weights of each layer, descending.
    """
    rising = [lamp(values)[::-1].astype(np.float32) for values in squared]  # halves what large models take
    every = np.sort(np.concatenate([np.empty(0, np.float32), *rising]))

    def at(share: float) -> Scores:
        lowest = every[-max(1, round(share * len(every)))] if len(every) else 1.0
        return np.array([1 - np.searchsorted(scores, lowest) / len(scores) for scores in rising])

    return at


def _by_densities(
    problem: Problem, orders: Mapping[str, NDArray[np.int64]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, int], Certificate]:
    """Return the widths that stand for the densities of the largest share of weights that fits the budget."""
    legal, products = problem.table.candidates(problem.graph), Products.of(problem.graph, orders)
    flat = [weights[name].flatten().double().square().sort(descending=True).values for name in products.layers]
    layer_densities = densities([values.cpu().numpy() for values in flat])

    def widths(share: float) -> dict[str, int]:
        wanted = products.shares(layer_densities(share))
        return {name: nearest_width(legal[name], wanted[name] * len(orders[name])) for name in orders}

    return scaled_widths(problem.graph, widths, problem.table, problem.budget)
