"""From labels to groups: connected components are channels, channels of one signature are a group."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from deploypipe.graph.labels import Ledger, Vector
from deploypipe.graph.tracer import LayerCall, State
from deploypipe.types import Attribute, Graph, Group, Layer, Member, Width

_NO_SPACE: Mapping[str, tuple[int, ...]] = dict.fromkeys(("kernel", "stride", "padding", "dilation", "in_size", "out_size"), ())
_Part = tuple[int, int, NDArray[np.int64]]  # group, number of slots it owns, owner of each slot (-1: not this group)
_Place = tuple[int, tuple[tuple[str, int], Vector]]  # position in the order of first use, (parameter, axis), its labels


def build_graph(state: State, ops: Mapping[str, int], example: tuple[Any, ...]) -> Graph:
    """Turn what one pass recorded into a `Graph`."""
    channels = _Channels(state)
    groups = channels.groups()
    widths = _Widths(channels, groups)
    norms = {i: norm for i, norm in state.norms.items() if state.norm_calls[norm] == 1}  # else it is of other layers, too
    return Graph(
        layers=tuple(widths.layer(call, norms.get(i, "")) for i, call in enumerate(state.layers)),
        groups=groups,
        attributes=tuple(widths.attributes()),
        shapes=dict(state.shapes),
        ops=dict(ops),
        notes=(),
        example=example,
        buffers=frozenset(state.buffers & state.shapes.keys()),
    )


class _Channels:
    """Channels (connected components of labels) and what is known about each."""

    def __init__(self, state: State) -> None:
        self.state, ledger = state, state.ledger
        self.of = _components(ledger)  # label -> channel
        self._of = np.append(self.of, -1)  # so that label -1 looks up channel -1
        self._parts: dict[int, tuple[Vector, list[_Part]]] = {}
        self.n = int(self.of.max()) + 1 if len(self.of) else 0
        self.first = np.full(self.n, len(self.of), dtype=np.int64)  # channel -> its lowest label
        np.minimum.at(self.first, self.of, np.arange(len(self.of)))
        self.reasons = [""]
        self.reason = np.zeros(self.n, dtype=np.int64)  # channel -> index into `reasons`
        for labels, why in [*ledger.frozen, *self._unequal(ledger)]:
            self._freeze(labels, why)
        self.family = np.full(self.n + 1, -1, dtype=np.int64)  # channel -> group; the last entry serves slots without one
        self.rank = np.full(self.n + 1, -1, dtype=np.int64)  # channel -> index inside the group
        self.normalised = np.zeros(self.n, dtype=bool)
        for labels in ledger.normalised:
            self.normalised[self.of[labels[labels >= 0]]] = True

    def _freeze(self, labels: Vector, why: str) -> None:
        channels = self.of[labels[labels >= 0]]
        channels = channels[self.reason[channels] == 0]
        if len(channels):
            if self.reasons[-1] != why:
                self.reasons.append(why)
            self.reason[channels] = len(self.reasons) - 1

    def _unequal(self, ledger: Ledger) -> list[tuple[Vector, str]]:
        """Return the labels whose size was taken from channels that turned out to be others."""
        frozen = []
        for a, b, why in ledger.same_width:
            mine, theirs = (np.unique(self.of[v[v >= 0]]) for v in (a, b))
            if not np.array_equal(mine, theirs):
                frozen += [(a, why), (b, why)]
        return frozen

    def parts(self, labels: Vector) -> list[_Part]:
        """Split the slots of a label vector by family; most belong to a single one. The same vectors come again and again."""
        known = self._parts.get(id(labels))
        if known is None:
            vector = self._of[labels]
            families, ranks = self.family[vector], self.rank[vector]
            first = int(families[0]) if len(families) else -1
            if (families == first).all():
                parts = [(first, len(ranks), ranks)] if first >= 0 else []
            else:
                counts = np.bincount(families + 1)
                found = np.flatnonzero(counts[1:]).tolist()
                parts = [(i, int(counts[i + 1]), np.where(families == i, ranks, -1)) for i in found]
            known = self._parts[id(labels)] = (labels, parts)
        return known[1]

    def groups(self) -> tuple[Group, ...]:
        """Sort the channels into groups: equal slots in equal axes, equal fate."""
        axes: dict[int, tuple[Vector, list[_Place]]] = {}  # parameters of one norm share a vector: look once
        for place in enumerate(self.state.axes.items()):
            labels = place[1][1]
            axes.setdefault(id(labels), (labels, []))[1].append(place)
        families = self._families(list(axes.values()))
        for i, channels in enumerate(families):
            self.family[channels], self.rank[channels] = i, np.arange(len(channels))
        members: list[list[tuple[int, Member]]] = [[] for _ in families]
        roles = self.state.roles
        for labels, places in axes.values():
            for i, _, owner in self.parts(labels):
                members[i] += [(order, Member(*key, roles[key], owner)) for order, (key, _) in places]
        coupled, names = self._coupled_by(), dict[str, int]()
        return tuple(
            self._group(channels, tuple(member for _, member in sorted(found, key=itemgetter(0))), names, coupled)
            for channels, found in zip(families, members, strict=True)
        )

    def _families(self, axes: list[tuple[Vector, list[_Place]]]) -> list[NDArray[np.int64]]:
        """Split the channels that some layer produces by what they own and by their fate, in order of first appearance.

        What a channel owns is summed up in 64 random bits for each slot's axis: equal for equal channels, and for others with
        a chance of 2^-64.
        """
        n_fates = 2 * len(self.reasons)
        random = _random_bits(1 << (n_fates + len(axes)).bit_length())
        fates = random[:n_fates].reshape(-1, 2)
        signature = fates[self.reason, self.normalised.astype(np.int64)]
        produced = np.zeros(self.n, dtype=bool)
        if axes:
            slots = self._of[np.concatenate([labels for labels, _ in axes])]
            lengths, owned = [len(labels) for labels, _ in axes], slots >= 0
            bits = np.repeat(random[n_fates : n_fates + len(axes)], lengths)
            np.add.at(signature, slots[owned], bits[owned])
            roles = self.state.roles
            emits = np.repeat([any(roles[key] == "produces" for _, (key, _) in places) for _, places in axes], lengths)
            produced[slots[owned & emits]] = True
        channels = np.flatnonzero(produced)
        channels = channels[np.argsort(self.first[channels], kind="stable")]
        if not len(channels):
            return []
        order = np.argsort(signature[channels], kind="stable")
        found = signature[channels[order]]
        starts = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
        parts = np.split(channels[order], starts[1:])
        return [parts[i] for i in np.argsort(order[starts])]

    def _group(
        self,
        channels: NDArray[np.int64],
        members: tuple[Member, ...],
        names: dict[str, int],
        coupled: dict[int, list[str]],
    ) -> Group:
        base = next(m.param for m in members if m.role == "produces").removesuffix(".weight").removesuffix(".bias")
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        first = int(channels[0])
        reason = self.reasons[self.reason[first]]
        if not reason and len(channels) == 1:
            slots = max(m.per_channel for m in members if m.role == "produces")
            reason = "it has a single channel" if slots == 1 else "all its channels are tied into one unit"
        couplings = tuple(dict.fromkeys(coupled.get(first, [])))
        return Group(name, len(channels), members, reason, couplings, bool(self.normalised[first]))

    def _coupled_by(self) -> dict[int, list[str]]:
        texts: dict[int, list[str]] = {}
        for a, b, why in self.state.ledger.couplings:
            for label in (a, b):
                texts.setdefault(int(self.of[label]), []).append(why)
        return texts


@cache
def _random_bits(n: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 2**64, size=n, dtype=np.uint64)


def _components(ledger: Ledger) -> NDArray[np.int64]:
    if not ledger.ties:
        return np.arange(ledger.count)
    left = np.concatenate([a for a, _ in ledger.ties])
    right = np.concatenate([b for _, b in ledger.ties])
    ones = np.ones(len(left), dtype=np.int8)
    matrix = csr_array((ones, (left, right)), shape=(ledger.count, ledger.count))
    return np.asarray(connected_components(matrix, directed=False)[1], dtype=np.int64)


@dataclass
class _Widths:
    """Reads widths of label vectors as functions of the plan."""

    channels: _Channels
    groups: tuple[Group, ...]
    known: dict[int, tuple[Vector, Width]] = field(default_factory=dict)  # one layer's output is the next one's input

    def width(self, labels: Vector) -> Width:
        """Return the length of a label vector as a function of the plan."""
        if id(labels) not in self.known:
            self.known[id(labels)] = (labels, self._width(labels))
        return self.known[id(labels)][1]

    def _width(self, labels: Vector) -> Width:
        parts, const = [], len(labels)
        for i, slots, _ in self.channels.parts(labels):
            group = self.groups[i]
            if group.fixed:
                continue
            per_channel, rest = divmod(slots, group.size)
            assert rest == 0, f"group {group.name} owns an uneven number of slots"
            parts.append((group.name, per_channel))
            const -= slots
        return Width(const, tuple(parts))

    def layer(self, call: LayerCall, norm: str) -> Layer:
        """Turn one recorded call into a layer; `norm` is the module that its output goes straight into."""
        geometry: dict[str, Any] = {**_NO_SPACE, **call.geometry}
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
            norm=norm,
            **geometry,
        )

    def attributes(self) -> list[Attribute]:
        """Return the integers to keep true; a module that is called several times counts once."""
        found: dict[tuple[str, str, int | None], Attribute] = {}
        for use in self.channels.state.attributes:
            key = (use.module, use.name, use.position)
            owners = {self.groups[i].name: owner for i, _, owner in self.channels.parts(use.labels) if not self.groups[i].fixed}
            if owners and key not in found:
                found[key] = Attribute(use.module, use.name, len(use.labels), use.divisor, use.position, owners)
        return list(found.values())
