"""ThiNet (Luo et al., ICCV 2017): its falsifiable tests."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.reconstruction import rescale
from deploypipe.algorithms.thinet import errors, removal_order
from deploypipe.compact import compact
from deploypipe.count import MacTable
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import FeatureTap, images
from deploypipe.plan import KeepPlan
from tests.toys import TOYS, Fn, conv, head


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()]
    model = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 4))
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.3, 2)
            norm.bias.normal_()
    return model.eval()


def data(n: int = 64) -> Dataset[object]:
    rng = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=rng), torch.randint(0, 4, (n,), generator=rng))


def problem(model: nn.Module, share: float = 0.5) -> Problem:
    graph, table = trace(model, (torch.zeros(1, 3, 8, 8),)), MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), data())


def removed_error(x: np.ndarray, gone: tuple[int, ...]) -> float:
    return float((x[:, list(gone)].sum(1) ** 2).sum())


def test_greedy_removal_is_nearly_always_optimal_for_independent_channels() -> None:
    rng, optimal, worst = np.random.default_rng(0), 0, 1.0
    for _ in range(500):
        x = rng.normal(size=(1000, 6)) * rng.uniform(0.3, 2, 6)
        order = removal_order(x.T @ x)
        for k in (2, 3):
            best = min(removed_error(x, gone) for gone in itertools.combinations(range(6), k))
            ratio = removed_error(x, tuple(order[:k])) / best
            optimal, worst = optimal + (ratio < 1 + 1e-9), max(worst, ratio)
    assert optimal >= 0.98 * 1000
    assert worst <= 1.05


def test_greedy_beats_random_subsets_of_correlated_channels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 8))
        order = removal_order(x.T @ x)
        random = [removed_error(x, tuple(rng.choice(8, 4, replace=False))) for _ in range(200)]
        assert removed_error(x, tuple(order[:4])) < np.mean(random)


def test_removal_uses_the_running_sum_not_single_channels() -> None:
    """Channel 2 alone is large, but with channel 0 gone it cancels it; by single energies channel 1 would follow."""
    base = np.random.default_rng(0).normal(size=(500, 2))
    x = np.stack([base[:, 0], 1.2 * base[:, 1], -1.1 * base[:, 0]], axis=1)
    assert removal_order(x.T @ x).tolist() == [0, 2, 1]


def test_ties_keep_the_lower_index() -> None:
    assert removal_order(np.zeros((4, 4))).tolist() == [3, 2, 1, 0]
    assert removal_order(np.eye(3)).tolist() == [2, 1, 0]


def test_objective_equals_the_measured_change_of_the_next_layers_output() -> None:
    """Drop channels behind the activation of a real network and look at the next layer's raw output."""
    model, gone = net(), [1, 4, 6]
    tap = FeatureTap(model, ["3.weight"], 10, seed=0)
    x = torch.cat([read["3.weight"][0].x for read in tap.samples(images(data(), 64, 0))]).numpy()
    dense = torch.cat([read["3.weight"][0].y for read in FeatureTap(model, ["3.weight"], 10, 0).samples(images(data(), 64, 0))])

    class Gate(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return t.index_fill(1, torch.tensor(gone), 0.0)

    gated = nn.Sequential(*model[:2], nn.Sequential(model[2], Gate()), *model[3:])
    cut = torch.cat([read["3.weight"][0].y for read in FeatureTap(gated, ["3.weight"], 10, 0).samples(images(data(), 64, 0))])
    measured = float(((dense - cut) ** 2).sum())
    assert removed_error(x, tuple(gone)) == pytest.approx(measured, rel=1e-4)
    gram = make("thinet", {"images": 64})._grams(
        problem(model), {"0": [m for m in problem(model).graph.group("0").members if m.param == "3.weight"]}
    )
    marked = np.isin(np.arange(8), gone).astype(float)
    assert marked @ gram["0"][0] @ marked == pytest.approx(measured / float((dense**2).sum()), rel=1e-4)


def test_least_squares_lowers_the_error_and_its_residual_is_orthogonal() -> None:
    rng, ratios = np.random.default_rng(0), []
    for _ in range(200):
        x = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 8)) + 0.3 * rng.normal(size=(300, 8))
        kept = np.sort(removal_order(x.T @ x)[4:])
        y, left = x.sum(1), x[:, kept]
        factors = rescale(left.T @ left, left.T @ y, 1e-9)
        before, residual = ((y - left.sum(1)) ** 2).sum(), y - left @ factors
        ratios.append((residual**2).sum() / before)
        assert np.abs(left.T @ residual).max() < 1e-4 * np.linalg.norm(left) * np.linalg.norm(y)
    assert max(ratios) < 1
    assert np.median(ratios) < 0.5


