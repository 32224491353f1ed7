"""Widths by one threshold on the scores of all groups together, as low as a budget asks, or by one share of every group."""

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
    one, so that no group is emptied. What the threshold leaves of the budget is filled, group by group, with the channels that
    come next below it, as far as their scores are positive.

    Args:
        graph: The traced model.
        scores: Group -> (C,) scores, comparable across groups. Groups without scores stay whole.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """
    legal, owner = table.candidates(graph), _owners(scores)

    def widths(share: float) -> dict[str, int]:
        return {name: nearest_width(legal[name], n) for name, n in _counts(scores, owner, share).items()}

    return scaled_widths(graph, widths, table, budget, worth_keeping(scores))


def uniform_widths(
    graph: Graph, names: Mapping[str, object], table: CostTable, budget: float, most: Mapping[str, int] | None = None
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group when the named ones keep the same share, the largest that fits the budget.

    What that leaves of the budget is filled group by group, as if the share went on rising, up to `most` channels of a group.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """
    legal, sizes = table.candidates(graph), {name: graph.group(name).size for name in names}

    def widths(share: float) -> dict[str, int]:
        return {name: nearest_width(legal[name], share * size) for name, size in sizes.items()}

    return scaled_widths(graph, widths, table, budget, most)


def survivors(scores: Mapping[str, Scores], share: float) -> dict[str, int]:
    """Return how many channels of each group are among that share of all channels with the highest scores."""
    return _counts(scores, _owners(scores), share)


def _counts(scores: Mapping[str, Scores], owner: NDArray[np.int64], share: float) -> dict[str, int]:
    counts = np.bincount(owner[: round(share * len(owner))], minlength=len(scores))
    return dict(zip(scores, counts.tolist(), strict=True))


def _owners(scores: Mapping[str, Scores]) -> NDArray[np.int64]:
    """Return the number of the group that each channel belongs to, the channel with the highest score of all first."""
    groups = np.repeat(np.arange(len(scores)), [len(score) for score in scores.values()])
    return groups[ranking(np.concatenate([np.empty(0), *scores.values()]))]


def worth_keeping(scores: Mapping[str, Scores]) -> dict[str, int]:
    """Return how many channels of each group have a positive score; the others are gone, or do nothing."""
    return {name: int((score > 0).sum()) for name, score in scores.items()}
