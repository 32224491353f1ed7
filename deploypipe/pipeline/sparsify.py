"""Give the compacted model 2:4 weights: channels in a better order, two of every four weights zero, kept so in fine-tuning."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe import saved
from deploypipe.errors import ModelError
from deploypipe.graph import trace
from deploypipe.latency.estimate import kernel_us
from deploypipe.latency.files import Shape
from deploypipe.pipeline.stages import COMPACT_TOLERANCE
from deploypipe.store import Kept, Store
from deploypipe.targets import Rates, Target
from deploypipe.training.masked import MaskedWeights
from deploypipe.two_four import Eligibility, eligibility, permuted, project, reads, retained, search
from deploypipe.types import Graph, Layer
from deploypipe.verify import check, outputs_of, require

TWO_FOUR, WEIGHTS, FOUND = "2:4", "two-four.safetensors", "two-four.json"
PATTERNS = ("", TWO_FOUR)


def two_four_stage(
    store: Store,
    compacted: Kept[nn.Module],
    inputs: Sequence[tuple[Tensor, ...]],
    target: Target,
    restore: Callable[[Path], nn.Module],
    pattern: str,
) -> Kept[nn.Module]:
    """Return the model that fine-tuning starts from: with 2:4 weights if `pattern` asks for them, else the compacted one.

    A weight becomes 2:4 if tensor cores can use that at the layer's widths and, where the target states rates, if it is
    estimated to save time there. Every layer is listed with the reason in `two-four.json`.

    Raises:
        BackendError: The model with channels in another order computes something else: a bug.
        ModelError: No layer is eligible.
    """
    if not pattern:
        return compacted

    def prune(folder: Path) -> None:
        model, found = sparsified(compacted.value, inputs, target.rates)
        saved.save_weights(model, folder / WEIGHTS)
        (folder / FOUND).write_text(json.dumps(found, indent=1) + "\n")

    return store.keep("two-four", [1, compacted, vars(target.rates)], prune, lambda root: restore(root / WEIGHTS))


def sparsified(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], rates: Rates) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of `model` with 2:4 weights, and what was done, in plain values.

    Raises:
        ModelError: No layer is eligible.
    """
    made = copy.deepcopy(model).eval()
    graph = trace(made, inputs[0])
    layers = choice(graph, rates)
    chosen = [found.weight for found in layers if found.eligible]
    if not chosen:
        listed = "; ".join(f"{found.layer}: {found.reason}" for found in layers[:4])
        fix = "leave --sparsity out: this network is too narrow for it, or a larger --budget keeps more channels"
        raise ModelError(f"no layer can hold the 2:4 pattern: {listed}", at="--sparsity 2:4", fix=fix)
    before = _kept_share(made, chosen)
    _permute(made, graph, chosen)
    after = _kept_share(made, chosen)
    proof = check("permuted", "compacted", outputs_of(model, inputs), outputs_of(made, inputs), COMPACT_TOLERANCE)
    require(proof, "this is a bug in deploypipe: leave --sparsity out")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in chosen:
                parameter.copy_(torch.from_numpy(project(parameter.numpy())))
    rows = [{"layer": found.layer, "weight": found.weight, "reason": found.reason} for found in layers]
    return made, {"layers": rows, "kept_magnitude": before, "kept_magnitude_permuted": after, "permutation_error": proof.error}


def choice(graph: Graph, rates: Rates) -> tuple[Eligibility, ...]:
    """Return for every layer whether its weight becomes 2:4, and else why not."""
    kept, layers = graph.kept(), {layer.name: layer for layer in graph.layers}
    found = []
    for one in eligibility(graph):
        layer = layers[one.layer]
        useless = one.eligible and rates.known and not pays(layer, layer.n_in.at(kept), layer.n_out.at(kept), rates)
        found.append(Eligibility(one.layer, one.weight, "estimated to save nothing" if useless else one.reason))
    return tuple(found)


def pays(layer: Layer, n_in: int, n_out: int, rates: Rates) -> bool:
    """Return whether the kernel is estimated to be faster with 2:4 weights, by more than a hundredth."""
    shape = Shape.of(layer)
    return kernel_us(shape, n_in, n_out, rates, sparse=True) < 0.99 * kernel_us(shape, n_in, n_out, rates)


def sparse_hooks(pattern: str, start: nn.Module) -> tuple[MaskedWeights, ...]:
    """Return what keeps the zeros of `start` while it is fine-tuned."""
    return (MaskedWeights.of_zeros(start),) if pattern else ()


def sparse_notes(root: Path, target: Target, pattern: str) -> list[str]:
    """Return which layers hold the pattern, which do not and why, and whether this target can use it at all."""
    if not pattern:
        return []
    state: Mapping[str, Any] = json.loads((root / FOUND).read_text())
    reasons: dict[str, list[str]] = {}
    for row in state["layers"]:
        reasons.setdefault(row["reason"], []).append(row["layer"])
    holding = reasons.pop("", [])
    shares = (
        f"{state['kept_magnitude']:.1%} of their magnitude was kept, {state['kept_magnitude_permuted']:.1%} after permuting"
    )
    notes = [f"2:4 weights in {len(holding)} of {len(state['layers'])} layers ({', '.join(holding)}); {shares}"]
    notes += [f"no 2:4 weights in {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if target.rates.known:
        notes.append("estimated latencies, of the dense model too, count on 2:4 weights wherever these are quicker")
    if not target.device.accelerator.startswith("nvidia"):
        notes.append(f"target {target.name} has no sparse tensor cores: 2:4 weights save nothing on it")
    return notes


def _permute(model: nn.Module, graph: Graph, chosen: Sequence[str]) -> None:
    """Put the channels of every group into the order in which the chosen weights keep most; what is computed stays the same."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in graph.prunable:
        weights = {name: tensor.detach().numpy() for name, tensor in named.items()}
        columns = reads(graph, group, weights, chosen)
        order = None if columns is None else search(columns)
        if order is None or np.array_equal(order, np.arange(group.size)):
            continue
        for name in {member.param for member in group.members}:
            moved = permuted(weights[name], [member for member in group.members if member.param == name], order)
            with torch.no_grad():
                named[name].copy_(torch.from_numpy(np.ascontiguousarray(moved)))


def _kept_share(model: nn.Module, chosen: Sequence[str]) -> float:
    weights = [p.detach().numpy() for name, p in model.named_parameters() if name in chosen]
    return sum(map(retained, weights)) / sum(float(np.abs(weight).sum()) for weight in weights)
