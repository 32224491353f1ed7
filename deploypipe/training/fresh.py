"""A model as it was before any training: every module drawn anew by its own rule."""

import copy
from zlib import crc32

import torch
from torch import nn

from deploypipe.data.batches import seeded


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with new random parameters and batch norm statistics as at the start.

    Every module resets itself (`reset_parameters`), which is what its constructor does, too. Initialisations that a model's own
    constructor applied on top of that are not known and not repeated. Parameters of modules that have no such method get their
    own values in random order. What is not trained (`requires_grad` is False) stays.

    Args:
        model: Stays as it is.
        seed: The same one gives the same weights, whatever was drawn before; the global generators are left alone. It is mixed,
            so that a model that was made with this seed does not come back.
    """
    new = copy.deepcopy(model)
    fixed = {name: p.detach().clone() for name, p in new.named_parameters() if not p.requires_grad}
    with seeded(_mixed(seed)), torch.no_grad():
        for name, module in new.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                order = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(_mixed(seed, name, leaf))).to(
                    parameter.device
                )
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
        for name, value in fixed.items():
            new.get_parameter(name).copy_(value)
    return new


def _mixed(*parts: object) -> int:
    return crc32(repr(("fresh", *parts)).encode()) % 2**31
