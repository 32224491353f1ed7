"""What an algorithm may do besides planning: methods that the pipeline looks for and calls if they are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from deploypipe.algorithms.base import Algorithm, Problem
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer


class Repairer(Algorithm, Protocol):
    """An algorithm that also corrects the weights after compaction."""

    def repair(self, small: nn.Module, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Return a corrected copy of the compacted model `small`."""
        ...


class Learner(Algorithm, Protocol):
    """An algorithm that trains before it plans. How long is its option `train_epochs`.

    One whose trained channels are not those of the user's model, because it sorts them or begins with fresh weights, also has
    an attribute or property `renumbered = True`: nothing is then learnt channel by channel from the user's model.
    """

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Return a trained copy of `problem.model` of the same architecture: plain modules, full width, gates folded.

        `plan`, compaction and `repair` then work from that model, as `problem.model`.
        """
        ...


class Guide(Algorithm, Protocol):
    """An algorithm that takes part in fine-tuning."""

    def hooks(self, problem: Problem, small: nn.Module, plan: KeepPlan) -> Sequence[TrainHook]:
        """Return what happens while the compacted model `small` is fine-tuned."""
        ...


class Scheduler(Algorithm, Protocol):
    """An algorithm that decides how its result is fine-tuned."""

    def schedule(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> TrainSettings:
        """Return the settings of fine-tuning, made from those of the run."""
        ...


@dataclass(frozen=True, eq=False)
class Rival:
    """Another way to the same architecture, trained for comparison.

    Attributes:
        name: What the report calls it.
        start: The model that is trained.
        settings: How.
    """

    name: str
    start: nn.Module
    settings: TrainSettings


class Comparer(Algorithm, Protocol):
    """An algorithm that is reported beside other ways to the same architecture."""

    arm: str  # what the report calls its own result

    def rivals(self, settings: TrainSettings, problem: Problem, plan: KeepPlan) -> Sequence[Rival]:
        """Return the other ways."""
        ...
