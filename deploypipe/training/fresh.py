"""A model as it was before any training: every module drawn anew by its own rule."""

import copy
from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import nn

from deploypipe.errors import ModelError
from deploypipe.training.finetune import seeded


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with new random parameters and batch norm statistics as at the start.

    Every module that owns parameters or buffers is asked to reset itself (`reset_parameters`), which is what its constructor
    does, too. Initialisations that a model's constructor applied on top of that are not known and not repeated.

    Args:
        model: Stays as it is.
        seed: The same one gives the same weights, whatever was drawn before; the global generators are left alone.

    Raises:
        ModelError: A module owns parameters and cannot reset them.
    """
    new = copy.deepcopy(model)
    with seeded(crc32(repr(("fresh", seed)).encode()) % 2**31), torch.no_grad():  # not the seed that the model was made with
        for name, module in new.named_modules():
            reset = _reset(module)
            if reset:
                reset()
            elif list(module.parameters(recurse=False)):
                raise ModelError(
                    f"{type(module).__name__} cannot be drawn anew: it owns parameters and has no reset_parameters()",
                    at=f"module '{name or '(root)'}'",
                    fix="give its class a method reset_parameters(self)",
                )
    return new


def _reset(module: nn.Module) -> Callable[[], Any] | None:
    found: Callable[[], Any] | None = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return found
