"""Algorithms for tests: one trains before it plans, one leaves zeros in weights, one is compared with another way."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from deploypipe.algorithms.base import Criterion, Problem, Statistics, filter_norms, signed
from deploypipe.algorithms.options import option
from deploypipe.algorithms.protocols import Rival
from deploypipe.allocation.allocate import unproved
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer
from deploypipe.types import Group


class Count(TrainHook):
    """Counts the epochs of all instances, and fails in the one that it is told to."""

    epochs: ClassVar[list[int]] = []
    fail_in: ClassVar[int | None] = None

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if epoch == Count.fail_in:
            raise KeyboardInterrupt
        Count.epochs.append(epoch)


@dataclass(frozen=True)
class Warmed(Criterion):
    """L2 norms after some training."""

    name: ClassVar[str] = "warmed"
    train_epochs: int = option(3, "epochs before planning", low=0)

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        return trainer.fit(problem.model, self.train_epochs, [Count()])

    def score(self, group: Group, stats: Statistics) -> torch.Tensor:
        return filter_norms(group, stats.weights, 2)


@dataclass(frozen=True)
class Thinned:
    """The largest weights of each layer."""

    name: ClassVar[str] = "thinned"
    sparse: ClassVar[bool] = True

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        share = 1.0
        while True:
            model = copy.deepcopy(problem.model)
            with torch.no_grad():
                for weight in (p for p in model.parameters() if p.dim() >= 2):
                    n = max(1, int(share * weight.numel()))
                    weight.masked_fill_(weight.abs() < weight.abs().flatten().topk(n).values[-1], 0.0)
            if NONZERO[problem.table.unit](model, problem.graph) <= problem.budget:
                return model
            share -= 0.01

    def plan(self, problem: Problem) -> KeepPlan:
        kept = problem.graph.kept()
        certificate = unproved(problem.graph, kept, problem.table, problem.budget, 0.0, "zeros")
        return signed(self, KeepPlan({}, fingerprint=problem.graph.fingerprint, certificate=certificate), {})


@dataclass(frozen=True)
class Compared(Criterion):
    """L2, beside training from the same start without a teacher, for twice as long."""

    name: ClassVar[str] = "compared"
    arm: ClassVar[str] = "ours"

    def score(self, group: Group, stats: Statistics) -> torch.Tensor:
        return filter_norms(group, stats.weights, 2)

    def schedule(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> TrainSettings:
        return replace(settings, epochs=1)

    def rivals(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> Sequence[Rival]:
        from deploypipe.compact import compact  # noqa: PLC0415

        small: Any = compact(problem.model, problem.graph, plan)
        return [Rival("longer", small, replace(settings, epochs=2))]
