"""What an algorithm trains with before it plans: every call trains a copy of a model, resumable like fine-tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.data.batches import Data, n_batches
from deploypipe.progress import Reporter
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainHook, TrainSettings


class Trainer:
    """Trains models on the training set with the settings of the run.

    Attributes:
        data: What is trained on; algorithms leave `data.test` alone.
        settings: Of the run; each call of `fit` states its own number of epochs.
        n_epochs: Epochs of all calls so far, for the report.

    Args:
        data: The data set.
        settings: Learning rate, batch size, distillation and seed.
        teacher: The user's model, for distillation; None for the labels alone.
        folder: Where checkpoints lie; without it an interrupted training starts again.
        reporter: Is told about every step.
    """

    def __init__(
        self,
        data: Data,
        settings: TrainSettings,
        *,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.data, self.settings = data, settings
        self._teacher, self._folder, self._reporter = teacher, folder, reporter
        self.n_epochs, self._n_calls = 0, 0

    def n_steps(self, epochs: int) -> int:
        """Return how many optimizer steps so many epochs have."""
        return epochs * n_batches(self.data.train, self.settings.batch_size, drop_last=True)

    def fit(self, model: nn.Module, epochs: int, hooks: Sequence[TrainHook] = (), **changes: Any) -> nn.Module:
        """Return a trained copy of `model`, in eval mode.

        The n-th call of a run has its own seed and its own checkpoint: with the same calls in the same order, an interrupted
        run goes on after the last epoch that was finished in any of them.

        Args:
            model: Stays as it is.
            epochs: Passes over the training set; 0 only copies.
            hooks: What happens at every step.
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
        return finetune(
            model, self.data, settings, teacher=self._teacher, checkpoint=file, reporter=self._reporter, hooks=hooks
        )
