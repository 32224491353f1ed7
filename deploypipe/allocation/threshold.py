"""Widths by one threshold on the scores of all groups together, as low as a budget asks."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deploypipe.allocation.allocate import ranking
from deploypipe.allocation.scaled import nearest_width, scaled_widths
from deploypipe.cost import CostTable
from deploypipe.plan import Certificate
from deploypipe.types import Graph

Scores = NDArray[np.float64]


def threshold_widths(
    graph: Graph, scores: Mapping[str, Scores], table: CostTable, budget: float
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group: the largest share of all channels, best first, that fits the budget.

    The number of channels of a group above the threshold is moved to the nearest width that the table offers; that is at least
    one, so that no group is emptied.

    Args:
        graph: The traced model.
        scores: Group -> (C,) scores, comparable across groups. Groups without scores stay whole.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """
    legal = table.candidates(graph)

    def widths(share: float) -> dict[str, int]:
        return {name: nearest_width(legal[name], n) for name, n in survivors(scores, share).items()}

    return scaled_widths(graph, widths, table, budget)


def uniform_widths(
    graph: Graph, names: Mapping[str, object], table: CostTable, budget: float
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group when the named ones keep the same share, the largest that fits the budget.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """
    legal, sizes = table.candidates(graph), {name: graph.group(name).size for name in names}

    def widths(share: float) -> dict[str, int]:
        return {name: nearest_width(legal[name], share * size) for name, size in sizes.items()}

    return scaled_widths(graph, widths, table, budget)


def survivors(scores: Mapping[str, Scores], share: float) -> dict[str, int]:
    """Return how many channels of each group are among that share of all channels with the highest scores."""
    owner = np.repeat(np.arange(len(scores)), [len(score) for score in scores.values()])
    best = ranking(np.concatenate([np.empty(0), *scores.values()]))[: round(share * len(owner))]
    counts = np.bincount(owner[best], minlength=len(scores))
    return dict(zip(scores, counts.tolist(), strict=True))
