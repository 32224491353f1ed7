"""Walk from choice to choice of widths, one group a step: the allocator's answer where the solver ran out of time."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deploypipe.cost import CostTerm

Choice = dict[str, int]  # group -> number of channels that stay


class Descent:
    """Neighbourhood search over candidate widths, with costs summed over a table's terms.

    Args:
        widths: Group -> candidate widths, ascending. Other groups stay whole.
        values: Group -> value of keeping w channels, by w.
        sizes: Size of every group.
        terms: What the model costs.
    """

    def __init__(
        self,
        widths: Mapping[str, Sequence[int]],
        values: Mapping[str, NDArray[np.float64]],
        sizes: Mapping[str, int],
        terms: Sequence[CostTerm],
    ) -> None:
        self._widths, self._values, self._whole, self._terms = widths, values, dict(sizes), terms
        self._of: dict[str, list[CostTerm]] = {name: [] for name in widths}
        for term in terms:
            for name in {*term.n_in.groups, *term.n_out.groups} & self._of.keys():
                self._of[name].append(term)

    def narrowed(self, limit: float) -> Choice:
        """Start whole and narrow, step by step, the group that gives up least for what it saves, until the cost is `limit`.

        Returns the cheapest choice met on the way if every further step would cost more.
        """
        kept = {name: widths[-1] for name, widths in self._widths.items()}
        cost = _sum(self._terms, self._whole | kept)
        while cost > limit:
            steps = []
            for name, widths in self._widths.items():
                below = reversed(widths[: widths.index(kept[name])])
                savings = ((-self._change(kept, name, width), width) for width in below)
                saved, width = next(((saved, width) for saved, width in savings if saved > 0), (0.0, 0))  # off the plateau
                if saved > 0:
                    steps.append((self._gain(name, width, kept[name]) / saved, saved, name, width))
            if not steps:
                break
            _, saved, name, width = min(steps, key=lambda step: step[0])
            kept[name] = width
            cost -= saved
        return kept

    def widened(self, kept: Choice, limit: float) -> Choice:
        """Add what still fits, the largest gain first."""
        kept = dict(kept)
        cost = _sum(self._terms, self._whole | kept)
        while True:
            gains = []
            for name, width in self._steps(kept, 1):
                gain, more = self._gain(name, kept[name], width), self._change(kept, name, width)
                if gain > 0 and cost + more <= limit:
                    gains.append((gain, more, name, width))
            if not gains:
                return kept
            _, more, name, width = max(gains, key=lambda step: step[0])
            kept[name] = width
            cost += more

    def cheapened(self, kept: Choice) -> Choice:
        """Walk to ever cheaper neighbours until there is none."""
        kept = dict(kept)
        while True:
            moves = [*self._steps(kept, -1), *self._steps(kept, 1)]
            changes = [(self._change(kept, name, width), name, width) for name, width in moves]
            change, name, width = min(changes, key=lambda move: move[0], default=(0.0, "", 0))
            if change >= 0:
                return kept
            kept[name] = width

    def _steps(self, kept: Choice, step: int) -> Iterator[tuple[str, int]]:
        for name, widths in self._widths.items():
            k = widths.index(kept[name]) + step
            if 0 <= k < len(widths):
                yield name, widths[k]

    def _change(self, kept: Choice, name: str, width: int) -> float:
        now = self._whole | kept
        return _sum(self._of[name], now | {name: width}) - _sum(self._of[name], now)

    def _gain(self, name: str, narrow: int, wide: int) -> float:
        return float(self._values[name][wide]) - float(self._values[name][narrow])


def _sum(terms: Sequence[CostTerm], kept: Mapping[str, int]) -> float:
    return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in terms)
