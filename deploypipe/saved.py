"""A pruned model on disk: factory + plan.json + safetensors. Nothing is pickled, and the dense weights are not needed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploypipe.compact import compact
from deploypipe.errors import ModelError, UsageError
from deploypipe.graph import trace
from deploypipe.models.load import load_model
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

PLAN, MODEL, WEIGHTS = "plan.json", "model.json", "tuned.safetensors"
MODEL_SCHEMA = 1


@dataclass(frozen=True)
class Origin:
    """How to make the dense model again: `spec` is what `--model` said; the fingerprint tells whether it still is the same."""

    spec: str
    fingerprint: str
    schema: int = MODEL_SCHEMA


def save_origin(folder: Path, origin: Origin) -> None:
    """Write `model.json` into `folder`."""
    (folder / MODEL).write_text(json.dumps(asdict(origin), indent=1) + "\n")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's parameters and persistent buffers as safetensors; a tensor of several names is written once.

    What is only a part of a larger tensor is written by itself: a buffer may be a slice.
    """
    tensors, written = dict[str, Tensor](), set[int]()
    for name, tensor in _persistent(model).items():
        if id(tensor) not in written:
            written.add(id(tensor))
            tensors[name] = tensor.detach().contiguous().clone()
    save_file(tensors, path, metadata={"format": "pt"})


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Read weights into a model of the right shape and return it.

    Raises:
        ModelError: The file is missing or damaged, or holds other tensors.
    """
    try:
        _fill(model, load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise ModelError(f"cannot read weights: {why}", at=str(path), fix="run the same build command again") from error
    return model


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Return all that is saved of a model, under each of its names."""
    saved = model.state_dict().keys()
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if name in saved}


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy tensors into a model; one name is enough for a tensor that has several.

    Raises:
        RuntimeError: A tensor is missing, left over or of another shape.
    """
    wanted = _persistent(model)
    present = {id(wanted[name]) for name in state if name in wanted}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in present]
    left_over = [name for name in state if name not in wanted]
    if missing or left_over:
        raise RuntimeError(f"missing: {', '.join(missing) or 'nothing'}; left over: {', '.join(left_over) or 'nothing'}")
    model.load_state_dict(state, strict=False)


def load(run: str | Path) -> nn.Module:
    """Return the pruned, fine-tuned module of a finished run, in evaluation mode.

    Raises:
        UsageError: `run` is no finished run.
        ModelError: The factory is gone or builds another model, or plan and weights do not fit it.

    Example:
        >>> small = load("runs/demo")  # doctest: +SKIP
    """
    run = Path(run)
    for name in (MODEL, PLAN, WEIGHTS):
        if not (run / name).is_file():
            raise UsageError(
                f"no finished run: {name} is missing", at=str(run), fix="give the folder of a finished `deploypipe build`"
            )
    try:
        state: dict[str, Any] = json.loads((run / MODEL).read_text())
        origin = Origin(**state)
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.json is damaged: {error}", at=str(run), fix="run the same build command again") from error
    loaded = load_model(origin.spec)
    graph = trace(loaded.model, loaded.example)
    if graph.fingerprint != origin.fingerprint:
        raise ModelError(
            f"'{origin.spec}' builds another model than the run was made with",
            at=str(run / MODEL),
            fix="restore the factory as it was, or run the build command again",
        )
    return restore(loaded.model, graph, KeepPlan.load(run / PLAN), run / WEIGHTS)


def restore(model: nn.Module, graph: Graph, plan: KeepPlan, weights: Path) -> nn.Module:
    """Return the compacted model with the weights of a file, in evaluation mode."""
    return load_weights(compact(model, graph, plan, check=False), weights).eval()
