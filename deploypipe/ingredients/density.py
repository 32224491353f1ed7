"""Budgets for zeros inside weights: how many entries of each weight may stay, and which are the largest of all.

For methods that leave a model of full size with single weights at zero. Prices are those of `ingredients/sparsity.py`: a
parameter counts one, a multiply-accumulate as often as the weight is used in a forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from deploypipe.count import layer_macs, macs
from deploypipe.errors import BudgetError
from deploypipe.types import Graph


@dataclass(frozen=True)
class Prices:
    """What the entries of a model's weights cost.

    Attributes:
        sizes: Weight -> number of entries, of every weight whose entries may be zero.
        each: Weight -> cost of one entry.
        rest: Cost of everything else.
        unit: "MACs" or "params".
    """

    sizes: Mapping[str, int]
    each: Mapping[str, float]
    rest: float
    unit: str

    @property
    def dense(self) -> float:
        """Cost without any zero."""
        return self.cost(self.sizes)

    def cost(self, kept: Mapping[str, int]) -> float:
        """Return the cost with `kept[weight]` entries that are not zero."""
        return self.rest + sum(self.each[name] * kept[name] for name in self.sizes)


def prices(model: nn.Module, graph: Graph, unit: str) -> Prices:
    """Return the prices of the weights of all layers.

    Args:
        model: Of the architecture that was traced.
        graph: Its channel graph.
        unit: "MACs" or "params".

    Raises:
        BudgetError: The unit is another: zeros inside weights save no time on a dense runtime.
    """
    if unit not in {"MACs", "params"}:
        raise BudgetError(
            f"zeros inside weights save no {unit} in a dense runtime", at="budget", fix="use --metric macs or --metric params"
        )
    named, dense = dict(model.named_parameters()), graph.kept()
    sizes = {layer.weight: named[layer.weight].numel() for layer in graph.layers if layer.weight in named}
    if unit == "params":
        total = sum(parameter.numel() for parameter in named.values())
        return Prices(sizes, dict.fromkeys(sizes, 1.0), float(total - sum(sizes.values())), unit)
    each = dict.fromkeys(sizes, 0.0)
    for layer in graph.layers:
        if layer.weight in sizes:
            each[layer.weight] += layer_macs(layer, dense) / sizes[layer.weight]
    rest = macs(graph) - sum(each[name] * size for name, size in sizes.items())
    return Prices(sizes, each, rest, unit)


def uniform(price: Prices, budget: float, counts: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return how many units of every weight may stay when all weights keep the same share, at least one each.

    Args:
        price: Of the entries.
        budget: Upper limit of the cost.
        counts: Weight -> number of units that its entries form, all of one size (kernels); by default single entries. Weights
            that are not named stay whole.

    Raises:
        BudgetError: One unit of each is too much already.
    """
    units = dict(price.sizes if counts is None else counts)
    unit_cost = {name: price.each[name] * price.sizes[name] / n for name, n in units.items()}
    rest = price.rest + sum(price.each[name] * size for name, size in price.sizes.items() if name not in units)

    def kept(share: float) -> dict[str, int]:
        return {name: max(1, int(share * n)) for name, n in units.items()}

    def cost(share: float) -> float:
        return rest + sum(unit_cost[name] * n for name, n in kept(share).items())

    require_within(cost(0.0), budget, price)
    low, high = 0.0, 1.0
    if cost(high) <= budget:
        return kept(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return kept(low)


def largest(named: Mapping[str, Tensor], price: Prices, budget: float, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks of the largest magnitudes of all weights together that cost no more than the budget.

    Args:
        named: Weights by name.
        price: Of the entries.
        budget: Upper limit of the cost; one entry of every weight stays in any case.
        alive: Weight -> mask; what is False there stays False, whatever its weight is now.

    Returns:
        Weight -> mask of its shape. Of equal magnitudes those of earlier weights and lower indices stay.

    Raises:
        BudgetError: One entry of each is too much already.
    """
    require_within(price.cost(dict.fromkeys(price.sizes, 1)), budget, price)
    names = list(price.sizes)
    flat = torch.cat([named[name].detach().flatten().abs().double().cpu() for name in names])
    each = torch.cat([torch.full((price.sizes[name],), price.each[name], dtype=torch.float64) for name in names])
    lives = torch.cat([alive[name].flatten().cpu() for name in names])
    starts = torch.tensor([0, *price.sizes.values()]).cumsum(0)
    firsts = torch.stack([a + torch.where(lives[a:b], flat[a:b], -1.0).argmax() for a, b in pairwise(starts.tolist())])
    order = torch.argsort(torch.where(lives, flat, -1.0), descending=True, stable=True)[: int(lives.sum())]
    stays = torch.zeros(len(flat), dtype=torch.bool)
    stays[firsts] = True
    order = order[~stays[order]]
    spent = price.rest + float(each[firsts].sum()) + each[order].cumsum(0)
    stays[order[spent <= budget]] = True
    parts = torch.split(stays, [price.sizes[name] for name in names])
    return {name: part.view_as(named[name]) for name, part in zip(names, parts, strict=True)}


def require_within(smallest: float, budget: float, price: Prices) -> None:
    """Raise BudgetError unless the smallest reachable cost is within the budget."""
    if smallest <= budget:
        return
    share = 100 * smallest / price.dense
    raise BudgetError(
        f"the budget of {budget:,.6g} {price.unit} ({100 * budget / price.dense:.1f} % of the dense model) is out of reach: "
        f"the smallest reachable cost is {smallest:,.6g} {price.unit} ({share:.1f} %)",
        at=f"{len(price.sizes)} weights with zeros",
        fix=f"ask for at least {share + 0.1:.1f}%",
    )
