"""AutoCompress: search pruning rates by annealing, carry them out by ADMM, purify; in rounds that end at the budget.

Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, AAAI 2020,
arXiv:1907.03141, algorithm 1.

Deviations: what a round must reach is a budget of the cost table, measured latency by default, on an exponential way from the
dense cost; the paper counts weights. Rates are of groups of coupled channels, and filter and channel pruning are one and the
same there; column pruning is left out, because no dense runtime is faster for it. Rates become widths that the table offers.
The temperature is in units of accuracy. The annealing starts from guided rates (no group is pruned less than one with fewer
weights), and they are free afterwards. A candidate is judged after renewing its batch norms, on a part of the training data
that no round trains on; the user's weights may know it. Purification takes off dead channels, and with `delta` the weakest ones
by the same annealing, as long as the accuracy on held-out images falls by no more than that; by default it does not go below
the budget. The final fine-tuning is that of the run, on all the data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import nn

from deploypipe.algorithms.base import Problem, judged, labelled, signed
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import cheapest_widths, first_channels, ranking, unproved
from deploypipe.allocation.scaled import nearest_width
from deploypipe.compact import compact
from deploypipe.data.batches import Samples
from deploypipe.ingredients.annealing import Rates, Schedule, anneal, guided, rescaled
from deploypipe.ingredients.expand import expanded
from deploypipe.ingredients.judge import Judge
from deploypipe.ingredients.projections import KeepRows
from deploypipe.ingredients.proximal import AdmmHook, Constraint
from deploypipe.ingredients.purify import dead
from deploypipe.ingredients.stacks import Stack
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.training.trainer import Trainer

MOST_PURIFIED = 0.5  # of the channels that are left in a group


@dataclass(frozen=True)
class AutoCompress:
    """Search, pull, prune and retrain round by round; then purify."""

    name: ClassVar[str] = "autocompress"
    rounds: int = option(3, "rounds on the way to the budget", low=1)
    train_epochs: int = option(9, "epochs with the pull of ADMM, over all rounds", low=0)
    retrain_epochs: int = option(1, "epochs after the pruning of each round", low=0)
    evaluations: int = option(100, "candidates that a search looks at", low=1)
    start: float = option(0.05, "first temperature, in units of accuracy", low=1e-6)
    stop: float = option(0.002, "last temperature, in units of accuracy", low=1e-9)
    spread: float = option(0.35, "largest change of a rate at the first temperature", low=0, high=1)
    rho: float = option(0.1, "strength of ADMM's pull at the start of a round", low=0)
    growth: float = option(1.4, "factor on rho after every epoch", low=1)
    delta: float = option(0.0, "accuracy that purification may cost; 0 takes off dead channels only", low=0, high=1)
    images: int = option(512, "training images that are held out to judge candidates, at most half of all", low=1)
    norm_images: int = option(256, "training images that renew a candidate's batch norms; 0 leaves them as they are", low=0)

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Return the model of full size whose channels are dead but for those that all rounds and purification left.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        dense, model = problem.table.predict(problem.graph), problem.model
        cheapest_widths(problem.graph, (g.name for g in problem.graph.prunable), problem.table, problem.budget)
        part = Judge(problem.graph, labelled(problem.data), self.images, self.norm_images, problem.seed).fit
        for number in range(1, self.rounds + 1):
            budget = dense * (problem.budget / dense) ** (number / self.rounds) if number < self.rounds else problem.budget
            task = replace(problem, model=model, budget=budget)
            plan = self.plan(task)
            pulled = self._pulled(task, plan, trainer, number, part)
            small = trainer.fit(compact(pulled, task.graph, plan), self.retrain_epochs, part=part)
            model = expanded(small, pulled, task.graph, plan)
        return self._purified(replace(problem, model=model))

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep the channels that are alive; if they cost too much, search the rates with which they fit.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data, or too little to hold some out.
        """
        search = _Search(self, problem)
        kept, value, how = search.alive, 0.0, "alive"
        if search.cost(kept) > problem.budget:
            kept, value = search.rates_that_fit()
            how = "annealing"
        whole = problem.graph.kept() | kept
        certificate = unproved(problem.graph, whole, problem.table, problem.budget, value, how)
        return signed(self, search.plan(kept).replace(certificate=certificate), search.skipped)

    def _pulled(self, task: Problem, plan: KeepPlan, trainer: Trainer, number: int, part: Samples | None = None) -> nn.Module:
        """Return the model after ADMM towards the numbers of channels of a plan."""
        graph = task.graph
        epochs = self.train_epochs * number // self.rounds - self.train_epochs * (number - 1) // self.rounds
        constraints = [
            Constraint(Stack.of_group(graph, graph.group(name), "filter"), KeepRows(len(kept)))
            for name, kept in plan.keep.items()
            if len(kept) < graph.group(name).size
        ]
        hooks = [AdmmHook(constraints, task.model, self.rho, self.growth)] if constraints else []
        return trainer.fit(task.model, epochs, hooks, part)

    def _purified(self, problem: Problem) -> nn.Module:
        search = _Search(self, problem)
        kept = search.purified() if self.delta else search.alive
        plan = search.plan(kept)
        return expanded(compact(problem.model, problem.graph, plan), problem.model, problem.graph, plan)


