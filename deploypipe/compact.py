"""Compaction: model + graph + keep plan -> a smaller dense model, checked against the masked original."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from deploypipe.branch import Branch, branches
from deploypipe.errors import ModelError
from deploypipe.graph.frames import failed_in, paths_of
from deploypipe.graph.outputs import copied, output_tensors
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph
from deploypipe.zeros import CONVOLUTIONS, NORMS, Zeros

_FORWARDS = {norm.forward for norm in NORMS}  # a norm with a forward of its own may give something for nothing
ALIVE = 1e-6  # relative change of the output by which it is known to depend on the input
CHECK_TOLERANCE = 1e-3  # far above rounding, far below what a wrongly cut channel does


def compact(model: nn.Module, graph: Graph, plan: KeepPlan, *, check: bool = True) -> nn.Module:
    """Return a copy of `model` without the channels that `plan` drops; the original is untouched.

    Args:
        model: The module that `graph` was traced from.
        graph: Its channel graph.
        plan: Which channels stay. A group without any takes its branch along: `Zeros` stand where the layers were.
        check: Run the result once on the graph's example and compare it with the masked original. (Where a layer
            norm runs across pruned channels the two differ by nature; then all but those channels are compared.)

    Raises:
        ModelError: The plan does not fit the graph, or without a branch the output no longer depends on the input, or
            `forward` holds a literal size or position that does not follow the smaller channels; the message names the
            module, the operation and the groups to keep.
    """
    plan.check(graph)
    if check:
        _require_alive(model, graph, plan)
    small = copy.deepcopy(model)
    _cut(small, graph, plan)
    if check and any(len(channels) < graph.group(name).size for name, channels in plan.keep.items()):
        _check(model, small, graph, plan)
    return small


def mask(model: nn.Module, graph: Graph, plan: KeepPlan) -> nn.Module:
    """Return a copy of full size in which the consumers' slots of dropped channels are zero, and the ends of empty branches.

    Without normalisation across channels it computes what the compacted model computes.
    """
    plan.check(graph)
    masked = copy.deepcopy(model)
    state = _tensors(masked)
    with torch.no_grad():
        for param, axis, slots in masked_slots(graph, plan):
            state[param].index_fill_(axis, slots, 0.0)
    return masked


def masked_slots(graph: Graph, plan: KeepPlan) -> list[tuple[str, int, Tensor]]:
    """Return (parameter, axis, indices) of the slots that read dropped channels: zero there, and the channels do nothing.

    Where a group keeps no channel, these are also the biases behind it and the norms that they go into.
    """
    found = []
    for name, channels in plan.keep.items():
        for member in graph.group(name).members:
            if member.role == "consumes":
                dropped = (member.owner >= 0) & ~np.isin(member.owner, channels)
                found.append((member.param, member.axis, torch.from_numpy(np.flatnonzero(dropped))))
    for branch in branches(graph, plan).values():
        names = [f"{end}.bias" for end in branch.ends]
        names += [f"{norm}.{leaf}" for norm in branch.norms for leaf in ("weight", "bias", "running_mean")]
        found += [(name, 0, torch.arange(graph.shapes[name][0])) for name in names if name in graph.shapes]
    return found


def kept_slots(graph: Graph, plan: KeepPlan, param: str, axis: int) -> NDArray[np.int64]:
    """Return the indices along an axis that stay under `plan`, ascending; of an empty group its first channel does."""
    stays = np.ones(graph.shapes[param][axis], dtype=bool)
    for group, member in graph.cuts(param, axis):
        if group.name in plan.keep:
            stays &= (member.owner < 0) | np.isin(member.owner, plan.keep[group.name] or (0,))
    return np.flatnonzero(stays)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by their first name, as the tracer names them."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def _cut(small: nn.Module, graph: Graph, plan: KeepPlan) -> None:
    """Replace the parameters, buffers and integer attributes of `small` in place."""
    touched = {(m.param, m.axis) for name in plan.keep for m in graph.group(name).members}
    axes: dict[str, list[int]] = {}
    for param, axis in sorted(touched):
        axes.setdefault(param, []).append(axis)
    state = _tensors(small)
    places = _places(small)
    for param, cut_axes in axes.items():
        old = state[param]
        new = old.detach()
        for axis in cut_axes:
            new = new.index_select(axis, torch.from_numpy(kept_slots(graph, plan, param, axis)))
        replacement = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, leaf in places[id(old)]:
            table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            table[leaf] = replacement
    _set_attributes(small, graph, plan)
    gone = branches(graph, plan).values()
    for path in {path for branch in gone for path in branch.layers}:
        _replace(small, path, Zeros(small.get_submodule(path)))
    for path in {path for branch in gone for path in branch.norms}:
        _replace(small, path, nn.Identity())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put the module in place of another, wherever that one hangs: a block may also keep its layers in a list."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if child is old:
                setattr(parent, leaf, module)


def _places(model: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    """Return where each parameter and buffer hangs: more than one place if it is shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, leaf))
    return places


def _set_attributes(small: nn.Module, graph: Graph, plan: KeepPlan) -> None:
    for attribute in graph.attributes:
        dropped = 0
        for name, owner in attribute.owners.items():
            if name in plan.keep:
                dropped += int(((owner >= 0) & ~np.isin(owner, plan.keep[name] or (0,))).sum())
        if dropped:
            module = small.get_submodule(attribute.module)
            new = (attribute.size - dropped) // attribute.divisor
            if attribute.index is not None:
                old = list(getattr(module, attribute.name))
                old[attribute.index] = new
                setattr(module, attribute.name, tuple(old))
            else:
                setattr(module, attribute.name, new)


