"""Give the compacted model 2:4 weights: channels in a better order, two of every four weights zero, kept so in fine-tuning."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from deploypipe import saved
from deploypipe.backends.base import Backend
from deploypipe.errors import BackendError, ModelError, TargetError
from deploypipe.graph import trace
from deploypipe.latency.estimate import ESTIMATED, kernel_us
from deploypipe.latency.files import Shape
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline.request import BY_CHOICE, TWO_FOUR
from deploypipe.pipeline.stages import COMPACT_TOLERANCE
from deploypipe.plan import KeepPlan
from deploypipe.reports.pattern import LayerPattern, TwoFour
from deploypipe.store import Kept, Store
from deploypipe.targets import Rates, Target
from deploypipe.training.masked import MaskedWeights
from deploypipe.two_four import IN, Eligibility, eligibility, holds, project, reorder, retained
from deploypipe.types import Graph, Layer
from deploypipe.verify import check, outputs_of, require

WEIGHTS, FOUND = "two-four.safetensors", "two-four.json"
MASKED = "masked"  # the model with the pattern, before fine-tuning
_EXPORTED = ("pruned.onnx", "pruned-simplified.onnx", "pruned-built.onnx")  # those that a run has
ORDER = "order_before_last_layer"
NOT_CHOSEN = "dense was the better choice within the budget"


def priced(table: LatencyTable, pattern: str, target: Target) -> LatencyTable:
    """Return the table that plans are made with under `--sparsity PATTERN`.

    "2:4" prunes whatever may be: widths are multiples of what sparse kernels take, prices those of the quicker kernel. "auto"
    lets the allocator choose for each layer: both prices are offered.

    Raises:
        TargetError: A choice is wanted, and nothing prices 2:4 weights.
    """
    if pattern == BY_CHOICE and table.source == ESTIMATED and not table.knows_two_four:
        raise TargetError(
            "the target file does not state what 2:4 weights gain there, and nothing is taken for granted",
            at=f"{target.path}: rates.sparse",
            fix="state sparse with its sparse_source in [rates], measure a device (--host), or leave --sparsity out",
        )
    if pattern == BY_CHOICE:
        return table.offering()
    return table.aligned(IN).masked() if pattern else table


def two_four_stage(
    store: Store,
    compacted: Kept[nn.Module],
    inputs: Sequence[tuple[Tensor, ...]],
    target: Target,
    restore: Callable[[Path], nn.Module],
    pattern: str,
    plan: KeepPlan,
) -> Kept[nn.Module]:
    """Return the model that fine-tuning starts from: with 2:4 weights if `pattern` or the plan asks for them.

    With "2:4" a weight becomes so if tensor cores can use that at the layer's widths and, where the target states rates, if it
    is estimated to save time there; with "auto" the weights of the layers that the plan names. Every layer is listed with
    the reason in `two-four.json`.

    Raises:
        BackendError: The model with channels in another order computes something else: a bug.
        ModelError: "2:4" was asked for and no layer is eligible.
    """
    if not _any(pattern, plan):
        return compacted

    def prune(folder: Path) -> None:
        chosen = partial(choice, rates=target.rates) if pattern == TWO_FOUR else partial(named, layers=plan.two_four)
        model, found = sparsified(compacted.value, inputs, chosen)
        saved.save_weights(model, folder / WEIGHTS)
        (folder / FOUND).write_text(json.dumps(found, indent=1) + "\n")

    return store.keep("two-four", [3, compacted, vars(target.rates)], prune, lambda root: restore(root / WEIGHTS))


def sparsified(
    model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], choose: Callable[[Graph], tuple[Eligibility, ...]]
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a copy of `model` with 2:4 weights, and what was done, in plain values.

    Raises:
        ModelError: No layer is eligible.
    """
    made = copy.deepcopy(model).eval()
    graph = trace(made, inputs[0])
    layers = choose(graph)
    chosen = [found.weight for found in layers if found.eligible]
    if not chosen:
        listed = "; ".join(f"{found.layer}: {found.reason}" for found in layers[:4])
        fix = "leave --sparsity out: this network is too narrow for it, or a larger --budget keeps more channels"
        raise ModelError(f"no layer can hold the 2:4 pattern: {listed}", at="--sparsity 2:4", fix=fix)
    before = _kept_share(made, chosen)
    order = reorder(made, graph, chosen)
    after = _kept_share(made, chosen)
    proof = check("permuted", "compacted", outputs_of(model, inputs), outputs_of(made, inputs), COMPACT_TOLERANCE)
    require(proof, "this is a bug in deploypipe: leave --sparsity out")
    _project(made, chosen)
    rows = [{"layer": found.layer, "weight": found.weight, "reason": found.reason} for found in layers]
    found = {"layers": rows, "kept_magnitude": before, "kept_magnitude_permuted": after, "permutation_error": proof.error}
    return made, found | {ORDER: order}


