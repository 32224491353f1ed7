"""The inverse of compaction: a smaller model's weights in a model of full size, whose other channels are dead."""

import copy

import torch
from torch import nn

from deploypipe.compact import kept_slots
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph


def expanded(small: nn.Module, full: nn.Module, graph: Graph, plan: KeepPlan) -> nn.Module:
    """Return a copy of `full` that computes what `small` computes, and whose compaction under `plan` is `small` again.

    Parameters of channels that the plan drops are zero; their batch norm statistics are those of `full`.

    Args:
        small: Of the shape that `compact(full, graph, plan)` has.
        full: Stays as it is.
        graph: Its channel graph.
        plan: What `small` has kept.
    """
    new = copy.deepcopy(full)
    values = dict([*small.named_parameters(), *small.named_buffers()])
    touched: dict[str, set[int]] = {}
    for name in plan.keep:
        for member in graph.group(name).members:
            touched.setdefault(member.param, set()).add(member.axis)
    with torch.no_grad():
        for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
            if name not in touched:
                tensor.copy_(values[name])
                continue
            if name not in graph.buffers:
                tensor.zero_()
            kept = [
                torch.from_numpy(kept_slots(graph, plan, name, axis)) if axis in touched[name] else torch.arange(n)
                for axis, n in enumerate(tensor.shape)
            ]
            places = [index.view([-1 if a == axis else 1 for a in range(tensor.dim())]) for axis, index in enumerate(kept)]
            tensor[tuple(places)] = values[name].to(tensor)
    return new
