"""Torch-Pruning as a peer: what it keeps within our budget, as one of our plans."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.cost import CostTable
from deploypipe.errors import BudgetError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

RATIOS = np.linspace(0.02, 0.98, 49)  # pruned at once
MOST, IN_STEPS = 0.95, (18, 40)  # or this ratio in so many steps, its gradients computed again before each
NEAR = 0.97  # of the budget: nearer than that nothing more is tried
Batches = Iterable[tuple[Tensor, Tensor]]


def torch_pruning(
    model: nn.Module,
    example: tuple[Tensor, ...],
    graph: Graph,
    table: CostTable,
    budget: float,
    taylor: Batches | None = None,
) -> KeepPlan:
    """Return what Torch-Pruning keeps: global ranking, widths rounded to 8, whatever of it comes nearest to the budget.

    What it keeps does not always cost less at a higher ratio (a group that would be emptied stays whole), so all ratios are
    tried, and if none comes near, pruning in steps.

    Args:
        model: Trained.
        example: Of its inputs.
        graph: Of the model.
        table: Prices what it keeps.
        budget: In the table's unit.
        taylor: Batches whose gradients it ranks by; None ranks by the norms of groups.
    """
    import torch_pruning as tp  # noqa: PLC0415 - in the dependency group `bench`

    head = next(name for name, module in reversed(list(model.named_modules())) if isinstance(module, nn.Linear))

    def pruned(ratio: float, n_steps: int) -> Iterator[KeepPlan]:
        importance = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance()
        with _followable(copy.deepcopy(model).eval().requires_grad_(True)) as copied:
            pruner = tp.pruner.BasePruner(
                copied, example, importance=importance, global_pruning=True, pruning_ratio=ratio, iterative_steps=n_steps,
                round_to=8, ignored_layers=[copied.get_submodule(head)],
            )  # fmt: skip
            for _ in range(n_steps):
                copied.zero_grad()
                for inputs, labels in taylor or ():
                    nn.functional.cross_entropy(copied(inputs), labels).backward()
                pruner.step()
                yield _plan(model, copied, graph)

    best: tuple[float, KeepPlan] | None = None
    for way in ([(float(ratio), 1) for ratio in RATIOS], *([(MOST, n_steps)] for n_steps in IN_STEPS)):
        for ratio, n_steps in way:
            for plan in pruned(ratio, n_steps):
                cost = _cost(table, graph, plan)
                best = (cost, plan) if cost <= budget and cost > (best[0] if best else 0.0) else best
        if best and best[0] >= NEAR * budget:
            break
    if best is None:
        raise BudgetError("no ratio keeps the budget", at="Torch-Pruning")
    return best[1]


@contextmanager
def _followable(model: nn.Module) -> Iterator[nn.Module]:
    """Write option-A shortcuts as convolutions that are modules: it only follows those."""
    for stage in (getattr(model, "layer2", None), getattr(model, "layer3", None)):
        weight = getattr(getattr(stage[0], "shortcut", None), "weight", None) if isinstance(stage, nn.Sequential) else None
        if weight is not None and not isinstance(stage[0].shortcut, nn.Conv2d):
            stage[0].shortcut = nn.Conv2d(weight.shape[1], weight.shape[0], 1, 2, bias=False)
            stage[0].shortcut.weight = nn.Parameter(weight.clone())
    yield model


def _cost(table: CostTable, graph: Graph, plan: KeepPlan) -> float:
    """Price a plan; widths below all that the table offers, which it has not measured, cost what the least of these costs."""
    least = {name: min(widths) for name, widths in table.candidates(graph).items()}
    kept = graph.kept(plan)
    return table.predict(graph, KeepPlan.of_widths({name: max(kept[name], least[name]) for name in plan.keep}))


def _plan(model: nn.Module, small: nn.Module, graph: Graph) -> KeepPlan:
    """Find what was kept again in our groups, by the batch norms, whose vectors it slices."""
    keep = {}
    for group in graph.prunable:
        name = next(m.param for m in group.members if m.role == "carries" and m.param.endswith("weight")).rpartition(".")[0]
        before, after = (_channels(whole.get_submodule(name)) for whole in (model, small))
        same = (before[:, None] == after).all(dim=2).any(dim=1)
        keep[group.name] = tuple(np.flatnonzero(same.numpy()).tolist())
        assert len(keep[group.name]) == len(after), f"channels of {name} are not all different"
    return KeepPlan(keep, fingerprint=graph.fingerprint)


def _channels(norm: nn.Module) -> Tensor:
    """Return (channels, 4): what a batch norm knows of each."""
    return torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var], dim=1).detach()
