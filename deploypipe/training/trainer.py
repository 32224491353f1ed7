"""What an algorithm trains with before it plans: every call trains a copy of a model, resumable like fine-tuning."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.data.batches import Data, Samples, count, n_batches
from deploypipe.errors import UsageError
from deploypipe.progress import Reporter, Silent
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainHook, TrainSettings


class Trainer:
    """Trains models on the training set with the settings of the run.

    Attributes:
        settings: Of the run; each call of `fit` states its own number of epochs.
        n_epochs: Epochs of all calls so far, for the report.

    Args:
        data: What is trained on; algorithms leave `data.test` alone. None if there is none: then only 0 epochs can be trained.
        settings: Learning rate, batch size, distillation and seed.
        teacher: The user's model, for distillation; None for the labels alone.
        folder: Where checkpoints lie; without it an interrupted training starts again.
        reporter: Is told about every step.
    """

    def __init__(
        self,
        data: Data | None,
        settings: TrainSettings,
        *,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self._data, self.settings = data, settings
        self._teacher, self._folder, self._reporter = teacher, folder, _Renamed(reporter or Silent())
        self.n_epochs, self._n_calls = 0, 0

    @property
    def data(self) -> Data:
        """What is trained on.

        Raises:
            UsageError: There is none.
        """
        if self._data is None:
            raise UsageError(
                "this algorithm trains before it prunes and needs data", at="--data", fix="name a data set, as in --data demo"
            )
        return self._data

    def n_steps(self, epochs: int) -> int:
        """Return how many optimizer steps so many epochs have."""
        return epochs * n_batches(self.data.train, self.settings.batch_size, drop_last=True) if epochs else 0

    def fit(
        self, model: nn.Module, epochs: int, hooks: Sequence[TrainHook] = (), part: Samples | None = None, **changes: Any
    ) -> nn.Module:
        """Return a trained copy of `model`, in eval mode.

        The n-th call of a run has its own seed and its own checkpoint: with the same calls in the same order, an interrupted
        run goes on after the last epoch that was finished in any of them.

        Args:
            model: Stays as it is.
            epochs: Passes over the training set; 0 only copies.
            hooks: What happens at every step.
            part: Of the training set, what is trained on, where the algorithm holds some of it out; all of it by default.
            changes: Fields of `TrainSettings`, as in `distill=0.0` or `lr=0.01`.

        Raises:
            ModelError: The model cannot be trained on this data.
            UsageError: A setting is out of range, or the loss is no longer finite.
        """
        seed = (self.settings.seed + 7919 * self._n_calls) % 2**31
        settings = replace(self.settings, **{"epochs": epochs, "seed": seed, **changes})
        file = self._folder / f"training-{self._n_calls}.safetensors" if self._folder else None
        self._n_calls += 1
        self.n_epochs += epochs
        if not epochs:
            return copy.deepcopy(model).eval()
        data = self.data if part is None else replace(self.data, train=part, key=f"{self.data.key}, {count(part)} of it")
        return finetune(model, data, settings, teacher=self._teacher, checkpoint=file, reporter=self._reporter, hooks=hooks)


class _Renamed(Silent):
    """Tells of training under its own name: what follows the plan is fine-tuning, this is not."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin the stage "train", whatever it is called."""
        self._reporter.stage("train", total)

    def advance(self, done: int, note: str = "") -> None:
        """Pass it on."""
        self._reporter.advance(done, note)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._reporter.note(text.replace("fine-tuning", "training"))
