"""HALP (Shen et al., NeurIPS 2022): its falsifiable tests."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms import halp, make
from deploypipe.algorithms.base import Problem, judged
from deploypipe.algorithms.halp import budget_at
from deploypipe.allocation.allocate import allocate_widths, prefix_sums
from deploypipe.compact import compact
from deploypipe.cost import CostTerm
from deploypipe.count import MacTable
from deploypipe.errors import BudgetError, NotApplicable, UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.curvature import derivatives, gates
from deploypipe.plan import KeepPlan
from deploypipe.training.adapt import Adapting
from deploypipe.types import Graph, Group, Width
from tests.toys import TOYS, Fn, cbr, conv, head

QUICK = {"steps": 2, "interval": 3, "batch": 16}


@dataclass(frozen=True)
class Table:
    """A cost table of given terms, over every width."""

    costs: tuple[CostTerm, ...]
    unit: str = "us"

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        return self.costs

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        return {group.name: tuple(range(1, group.size + 1)) for group in graph.prunable}

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in self.costs)


def alone(name: str, prices: Sequence[float]) -> CostTerm:
    return CostTerm(name, Width(0), Width(0, ((name, 1),)), lambda _, n: float(prices[n]))


def graph_of(**sizes: int) -> Graph:
    return Graph((), tuple(Group(name, size, ()) for name, size in sizes.items()), (), {}, {}, ())


def samples(example: Tensor, n: int = 64, classes: int = 4, seed: int = 0) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, *example.shape[1:], generator=rng), torch.randint(0, classes, (n,), generator=rng))


def problem(net: str = "plain", share: float = 0.5) -> Problem:
    model, example = TOYS[net]()
    graph, table = trace(model, example), MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), samples(example[0]))


# --- the saliency


class Gated(nn.Module):
    """A module followed by one factor on each channel."""

    def __init__(self, module: nn.Module, gate: nn.Parameter) -> None:
        super().__init__()
        self.module, self.gate = module, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * self.gate[:, None, None]


def gate_gradient(model: nn.Module, graph: Graph, group: Group) -> Tensor:
    return gates(model, graph)(group).first(dict(model.named_parameters()))


def backward(model: nn.Module, classes: int = 4) -> None:
    x, y = samples(torch.zeros(1, 3, 8, 8), 32, classes).tensors
    F.cross_entropy(model.train()(x), y).backward()


def test_saliency_is_the_derivative_by_a_gate_behind_the_norm() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    group = graph.group("1.0")
    gate = nn.Parameter(torch.ones(12))
    model[1][1] = Gated(model[1][1], gate)
    backward(model)
    gamma, beta = model[1][1].module.weight, model[1][1].module.bias
    expected = gamma * gamma.grad + beta * beta.grad
    torch.testing.assert_close(gate.grad, expected.detach(), atol=1e-6, rtol=1e-5)
    model[1][1] = model[1][1].module
    torch.testing.assert_close(gate_gradient(model, graph, group).float(), gate.grad, atol=1e-6, rtol=1e-3)


def test_coupled_layers_share_a_gate_also_where_only_some_have_a_norm() -> None:
    """The residual toy adds a bare convolution with bias and a normalised one. Absolute values before the sum are wrong."""
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    group = graph.group("short")
    gate = nn.Parameter(torch.ones(10))
    model.short, model.d2[1] = Gated(model.short, gate), Gated(model.d2[1], gate)
    backward(model)
    model.short, norm = model.short.module, model.d2[1].module
    model.d2[1] = norm
    found = gate_gradient(model, graph, group).float()
    torch.testing.assert_close(found, gate.grad, atol=1e-5, rtol=1e-3)
    of_norm = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()
    of_short = (model.short.weight * model.short.weight.grad).sum((1, 2, 3)).detach() + (
        model.short.bias * model.short.bias.grad
    )
    assert (of_norm.abs() + of_short.abs() - gate.grad.abs()).abs().max() > 0.1 * gate.grad.abs().max()
    assert (of_norm - gate.grad).abs().max() > 0.1 * gate.grad.abs().max()


def test_the_plain_weight_form_is_blind_behind_a_norm() -> None:
    model, _ = TOYS["plain"]()
    backward(model)
    norm, weight = model[1][1], model[1][0].weight
    by_weight = (weight * weight.grad).sum((1, 2, 3)).abs().max()
    by_gate = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).abs().max()
    assert by_weight < 1e-3 * by_gate


def test_without_norm_the_filters_count_with_their_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), head(5))
    graph = trace(model.eval(), (torch.randn(2, 3, 8, 8),))
    group = graph.group("0")
    gate = nn.Parameter(torch.ones(6))
    model[0] = Gated(model[0], gate)
    backward(model)
    model[0] = model[0].module
    torch.testing.assert_close(gate_gradient(model, graph, group).float(), gate.grad, atol=1e-6, rtol=1e-4)


def test_a_channel_that_nothing_reads_has_no_saliency_and_goes_first() -> None:
    task = problem(share=0.8)
    with torch.no_grad():
        task.model[3][0].weight[:, [1, 7]] = 0
        task.model[1][1].weight[[1, 7]] = 50.0
    run = Adapting(task.model, task.data, 0.0, 16, 0)
    next(run.steps(1))
    found = gate_gradient(run.model, task.graph, task.graph.group("1.0"))
    assert found[[1, 7]].tolist() == [0.0, 0.0]
    assert (found.abs() > 0).sum() == 10
    assert {1, 7}.isdisjoint(make("halp", {**QUICK, "lr": 0}).plan(task).keep["1.0"])


def test_absolute_values_are_taken_in_every_batch() -> None:
    """Averaging signed gradients first would let batches cancel."""
    task, method = problem(), make("halp", {"interval": 4, "batch": 16, "lr": 0})
    run = Adapting(task.model, task.data, 0.0, 16, 0)
    found = method._saliencies(run, judged(task.graph, gates(run.model, task.graph))[0], task.reporter, 0)[0]["1.0"]
    again = Adapting(task.model, task.data, 0.0, 16, 0)
    group = task.graph.group("1.0")
    each = torch.stack([gate_gradient(model, task.graph, group) for model in again.steps(4)])
    np.testing.assert_allclose(found, each.abs().mean(0).numpy())
    assert np.abs(found - each.mean(0).abs().numpy()).max() > 0.2 * found.max()


def test_a_group_without_gradient_stays_whole_with_a_reason() -> None:
    task = problem()
    with pytest.raises(NotApplicable, match="has a gradient"):
        gate_gradient(task.model, task.graph, task.graph.group("0.0"))

    def stopped(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.a(x)
        return m.head(m.b(x))

    model = Fn(stopped, a=cbr(3, 8), b=cbr(8, 8), head=head(8)).eval()
    graph, table = trace(model, (torch.randn(2, 3, 8, 8),)), MacTable(multiple=1)
    plan = make("halp", QUICK).plan(Problem(model, graph, table, 0.7 * table.predict(graph), samples(torch.zeros(1, 3, 8, 8))))
    assert "no norm and no weight" in plan.skipped["a.0"]
    assert "a.0" not in plan.keep
    assert len(plan.keep["b.0"]) < 8


# --- the knapsack


def instance(
    rng: np.random.Generator, stairs: bool, share: float = 0.6
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """Three groups of four blocks: falling saliencies, cumulative costs with marginals of any sign, a budget."""
    values, prices = {}, {}
    for name in "abc":
        marginals = np.where(rng.random(4) < 0.5, 0.0, 8.0) if stairs else rng.integers(-2, 7, 4).astype(float)
        values[name] = prefix_sums(np.sort(rng.random(4))[::-1])
        prices[name] = np.concatenate([[0.0], np.cumsum(marginals) + 5])
    least = sum(min(p[1:]) for p in prices.values())
    return values, prices, least + share * (sum(p[4] for p in prices.values()) - least) + 1e-6


def brute_force(values: Mapping[str, np.ndarray], prices: Mapping[str, np.ndarray], budget: float) -> float:
    choices = itertools.product(range(1, 5), repeat=3)
    fitting = [c for c in choices if sum(prices[g][n] for g, n in zip("abc", c, strict=True)) <= budget]
    return max(float(sum(values[g][n] for g, n in zip("abc", c, strict=True))) for c in fitting)


def test_the_allocator_equals_brute_force_on_marginals_of_any_sign() -> None:
    rng, graph, solved = np.random.default_rng(0), graph_of(a=4, b=4, c=4), 0
    while solved < 200:
        values, prices, budget = instance(rng, stairs=False)
        if budget <= 0 or budget < sum(min(p[1:]) for p in prices.values()):
            continue
        solved += 1
        table = Table(tuple(alone(name, prices[name]) for name in "abc"))
        kept, certificate = allocate_widths(graph, values, table, budget, gap=1e-9)
        best = brute_force(values, prices, budget)
        assert certificate.value == pytest.approx(best)
        assert certificate.predicted == pytest.approx(sum(prices[name][kept[name]] for name in "abc"))
        assert certificate.predicted <= budget


def test_a_knapsack_of_single_blocks_breaks_the_order_where_ours_cannot() -> None:
    """With stairs in the latency a later block is often free while the one before it is not."""
    rng, broken, n = np.random.default_rng(0), 0, 60
    for _ in range(n):
        values, prices, budget = instance(rng, stairs=True, share=0.4)
        gains = np.concatenate([np.diff(values[name]) for name in "abc"])
        costs = np.concatenate([np.diff(prices[name]) for name in "abc"])
        picks = np.array(list(itertools.product([False, True], repeat=12)))
        fits = picks @ costs <= budget
        best = picks[fits][np.argmax(picks[fits] @ gains)].reshape(3, 4)
        broken += any((np.diff(group.astype(int)) > 0).any() for group in best)
    assert broken >= 0.6 * n
    task = problem(share=0.6)
    run = Adapting(task.model, task.data, 0.0, 16, 0)
    method = make("halp", {"steps": 1, "interval": 3, "batch": 16, "lr": 0})
    plan = method.plan(task)
    saliencies = method._saliencies(run, judged(task.graph, gates(run.model, task.graph))[0], task.reporter, 0)[0]
    for name, channels in plan.keep.items():
        gone = np.setdiff1d(np.arange(len(saliencies[name])), channels)
        assert not len(gone) or saliencies[name][list(channels)].min() >= saliencies[name][gone].max()


def stairs(graph: Graph, step: int = 8) -> Callable[[CostTerm], CostTerm]:
    def stair(term: CostTerm) -> CostTerm:
        return replace(term, price=lambda a, b: float(-(-a // step) * -(-b // step)))

    return stair


def test_widths_sit_on_the_steps_of_a_staircase() -> None:
    rng, graph = np.random.default_rng(0), graph_of(a=32, b=24, c=40)
    ends = [Width(3), *(Width(0, ((name, 1),)) for name in "abc"), Width(10)]
    table = Table(tuple(stairs(graph)(CostTerm(str(i), *pair, max)) for i, pair in enumerate(itertools.pairwise(ends))))
    for share in (0.3, 0.5, 0.7):
        values = {group.name: prefix_sums(np.sort(0.1 + rng.random(group.size))[::-1]) for group in graph.groups}
        kept, certificate = allocate_widths(graph, values, table, share * table.predict(graph), gap=1e-9)
        assert all(width % 8 == 0 for width in kept.values())
        assert certificate.predicted <= share * table.predict(graph)


def test_cost_of_the_plan_is_that_of_the_new_network_which_frozen_marginals_miss() -> None:
    """Marginals add up to the layer's price at the old width before it, which is not the price of what comes out."""
    task = problem("plain", 0.5)
    plan = make("halp", QUICK).plan(task)
    kept, dense, terms = task.graph.kept(plan), task.graph.kept(), task.table.terms(task.graph)
    frozen = sum(term.price(term.n_in.at(dense), term.n_out.at(kept)) for term in terms)
    for term in terms:
        at = term.n_in.at(dense)
        marginals = [term.price(at, n) - term.price(at, n - 1) for n in range(1, term.n_out.at(kept) + 1)]
        assert sum(marginals) == pytest.approx(term.price(at, term.n_out.at(kept)))
    small = compact(task.model, task.graph, plan)
    after = task.table.predict(trace(small, task.graph.example))
    assert plan.certificate is not None
    assert plan.certificate.predicted == after <= task.budget
    assert frozen > 1.2 * after


