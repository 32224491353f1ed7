"""What the channels of a group own of its parameters, as one matrix: a row for each channel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deploypipe.errors import NotApplicable
from deploypipe.types import Graph, Group, Member

SIDES = {"filter": ("produces", "carries"), "channel": ("consumes",)}  # whose slices make up a channel


def rows(tensor: Tensor, member: Member) -> Tensor:
    """Return what each channel owns of a parameter, as a (channels, K) matrix; K counts all its slots and all other axes.

    >>> rows(conv.weight, group.members[0])  # doctest: +SKIP
    """
    return tensor.movedim(member.axis, 0)[_slots(member).to(tensor.device)].reshape(int(member.owner.max()) + 1, -1)


def add_rows(tensor: Tensor, member: Member, matrix: Tensor) -> None:
    """Add a (channels, K) matrix to where `rows` reads it, in place."""
    moved = tensor.movedim(member.axis, 0)
    slots = _slots(member).to(tensor.device)
    moved.index_add_(0, slots, matrix.reshape(len(slots), *moved.shape[1:]).to(tensor))


@dataclass(frozen=True, eq=False)
class Stack:
    """Several members of one group side by side, or a whole weight.

    Attributes:
        name: For messages.
        members: All have the same number of channels.
    """

    name: str
    members: tuple[Member, ...]

    @classmethod
    def of_weight(cls, param: str, shape: Sequence[int]) -> "Stack":
        """Return the stack of a whole weight: its rows are those of its first axis, in order."""
        return cls(param, (Member(param, 0, "produces", np.arange(shape[0])),))

    @classmethod
    def of_group(cls, graph: Graph, group: Group, side: str) -> "Stack":
        """Return the stack of what makes the channels of a group ("filter"), norms included, or of what reads them ("channel").

        Behind a norm the filter's scale and shift belong to it: the filter alone can be scaled at will.

        Raises:
            NotApplicable: No weight does.
        """
        members = tuple(m for m in group.members if m.role in SIDES[side] and m.param not in graph.buffers)
        if not any(len(graph.shapes[member.param]) > 1 for member in members):
            raise NotApplicable(f"no weight {'makes' if side == 'filter' else 'reads'} its channels")
        return cls(group.name, members)

    def norms(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return the (channels,) Euclidean norms of the rows."""
        return self.read(named).double().square().sum(1).sqrt()

    def read(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return the (channels, K) matrix, a copy."""
        return torch.cat([rows(named[member.param].detach(), member) for member in self.members], dim=1)

    def add(self, named: Mapping[str, Tensor], matrix: Tensor) -> None:
        """Add a (channels, K) matrix to where `read` found it, in place."""
        start = 0
        for member in self.members:
            width = rows(named[member.param].detach(), member).shape[1]
            add_rows(named[member.param], member, matrix[:, start : start + width])
            start += width


def _slots(member: Member) -> Tensor:
    """Return the slots that channels own, those of the first channel first."""
    slots = np.flatnonzero(member.owner >= 0)
    return torch.from_numpy(slots[np.argsort(member.owner[slots], kind="stable")])
