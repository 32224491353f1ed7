"""What widths are worth, measured: the loss of every group at every width; and a search that mends what curves cannot say.

Curves say what one group does while all others stay as they are. Groups interact: of two that do the same, either may go, but
not both. So the curves are measured again around the solution, and a step from there is kept only if the measured loss falls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from deploypipe.allocation.allocate import allocate_widths, charged_once, first_channels
from deploypipe.cost import CostTable
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.progress import Reporter
from deploypipe.training.evaluate import Accuracy
from deploypipe.types import Graph
from deploypipe.worth.heldout import Meter

Widths = Mapping[str, int]


@dataclass(frozen=True)
class Curve:
    """Held-out loss and accuracy of the model with one group at several widths.

    Attributes:
        group: Its name.
        size: Its full width.
        widths: Measured numbers of channels, ascending; the full width is the last.
        found: What was measured at each of them.
    """

    group: str
    size: int
    widths: tuple[int, ...]
    found: tuple[Accuracy, ...]

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """Measured losses, the nearest that never rise with the width.

        More channels do not hurt a network that is trained afterwards; where a measurement says so it is noise, or a channel
        that training would quieten. Neighbours that contradict this share their mean (isotonic regression).
        """
        losses: NDArray[np.float64] = isotonic_regression([each.loss for each in self.found], increasing=False).x
        return losses

    @property
    def value(self) -> NDArray[np.float64]:
        """Return the (size + 1,) value of keeping w channels: minus the rise of the loss, zero at full width.

        The loss is the mean negative logarithm of the probability of the right label. Damage in several groups multiplies what
        is left of that probability, to first order, so that these logarithms add up. Accuracies do not: they are flat until
        the first label changes. Widths between measured ones are interpolated, narrower ones count as the narrowest.
        """
        rise = self.losses - self.losses[-1]
        value: NDArray[np.float64] = -np.interp(np.arange(self.size + 1), self.widths, rise)
        return value


@dataclass(frozen=True)
class Trial:
    """A plan that was measured.

    Attributes:
        origin: What proposed it: "scores" of the algorithm, "curves" of the whole model, or the curves of "round 1", ...
        kept: Group -> channels that stay.
        certificate: What the allocator proved about it, in the values that it was given.
        found: Measured on held-out images, before training.
        trained: The same after one epoch of training, for the finalists.
    """

    origin: str
    kept: Widths
    certificate: Certificate
    found: Accuracy
    trained: Accuracy | None = None


@dataclass(frozen=True)
class Found:
    """What a search found: the plans that were tried, in order, and which of them is the best by measurement."""

    trials: tuple[Trial, ...]
    chosen: int

    @property
    def best(self) -> Trial:
        """The plan to take."""
        return self.trials[self.chosen]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """A model whose widths can be measured.

    Attributes:
        graph: Its channel graph.
        table: What widths cost, and which are worth choosing from.
        orders: Group -> channels, the one to keep longest first. Groups without an order stay whole.
        meter: Measures plans.
        reporter: Hears how far it is.
        removable: Groups that may be left without channels, so that their branch goes.
    """

    graph: Graph
    table: CostTable
    orders: Mapping[str, ArrayLike]
    meter: Meter
    reporter: Reporter
    removable: tuple[str, ...] = ()

    def plan(self, kept: Widths) -> KeepPlan:
        """Return the plan that keeps the first channels of each group's order."""
        return KeepPlan(first_channels(self.orders, kept))

    def curves(self, around: Widths, stage: str) -> tuple[Curve, ...]:
        """Measure every group at every candidate width, the others as in `around` (whole, if they are not named there)."""
        offered = self.table.candidates(self.graph)
        widths = {name: self._widths(name, offered.get(name, ()), around) for name in self.orders}
        self.meter.measure(self.plan(around))  # the one point that all curves share
        plans = [(name, self.plan({**around, name: width})) for name, choice in widths.items() for width in choice]
        missing = [(name, plan) for name, plan in plans if not self.meter.known(plan)]
        if missing:
            self.reporter.stage(stage, len(missing))
        else:
            self.reporter.reused(stage)
        for done, (name, plan) in enumerate(missing, 1):
            self.meter.measure(plan)
            self.reporter.advance(done, name)
        found = iter([self.meter.measure(plan) for _, plan in plans])
        return tuple(Curve(name, choice[-1], choice, tuple(next(found) for _ in choice)) for name, choice in widths.items())

    def require(self, budget: float) -> None:
        """Raise BudgetError unless some choice of widths fits the budget; nothing is measured for it."""
        offered = self.table.candidates(self.graph)
        choice = {name: self._widths(name, offered.get(name, ()), {}) for name in self.orders}
        none = {name: np.zeros(self.graph.group(name).size + 1) for name in self.orders}
        allocate_widths(self.graph, none, self.table, budget, candidates=choice)

    def search(self, budget: float, rounds: int, scored: tuple[Widths, Certificate] | None = None) -> Found:
        """Try plans within the budget, and measure each.

        First come the plan that the algorithm's scores chose, if there is one, and the best by the curves of the whole model.
        Each round measures the curves around the best plan so far and solves again. These curves hold where the others stay as
        they are, so a solution that moves far may be worse than they say: then every group may move only half as many widths
        (or to its full width), and it is solved again. The search ends when no smaller step helps, or after `rounds`
        measurements of curves.

        Args:
            budget: Upper limit of the table's cost.
            rounds: How often curves are measured again, at most.
            scored: What the algorithm's scores chose within the budget: the answer is no worse, by measured loss.

        Raises:
            BudgetError: No choice of widths fits.
        """
        trials = [self._trial("curves", self.curves({}, "curves"), budget)]
        if scored:
            trials.insert(0, Trial("scores", *scored, self.meter.measure(self.plan(scored[0]))))
        best = min(trials, key=lambda trial: trial.found.loss)
        for number in range(1, rounds + 1):
            better = self._step(f"round {number}", best, budget, trials)
            if better is None:
                break
            best = better
        return Found(tuple(trials), trials.index(best))

    def finals(self, found: Found, n: int) -> Found:
        """Train the `n` plans of the smallest loss for one epoch each, and choose the one of the smallest loss then."""
        order = sorted(range(len(found.trials)), key=lambda i: found.trials[i].found.loss)
        different = {tuple(sorted(found.trials[i].kept.items())): i for i in reversed(order)}  # of equal plans the first
        finalists = sorted(different.values(), key=order.index)[:n]
        trials = list(found.trials)
        for i in finalists:
            trials[i] = replace(trials[i], trained=self.meter.trained(self.plan(trials[i].kept), self.reporter))
        after = {i: trained.loss for i in finalists if (trained := trials[i].trained)}
        return Found(tuple(trials), min(after, key=lambda i: after[i]))

    def _step(self, origin: str, centre: Trial, budget: float, trials: list[Trial]) -> Trial | None:
        """Return a better plan than `centre` by the curves around it; None if none is found. What is tried joins `trials`."""
        curves = self.curves(centre.kept, f"curves, {origin}")
        radius = max(len(curve.widths) for curve in curves)
        while radius:
            trial = self._trial(origin, curves, budget, _near(curves, centre.kept, radius))
            if all(trial.kept != other.kept for other in trials):
                trials.append(trial)
            if trial.found.loss < centre.found.loss:
                return trial
            radius //= 2
        return None

    def _trial(
        self, origin: str, curves: Sequence[Curve], budget: float, candidates: Mapping[str, tuple[int, ...]] | None = None
    ) -> Trial:
        """Return the best plan by the curves, measured. Without `candidates` all measured widths may be chosen."""
        values = charged_once(self.graph, {curve.group: curve.value for curve in curves}, self.removable)
        choice = candidates or {curve.group: curve.widths for curve in curves}
        kept, certificate = allocate_widths(self.graph, values, self.table, budget, candidates=choice)
        return Trial(origin, kept, certificate, self.meter.measure(self.plan(kept)))

    def _widths(self, name: str, offered: Sequence[int], around: Widths) -> tuple[int, ...]:
        size, none = self.graph.group(name).size, (0,) if name in self.removable else ()
        return tuple(sorted({*none, *offered, around.get(name, size), size}))


def _near(curves: Sequence[Curve], kept: Widths, radius: int) -> dict[str, tuple[int, ...]]:
    """Return the widths at most `radius` places from those in `kept`."""
    near = {}
    for curve in curves:
        place = curve.widths.index(kept[curve.group])
        near[curve.group] = curve.widths[max(0, place - radius) : place + radius + 1]
    return near
