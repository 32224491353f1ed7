"""Taylor importance: how much the loss changes when a channel is scaled to zero, to first or second order, squared.

Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771, equations 3, 6, 7 and 8, and
the algorithm of section 3.2.

Deviations: a coupled group has one gate, on every batch norm behind a layer that makes its channels (or on the layer itself if
it has none; where a norm has no scale, or runs across channels, on what reads the channels); its score is divided by the
number of those layers, as the paper divides that of a stage's trunk by its blocks. The paper removes a fixed number of units a
step; here the cost falls by equal amounts, and one threshold over all groups leaves each its narrowest legal width; what it
leaves of the budget is filled with the channels that come next. The second order takes the diagonal of the Hessian from random
probes averaged over the batches of a step (0 probes: exactly, one backward pass for each channel). Weights that adapt
meanwhile, on images that are not augmented and without weight decay, only serve to judge: the plan is carried out on the
trained weights and fine-tuned afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploypipe.algorithms.base import SHARED_OUT, Problem, by_values, judged, labelled, least_cost, producers, shared_out
from deploypipe.algorithms.options import option
from deploypipe.compact import masked_slots
from deploypipe.data.batches import seeded
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.curvature import Unit, curvature, gates
from deploypipe.ingredients.gates import Scaled
from deploypipe.ingredients.statistics import batch_size, generator, trained_weights
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.training.adapt import Adapting
from deploypipe.training.evaluate import logits
from deploypipe.types import Graph, Group

SMOOTHING = 0.9


@dataclass(frozen=True)
class Taylor:
    """Average squared Taylor terms over mini-batches, drop the smallest, and go on until the budget is reached."""

    name: ClassVar[str] = "taylor"
    on: str = option("gate", "what is scaled to zero: a gate on the channel, or each weight of its filters by itself",
                     choices=("gate", "weight"))  # fmt: skip
    order: str = option("first", "order of the expansion", choices=("first", "second"))
    steps: int = option(10, "pruning steps on the way to the budget", low=1)
    interval: int = option(20, "mini-batches before each step", low=1)
    batch: int = option(64, "images of one mini-batch", low=2)
    lr: float = option(0.001, "learning rate while the network adapts; 0 only measures", low=0)
    probes: int = option(1, "random probes of the Hessian for each mini-batch; 0 for its exact diagonal", low=0)
    widths: str = option("threshold", "what decides widths: one threshold, equal shares, or the exact allocator",
                         choices=SHARED_OUT)  # fmt: skip

    def plan(self, problem: Problem) -> KeepPlan:
        """Alternate between training, which gathers scores, and cutting.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data, or the training diverges.
        """
        graph, table = problem.graph, problem.table
        dense, least = table.predict(graph), least_cost(problem)
        plan, smooth = KeepPlan({}), dict[str, Tensor]()
        images = min(self.batch, batch_size(graph.example))
        run = Adapting(problem.model, labelled(problem.data), self.lr, images, problem.seed)
        units, skipped = self.units(run.model, graph)
        makers, _ = judged(graph, lambda group: len(producers(group, trained_weights(run.model))))
        shared = {name: makers.get(name, 1) for name in units}  # fixed weights that make a channel have no part in its score
        with counted(problem.reporter, "taylor", self.steps * self.interval) as reporter:
            for step in range(1, self.steps + 1):
                met = Terms(self, units, generator(problem.seed, "probes", step))
                for model in run.steps(self.interval):
                    met.add(model, run.latest)
                    reporter.advance((step - 1) * self.interval + met.n)
                smooth = smoothed(smooth, met.scores(), plan)
                last = step == self.steps
                budget = problem.budget if last else max(least, dense + (problem.budget - dense) * step / self.steps)
                goal = replace(problem, budget=budget, allocator=problem.allocator if last else by_values)
                without = skipped | {name: reason for name, reason in met.skipped.items() if name not in smooth}
                scores = {name: (score / shared[name]).cpu().numpy() for name, score in smooth.items()}
                plan = shared_out(self, goal, scores, without, self.widths)
                run.hold(masked_slots(graph, plan))
        return plan

    def units(self, model: nn.Module, graph: Graph) -> tuple[dict[str, Unit], dict[str, str]]:
        """Return for each group what is scaled to zero when a channel goes, and why groups cannot be judged."""
        if self.on == "gate":
            return judged(graph, gates(model, graph))
        view = trained_weights(model)

        def unit(group: Group) -> Unit:
            scaled = [Scaled(m.param, m.axis, torch.from_numpy(m.owner)) for m in producers(group, view)]
            return Unit(group.size, scaled, each=True)

        return judged(graph, unit)


class Terms:
    """Gathers the Taylor terms of mini-batches.

    Attributes:
        skipped: Group -> why it has no terms.

    Args:
        options: Of the method.
        units: What each group scales.
        rng: Of the probes.
    """

    def __init__(self, options: Taylor, units: Mapping[str, Unit], rng: torch.Generator) -> None:
        self._options, self._units, self._rng, self.n = options, units, rng, 0
        self.skipped = dict[str, str]()
        self._means = dict[str, Tensor]()  # of first derivatives, so far: (C,) for gates, (C, K) for weights
        self._spreads = dict[str, Tensor]()  # (C,) summed squared deviations from these means
        self._seconds = dict[str, Tensor]()

    def add(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        """Add the terms of one batch, whose gradients stand in the model."""
        self.n += 1
        named, (inputs, labels) = dict(model.named_parameters()), batch
        for name, unit in self._units.items():
            try:
                first = unit.first(named)
            except NotApplicable as reason:
                self.skipped[name] = str(reason)
                continue
            before = self._means.get(name, torch.zeros_like(first))
            mean = before + (first - before) / self.n
            spread = _summed((first - before) * (first - mean))  # Welford's update: batches need not be kept
            self._means[name], self._spreads[name] = mean, spread + self._spreads.get(name, torch.zeros_like(spread))
        if self._options.order == "second":

            def loss(call: Callable[..., object]) -> Tensor:
                return F.cross_entropy(logits(call, inputs, labels), labels)

            with seeded((self._rng.initial_seed() + self.n) % 2**31):  # dropout draws in these passes, too
                seconds = curvature(model, self._units, loss, self._options.probes, self._rng)
            for name, found in seconds.items():
                self._seconds[name] = self._seconds.get(name, torch.zeros_like(found)) + found

    def scores(self) -> dict[str, Tensor]:
        """Return the (C,) scores: the mean over batches of squares, never the square of the mean alone."""
        found = {}
        for name, mean in self._means.items():
            term = mean - 0.5 * self._seconds[name] / self.n if name in self._seconds else mean
            found[name] = self._spreads[name] / self.n + _summed(term.square())
        return found


def _summed(values: Tensor) -> Tensor:
    """Return (C,) values as they are, and (C, K) ones summed over what each channel owns."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def smoothed(before: Mapping[str, Tensor], now: Mapping[str, Tensor], plan: KeepPlan) -> dict[str, Tensor]:
    """Return scores smoothed over pruning steps; channels that are gone stay last.

    They are below zero by the least that there is: shares are of scores above the worst one, and must not change with it.
    """
    found = {name: SMOOTHING * before[name] + (1 - SMOOTHING) * score if before else score for name, score in now.items()}
    for name, kept in plan.keep.items():
        gone = torch.ones_like(found[name], dtype=torch.bool)
        gone[list(kept)] = False
        found[name] = found[name].masked_fill(gone, -torch.finfo(found[name].dtype).tiny)
    return found
