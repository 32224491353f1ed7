"""Widths by first-order terms: what a channel's gate does to the loss, counted once for a coupled group; branches may go."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toys import cbr, head

from deploypipe.algorithms.base import Problem
from deploypipe.allocation.allocate import allocate
from deploypipe.count import MacTable, macs
from deploypipe.errors import BudgetError, UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.removal import removable
from deploypipe.plan import KeepPlan
from deploypipe.worth.first_order import BATCHES, by_first_order, first_order


class Gated(nn.Module):
    """Two blocks on a trunk; a factor on each channel of each group, all one, that the test differentiates itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.out = cbr(3, 8), cbr(8, 8), cbr(8, 8), head(8)
        self.a2, self.b2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.a3, self.b3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, gates: dict[str, Tensor] | None = None) -> Tensor:
        z = {name: gate[None, :, None, None] for name, gate in (gates or {}).items()}
        x = self.scaled(self.stem[1](self.stem[0](x)), z, "trunk").relu()
        x = (x + self.scaled(self.a3(self.a2(self.scaled(self.a[1](self.a[0](x)), z, "a").relu())), z, "trunk")).relu()
        x = (x + self.scaled(self.b3(self.b2(self.scaled(self.b[1](self.b[0](x)), z, "b").relu())), z, "trunk")).relu()
        return self.out(x)

    @staticmethod
    def scaled(x: Tensor, z: dict[str, Tensor], name: str) -> Tensor:
        return x * z[name] if name in z else x


@pytest.fixture
def task() -> Problem:
    torch.manual_seed(0)
    model = Gated()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    example = torch.randn(32, 3, 8, 8)
    graph = trace(model.eval(), example)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)  # one batch: every step sees all of it
    return Problem(model, graph, MacTable(multiple=1), 0.5 * macs(graph), data)


def test_the_worth_of_a_channel_is_its_gates_squared_derivative_once_for_all_places(task: Problem) -> None:
    model, (x, labels) = task.model, task.data.tensors  # type: ignore[union-attr]
    gates = {name: torch.ones(8, requires_grad=True) for name in ("trunk", "a", "b")}
    found = first_order(task)
    F.cross_entropy(model.train()(x, gates), labels).backward()
    groups = {"trunk": "stem.0", "a": "a.0", "b": "b.0"}
    assert set(found) == set(groups.values())
    for name, group in groups.items():
        np.testing.assert_allclose(found[group], gates[name].grad.square().numpy(), rtol=1e-3, atol=1e-9)


def test_the_model_stays_as_it_is_and_the_answer_the_same(task: Problem) -> None:
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    first, second = first_order(task), first_order(task)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in task.model.parameters())
    assert BATCHES > 1


def test_widths_are_those_of_the_exact_allocator_on_these_sums_with_branches_that_may_go(task: Problem) -> None:
    worth, gone = first_order(task), removable(task.model, task.graph)
    assert gone == ("a.0", "b.0")
    orders = {name: np.argsort(-each) for name, each in worth.items()}
    kept, certificate = by_first_order(task, orders, {})
    alone = allocate(task.graph, worth, task.table, task.budget, removable=gone)
    assert kept == {**kept, **{name: len(channels) for name, channels in alone.keep.items()}}
    assert certificate.predicted <= task.budget


def test_the_orders_are_the_algorithms_and_not_those_of_the_gradient(task: Problem) -> None:
    """Where the worst channels come first, prefixes are worth least; the sums must be of the channels that would stay."""
    worth = first_order(task)
    best = by_first_order(task, {name: np.argsort(-each) for name, each in worth.items()}, {})[1].value
    worst = by_first_order(task, {name: np.argsort(each) for name, each in worth.items()}, {})[1].value
    assert worst < best


def test_a_budget_that_only_whole_branches_reach(task: Problem) -> None:
    narrowest = macs(task.graph, KeepPlan.of_widths(dict.fromkeys(("stem.0", "a.0", "b.0"), 1)))
    orders = {name: np.arange(8) for name in ("stem.0", "a.0", "b.0")}
    kept, _ = by_first_order(Problem(task.model, task.graph, task.table, 0.8 * narrowest, task.data), orders, {})
    assert 0 in kept.values()
    with pytest.raises(BudgetError):
        by_first_order(Problem(task.model, task.graph, task.table, 1.0, task.data), orders, {})


def test_it_needs_labelled_data(task: Problem) -> None:
    with pytest.raises(UsageError, match="needs data"):
        first_order(Problem(task.model, task.graph, task.table, task.budget, None))
