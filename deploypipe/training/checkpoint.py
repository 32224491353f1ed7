"""The state of training after an epoch, in one safetensors file that is replaced whole."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from deploypipe.training.hints import Hint
from deploypipe.training.settings import TrainHook, TrainSettings

_SCHEMA = 1


def run_key(
    settings: TrainSettings,
    data_key: str,
    student: nn.Module,
    teacher: nn.Module | None,
    hooks: Sequence[TrainHook] = (),
    hint: Hint | None = None,
) -> str:
    """Return a hash of everything that decides the outcome of a training run."""
    names = [[type(hook).__qualname__, hook.key] for hook in hooks]
    heard = asdict(hint) if hint else None
    digest = hashlib.sha256(json.dumps([_SCHEMA, asdict(settings), data_key, names, heard]).encode())
    for model in (student, teacher):
        digest.update(state_digest(model).encode() if model is not None else b"none")
    return digest.hexdigest()[:16]


def state_digest(model: nn.Module) -> str:
    """Return a hash of the names and values of a model's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_plain(tensor).view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, which is what safetensors stores."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


class Checkpoint:
    """Weights, momentum, hook states and the number of finished epochs of one training run."""

    def __init__(self, path: Path, key: str, model: nn.Module, optimizer: Optimizer, hooks: Sequence[TrainHook] = ()) -> None:
        self.path, self.key, self.model, self.optimizer, self.hooks = path, key, model, optimizer, hooks

    def save(self, n_epochs: int) -> None:
        """Replace the file by the present state, reached after `n_epochs` epochs."""
        tensors = {f"model.{name}": _plain(tensor) for name, tensor in self.model.state_dict().items()}
        for name, parameter in self._parameters():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = _plain(momentum)
        for i, hook in enumerate(self.hooks):
            tensors |= {f"hook.{i}.{name}": _plain(tensor) for name, tensor in hook.state().items()}
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"state": json.dumps({"key": self.key, "n_epochs": n_epochs})})
        temporary.replace(self.path)

    def load(self) -> int:
        """Take the state over and return the number of finished epochs; 0 if the file is absent or of another run."""
        n_epochs = finished_epochs(self.path, self.key)
        if not n_epochs:
            return 0
        try:
            tensors = load_file(self.path)
        except (OSError, SafetensorError):
            return 0
        self.model.load_state_dict(_under("model.", tensors))
        momenta = _under("momentum.", tensors)
        for name, parameter in self._parameters():
            if name in momenta:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momenta[name])
        for i, hook in enumerate(self.hooks):
            hook.restore(_under(f"hook.{i}.", tensors))
        return n_epochs

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)


def finished_epochs(path: Path, key: str) -> int:
    """Return how many epochs the run of that key finished; 0 if the file is absent, broken or of another run."""
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return 0
    return int(state["n_epochs"]) if state.get("key") == key else 0


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
