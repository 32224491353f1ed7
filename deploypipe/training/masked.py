"""Weights that stay zero while a model is trained."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from deploypipe.training.settings import TrainHook


class MaskedWeights(TrainHook):
    """Keeps chosen weights at exactly zero: their gradients are cleared, and after every step they are.

    Gradients alone are not enough, momentum and weight decay move weights too; weights alone are not enough either, since the
    momentum of what is set back would grow all the same.

    Attributes:
        masks: Parameter name -> mask of its shape; True stays, False is zero.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.bool() for name, mask in masks.items()}
        kept = ",".join(f"{name}:{int(mask.sum())}" for name, mask in self.masks.items())
        self.key = f"masked {kept}"

    @classmethod
    def of_zeros(cls, model: nn.Module, names: Collection[str] | None = None) -> "MaskedWeights":
        """Return the hook that keeps every weight that is zero in `model` at zero.

        Args:
            model: Whose zeros are meant.
            names: Parameters that may have been pruned; by default all of two or more axes.
        """
        found = {name: p.detach() != 0 for name, p in model.named_parameters() if p.dim() >= 2}
        return cls({name: mask for name, mask in found.items() if not mask.all() and (names is None or name in names)})

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the masked weights of `model` to zero."""
        for parameter, mask in self._masked(model):
            parameter.masked_fill_(~mask, 0.0)

    def on_train_begin(self, model: nn.Module) -> None:
        """Begin with zeros."""
        self.apply(model)

    @torch.no_grad()
    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Clear the gradients of masked weights."""
        for parameter, mask in self._masked(model):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0.0)

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Set masked weights back to zero."""
        self.apply(model)

    def _masked(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        named = dict(model.named_parameters())
        return [(named[name], mask.to(named[name].device)) for name, mask in self.masks.items()]


def told_from_pruned(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a masked weight in which survivors that happen to be zero are the smallest number there is: zero means pruned.

    A layer that began at zero would else never leave it again, and count for nothing.
    """
    return weight.masked_fill(~mask, 0.0).masked_fill(mask & (weight == 0), torch.finfo(weight.dtype).tiny)
