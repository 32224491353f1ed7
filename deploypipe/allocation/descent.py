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
        together: Group -> groups that must have no channel either where it has none.
    """

    def __init__(
        self,
        widths: Mapping[str, Sequence[int]],
        values: Mapping[str, NDArray[np.float64]],
        sizes: Mapping[str, int],
        terms: Sequence[CostTerm],
        together: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._widths, self._values, self._whole, self._terms = widths, values, dict(sizes), terms
        self._together = together or {}
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
                moves = (self._move(kept, name, width) for width in below)
                savings = ((-self._change(kept, move), move) for move in moves)
                saved, move = next(((saved, move) for saved, move in savings if saved > 0), (0.0, {}))  # off the plateau
                if saved > 0:
                    steps.append((-self._gain(kept, move) / saved, saved, move))
            if not steps:
                break
            _, saved, move = min(steps, key=lambda step: step[0])
            kept |= move
            cost -= saved
        return kept

    def widened(self, kept: Choice, limit: float) -> Choice:
        """Add what still fits, the largest gain first."""
        kept = dict(kept)
        cost = _sum(self._terms, self._whole | kept)
        while True:
            gains = []
            for move in self._steps(kept, 1):
                gain, more = self._gain(kept, move), self._change(kept, move)
                if gain > 0 and cost + more <= limit:
                    gains.append((gain, more, move))
            if not gains:
                return kept
            _, more, move = max(gains, key=lambda step: step[0])
            kept |= move
            cost += more

    def cheapened(self, kept: Choice) -> Choice:
        """Walk to ever cheaper neighbours until there is none."""
        kept = dict(kept)
        while True:
            moves = [*self._steps(kept, -1), *self._steps(kept, 1)]
            changes = [(self._change(kept, move), move) for move in moves]
            change, move = min(changes, key=lambda one: one[0], default=(0.0, {}))
            if change >= 0:
                return kept
            kept |= move

    def _steps(self, kept: Choice, step: int) -> Iterator[Choice]:
        for name, widths in self._widths.items():
            k = widths.index(kept[name]) + step
            if 0 <= k < len(widths):
                yield self._move(kept, name, widths[k])

    def _move(self, kept: Choice, name: str, width: int) -> Choice:
        """Return all that changes with the width of a group: what goes or comes with it where it loses its last channels."""
        move, waiting = {name: width}, [name]
        while waiting:
            here = waiting.pop()
            along = dict.fromkeys(self._together.get(here, ()), 0) if not move[here] else {}
            if move[here]:
                without = (n for n, others in self._together.items() if here in others and not (kept | move)[n])
                along = {other: self._widths[other][1] for other in without}
            for other, least in along.items():
                if bool((kept | move)[other]) != bool(least):
                    move[other] = least
                    waiting.append(other)
        return move

    def _change(self, kept: Choice, move: Choice) -> float:
        now, terms = self._whole | kept, {id(term): term for name in move for term in self._of[name]}
        return _sum([*terms.values()], now | move) - _sum([*terms.values()], now)

    def _gain(self, kept: Choice, move: Choice) -> float:
        return sum(float(self._values[name][width]) - float(self._values[name][kept[name]]) for name, width in move.items())


def _sum(terms: Sequence[CostTerm], kept: Mapping[str, int]) -> float:
    return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in terms)
