"""Costs: what a model costs as a sum over its layers, whatever the unit."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol

from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Kept, Width

Price = Callable[[int, int], float]


@dataclass(frozen=True)
class CostTerm:
    """One additive price of a model: `price(n_in, n_out)` of two widths, in the table's unit.

    `two_four` is the price with 2:4 weights, where the table knows one and a plan may choose so for this layer: never more than
    `price`, and the same where the pattern is not allowed at these widths or does not pay.
    """

    name: str
    n_in: Width
    n_out: Width
    price: Price
    two_four: Price | None = None

    def under(self, kept: Kept, two_four: Container[str] = ()) -> float:
        """Return the price when `kept[group]` channels stay, with 2:4 weights if the layer is named in `two_four`."""
        price = self.two_four if self.two_four and self.name in two_four else self.price
        return price(self.n_in.at(kept), self.n_out.at(kept))


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