def test_error_curve_equals_least_squares_at_every_width() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 9)) + 0.2 * rng.normal(size=(400, 9))
    order, y = rng.permutation(9), x.sum(1)
    curve = errors(x.T @ x, order, 1e-9)
    assert curve.shape == (10,)
    assert curve[0] == pytest.approx((y**2).sum())
    for w in range(1, 10):
        left = x[:, order[:w]]
        direct = ((y - left @ np.linalg.lstsq(left, y, rcond=None)[0]) ** 2).sum()
        assert curve[w] == pytest.approx(direct, rel=1e-4, abs=1e-5 * curve[0])


def test_a_duplicate_goes_without_error_and_the_other_doubles() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) * np.array([1.0, 2.0, 1.5, 1.0])
    x[:, 3] = x[:, 0]
    order = removal_order(x.T @ x)[::-1]
    keep = [c for c in order if c != 3]
    assert errors(x.T @ x, np.array([*keep, 3]), 1e-9)[3] < 1e-6 * (x.sum(1) ** 2).sum()
    assert rescale(x[:, :3].T @ x[:, :3], x[:, :3].T @ x.sum(1), 1e-9) == pytest.approx([2.0, 1.0, 1.0], abs=1e-5)


def test_a_duplicated_filter_costs_nothing_after_repair() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = model[0].weight[2], model[0].bias[2]
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor[5] = tensor[2]
        model[3].weight[:, 5] = model[3].weight[:, 2]
    task = problem(model)
    plan = KeepPlan({"0": (0, 1, 2, 3, 4, 6, 7)})
    small = compact(model, task.graph, plan)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() > 1e-2
        repaired = make("thinet").repair(small, task, plan)
        torch.testing.assert_close(repaired(x), model(x), atol=1e-3, rtol=1e-3)


