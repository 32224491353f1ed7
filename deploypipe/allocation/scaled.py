"""Widths that all follow from one number, such as a density: the largest number whose widths fit a budget."""

from collections.abc import Callable, Mapping, Sequence

from deploypipe.allocation.allocate import cheapest_widths, unproved
from deploypipe.cost import CostTable
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.types import Graph

HALVINGS = 40


def scaled_widths(
    graph: Graph, widths_at: Callable[[float], Mapping[str, int]], table: CostTable, budget: float
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group for the largest share that fits, found by bisection.

    Where the cost does not rise with the widths everywhere, the share is one that fits, not surely the largest.

    Args:
        graph: The traced model.
        widths_at: Share from 0 to 1 -> numbers of kept channels, which rise with it; groups that are not named stay whole.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """

    def fits(share: float) -> bool:
        plan = KeepPlan.of_widths(widths_at(share))
        return table.predict(graph, plan) <= budget

    if not fits(0.0):
        cheapest = cheapest_widths(graph, widths_at(0.0), table, budget)
        return cheapest, unproved(graph, cheapest, table, budget, 0.0, "cheapest")
    low, high = (1.0, 1.0) if fits(1.0) else (0.0, 1.0)
    for _ in range(HALVINGS if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    kept = graph.kept() | dict(widths_at(low))
    return kept, unproved(graph, kept, table, budget, low, "scaled")


def nearest_width(legal: Sequence[int], wanted: float) -> int:
    """Return the legal width closest to the wanted one; of two, the narrower.

    >>> nearest_width((8, 16, 20), 12), nearest_width((8, 16, 20), 0.3), nearest_width((8, 16, 20), 17)
    (8, 8, 16)
    """
    return min(legal, key=lambda width: (abs(width - wanted), width))
