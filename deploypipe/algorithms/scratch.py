"""Scratch-E and Scratch-B: the architecture that another method found, trained from fresh weights.

Liu et al., Rethinking the Value of Network Pruning, ICLR 2019, arXiv:1810.05270, section 3. The report shows the ways side by
side: from fresh weights for as many epochs as the dense model had (E), for the same computation (B), and from the weights that
the pruned channels had.

Deviations: how long the user's model was trained is not known: E is the option `train_epochs`, or the run's number of epochs.
Schedules are the run's (warm-up, then cosine), stretched to the number of epochs, for all ways; from fresh weights nothing is
distilled. Scratch-B's epochs are at most `cap` times E (the paper has no limit on CIFAR and 2 on ImageNet).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem, signed
from deploypipe.algorithms.options import option
from deploypipe.algorithms.protocols import Rival
from deploypipe.compact import compact
from deploypipe.count import macs
from deploypipe.errors import UsageError
from deploypipe.plan import KeepPlan
from deploypipe.training.fresh import fresh
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer

E, B, INHERITED = "scratch-e", "scratch-b", "inherited"


@dataclass(frozen=True)
class ScratchE:
    """Another method's plan, from fresh weights, for as many epochs as the dense model had."""

    name: ClassVar[str] = E
    inner: str = option("l2", "the method whose plan is trained, with its own defaults")
    train_epochs: int = option(0, "E: epochs that the dense model was trained; 0 takes the run's", low=0)
    cap: float = option(0.0, "most epochs of scratch-b, as a multiple of E; 0 for no limit", low=0)
    seeds: int = option(1, "seeds of every way to train; a gain is named from 2 on", low=1)
    compare: bool = option(True, "also train the other two ways, for the report")

    def __post_init__(self) -> None:
        try:
            usable = self.inner not in {E, B} and not getattr(self.method, "sparse", False)
        except UsageError:
            usable = False
        if not usable:
            raise UsageError(
                f"option 'inner' cannot be '{self.inner}': it is no method that cuts channels by itself",
                at=f"--set inner={self.inner}",
                fix="name another one from `deploypipe algos`, such as l2",
            )

    @property
    def arm(self) -> str:
        """What the report calls the run's own result."""
        return self.name

    @property
    def method(self) -> Any:
        """The method whose plan is trained."""
        return make(self.inner)

    @property
    def renumbered(self) -> bool:
        """Whether the channels that the inner method trains are not those of the user's model."""
        return bool(getattr(self.method, "renumbered", False))

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train before planning if the inner method does."""
        inner = self.method
        model: nn.Module = inner.train(problem, trainer) if hasattr(inner, "train") else copy.deepcopy(problem.model).eval()
        return model

    def plan(self, problem: Problem) -> KeepPlan:
        """Return the inner method's plan.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        plan: KeepPlan = self.method.plan(problem)
        return signed(self, plan, plan.skipped)

    def repair(self, small: nn.Module, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Forget the weights."""
        return fresh(small, problem.seed)

    def schedule(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> TrainSettings:
        """Train for the epochs of this way, at the full learning rate, from the labels alone."""
        return self._scratch(settings, self.name, problem, plan)

    def rivals(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> Sequence[Rival]:
        """Return the other ways, and further seeds of this one."""
        small = compact(problem.model, problem.graph, plan)
        repaired = self.method.repair(small, problem, plan) if hasattr(self.method, "repair") else small
        found = []
        for way in (self.name, *(way for way in (E, B, INHERITED) if way != self.name and self.compare)):
            how = settings if way == INHERITED else self._scratch(settings, way, problem, plan)
            for seed in range(settings.seed, settings.seed + self.seeds):
                if (way, seed) != (self.name, settings.seed):  # that one is the run itself
                    start = repaired if way == INHERITED else fresh(small, seed)
                    found.append(Rival(way, start, replace(how, seed=seed)))
        return found

    def _scratch(self, settings: TrainSettings, way: str, problem: Problem, plan: KeepPlan) -> TrainSettings:
        epochs = self.train_epochs or settings.epochs
        if way == B:
            epochs = epochs_b(epochs, macs(problem.graph), macs(problem.graph, plan), self.cap)
        return replace(settings, epochs=epochs, distill=0.0)


@dataclass(frozen=True)
class ScratchB(ScratchE):
    """Another method's plan, from fresh weights, for the computation that training the dense model took."""

    name: ClassVar[str] = B


def epochs_b(epochs: int, dense: float, pruned: float, cap: float = 0.0) -> int:
    """Return the epochs with which a pruned model takes the computation of `epochs` of the dense one.

    >>> epochs_b(160, 100, 40), epochs_b(90, 100, 40, cap=2)
    (400, 180)
    """
    factor = min(dense / pruned, cap or float("inf"))
    return round(epochs * factor)