def patterned(model: nn.Module, example: Sequence[Any], pattern: str, plan: KeepPlan, rates: Rates) -> nn.Module:
    """Return the compacted model as its latency is measured while planning: with the pattern, channels in their own order."""
    if not _any(pattern, plan):
        return model
    graph = trace(model, tuple(example))
    layers = choice(graph, rates) if pattern == TWO_FOUR else named(graph, plan.two_four)
    made = copy.deepcopy(model)
    _project(made, [found.weight for found in layers if found.eligible])
    return made


def choice(graph: Graph, rates: Rates) -> tuple[Eligibility, ...]:
    """Return for every layer whether its weight becomes 2:4, and else why not."""
    kept, layers = graph.kept(), {layer.name: layer for layer in graph.layers}
    found = []
    for one in eligibility(graph):
        layer = layers[one.layer]
        useless = one.eligible and rates.known and not pays(layer, layer.n_in.at(kept), layer.n_out.at(kept), rates)
        found.append(Eligibility(one.layer, one.weight, "estimated to save nothing" if useless else one.reason))
    return tuple(found)


def named(graph: Graph, layers: Sequence[str]) -> tuple[Eligibility, ...]:
    """Return for every layer whether the plan chose 2:4 weights for it, and else why not."""
    return tuple(
        replace(found, reason=found.reason or ("" if found.layer in layers else NOT_CHOSEN)) for found in eligibility(graph)
    )


def pays(layer: Layer, n_in: int, n_out: int, rates: Rates) -> bool:
    """Return whether the kernel is estimated to be faster with 2:4 weights, by more than a hundredth."""
    shape = Shape.of(layer)
    return kernel_us(shape, n_in, n_out, rates, sparse=True) < 0.99 * kernel_us(shape, n_in, n_out, rates)


def sparse_hooks(pattern: str, plan: KeepPlan, start: nn.Module) -> tuple[MaskedWeights, ...]:
    """Return what keeps the zeros of the 2:4 weights of `start` while it is fine-tuned; a gate that begins at zero is none."""
    weights = {name: p.detach() for name, p in start.named_parameters() if p.dim() >= 2}
    held = [name for name, p in weights.items() if p.any() and holds(p.cpu().numpy())]
    return (MaskedWeights.of_zeros(start, held),) if _any(pattern, plan) else ()


def sparse_notes(root: Path, target: Target, table: LatencyTable | None, pattern: str) -> list[str]:
    """Return which layers hold the pattern, which do not and why, and whether this target can use it at all."""
    if not pattern:
        return []
    notes = ["2:4 weights were offered for each layer, and chosen for none"]
    if (root / FOUND).is_file():
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
    if table and table.knows_two_four and table.source != "measured":
        rates = target.rates
        notes.append(f"what 2:4 saves is assumed, not measured: {rates.sparse:g} times the dense rate ({rates.sparse_source})")
    if not target.device.accelerator.startswith("nvidia"):
        notes.append(f"target {target.name} has no sparse tensor cores: 2:4 weights save nothing on it")
    return notes