def test_repair_brings_real_outputs_closer_and_leaves_its_argument_alone() -> None:
    model = net()
    task = problem(model, 0.5)
    plan = make("thinet").plan(task)
    small = compact(model, task.graph, plan)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    repaired = make("thinet").repair(small, task, plan)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        error = [float((m(x) - model(x)).square().mean()) for m in (small, repaired)]
    assert error[1] < 0.7 * error[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_reads_the_next_layers_input_not_its_own_output() -> None:
    """Channel 0 has by far the largest filter but its next layer ignores it, and channel 1 is dead after the activation."""
    model = net()
    with torch.no_grad():
        model[0].weight[0] *= 50
        model[3].weight[:, 0] = 0
        model[1].bias[1] = -100.0
        model[3].weight[:, 1] *= 50
    task = problem(model, 0.7)
    assert {0, 1}.isdisjoint(make("thinet").plan(task).keep["0"])
    assert 0 in make("l1").plan(task).keep["0"]


def test_depthwise_is_passed_and_flattened_slots_are_summed() -> None:
    for name in ("depthwise", "flatten_after_concat"):
        model, example = TOYS[name]()
        graph, table = trace(model.eval(), example), MacTable(multiple=1)
        rng = torch.Generator().manual_seed(0)
        inputs = torch.randn(32, *example[0].shape[1:], generator=rng)
        task = Problem(model, graph, table, 0.5 * table.predict(graph), TensorDataset(inputs, torch.zeros(32).long()))
        plan = make("thinet", {"images": 32}).plan(task)
        assert not plan.skipped
        assert any(len(channels) < graph.group(group).size for group, channels in plan.keep.items())
        make("thinet", {"images": 32}).repair(compact(model, graph, plan), task, plan)(inputs)


class Select(nn.Conv2d):
    """A convolution whose weight is fixed, in a buffer."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 1, bias=False)
        del self.weight
        self.register_buffer("weight", torch.eye(n_out, n_in)[:, :, None, None].contiguous())


@pytest.mark.parametrize("algo", ["thinet", "dcp"])
def test_layers_that_are_never_called_and_fixed_weights_are_not_read(algo: str) -> None:
    """Their groups stay whole, with the reason, and are not repaired."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight, m.b.bias, padding=1))
        return m.head(F.relu(m.d(F.relu(m.c(x))) + m.short(x)))

    torch.manual_seed(0)
    parts = {"a": conv(3, 8), "b": conv(8, 12), "c": conv(12, 8), "d": conv(8, 12), "short": Select(12, 12)}
    model = Fn(f, **parts, head=head(12)).eval()
    graph, table = trace(model, (torch.zeros(1, 3, 8, 8),)), MacTable(multiple=1)
    task = Problem(model, graph, table, 0.8 * table.predict(graph), data())
    method = make(algo, {"images": 32, "train_epochs": 0, "heads": 0, "parts": 2} if algo == "dcp" else {"images": 32})
    plan = method.plan(task)
    assert "b.weight is used, but its layer is not called" in plan.skipped["a"]
    assert "a" not in plan.keep or len(plan.keep["a"]) == 8
    small = method.repair(compact(model, graph, plan), task, plan)
    left = graph.kept(plan)["b"]
    assert torch.equal(small.short.weight, compact(model, graph, plan).short.weight)
    assert small.b.weight.shape == (left, 8, 3, 3)


def test_needs_data() -> None:
    task = problem(net())
    with pytest.raises(UsageError, match="needs data"):
        make("thinet").plan(Problem(task.model, task.graph, task.table, task.budget))


def test_a_group_of_which_nothing_arrives_goes_first() -> None:
    """Kept whole, it would leave the others to save all, which they cannot here."""
    model = net()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    task = problem(model, 0.25)
    plan = make("thinet", {"images": 32}).plan(task)
    assert len(plan.keep["0"]) <= 2
    assert dict(plan.skipped) == {}
    assert len(make("thinet", {"images": 32}).plan(problem(model, 1.0)).keep["0"]) == 8, "unless nothing has to go"
    small = make("thinet", {"images": 32}).repair(compact(model, task.graph, plan), task, plan)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.isfinite(small(x)).all()


def told(task: Problem, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the orders and values that the allocator gets."""
    seen: list[dict[str, Any]] = []
    allocator = task.allocator

    def asked(problem: Problem, orders: Any, values: Any) -> Any:
        seen.extend([dict(orders), dict(values)])
        return allocator(problem, orders, values)

    make("thinet", {"images": 64, **options}).plan(replace(task, allocator=asked))
    return seen[0], seen[1]


def two_readers(a: list[float], b: list[float]) -> Problem:
    """Channel c is read by two layers with these factors; channels with equal inputs are those whose filters are equal."""
    torch.manual_seed(0)
    parts = {"stem": conv(3, len(a)), "a": conv(len(a), 6), "b": conv(len(b), 6)}
    model = Fn(lambda m, x: m.head(F.relu(m.a(y := F.relu(m.stem(x))) + m.b(y))), **parts, head=head(6))
    with torch.no_grad():
        for layer, factors in ((model.a, a), (model.b, b)):
            layer.weight *= torch.tensor(factors)[None, :, None, None]
    return problem(model.eval(), 0.8)


def test_errors_of_all_layers_that_read_a_group_are_added() -> None:
    """Each reader ignores half of the channels, and no channel is ignored by both."""
    orders, values = told(two_readers([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]))
    assert values["stem"][0] == pytest.approx(-2.0), "with no channel both outputs are lost whole"
    assert values["stem"][-1] == pytest.approx(0.0, abs=1e-4)
    assert (np.diff(values["stem"]) > 1e-3).all(), "every channel counts for one of them"
    assert len(set(orders["stem"][:3].tolist()) & {0, 1, 2}) in (1, 2), "and those that stay longest serve both"


def test_every_layer_that_reads_a_group_rescales_with_factors_of_its_own() -> None:
    """Channel 1 is the double of channel 0: one reader makes up for it by a factor above 1, the other by one below 1."""
    task = two_readers([1, 1, 1, 1], [1, 1, 1, 1])
    model = task.model
    with torch.no_grad():
        model.stem.weight[1], model.stem.bias[1] = model.stem.weight[0], model.stem.bias[0]
        model.a.weight[:, 1] = 0.3 * model.a.weight[:, 0]
        model.b.weight[:, 1] = -0.3 * model.b.weight[:, 0]
    orders, values = told(task)
    assert orders["stem"][-1] == 1
    assert values["stem"][3] == pytest.approx(0.0, abs=1e-4)
    assert values["stem"][2] < -0.02


def test_after_repair_norms_hold_the_statistics_that_they_meet() -> None:
    """Else the first step of fine-tuning, or renewed statistics, would undo what was fitted to the old ones."""
    model = net()
    task = problem(model)
    plan = KeepPlan({"0": (0, 2, 5, 6)})
    repaired: Any = make("thinet", {"images": 64}).repair(compact(model, task.graph, plan), task, plan)
    met: list[Tensor] = []
    repaired[4].register_forward_pre_hook(lambda m, args: met.append(args[0]))
    with torch.no_grad():
        repaired(data().tensors[0])  # type: ignore[attr-defined]
    torch.testing.assert_close(repaired[4].running_mean, met[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(repaired[4].running_var, met[0].var((0, 2, 3), correction=0), atol=1e-4, rtol=1e-4)
    assert (repaired[4].running_mean - model[4].running_mean).abs().max() > 0.1
