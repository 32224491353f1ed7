"""Hints: the pruned network also learns the activations that the dense one's classifier reads, before they are pooled.

Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550, section 2.2. That the last activations are
the place for it: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv:2203.14001. Their
students have channels of their own and need a layer that maps them onto the teacher's. A pruned network owns a part of the
teacher's channels, so its activations are compared one by one.

How far the network has come decides how strong a hint must be, and one that is too strong ends the training (decision 20). So
it is no term of the loss: it turns the loss's gradient, and never makes it longer, where that passes these activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Hint:
    """A module whose outputs (B, C, ...) a pruned network shares with its teacher.

    Attributes:
        module: Its name, in both networks.
        channels: Which of the teacher's channels those of the pruned network are.
    """

    module: str
    channels: tuple[int, ...]


class Listener:
    """Hears what the module of a hint says in a student and in its teacher."""

    def __init__(self, hint: Hint) -> None:
        self._channels = torch.tensor(hint.channels)
        self._ours = self._theirs = torch.empty(0)

    def hear_student(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Be a forward hook of the student's module."""
        self._ours = output

    def hear_teacher(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Be a forward hook of the teacher's module."""
        self._theirs = output

    def follow(self, share: float) -> None:
        """Turn the gradient of the latest forward pass towards the teacher, when it comes: see `turned`."""
        ours, theirs = self._ours.detach(), self._theirs.detach()
        wanted = theirs.index_select(1, self._channels.to(theirs.device))
        if self._ours.requires_grad:  # else nothing before the classifier is trained
            turn = partial(turned, ours=ours, wanted=wanted, share=share)
            self._ours.register_hook(turn)  # type: ignore[no-untyped-call]
        self._ours = self._theirs = torch.empty(0)


def turned(gradient: Tensor, ours: Tensor, wanted: Tensor, share: float) -> Tensor:
    """Return a mean of the gradient and of one as long as it that leads from `ours` to `wanted`.

    Args:
        gradient: Of the loss by activations (B, C, ...).
        ours: These activations.
        wanted: The teacher's.
        share: Of the second one, 0 to 1.
    """
    away = ours.float() - wanted.float()
    pull = gradient.float().norm() * (away / away.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.lerp(gradient.float(), pull, share).to(gradient.dtype)


@contextmanager
def listening(student: nn.Module, teacher: nn.Module, hint: Hint) -> Iterator[Listener]:
    """Listen to both networks for the time of a `with` block.

    Raises:
        AttributeError: One of them has no such module.
    """
    listener = Listener(hint)
    handles = [
        student.get_submodule(hint.module).register_forward_hook(listener.hear_student),
        teacher.get_submodule(hint.module).register_forward_hook(listener.hear_teacher),
    ]
    try:
        yield listener
    finally:
        for handle in handles:
            handle.remove()
