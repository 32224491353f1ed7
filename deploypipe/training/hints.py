"""Hints: the pruned network also learns the activations that the dense one's classifier reads, before they are pooled.

Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550, section 2.2. That the last activations are
the place for it: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv:2203.14001. Their
students have channels of their own and need a layer that maps them onto the teacher's. A pruned network owns a part of the
teacher's channels, so its activations are compared one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """What the module of a hint said in the latest forward pass of a student and of its teacher."""

    def __init__(self, hint: Hint) -> None:
        self._channels = torch.tensor(hint.channels)
        self.ours = self.theirs = torch.empty(0)

    def distance(self) -> Tensor:
        """Return the squared distance of the student's activations from the teacher's, over the square of these; 0: equal."""
        wanted = self.theirs.detach().float()
        wanted = wanted.index_select(1, self._channels.to(wanted.device))
        size = wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return (self.ours.float() - wanted).square().sum() / size


@contextmanager
def listening(student: nn.Module, teacher: nn.Module, hint: Hint) -> Iterator[Listener]:
    """Listen to both networks for the time of a `with` block.

    Raises:
        AttributeError: One of them has no such module.
    """
    listener = Listener(hint)

    def ours(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        listener.ours = output

    def theirs(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        listener.theirs = output

    handles = [
        student.get_submodule(hint.module).register_forward_hook(ours),
        teacher.get_submodule(hint.module).register_forward_hook(theirs),
    ]
    try:
        yield listener
    finally:
        for handle in handles:
            handle.remove()
