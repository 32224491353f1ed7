"""Budgets of zeros inside weights: counted by hand, and by what the report counts."""

import pytest
import torch
from torch import nn

from deploypipe.count import macs, params
from deploypipe.errors import BudgetError
from deploypipe.graph import trace
from deploypipe.ingredients.density import Prices, largest, prices, uniform
from deploypipe.ingredients.sparsity import NONZERO
from tests.toys import TOYS

NETS = pytest.mark.parametrize(
    "net", ["plain", "residual", "depthwise", "concat", "shared_module", "fixed_shortcut", "se_block"]
)
UNITS = pytest.mark.parametrize("unit", ["MACs", "params"])


def zeroed(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return model


@NETS
@UNITS
def test_prices_are_those_of_the_report(net: str, unit: str) -> None:
    model, example = TOYS[net]()
    graph = trace(model, example)
    price = prices(model, graph, unit)
    assert price.dense == pytest.approx({"MACs": macs, "params": params}[unit](graph))
    masks = {
        n: torch.rand(s, generator=torch.Generator().manual_seed(0)) < 0.4 for n, s in graph.shapes.items() if n in price.sizes
    }
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert price.cost(kept) == pytest.approx(NONZERO[unit](zeroed(model, masks), graph))


@NETS
@UNITS
@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_masks_fill_the_budget_and_keep_no_more(net: str, unit: str, share: float) -> None:
    model, example = TOYS[net]()
    graph = trace(model, example)
    price = prices(model, graph, unit)
    budget = price.rest + share * (price.dense - price.rest)
    named = dict(model.named_parameters())
    masks = largest(named, price, budget, {name: torch.ones_like(named[name], dtype=torch.bool) for name in price.sizes})
    cost = price.cost({name: int(mask.sum()) for name, mask in masks.items()})
    assert budget - max(price.each.values()) < cost <= budget
    even = uniform(price, budget)
    assert budget - sum(price.each.values()) < price.cost(even) <= budget
    shares = {name: even[name] / price.sizes[name] for name in even}
    assert max(shares.values()) - min(shares.values()) <= 1 / min(price.sizes.values())


def test_the_threshold_is_global_and_dead_weights_stay_dead() -> None:
    named = {"a": torch.tensor([[5.0, 1.0, 4.0]]), "b": torch.tensor([[3.0, 9.0, 2.0]])}
    price = Prices({"a": 3, "b": 3}, {"a": 1.0, "b": 1.0}, 10.0, "params")
    alive = {"a": torch.tensor([[True, True, True]]), "b": torch.tensor([[True, False, True]])}
    masks = largest(named, price, 13.0, alive)
    assert masks["a"].tolist() == [[True, False, True]]
    assert masks["b"].tolist() == [[True, False, False]]
    one = largest({"a": torch.full((1, 3), 7.0), "b": torch.full((1, 3), 0.1)}, price, 13.0, alive)
    assert one["a"].sum() == 2
    assert one["b"].sum() == 1, "a layer is never emptied"


def test_out_of_reach_is_said_with_the_smallest_cost() -> None:
    price = Prices({"a": 3, "b": 3}, {"a": 1.0, "b": 1.0}, 10.0, "params")
    for ask in (lambda: uniform(price, 11.9), lambda: largest({}, price, 11.9, {})):
        with pytest.raises(BudgetError, match="smallest reachable cost is 12 params"):
            ask()
    model, example = TOYS["plain"]()
    with pytest.raises(BudgetError, match="save no us"):
        prices(model, trace(model, example), "us")
