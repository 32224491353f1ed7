"""Widths by first-order terms: what a channel's gate does to the loss, counted once for a coupled group; branches may go."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toys import TOYS, cbr, conv, head

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.allocate import allocate
from deploypipe.branch import together
from deploypipe.compact import compact, difference, run
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


def test_how_many_stay_does_not_depend_on_which(task: Problem) -> None:
    orders = [{name: order[::step] for name, order in {n: np.argsort(w) for n, w in first_order(task).items()}.items()}
              for step in (1, -1)]  # fmt: skip
    assert by_first_order(task, orders[0], {})[0] == by_first_order(task, orders[1], {})[0]


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


class FourBlocks(nn.Module):
    """Without its four branches it takes 4 % of its MACs, and 26 % with one of every eight channels in each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = cbr(3, 16), head(16)
        self.a = nn.ModuleList(cbr(16, 16) for _ in range(4))
        self.b = nn.ModuleList(nn.Sequential(conv(16, 16), nn.BatchNorm2d(16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = F.relu(x + b(a(x)))
        return self.head(x)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("depgraph", {"train_epochs": 0, "steps": 1}),
        ("depgraph", {"train_epochs": 0, "steps": 10}),
        ("taylor", {"steps": 4, "interval": 2}),
        ("halp", {"steps": 4, "interval": 2}),
        ("dcp", {"heads": 0, "images": 32, "parts": 1}),
        ("l2", {}),
    ],
)
def test_a_budget_below_the_narrowest_widths_is_reached_without_branches(algo: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, table, asked = FourBlocks().eval(), MacTable(multiple=8), []
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
    problem = Problem(model, graph, table, 0.15 * table.predict(graph), data)
    with pytest.raises(BudgetError, match="smallest reachable"):
        make(algo, options).plan(problem)

    def counted(*question: Any) -> Any:
        asked.append(question)
        return by_first_order(*question)

    plan = make(algo, options).plan(replace(problem, allocator=counted))
    assert table.predict(graph, plan) <= problem.budget
    assert () in plan.keep.values()
    assert len(asked) == 1, "steps on the way are decided by the algorithm's own values"


class Bottlenecks(nn.Module):
    """Two branches of three convolutions each: the channels between them go together or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = cbr(3, 16), head(16)
        self.a = nn.ModuleList(cbr(16, 16, 1) for _ in range(2))
        self.b = nn.ModuleList(cbr(16, 16) for _ in range(2))
        self.c = nn.ModuleList(nn.Sequential(conv(16, 16, 1), nn.BatchNorm2d(16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b, c in zip(self.a, self.b, self.c, strict=True):
            x = F.relu(x + c(b(a(x))))
        return self.head(x)


def bottlenecks() -> Problem:
    torch.manual_seed(0)
    model, table = Bottlenecks().eval(), MacTable(multiple=4)
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.arange(64) % 4)
    return Problem(model, graph, table, table.predict(graph), data)


def test_groups_of_one_branch_go_together() -> None:
    task = bottlenecks()
    tied = together(task.graph, removable(task.model, task.graph))
    assert tied == {"a.0.0": ("b.0.0",), "b.0.0": ("a.0.0",), "a.1.0": ("b.1.0",), "b.1.0": ("a.1.0",)}
    inverted, example = TOYS["se_block"]()
    graph = trace(inverted, example)
    for name, others in together(graph, removable(inverted, graph)).items():
        for other in others:
            small = compact(inverted, graph, KeepPlan({name: ()}), check=False)
            both = compact(inverted, graph, KeepPlan({name: (), other: ()}), check=False)
            assert difference(run(small, example), run(both, example)) < 1e-6


@pytest.mark.parametrize("share", [0.75, 0.6, 0.45, 0.3, 0.15])
def test_with_branches_of_several_groups_the_widths_are_those_of_brute_force(share: float) -> None:
    """No group is left with channels that do nothing; a branch is worth what the group says that values it most, once."""
    task = bottlenecks()
    task = replace(task, budget=share * task.table.predict(task.graph))
    names, worth = [g.name for g in task.graph.prunable], first_order(task)
    sums = {name: np.concatenate([[0.0], np.cumsum(np.sort(worth[name])[::-1])]) for name in names}
    branches = [("a.0.0", "b.0.0"), ("a.1.0", "b.1.0")]
    offered = {name: (*([0] if name != "stem.0" else []), 4, 8, 12, 16) for name in names}
    best = -np.inf
    for choice in itertools.product(*offered.values()):
        kept = dict(zip(names, choice, strict=True))
        if any(bool(kept[one]) != bool(other) for one, other in ((a, kept[b]) for a, b in branches)):
            continue
        if task.table.predict(task.graph, KeepPlan.of_widths(kept)) <= task.budget:
            gone = {name for pair in branches for name in pair if not kept[pair[0]]}
            value = sum(sums[name][kept[name]] for name in names if name not in gone)
            value += sum(sums[a][-1] + sums[b][-1] - max(sums[a][-1], sums[b][-1]) for a, b in branches if a in gone)
            best = max(best, value)
    kept, certificate = by_first_order(task, {name: np.arange(16) for name in names}, {})
    assert all(bool(kept[a]) == bool(kept[b]) for a, b in branches)
    assert certificate.value == pytest.approx(best, rel=2e-3)
    assert certificate.bound >= best * (1 - 1e-9)
    assert certificate.predicted <= task.budget