def two_four_outcome(
    root: Path,
    graph: Graph,
    plan: KeepPlan,
    table: LatencyTable | None,
    pattern: str,
    backend: Backend,
    accuracies: Mapping[str, float | None],
) -> TwoFour | None:
    """Return for every layer of the model whether its weight is 2:4, why not, and what the table says that saves.

    Args:
        root: The run folder.
        graph: Of the dense model.
        plan: Of the run.
        table: The run's latency table; None if it needed none.
        pattern: What was asked for.
        backend: Of the target; what its builder said about the pruned model is evidence if it knows sparse kernels.
        accuracies: Of the model in its stages; MASKED is that with the pattern, before fine-tuning.
    """
    if not pattern:
        return None
    evidence = json.loads((root / "pruned-built.json").read_text()) if backend.two_four else []
    reasons = _reasons(root)
    kept = graph.kept(plan)
    offered = {t.name: t for t in table.offering().terms(graph) if t.two_four} if table and table.knows_two_four else {}
    found = []
    layers = {layer.name: layer for layer in graph.layers}
    for one in eligibility(graph, kept):
        if not (layers[one.layer].n_in.at(kept) and layers[one.layer].n_out.at(kept)):
            continue  # its branch is gone
        term = offered.get(one.layer)
        dense_us = term.under(kept) if term else None
        saved_us = dense_us - term.under(kept, (one.layer,)) if term and dense_us is not None and one.eligible else None
        reason = reasons.get(one.layer, one.reason or NOT_CHOSEN)
        if reason == NOT_CHOSEN and saved_us == 0.0:
            reason = "no quicker than dense by the latency table"
        found.append(LayerPattern(one.layer, TWO_FOUR if not reason else "dense", reason, dense_us, saved_us))
    source, proof = table.source if table and offered else "", proven(root, two_four_weights(root))
    return TwoFour(pattern, tuple(found), source, tuple(evidence), proof, accuracies.get(MASKED))


def proven(root: Path, weights: Sequence[str]) -> tuple[str, ...]:
    """Return the files of a run in which all of `weights` are found by name and hold the pattern by exact zeros.

    Raises:
        BackendError: A weight does not hold it: what was put in before fine-tuning was lost on the way.
    """
    files = {saved.WEIGHTS: load_file(root / saved.WEIGHTS)} if weights else {}
    for path in (root / name for name in (_EXPORTED if weights else ()) if (root / name).is_file()):
        exported = onnx.load(str(path)).graph
        turned = {node.input[1] for node in exported.node if node.op_type == "MatMul"}  # (inputs, outputs), as `x @ w` reads it
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in exported.initializer if tensor.name in weights}
        files[path.name] = {name: array.T if name in turned else array for name, array in arrays.items()}
    for file, found in files.items():
        lost = [name for name in weights if name in found and not holds(found[name])]
        if lost:
            fix = "this is a bug in deploypipe: leave --sparsity out"
            raise BackendError(f"{', '.join(lost)} should hold the 2:4 pattern and does not", at=str(root / file), fix=fix)
    return tuple(file for file, found in files.items() if set(weights) <= set(found))


def two_four_layers(root: Path) -> list[str]:
    """Return the layers of a run whose weights were made 2:4."""
    return [row["layer"] for row in _rows(root) if not row["reason"]]


def two_four_weights(root: Path) -> list[str]:
    """Return the weights of a run that were made 2:4."""
    return [row["weight"] for row in _rows(root) if not row["reason"]]


def _reasons(root: Path) -> dict[str, str]:
    return {row["layer"]: row["reason"] for row in _rows(root)}


def new_order(root: Path, pattern: str, plan: KeepPlan) -> list[int]:
    """Return where each input of the last layer was before channels were put into another order; empty if none were."""
    return list(json.loads((root / FOUND).read_text())[ORDER]) if _any(pattern, plan) else []


def _rows(root: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads((root / FOUND).read_text())["layers"] if (root / FOUND).is_file() else []
    return rows


def _any(pattern: str, plan: KeepPlan) -> bool:
    """Return whether any weight is to become 2:4."""
    return pattern == TWO_FOUR or (pattern == BY_CHOICE and bool(plan.two_four))


def _project(model: nn.Module, weights: Sequence[str]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(torch.from_numpy(project(parameter.numpy())))


def _kept_share(model: nn.Module, chosen: Sequence[str]) -> float:
    weights = [p.detach().numpy() for name, p in model.named_parameters() if name in chosen]
    return sum(map(retained, weights)) / sum(float(np.abs(weight).sum()) for weight in weights)
