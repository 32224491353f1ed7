"""Read a state dict without running any code from it, and fit it into a model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deploypipe.errors import ModelError, UsageError
from deploypipe.factory import near_path

State = Mapping[str, Tensor]
_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 4
_SAVE = "save the weights alone: torch.save(model.state_dict(), path), or safetensors.torch.save_file"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a state dict written by torch.save; nothing else in the file is executed.

    A state dict may lie under "state_dict" (or the like), and its names may begin with "module.".

    Raises:
        UsageError: The file does not exist.
        ModelError: It holds something else than tensors under names.
    """
    at = f"--weights {path}"
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a name is too long
        advice = near_path(path.resolve(), ".safetensors, .pt or .pth file", _may_hold_weights)
        raise UsageError(f"there is no weights file '{path}'", at=at, fix=advice)
    state: Any = _read_safetensors(path, at) if path.suffix == ".safetensors" else _read_torch(path, at)
    while nested := [name for name in _NESTED if isinstance(state, Mapping) and isinstance(state.get(name), Mapping)]:
        state = state[nested[0]]
    pairs = state.items() if isinstance(state, Mapping) else ()
    if isinstance(state, Mapping) and not state:
        raise ModelError("the weights file is empty", at=at, fix=_SAVE)
    if not pairs or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        what = f"a {type(state).__name__}" if not isinstance(state, Mapping) else f"'{', '.join(map(str, list(state)[:5]))}'"
        raise ModelError(f"the weights file holds {what}, not tensors under names", at=at, fix=_SAVE)
    return dict(state)


def _may_hold_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".pt", ".pth") and path.is_file()


def _read_safetensors(path: Path, at: str) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as failure:
        raise ModelError(f"the weights file is damaged: {failure}", at=at, fix="download or write it again") from failure


def _read_torch(path: Path, at: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # a damaged archive makes the unpickler raise anything
        if "Weights only load failed" in str(failure):
            message = "the weights file holds more than tensors, or is damaged; its code is not run"
            raise ModelError(message, at=at, fix=_SAVE) from failure
        reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise ModelError(f"the weights file is damaged: {reason}", at=at, fix="download or write it again") from failure


def fit_weights(model: nn.Module, state: State, at: str, *, unused: Sequence[str] = ()) -> None:
    """Copy `state` into `model`.

    Counters of batch norm may be missing: many published files leave them out.

    Args:
        model: Changed in place.
        state: Tensors by name.
        at: Where they came from, for messages.
        unused: Beginnings of names that may be left over, such as auxiliary classifiers.

    Raises:
        ModelError: A name is missing, left over or of another shape, or a value is not finite.
    """
    wanted = model.state_dict()
    state = _renamed(state, wanted)
    state = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(tuple(unused))}
    counters = {name for name in wanted if name.rpartition(".")[2] == "num_batches_tracked"}
    missing = [name for name in wanted if name not in state and name not in counters]
    left_over = [name for name in state if name not in wanted]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = {"missing": missing, "not in the model": left_over, "of another shape": shapes}
    parts = [f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names]
    if parts:
        message = f"the weights do not fit the model ({len(wanted)} tensors): {'; '.join(parts)}"
        raise ModelError(message, at=at, fix="use the factory, and its arguments, that the weights were trained with")
    unlike = [f"{name} {_kind(state[name])} instead of {_kind(t)}" for name, t in wanted.items() if name in state
              and _kind(state[name]) != _kind(t)]  # fmt: skip
    if unlike:
        raise ModelError(f"weights of another kind than the model's: {_listed(unlike)}", at=at, fix="save plain float tensors")
    broken = [name for name, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    if broken:
        raise ModelError(f"weights are not finite: {_listed(broken)}", at=at, fix="use weights from before training diverged")
    model.load_state_dict(state, strict=False)


def _kind(tensor: Tensor) -> str:
    """Name what copying from one tensor to another would lose: sparse and complex numbers, whole numbers in place of reals."""
    numbers = "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "whole numbers"
    return numbers if tensor.layout == torch.strided else f"sparse {numbers}"


def _renamed(state: State, wanted: State) -> State:
    """Take off a prefix that all names share and the model lacks, as data-parallel training and torch.compile add it.

    Another one (a training framework's own) is taken off if the names then are the model's.
    """
    first = next(iter(state), "").partition(".")[0] + "."
    bare = {name.removeprefix(first) for name in state if name.startswith(first)}
    own = (first,) if len(bare) == len(state) and bare & wanted.keys() else ()
    for prefix in (*_PREFIXES, *own):
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in wanted):
            return _renamed({name.removeprefix(prefix): tensor for name, tensor in state.items()}, wanted)
    return state


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