# ---- branches that go as a whole --------------------------------------------------------------------------------


def replaceable(model: nn.Module, branch: Branch) -> bool:
    """Say whether `Zeros` can stand for all layers of a branch, and nothing for its norms."""
    layers = [type(model.get_submodule(path)) in (*CONVOLUTIONS, nn.Linear) for path in branch.layers]
    norms = [model.get_submodule(path) for path in branch.norms]
    return all(layers) and all(isinstance(norm, NORMS) and type(norm).forward in _FORWARDS for norm in norms)


def alive(model: nn.Module, graph: Graph, plan: KeepPlan) -> bool:
    """Say whether the masked model's output still depends on its input: it differs between the example and another one."""
    masked = mask(model, graph, plan)
    other = tree_map(lambda x: x.flip(-1) * 0.5 + 0.25 if isinstance(x, Tensor) and x.is_floating_point() else x, graph.example)
    return difference(run(masked, graph.example), run(masked, other)) > ALIVE


def _require_alive(model: nn.Module, graph: Graph, plan: KeepPlan) -> None:
    gone = branches(graph, plan)
    at, fix = f"groups {', '.join(gone)}", "keep channels of one of these groups"
    if wrong := [name for name, branch in gone.items() if not replaceable(model, branch)]:
        raise ModelError(
            f"group '{wrong[0]}' cannot be left without channels: its layers are of a class of their own", at=at, fix=fix
        )
    if gone and not alive(model, graph, plan):
        raise ModelError("without these branches the output no longer depends on the input", at=at, fix=fix)


# ---- the proof that nothing in `forward` was written for the old sizes -------------------------------------------


def _check(model: nn.Module, small: nn.Module, graph: Graph, plan: KeepPlan) -> None:
    try:
        ours = run(small, graph.example)
    except Exception as error:
        raise _literal(small, graph, plan, error) from error
    normalised = across_norms(graph, plan)
    if normalised:  # there masks compute something else; all the rest of the plan can be compared
        plan = KeepPlan({name: kept for name, kept in plan.keep.items() if name not in normalised})
        try:
            ours = run(compact(model, graph, plan, check=False), graph.example)
        except Exception:  # the plan itself runs; that a part of it would is not asked for
            return
    theirs = run(mask(model, graph, plan), graph.example)
    error_size = difference(theirs, ours)
    if not error_size <= CHECK_TOLERANCE:
        raise ModelError(
            f"the compacted model computes something else than the masked one (relative error {error_size:.1e})",
            at=f"groups {', '.join(_culprits(model, graph, plan)) or 'in combination'}",
            fix="forward picks channels by literal positions; keep these groups whole (--keep NAME)",
        )


def across_norms(graph: Graph, plan: KeepPlan) -> set[str]:
    """Return the groups that lose channels, though a norm runs across them: no mask computes what the smaller model does."""
    return {name for name, kept in plan.keep.items() if graph.group(name).normalised and len(kept) < graph.group(name).size}


def run(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """Return the output tensors of one evaluation-mode pass, flattened, with a fixed random seed."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return output_tensors(model(*copied(example)))
    finally:
        for module in training:
            module.training = True


def difference(reference: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest absolute difference, relative to the largest finite reference output.

    It is inf if shapes differ, and where NaN says nothing of the difference; equal infinities do not differ.
    """
    if [t.shape for t in reference] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.numel():
            scale = max(float(a.abs().masked_fill(a.isinf(), 0).max()), 1e-12)
            off = float((a.double() - b.double()).abs().masked_fill(a == b, 0.0).max()) / scale
            worst = max(worst, off if off < float("inf") else float("inf"))  # NaN is less than nothing
    return worst


def _culprits(model: nn.Module, graph: Graph, plan: KeepPlan) -> list[str]:
    """Return the groups of the plan that go wrong when they are cut alone (only run to explain an error)."""
    found = []
    for name, channels in plan.keep.items():
        if len(channels) == graph.group(name).size:
            continue
        alone = KeepPlan({name: channels})
        part = copy.deepcopy(model)
        _cut(part, graph, alone)
        try:
            wrong = difference(run(mask(model, graph, alone), graph.example), run(part, graph.example)) > CHECK_TOLERANCE
        except Exception:  # whatever a foreign forward raises on the smaller sizes marks the group
            wrong = True
        if wrong:
            found.append(name)
    return found


def _literal(small: nn.Module, graph: Graph, plan: KeepPlan, error: Exception) -> ModelError:
    last = _LastOperation()
    with suppress(Exception), last:  # a second run, only to find out after which operation the first one failed
        run(small, graph.example)
    module = failed_in(error, paths_of(small))
    why = (str(error).splitlines() or [type(error).__name__])[0]  # a bare assert has no message
    names = [name for name, channels in plan.keep.items() if len(channels) < graph.group(name).size]
    return ModelError(
        f"the compacted model does not run; forward seems to hold a literal size ({why})",
        at=f"module '{module or '(root)'}' ({type(small.get_submodule(module)).__name__}), after {last.name}",
        fix="derive sizes from x.shape in forward (x.flatten(1) instead of x.view(-1, 512)), or keep the groups that "
        f"reach it whole with --keep NAME (cut were: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''})",
    )


class _LastOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the last operation that began."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = "no operation"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = func._schema.name.rpartition("::")[2]
        return func(*args, **(kwargs or {}))
