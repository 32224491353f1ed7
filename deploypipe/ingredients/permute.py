"""The same function with the channels of its groups in another order."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.types import Graph, Member


def permuted(model: nn.Module, graph: Graph, orders: Mapping[str, Sequence[int]]) -> nn.Module:
    """Return a copy in which the channels of groups stand in another order; it computes what `model` computes.

    Args:
        model: That was traced; stays as it is.
        graph: Its channel graph.
        orders: Group -> all its channels, in the order that they shall have; groups that are not named stay as they are, and
            so do those that weights take part in which are no parameters: they are fixed, and may not even be saved.
    """
    new = copy.deepcopy(model)
    state: dict[str, Tensor] = dict([*new.named_parameters(), *new.named_buffers()])
    with torch.no_grad():
        for name, order in orders.items():
            if in_place(graph, name):
                continue
            for member in graph.group(name).members:
                tensor, index = state[member.param], torch.from_numpy(_index(member, order))
                tensor.copy_(tensor.index_select(member.axis, index.to(tensor.device)))
    return new


def in_place(graph: Graph, group: str) -> bool:
    """Say whether fixed weights take part in a group, so that its channels cannot be put into another order."""
    return any(m.param in graph.buffers and len(graph.shapes[m.param]) > 1 for m in graph.group(group).members)


def _index(member: Member, order: Sequence[int]) -> NDArray[np.int64]:
    """Return which slot each slot of the axis takes its values from."""
    index = np.arange(len(member.owner))
    slots = [np.flatnonzero(member.owner == channel) for channel in range(len(order))]
    for channel, source in enumerate(order):
        index[slots[channel]] = slots[source]
    return index
