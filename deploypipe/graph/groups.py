"""From labels to groups: connected components are channels, channels of one signature are a group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deploypipe.graph.labels import Ledger, Vector
from deploypipe.graph.tracer import LayerCall, State
from deploypipe.types import Attribute, Graph, Group, Layer, Member, Width

Key = tuple[str, int]


def build_graph(state: State, ops: Mapping[str, int], example: tuple[Any, ...]) -> Graph:
    """Turn what one pass recorded into a `Graph`."""
    channels = _Channels(state)
    groups = channels.groups()
    widths = _Widths(channels, groups)
    return Graph(
        layers=tuple(widths.layer(call) for call in state.layers),
        groups=groups,
        attributes=tuple(widths.attributes()),
        shapes=dict(state.shapes),
        ops=dict(ops),
        notes=(),
        example=example,
    )


class _Channels:
    """Channels (connected components of labels) and what is known about each."""

    def __init__(self, state: State) -> None:
        self.state, ledger = state, state.ledger
        self.of = _components(ledger)  # label -> channel
        self.n = int(self.of.max()) + 1 if len(self.of) else 0
        self.first = np.full(self.n, len(self.of), dtype=np.int64)
        np.minimum.at(self.first, self.of, np.arange(len(self.of)))
        self.reason = [""] * self.n
        for labels, why in [*ledger.frozen, *self._unequal(ledger)]:
            for channel in np.unique(self.of[labels[labels >= 0]]).tolist():
                self.reason[channel] = self.reason[channel] or why
        self.normalised = np.zeros(self.n, dtype=bool)
        for labels in ledger.normalised:
            self.normalised[self.of[labels[labels >= 0]]] = True

    def _unequal(self, ledger: Ledger) -> list[tuple[Vector, str]]:
        """Return the labels whose size was taken from channels that turned out to be others."""
        frozen = []
        for a, b, why in ledger.same_width:
            mine, theirs = (np.unique(self.of[v[v >= 0]]) for v in (a, b))
            if not np.array_equal(mine, theirs):
                frozen += [(a, why), (b, why)]
        return frozen

    def vector(self, labels: Vector) -> NDArray[np.int64]:
        """Return the channel of each label, -1 where there is none."""
        return np.where(labels >= 0, self.of[np.maximum(labels, 0)], -1) if self.n else labels.astype(np.int64)

    def groups(self) -> tuple[Group, ...]:
        """Sort the channels into groups of equal signature."""
        keys = list(self.state.axes)
        axes = [self.vector(self.state.axes[key]) for key in keys]
        counts: list[list[tuple[int, int]]] = [[] for _ in range(self.n)]
        for i, axis in enumerate(axes):
            found, number = np.unique(axis[axis >= 0], return_counts=True)
            for channel, n in zip(found.tolist(), number.tolist(), strict=True):
                counts[channel].append((i, n))
        families: dict[Any, list[int]] = {}
        for channel in np.argsort(self.first, kind="stable").tolist():
            signature = (tuple(counts[channel]), self.reason[channel], bool(self.normalised[channel]))
            if any(self.state.roles[keys[i]] == "produces" for i, _ in counts[channel]):
                families.setdefault(signature, []).append(channel)
        coupled = self._coupled_by()
        names: dict[str, int] = {}
        return tuple(
            self._group(members, [keys[i] for i, _ in signature[0]], [axes[i] for i, _ in signature[0]], names, coupled)
            for signature, members in families.items()
        )

    def _group(
        self, channels: list[int], keys: list[Key], axes: list[NDArray[np.int64]], names: dict[str, int], coupled: list[list[str]]
    ) -> Group:
        rank = np.full(self.n + 1, -1, dtype=np.int64)  # the last entry serves slots without a channel
        rank[channels] = np.arange(len(channels))
        members = tuple(
            Member(name, axis, self.state.roles[name, axis], rank[vector])
            for (name, axis), vector in zip(keys, axes, strict=True)
        )
        base = next(m.param for m in members if m.role == "produces")
        base = base.removesuffix(".weight").removesuffix(".bias")
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        reason = self.reason[channels[0]]
        if not reason and len(channels) == 1:
            reason = "all its channels are tied into one unit"
        couplings = tuple(dict.fromkeys(text for c in channels[:1] for text in coupled[c]))
        return Group(name, len(channels), members, reason, couplings, bool(self.normalised[channels[0]]))

    def _coupled_by(self) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in range(self.n)]
        for a, b, why in self.state.ledger.couplings:
            for label in (a, b):
                texts[self.of[label]].append(why)
        return texts


def _components(ledger: Ledger) -> NDArray[np.int64]:
    if not ledger.ties:
        return np.arange(ledger.count)
    left = np.concatenate([a for a, _ in ledger.ties])
    right = np.concatenate([b for _, b in ledger.ties])
    ones = np.ones(len(left), dtype=np.int8)
    matrix = coo_array((ones, (left, right)), shape=(ledger.count, ledger.count))
    return np.asarray(connected_components(matrix, directed=False)[1], dtype=np.int64)


@dataclass
class _Widths:
    """Reads widths of label vectors as functions of the plan."""

    channels: _Channels
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        self.home = np.full(self.channels.n + 1, -1, dtype=np.int64)  # channel -> group
        self.rank = np.full(self.channels.n + 1, -1, dtype=np.int64)  # channel -> index inside the group
        for i, group in enumerate(self.groups):
            member = group.members[0]
            vector = self.channels.vector(self.channels.state.axes[member.param, member.axis])
            mine = member.owner >= 0
            self.home[vector[mine]] = i
            self.rank[vector[mine]] = member.owner[mine]

    def width(self, labels: Vector, divisor: int = 1) -> Width:
        """Return the length of a label vector, divided by `divisor`, as a function of the plan."""
        homes = self.home[self.channels.vector(labels)]
        parts, const = [], len(labels)
        for i in np.unique(homes[homes >= 0]).tolist():
            group = self.groups[i]
            slots = int((homes == i).sum())
            if group.fixed:
                continue
            per_channel, rest = divmod(slots, group.size * divisor)
            assert rest == 0, f"group {group.name} owns an uneven number of slots"
            parts.append((group.name, per_channel))
            const -= slots
        return Width(const // divisor, tuple(parts))

    def layer(self, call: LayerCall) -> Layer:
        """Turn one recorded call into a layer."""
        geometry: dict[str, Any] = {
            key: () for key in ("kernel", "stride", "padding", "dilation", "in_size", "out_size")
        } | dict(call.geometry)
        n_groups = Width(1) if call.group_labels is None else self.width(call.group_labels)
        return Layer(
            name=call.name,
            kind=call.kind,
            weight=call.weight,
            bias=call.bias,
            groups=call.groups,
            n_in=self.width(call.vec_in),
            n_out=self.width(call.vec_out),
            n_groups=n_groups,
            **geometry,
        )

    def attributes(self) -> list[Attribute]:
        """Return the integers to keep true; a module that is called several times counts once."""
        found: dict[tuple[str, str, int | None], Attribute] = {}
        for use in self.channels.state.attributes:
            vector = self.channels.vector(use.labels)
            homes, ranks = self.home[vector], self.rank[vector]
            owners = {
                self.groups[i].name: np.where(homes == i, ranks, -1)
                for i in np.unique(homes[homes >= 0]).tolist()
                if not self.groups[i].fixed
            }
            if owners:
                found.setdefault(
                    (use.module, use.name, use.index),
                    Attribute(use.module, use.name, len(vector), use.divisor, use.index, owners),
                )
        return list(found.values())
