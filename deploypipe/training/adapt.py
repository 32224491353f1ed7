"""Short training while an algorithm is still choosing: a copy of the model learns, and dropped channels stay out of it."""

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from deploypipe.data.batches import Samples, batches, seeded
from deploypipe.errors import UsageError
from deploypipe.training.evaluate import logits

Slots = Sequence[tuple[str, int, Tensor]]  # (parameter, axis, indices)
MOMENTUM = 0.9


class Adapting:
    """A copy of a model that learns in short runs, in training mode and with a constant learning rate.

    Attributes:
        model: The copy; gradients of the latest batch stand in its parameters.
        latest: Inputs and labels of that batch.

    Args:
        model: Stays as it is.
        data: Training data, met in a seeded order, again and again.
        lr: Learning rate of SGD; 0 only measures.
        batch_size: Images per step.
        seed: Decides the order, dropout and what the user's transforms do.
    """

    def __init__(self, model: nn.Module, data: Samples, lr: float, batch_size: int, seed: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(True).train()
        self._optimizer = SGD(self.model.parameters(), lr=lr, momentum=MOMENTUM)
        self._named = dict(self.model.named_parameters())
        self._fixed = {name: (buffer, buffer.clone()) for name, buffer in self.model.named_buffers()}
        self._zero: Slots = ()
        self._stream = _endless(data, batch_size, seed)
        self._seed, self._step = seed, 0
        self.latest: tuple[Tensor, Tensor]

    @torch.no_grad()
    def hold(self, zero: Slots) -> None:
        """Set these slots to zero, forget their momentum, and keep them at zero from now on. Earlier slots are set free.

        Fixed weights (buffers) get their former values back when they are set free.
        """
        for param, _, _ in self._zero:
            if param in self._fixed:
                self._fixed[param][0].copy_(self._fixed[param][1])
        self._zero = zero
        for param, axis, slots in zero:
            if param in self._fixed:
                self._fixed[param][0].index_fill_(axis, slots.to(self._fixed[param][0].device), 0.0)
                continue
            parameter = self._named[param]
            at = slots.to(parameter.device)
            parameter.index_fill_(axis, at, 0.0)
            momentum = self._optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                momentum.index_fill_(axis, at, 0.0)

    def steps(self, n: int) -> Iterator[nn.Module]:
        """Make `n` steps; yield the model in each, after the gradients are there and before they are used.

        Raises:
            UsageError: The loss is no longer finite.
        """
        device = next(self.model.parameters()).device
        for _ in range(n):
            with seeded((self._seed * 1_000_003 + self._step) % 2**31):
                inputs, labels = (part.to(device) for part in next(self._stream))
                self.latest = (inputs, labels)
                self._optimizer.zero_grad()
                loss = F.cross_entropy(logits(self.model, inputs.clone(), labels), labels)
                loss.backward()  # type: ignore[no-untyped-call]
            if not torch.isfinite(loss):
                at = f"step {self._step + 1}, learning rate {self._optimizer.param_groups[0]['lr']:g}"
                raise UsageError("the loss is not finite while the algorithm adapts", at=at, fix="lower its option lr")
            yield self.model
            for param, axis, slots in self._zero:
                gradient = self._named[param].grad if param in self._named else None
                if gradient is not None:
                    gradient.index_fill_(axis, slots.to(device), 0.0)
            self._optimizer.step()
            self._step += 1


def _endless(data: Samples, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from batches(data, batch_size, shuffle_seed=(seed * 1_000_003 + epoch * 1009) % 2**31, drop_last=True)
        epoch += 1
