"""LAMP: one global threshold on magnitudes that were made comparable across layers.

Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, arXiv:2010.07611, section 2.

Deviations: the paper prunes single weights. Here u is a channel and W[u]^2 the squared norm of the filters that make it, summed
over the layers that do; there is one LAMP vector for each group of coupled layers. The paper fixes the share of weights that
survives; here the share of channels is the largest with which the model fits the budget. The number of channels above the
threshold is moved to the nearest width that the table offers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploypipe.algorithms.base import Problem, Statistics, judged, producers, rows, signed
from deploypipe.allocation.allocate import plan_of, ranking
from deploypipe.allocation.threshold import threshold_widths
from deploypipe.plan import KeepPlan
from deploypipe.types import Group

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Lamp:
    """Rank the channels of all groups together by their LAMP scores; inside a group that is the order of their norms."""

    name: ClassVar[str] = "lamp"

    def plan(self, problem: Problem) -> KeepPlan:
        """Score, and lower the one threshold until the model fits no more.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        weights = Statistics(problem).weights
        squared, skipped = judged(problem.graph, lambda group: squared_norms(group, weights))
        orders = {name: ranking(norms) for name, norms in squared.items()}
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
