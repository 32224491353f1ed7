"""What a training run is told: its settings, and what an algorithm does at every step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deploypipe.errors import UsageError

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}  # -> Lightning Fabric's name


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        epochs: Passes over the training set; 0 leaves the model as it is.
        lr: Highest learning rate, reached after the warm-up.
        batch_size: Images per step, over all devices together.
        momentum: Of SGD with Nesterov's correction.
        weight_decay: On weights of two or more axes; biases and normalisation are not decayed.
        distill: Share of the distillation loss, 0 to 1; the labels get the rest.
        temperature: Softens both distributions of the distillation loss.
        hint: Share of the dense model's last activations in the direction of the first step, 0 to 1, where it teaches; it
            falls to zero over the training (see `hints`).
        label_smoothing: Share of the label that is spread over all classes.
        warmup: Share of all steps with a linearly rising learning rate.
        seed: Decides order, augmentation and dropout.
        precision: "fp32", or "bf16": products in bfloat16, weights and sums in fp32; faster where the processor has it.
    """

    epochs: int = 3
    lr: float = 0.05
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill: float = 0.5
    temperature: float = 4.0
    hint: float = 0.9
    label_smoothing: float = 0.0
    warmup: float = 0.05
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "lr": (0 < self.lr < math.inf, "greater than 0"),
            "batch_size": (self.batch_size >= 2, "2 or more, for batch normalisation"),
            "momentum": (0 < self.momentum < 1, "between 0 and 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "distill": (0 <= self.distill <= 1, "from 0 to 1"),
            "temperature": (0 < self.temperature < math.inf, "greater than 0"),
            "hint": (0 <= self.hint <= 1, "from 0 to 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "from 0 to below 1"),
            "warmup": (0 <= self.warmup < 1, "from 0 to below 1"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2147483647"),
            "precision": (self.precision in PRECISIONS, f"out of {', '.join(PRECISIONS)}"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                message = f"{name} cannot be {getattr(self, name)}"
                raise UsageError(message, at="training settings", fix=f"give a value {allowed}")

    def lr_at(self, step: int, n_steps: int) -> float:
        """Return the learning rate of one of `n_steps` steps.

        >>> [round(TrainSettings(lr=1.0, warmup=0.25).lr_at(step, 8), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
        """
        rising = round(self.warmup * n_steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (n_steps - rising)))

    def hint_at(self, step: int, n_steps: int) -> float:
        """Return the share of the hint in one of `n_steps` steps: it leads at first, in the end the loss alone decides.

        >>> [round(TrainSettings(hint=0.8).hint_at(step, 4), 2) for step in range(4)]
        [0.8, 0.6, 0.4, 0.2]
        """
        return self.hint * (1 - step / n_steps)

    def travel(self, n_steps: int) -> float:
        """Return how far a constant gradient of 1 moves a parameter: the sum of learning rates over (1 - momentum).

        A penalty of weight `reach / travel` can move a parameter by `reach`, however long the training is.
        """
        return sum(self.lr_at(step, n_steps) for step in range(n_steps)) / (1 - self.momentum)


class TrainHook:
    """What an algorithm does while a model is trained; override what is needed.

    Called in this order: once `on_train_begin`; forward, `on_loss`, backward, `on_batch_backward`, optimizer step,
    `on_step_end`; after the last step of an epoch `on_epoch_end`; once `on_train_end`. A hook that remembers tensors returns
    them from `state` and takes them back in `restore`, so that an interrupted run goes on exactly where it was. With no epochs
    nothing is called.

    Attributes:
        key: Whatever else decides the hook's effect, such as its options; a checkpoint written under another key is not used.
    """

    key: str = ""

    def on_train_begin(self, model: nn.Module) -> None:
        """Prepare the copy that is trained: forward hooks, more parameters (they are trained, too)."""

    def on_loss(self, model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
        """Return the loss to minimise, with a term of the hook's own added."""
        return loss

    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Read or change the gradients of optimizer step `step`, counted from 0."""

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Read or change the weights, for instance to apply a mask again."""

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Read or change the weights after epoch `epoch`, counted from 0."""

    def on_train_end(self, model: nn.Module) -> None:
        """Take back what `on_train_begin` did, so that the architecture is the former one."""

    def state(self) -> Mapping[str, Tensor]:
        """Return what must outlive an interruption."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned at the end of an earlier epoch."""