def test_more_budget_never_keeps_less_saliency() -> None:
    task, method = problem("residual"), make("halp", {"steps": 1, "interval": 3, "batch": 16, "lr": 0})
    dense = task.table.predict(task.graph)
    plans = [method.plan(replace(task, budget=share * dense)) for share in (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)]
    saliency = [plan.certificate.value for plan in plans if plan.certificate]
    assert all(low <= high * 1.001 for low, high in itertools.pairwise(saliency))
    assert saliency[0] < 0.8 * saliency[-1]


# --- the schedule


def test_budgets_fall_exponentially_and_end_exactly() -> None:
    budgets = [budget_at(step, 7, 1000.0, 123.4) for step in range(8)]
    assert budgets[0] == pytest.approx(1000.0)
    assert budgets[-1] == 123.4
    ratios = [b / a for a, b in itertools.pairwise(budgets)]
    assert ratios == pytest.approx([(123.4 / 1000) ** (1 / 7)] * 7)


def test_channels_are_gone_from_one_step_to_the_next_as_far_as_its_budget_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step measures is the network that the last one left: zero where dropped channels are read."""
    task, reader, costs = problem(share=0.4), {"0.0": "1.0.weight", "1.0": "3.0.weight", "3.0": "4.2.weight"}, list[float]()

    def seen(model: nn.Module, units: Any) -> Any:
        read = {name: model.get_parameter(weight).detach().transpose(0, 1).flatten(1) for name, weight in reader.items()}
        widths = {name: int((weight != 0).any(1).sum()) for name, weight in read.items()}
        costs.append(task.table.predict(task.graph, KeepPlan.of_widths(widths)))
        return derivatives(model, units)

    monkeypatch.setattr(halp, "derivatives", seen)
    make("halp", {"steps": 4, "interval": 1, "batch": 16, "lr": 0}).plan(task)
    dense = task.table.predict(task.graph)
    budgets = [budget_at(step, 4, dense, task.budget) for step in range(5)]
    assert len(costs) == 4
    assert costs[0] == dense
    assert all(after < cost <= budget for cost, budget, after in zip(costs[1:], budgets[1:], budgets[2:], strict=False))


def test_dropped_channels_stay_out_while_the_rest_learns() -> None:
    task = problem()
    run = Adapting(task.model, task.data, 0.05, 16, 0)
    for _ in run.steps(3):
        pass
    weight, slots = run.model[1][0].weight, torch.tensor([2, 4])
    assert (weight[:, slots] != 0).all()
    run.hold([("1.0.weight", 1, slots)])
    before = weight.detach().clone()
    for _ in run.steps(3):
        pass
    assert (weight[:, slots] == 0).all()
    assert (weight[:, 0] != before[:, 0]).any()
    run.hold([])
    for _ in run.steps(2):
        pass
    assert (weight[:, slots] != 0).any()  # set free, a channel may return
    assert all(p.grad is None for p in task.model.parameters())


def test_adapting_changes_what_is_judged() -> None:
    task = problem(share=0.4)
    still, moving = (make("halp", {"steps": 4, "interval": 8, "batch": 16, "lr": lr}).plan(task) for lr in (0, 0.1))
    assert still.keep != moving.keep
    assert moving.certificate is not None
    assert moving.certificate.predicted <= task.budget


def test_fails_at_once_and_in_words() -> None:
    task = problem()
    with pytest.raises(UsageError, match="needs data"):
        make("halp").plan(replace(task, data=None))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("halp", {"steps": 1000, "interval": 1000}).plan(replace(task, budget=1.0))
    with pytest.raises(UsageError, match="not finite") as caught:
        make("halp", {**QUICK, "interval": 50, "lr": 1e20}).plan(task)
    assert "lr" in caught.value.fix
