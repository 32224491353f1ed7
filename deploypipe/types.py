"""The frozen values that flow between stages: groups of channels, layers, plans, widths."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deploypipe.errors import ModelError, nearest

Role = Literal["produces", "carries", "consumes"]
Kept = Mapping[str, int]  # group name -> number of channels that stay


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one parameter or buffer that is cut together with a group.

    `owner` has one entry for each slot of the axis: the channel of the group that owns it, or -1 for slots of
    other groups and for slots that always stay.
    """

    param: str
    axis: int
    role: Role
    owner: NDArray[np.int64]

    def slots(self, channel: int) -> tuple[int, ...]:
        """Return the indices along `axis` that belong to `channel`, ascending."""
        return tuple(np.flatnonzero(self.owner == channel).tolist())

    @property
    def per_channel(self) -> int:
        """Number of slots that each channel owns here (equal for all channels of a group)."""
        return int(np.count_nonzero(self.owner == 0))


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are chosen from together: all own the same number of slots in the same members.

    Attributes:
        name: The first layer that produces the channels.
        size: Number of channels (units that can be dropped one by one).
        members: Every parameter axis that is cut when a channel goes.
        fixed: Why the group must stay whole; empty if it can be pruned.
        coupled_by: The operations that tie several layers into this group.
        normalised: A normalisation runs across the channels (layer norm), so dropping channels is not the same
            as zeroing them.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    fixed: str = ""
    coupled_by: tuple[str, ...] = ()
    normalised: bool = False


@dataclass(frozen=True)
class Width:
    """A number of channels that depends on the plan: `const + sum(slots * kept[group])`."""

    const: int
    parts: tuple[tuple[str, int], ...] = ()

    def at(self, kept: Kept) -> int:
        """Return the width when `kept[group]` channels stay in every group."""
        return self.const + sum(slots * kept[name] for name, slots in self.parts)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that decide this width."""
        return tuple(name for name, _ in self.parts)


Kind = Literal["conv", "depthwise", "grouped", "transposed", "linear", "matmul"]


@dataclass(frozen=True)
class Layer:
    """One call of a weighted operation, as the forward pass met it.

    Sizes are those of the unpruned model. `in_size`/`out_size` are the spatial sizes (empty for linear layers),
    `positions` is the number of output positions over batch and space, so that dense MACs are
    `positions * n_out * (n_in / groups) * prod(kernel)` for every kind but transposed convolutions, where the positions are
    those of the input. `norm` is the module of the batch or group norm that its output goes straight into, if there is one.
    """

    name: str
    kind: Kind
    weight: str
    bias: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    batch: int
    positions: int
    n_in: Width
    n_out: Width
    n_groups: Width
    norm: str = ""


@dataclass(frozen=True, eq=False)
class Attribute:
    """An integer of a module that states a width, such as `in_channels`, kept true by compaction.

    The new value is the number of kept slots of the axis divided by `divisor`. `owners` holds for every group
    that takes part the owner of each slot (-1 elsewhere); `index` is the position inside a tuple
    (`normalized_shape`), or None for a plain integer.
    """

    module: str
    name: str
    size: int
    divisor: int
    index: int | None
    owners: Mapping[str, NDArray[np.int64]]


class HasKeep(Protocol):
    """Anything that says which channels stay: a `KeepPlan`."""

    @property
    def keep(self) -> Mapping[str, tuple[int, ...]]:
        """Return group name -> channels that stay."""
        ...


@dataclass(frozen=True, eq=False)
class Graph:
    """Layers and groups of coupled channels of one model, traced for one example input."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    attributes: tuple[Attribute, ...]
    shapes: Mapping[str, tuple[int, ...]]  # every parameter and buffer of the model
    ops: Mapping[str, int]  # operation -> how often the forward pass called it
    notes: tuple[str, ...]  # what the tracer could not follow, in words
    example: tuple[Any, ...] = field(repr=False, default=())
    buffers: frozenset[str] = frozenset()  # the names in `shapes` that are no trainable parameters

    def __post_init__(self) -> None:
        by_name = {group.name: group for group in self.groups}
        object.__setattr__(self, "_by_name", MappingProxyType(by_name))

    _by_name: Mapping[str, Group] = field(init=False, repr=False)

    @cached_property
    def calls(self) -> tuple[tuple[str, Layer], ...]:
        """Every layer with a name that no other has: of a module that is called again, "name#2" and so on."""
        seen = Counter[str]()
        named = []
        for layer in self.layers:
            seen[layer.name] += 1
            named.append((f"{layer.name}#{seen[layer.name]}" if seen[layer.name] > 1 else layer.name, layer))
        return tuple(named)

    @cached_property
    def _cuts(self) -> Mapping[tuple[str, int], list[tuple[Group, Member]]]:
        cuts: dict[tuple[str, int], list[tuple[Group, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                cuts.setdefault((member.param, member.axis), []).append((group, member))
        return MappingProxyType(cuts)

    @property
    def fixed(self) -> dict[str, str]:
        """Groups that stay whole, with the reason."""
        return {group.name: group.fixed for group in self.groups if group.fixed}

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Groups from which channels may be dropped."""
        return tuple(group for group in self.groups if not group.fixed)

    @property
    def fingerprint(self) -> str:
        """Hash of the parameter shapes and of the groups: equal graphs take each other's plans."""
        digest = hashlib.sha256(json.dumps(sorted((name, list(shape)) for name, shape in self.shapes.items())).encode())
        for group in self.groups:
            digest.update(f"{group.name} {group.size}".encode())
            for member in group.members:
                digest.update(f"{member.param} {member.axis}".encode() + member.owner.astype(np.int32).tobytes())
        return digest.hexdigest()[:16]

    def group(self, name: str) -> Group:
        """Return the group called `name`.

        Raises:
            ModelError: No group has this name.
        """
        if name not in self._by_name:
            raise ModelError(f"unknown group '{name}'", at="keep plan", fix=nearest(name, self._by_name))
        return self._by_name[name]

    def cuts(self, param: str, axis: int) -> Sequence[tuple[Group, Member]]:
        """Return the groups that own slots of this axis, with their members."""
        return self._cuts.get((param, axis), ())

    def width(self, param: str, axis: int) -> Width:
        """Return the width of an axis as a function of the kept channels of its prunable groups."""
        parts, owned = [], 0
        for group, member in self.cuts(param, axis):
            if not group.fixed:
                parts.append((group.name, member.per_channel))
                owned += member.per_channel * group.size
        return Width(self.shapes[param][axis] - owned, tuple(parts))

    def keeping(self, names: Iterable[str], reason: str) -> "Graph":
        """Return the graph with these groups fixed for `reason`.

        Raises:
            ModelError: A group is unknown.
        """
        chosen = {self.group(name).name for name in names}
        groups = tuple(replace(g, fixed=g.fixed or reason) if g.name in chosen else g for g in self.groups)
        return Graph(self.layers, groups, self.attributes, self.shapes, self.ops, self.notes, self.example, self.buffers)

    def kept(self, plan: "HasKeep | None" = None) -> dict[str, int]:
        """Return the number of channels that stay in every group under `plan` (all of them without a plan)."""
        named = plan.keep if plan else {}
        return {g.name: len(named[g.name]) if g.name in named else g.size for g in self.groups}
