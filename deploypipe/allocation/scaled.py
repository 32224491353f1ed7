"""Widths that all follow from one number, such as a density: the largest that fits a budget, and what fits beside it."""

from collections.abc import Callable, Mapping, Sequence

from deploypipe.allocation.allocate import cheapest_widths, unproved
from deploypipe.cost import CostTable
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.types import Graph

HALVINGS = 40
WidthsAt = Callable[[float], Mapping[str, int]]


def scaled_widths(
    graph: Graph, widths_at: WidthsAt, table: CostTable, budget: float, most: Mapping[str, int] | None = None
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group for the largest share that fits, found by bisection, and what fits beside.

    One share for all leaves a part of the budget unused, since at the next one several groups grow at once, or one by a whole
    step. So the share goes on rising, and each group whose turn comes follows it by itself, up to its first width that does
    not fit. Where the cost does not rise with the widths everywhere, the share is one that fits, not surely the largest.

    Args:
        graph: The traced model.
        widths_at: Share from 0 to 1 -> numbers of kept channels, which rise with it; groups that are not named stay whole.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.
        most: Group -> width beyond which it does not follow by itself; without it, its size.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
    """

    def within(kept: Mapping[str, int]) -> bool:
        return table.predict(graph, KeepPlan.of_widths(kept)) <= budget

    def fits(share: float) -> bool:
        return within(widths_at(share))

    if not fits(0.0):
        cheapest = cheapest_widths(graph, widths_at(0.0), table, budget)
        return cheapest, unproved(graph, cheapest, table, budget, 0.0, "cheapest")
    low, high = (1.0, 1.0) if fits(1.0) else (0.0, 1.0)
    for _ in range(HALVINGS if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    kept = graph.kept() | _filled(low, widths_at, within, most or {})
    return kept, unproved(graph, kept, table, budget, low, "scaled")


def _filled(
    share: float, widths_at: WidthsAt, within: Callable[[Mapping[str, int]], bool], most: Mapping[str, int]
) -> dict[str, int]:
    """Return the widths at that share, and of each group what it gains alone, in the order in which a rising share adds it."""
    kept = dict(widths_at(share))
    growing = list(kept)

    def gains(at: float) -> dict[str, int]:
        wanted = widths_at(at)
        return {name: wanted[name] for name in growing if wanted[name] > kept[name]}

    while gains(1.0):
        low, high = share, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if gains(middle) else (middle, high)
        share = high
        for name, width in gains(share).items():
            if width <= most.get(name, width) and within({**kept, name: width}):
                kept[name] = width
            else:
                growing.remove(name)
    return kept


def nearest_width(legal: Sequence[int], wanted: float) -> int:
    """Return the legal width closest to the wanted one; of two, the narrower.

    >>> nearest_width((8, 16, 20), 12), nearest_width((8, 16, 20), 0.3), nearest_width((8, 16, 20), 17)
    (8, 8, 16)
    """
    return min(legal, key=lambda width: (abs(width - wanted), width))
