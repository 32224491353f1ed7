"""The search for the most valuable choice within a budget: the exact program, and what stands in where it ends early."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from deploypipe.allocation.descent import Descent
from deploypipe.allocation.linear import Solution
from deploypipe.allocation.program import Program
from deploypipe.cost import CostTable, CostTerm
from deploypipe.errors import BudgetError
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.types import Graph

Values = NDArray[np.float64]
ROUNDS = 12  # solutions that turn out over budget are refused this often before the search gives up on the solver


@dataclass(frozen=True)
class Choice:
    """What was chosen: group -> number of channels that stay (groups that are not named are whole), layers with 2:4 weights."""

    kept: dict[str, int]
    two_four: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True)
class Search:
    """One allocation: the widths to choose from, their values, and the program that stands for them."""

    graph: Graph
    table: CostTable
    budget: float
    widths: dict[str, tuple[int, ...]]
    values: dict[str, Values]
    whole: dict[str, int]
    terms: Sequence[CostTerm]
    program: Program
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # group -> groups that are empty where it is

    def value(self, choice: Choice) -> float:
        """Return the summed value, less that of the masks; groups that are not named are whole."""
        kept, masks = choice.kept, self.program.masks
        gained = sum(value[kept.get(name, -1)] for name, value in self.values.items())
        return float(gained) - sum(masks[name][1] for name in choice.two_four)

    def predict(self, choice: Choice) -> float:
        """Return the table's own prediction: the only cost that counts. Groups that are not named are whole."""
        return self.table.predict(self.graph, KeepPlan.of_widths(choice.kept, choice.two_four))

    @property
    def exact(self) -> bool:
        """Whether the program's cost is what the table predicts, up to the solver's tolerance."""
        return self.program.exact and not self.slack

    @cached_property
    def slack(self) -> float:
        """Return by how much the terms may exceed the prediction: an empty group takes more along than the terms know of.

        `ParamTable` prices biases and norms behind an empty branch as if they stayed. Each branch by itself, with all other
        groups whole, is the most that this can be.
        """
        found = 0.0
        for name in (name for name, widths in self.widths.items() if widths[0] == 0):
            gone = dict.fromkeys((name, *self.together.get(name, ())), 0)
            found += max(sum(term.under(self.whole | gone) for term in self.terms) - self.predict(Choice(gone)), 0.0)
        return found if found > 1e-9 * self.budget else 0.0  # else rounding

    def solve(self, gap: float, deadline: float) -> tuple[Choice, Solution]:
        """Return the best choice whose true prediction fits, and the solver's first answer with its bound on the loss.

        The program's cost differs from the prediction by the solver's tolerance, by the envelope of large concats, and by what
        the table predicts beyond the sum of its terms. If the answer is over budget, the program is solved again for less.
        Where terms may exceed the prediction, it is solved for as much more at first: nothing within the budget is missed.

        A walk through the widths comes first, and the solver is asked for what loses less than it by more than the gap: on wide
        concats the walk is often within the gap already, and proving that is far quicker than finding as good an answer.
        """
        losses = {name: self.values[name][-1] - self.values[name][list(widths)] for name, widths in self.widths.items()}
        walked = self._walked()
        beat = (1 - gap) * (self.value(Choice({})) - self.value(walked)) if walked else np.inf
        room = self.budget + self.slack
        first = self.program.solve(losses, room, gap, deadline - time.monotonic(), beat)
        if first.status == "infeasible":
            return (walked, Solution(None, beat, "optimal")) if walked else (self.cheapest(deadline), first)
        first = replace(first, bound=min(first.bound, beat))

        def again(limit: float) -> Choice | None:
            return _choice(
                first if limit == room else self.program.solve(losses, limit, gap, deadline - time.monotonic(), beat)
            )

        answers = [self._within_budget(again, room)]
        if not (self.exact and first.status == "optimal" and answers[0]):
            answers += [self._within_budget(partial(self._narrowed, masked), self.budget) for masked in self._extremes()]
            answers += [self._widened(choice) for choice in answers if choice]
        found = [self._useful(choice) for choice in (*answers, walked) if choice]
        return max(found, key=self.value) if found else self.cheapest(deadline), first

    def _extremes(self) -> list[frozenset[str]]:
        """Return no mask, and all of them where there are any: what a walk through the widths alone is tried with."""
        return list(dict.fromkeys([frozenset(), frozenset(self.program.masks)]))

    def _descent(self, masked: frozenset[str]) -> Descent:
        """Return the walk through the widths, with these layers' prices those of 2:4 weights."""
        terms = [replace(t, price=t.two_four) if t.two_four and t.name in masked else t for t in self.terms]
        return Descent(self.widths, self.values, self.whole, terms, self.together)

    def _walked(self) -> Choice | None:
        """Return the best choice of a walk through the widths; None if none fits at once."""
        walks = [self._narrowed(masked, self.budget) for masked in self._extremes()]
        return max(
            (self._useful(self._widened(c)) for c in walks if self.predict(c) <= self.budget), key=self.value, default=None
        )

    def _narrowed(self, masked: frozenset[str], limit: float) -> Choice:
        return Choice(self._descent(masked).narrowed(limit), masked)

    def _widened(self, choice: Choice) -> Choice:
        wider = replace(choice, kept=self._descent(choice.two_four).widened(choice.kept, self.budget))
        return wider if self.predict(wider) <= self.budget else choice

    def _useful(self, choice: Choice) -> Choice:
        """Return the choice without masks that save nothing at its widths."""
        kept = self.whole | choice.kept
        saving = {term.name for term in self.terms if term.under(kept, choice.two_four) < term.under(kept)}
        return replace(choice, two_four=choice.two_four & saving)

    def _within_budget(self, solve: Callable[[float], Choice | None], limit: float) -> Choice | None:
        """Ask `solve` for ever lower limits until its answer truly fits; None if it has no answer."""
        for k in range(ROUNDS):
            choice = solve(limit)
            if choice is None:
                return None
            excess = self.predict(choice) - self.budget
            if excess <= 0:
                return choice
            limit -= max(excess, 1e-9 * 4**k * self.budget)
        return None

    def cheapest(self, deadline: float) -> Choice:
        """Return the cheapest choice if it fits.

        Raises:
            BudgetError: It does not.
        """
        narrowest = {name: widths[0] for name, widths in self.widths.items()}
        found = self.program.solve(None, self.budget, 1e-6, max(deadline - time.monotonic(), 5.0))
        proved = self.exact and found.status == "optimal"
        starts = [choice for choice in (_choice(found), *(Choice(narrowest, masked) for masked in self._extremes())) if choice]
        if not proved:
            starts = [Choice(self._descent(c.two_four).cheapened(c.kept), c.two_four) for c in starts]
        choice = self._useful(min(starts, key=self.predict))
        smallest, dense, unit = self.predict(choice), self.predict(Choice({})), self.table.unit
        if smallest <= self.budget:
            return choice
        share = 100 * smallest / dense
        fix = f"ask for at least {np.ceil(10 * share) / 10:.1f}%, or allow narrower widths"
        if not self.widths:
            fix = "no channel of this model can go: `deploypipe inspect` says why, group by group"
        raise BudgetError(
            f"the budget of {self.budget:,.6g} {unit} ({100 * self.budget / dense:.1f} % of the dense model) is out of reach: "
            f"the smallest reachable cost {'' if proved else 'found '}is {smallest:,.6g} {unit} ({share:.1f} %)",
            at=f"{len(self.widths)} groups to choose from, {len(self.graph.fixed)} fixed{self._source()}",
            fix=fix,
        )

    def _source(self) -> str:
        """Say so if costs are latencies that nobody measured."""
        source = getattr(self.table, "source", "measured")  # counts have none
        return "" if source in {"measured", "fitted"} else f"; latencies are {source}, not measured"

    def certificate(self, choice: Choice, bound: float, status: str, start: float) -> Certificate:
        """Return what is known about a choice: its value, the proven `bound` of any, its cost."""
        value, predicted = self.value(choice), self.predict(choice)
        return Certificate(
            value=value,
            bound=bound,
            gap=(bound - value) / max(abs(value), 1e-12),
            predicted_us=predicted if self.table.unit == "us" else None,
            predicted=predicted,
            budget=self.budget,
            unit=self.table.unit,
            seconds=time.monotonic() - start,
            n_variables=self.program.n_variables,
            status=status,
            two_four=tuple(sorted(choice.two_four)),
        )


def _choice(solution: Solution) -> Choice | None:
    return None if solution.kept is None else Choice(solution.kept, solution.two_four)
