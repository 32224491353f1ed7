"""Costs: what a model costs as a sum over its layers, whatever the unit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Width


@dataclass(frozen=True)
class CostTerm:
    """One additive price of a model: `price(n_in, n_out)` of two widths, in the table's unit."""

    name: str
    n_in: Width
    n_out: Width
    price: Callable[[int, int], float]


class CostTable(Protocol):
    """What a model costs as a sum over its layers: latency, MACs or parameters."""

    @property
    def unit(self) -> str:
        """Return "us", "MACs" or "params"."""
        ...

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        """Return the additive terms; a term that cannot be priced raises TargetError."""
        ...

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Return for every prunable group the numbers of kept channels worth choosing from, ascending."""
        ...

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        """Return the cost under `plan` (of the whole model without a plan)."""
        ...
