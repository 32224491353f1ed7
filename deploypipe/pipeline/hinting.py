"""Where a pruned network and its teacher say the same thing: found by running both."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from deploypipe.compact import compact, kept_slots, mask
from deploypipe.graph.outputs import copied
from deploypipe.plan import KeepPlan
from deploypipe.training.hints import Hint
from deploypipe.training.layout import in_mode
from deploypipe.training.settings import TrainSettings
from deploypipe.types import Graph

_FILE = "hint.json"
_TOLERANCE = 1e-3  # of the largest activation: far above rounding, far below what another channel says


def renumbered(algorithm: object) -> bool:
    """Say whether the channels of what the algorithm trains before it plans are not those of the user's model."""
    return bool(getattr(algorithm, "renumbered", False))


def find_hint(model: nn.Module, graph: Graph, plan: KeepPlan, algorithm: object = None) -> Hint | None:
    """Return the last module before the classifier whose outputs have the channels that it reads, if there is one.

    No weighted layer lies between. Outputs with positions come before pooled ones: they say more. That channels are the same
    ones is not concluded but seen: on the graph's example, the compacted network says there what the masked one says.

    Args:
        model: The dense network that `graph` was traced from.
        graph: Its last layer is the classifier.
        plan: Which channels stay.
        algorithm: Whose training `model` comes from. If it renumbers channels they are not the teacher's, and there is no hint.
    """
    if renumbered(algorithm):
        return None
    reader = graph.layers[-1]
    if reader.kind not in ("conv", "linear"):
        return None
    channels = torch.from_numpy(kept_slots(graph, plan, reader.weight, 1))
    small, masked = compact(model, graph, plan, check=False), mask(model, graph, plan)
    ours, theirs = (_outputs_before(network, reader.name, graph) for network in (small, masked))
    n = graph.shapes[reader.weight][1]
    shared = [
        name
        for name, said in theirs.items()
        if name in ours
        and said.shape[1] == n
        and ours[name].shape == (len(said), len(channels), *said.shape[2:])
        and torch.allclose(ours[name], said[:, channels], rtol=0, atol=_TOLERANCE * float(said.abs().max()))
    ]
    with_positions = [name for name in shared if theirs[name][0, 0].numel() > 1]
    best = (with_positions or shared)[-1:]
    return Hint(best[0], tuple(channels.tolist())) if best else None


def hinted(
    algorithm: object,
    model: nn.Module,
    graph: Graph,
    plan: KeepPlan,
    settings: TrainSettings,
    folder: Path,
    order: Sequence[int] = (),
) -> Hint | None:
    """Return the hint for fine-tuning with these settings, if they ask for one; leave word of it in `folder`.

    `order` says which of the compacted network's channels each is now, if they have been put into another order.
    """
    if not (settings.epochs and settings.distill and settings.hint):
        return None
    hint = find_hint(model, graph, plan, algorithm)
    (folder / _FILE).write_text(json.dumps({"module": hint.module if hint else None}) + "\n")
    return replace(hint, channels=tuple(hint.channels[slot] for slot in order)) if hint and order else hint


def hint_notes(root: Path) -> list[str]:
    """Return what the report says about the hint of a run."""
    file = root / _FILE
    if not file.is_file():
        return []
    module = json.loads(file.read_text())["module"]
    if module is None:
        return [
            "fine-tuning learnt from the dense model's outputs only: no activations before the classifier are the same in both"
        ]
    return [f"fine-tuning learnt from the dense model's outputs and from its activations at {module}"]


def _outputs_before(model: nn.Module, reader: str, graph: Graph) -> dict[str, Tensor]:
    """Return what modules said after the last layer before `reader` was called, by name, in the order in which they ended."""
    found: dict[str, Tensor] = {}

    def hear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            drops = isinstance([*module.modules()][-1], _DropoutNd)  # in training it says something else
            if isinstance(output, Tensor) and output.dim() > 1 and not drops:
                found.pop(name, None)
                found[name] = output

        return hook

    def forget(_module: nn.Module, _inputs: Any) -> None:
        found.clear()

    def stop(_module: nn.Module, _inputs: Any) -> None:
        raise _Reached

    modules = dict(model.named_modules())
    layers = {layer.name for layer in graph.layers} & modules.keys()
    handles = [module.register_forward_hook(hear(name)) for name, module in modules.items()]
    handles += [modules[name].register_forward_pre_hook(stop if name == reader else forget) for name in layers]
    try:
        with in_mode(model, training=False), torch.inference_mode():
            model(*copied(graph.example))
    except _Reached:
        return found
    finally:
        for handle in handles:
            handle.remove()
    return {}


class _Reached(Exception):
    pass
