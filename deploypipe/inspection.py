"""What a model consists of: layers, groups of coupled channels, what cannot be pruned and why, and what it costs."""

from dataclasses import asdict, dataclass
from typing import Any

from deploypipe.count import MacTable, macs, params
from deploypipe.types import Graph, Group, Layer, Member


@dataclass(frozen=True)
class LayerFacts:
    """One call of a weighted operation; sizes and counts of the unpruned model."""

    name: str
    kind: str
    n_in: int
    n_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    n_macs: int


@dataclass(frozen=True)
class GroupFacts:
    """One group of coupled channels; `members` are "name[axis] role", `fixed` says why it stays whole."""

    name: str
    size: int
    members: tuple[str, ...]
    coupled_by: tuple[str, ...]
    fixed: str


@dataclass(frozen=True)
class Inspection:
    """Everything that `deploypipe inspect` shows."""

    model: str
    n_parameters: int
    n_macs: int
    layers: tuple[LayerFacts, ...]
    groups: tuple[GroupFacts, ...]
    notes: tuple[str, ...]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def inspect_graph(graph: Graph, model: str = "") -> Inspection:
    """Return the facts of a traced model."""
    kept, terms = graph.kept(), MacTable().terms(graph)
    costs = [int(term.price(term.n_in.at(kept), term.n_out.at(kept))) for term in terms]
    layers = tuple(_layer(layer, graph, n_macs) for layer, n_macs in zip(graph.layers, costs, strict=True))
    groups = tuple(_group(group) for group in graph.groups)
    return Inspection(model, params(graph), macs(graph), layers, groups, tuple(graph.notes), graph.fingerprint)


def member_text(member: Member) -> str:
    """Return a member as "name[axis] role"."""
    return f"{member.param}[{member.axis}] {member.role}"


def _layer(layer: Layer, graph: Graph, n_macs: int) -> LayerFacts:
    kept = graph.kept()
    shape = (layer.kernel, layer.stride, layer.groups, layer.in_size, layer.out_size)
    return LayerFacts(layer.name, layer.kind, layer.n_in.at(kept), layer.n_out.at(kept), *shape, n_macs)


def _group(group: Group) -> GroupFacts:
    return GroupFacts(group.name, group.size, tuple(map(member_text, group.members)), group.coupled_by, group.fixed)