class _Search:
    """The widths of one model that a search goes through, and how good they are.

    Attributes:
        skipped: Group -> why it stays whole.
        alive: Group -> the narrowest width on offer that holds all channels that are not dead.
    """

    def __init__(self, options: AutoCompress, problem: Problem) -> None:
        self._options, self._problem, graph = options, problem, problem.graph
        view, gone = weights(problem.model), dead(problem.model, problem.graph)
        norms, self.skipped = judged(graph, lambda g: Stack.of_group(graph, g, "filter").norms(view).cpu().numpy())
        for name, channels in gone.items():
            if name in norms:
                norms[name][list(channels)] = -1.0
        self._orders = {name: ranking(norm) for name, norm in norms.items()}
        offered = problem.table.candidates(graph)
        n_alive = {name: int((norm >= 0).sum()) for name, norm in norms.items()}
        self.alive = {name: min(w for w in offered[name] if w >= n) for name, n in n_alive.items()}
        self._legal = {name: [w for w in offered[name] if w <= self.alive[name]] for name in norms}
        self._sizes = np.array([view[_first_weight(problem, name)].numel() for name in norms], dtype=float)
        self._judge = Judge(graph, labelled(problem.data), options.images, options.norm_images, problem.seed)
        self._rng = np.random.default_rng(problem.seed)
        self._known: dict[tuple[int, ...], float] = {}

    def plan(self, kept: Mapping[str, int]) -> KeepPlan:
        """Return the plan of the strongest channels."""
        return KeepPlan(first_channels(self._orders, kept), fingerprint=self._problem.graph.fingerprint)

    def cost(self, kept: Mapping[str, int]) -> float:
        """Return what widths cost."""
        return self._problem.table.predict(self._problem.graph, KeepPlan.of_widths(kept))

    def accuracy(self, kept: Mapping[str, int]) -> float:
        """Return the accuracy of the strongest channels on held-out images, without training."""
        key = tuple(kept.values())
        if key not in self._known:
            self._known[key] = self._judge(self._problem.model, self.plan(kept)).top1
        return self._known[key]

    def widths(self, rates: Rates) -> dict[str, int]:
        """Return the widths on offer that are nearest to what the rates leave of the channels that are alive."""
        return {
            name: nearest_width(legal, (1 - rate) * self.alive[name])
            for rate, (name, legal) in zip(rates, self._legal.items(), strict=True)
        }

    def rates_that_fit(self) -> tuple[dict[str, int], float]:
        """Return the widths within the budget that annealing finds, and their accuracy.

        Raises:
            BudgetError: There are none.
        """
        problem = self._problem
        cheapest = cheapest_widths(problem.graph, self._legal, problem.table, problem.budget)

        def fits(rates: Rates) -> bool:
            return self.cost(self.widths(rates)) <= problem.budget

        def reward(rates: Rates) -> float:
            return self.accuracy(self.widths(rates)) if fits(rates) else -1.0

        first = rescaled(guided(self._sizes, self._rng), fits)
        rates, value = self._annealed(first, lambda rates: rescaled(rates, fits), reward)
        if value < 0:  # only widths fit that no common factor on the rates leads to
            kept = {name: cheapest[name] for name in self._legal}
            return kept, self.accuracy(kept)
        return self.widths(rates), value

    def purified(self) -> dict[str, int]:
        """Return the cheapest widths found whose accuracy is no more than `delta` lower."""
        whole, base = self.cost(self.alive), self.accuracy(self.alive)

        def reward(rates: Rates) -> float:
            kept = self.widths(rates)
            lost = base - self.accuracy(kept)
            return (whole - self.cost(kept)) / whole if lost <= self._options.delta else -lost

        rates, _ = self._annealed(np.zeros(len(self._legal)), lambda r: np.clip(r, 0, MOST_PURIFIED), reward)
        return self.widths(rates)

    def _annealed(
        self, first: Rates, feasible: Callable[[Rates], Rates], reward: Callable[[Rates], float]
    ) -> tuple[Rates, float]:
        options, reporter = self._options, self._problem.reporter
        schedule = Schedule(options.start, min(options.stop, options.start), options.evaluations, options.spread)
        reporter.stage("autocompress", options.evaluations)
        done = 0

        def told(rates: Rates) -> float:
            nonlocal done
            done += 1
            reporter.advance(done)
            return reward(rates)

        return anneal(first, feasible, told, schedule, self._rng)


def _first_weight(problem: Problem, name: str) -> str:
    """Return the weight that makes a group's channels, or the first of them: its size decides the guided start."""
    members = Stack.of_group(problem.graph, problem.graph.group(name), "filter").members
    return next(member.param for member in members if len(problem.graph.shapes[member.param]) > 1)
