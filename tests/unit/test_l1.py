"""L1 norm (Li et al., ICLR 2017): its falsifiable tests."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Orders, Problem, Statistics, Values, by_values, filter_norms, log_share, rows
from deploypipe.compact import compact
from deploypipe.count import MacTable
from deploypipe.errors import NotApplicable, UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import Certificate
from deploypipe.types import Group
from tests.toys import TOYS, Fn, cbr, head


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(12), nn.ReLU()] if norm else [nn.ReLU()]
    tail = [nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=not norm), *middle, *tail).eval()


EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def problem(model: nn.Module, share: float, example: tuple[Tensor, ...] = EXAMPLE) -> Problem:
    graph, table = trace(model, example), MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph))


def test_chooses_the_smallest_norms_and_differs_from_l2() -> None:
    """Filter 0 has one entry of 3, filter 1 has nine of 0.9: L1 says 3 < 8.1, L2 says 3 > 2.7."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0, 1, 1] = -3.0
        model[0].weight[1] = 0.9
    task = problem(model, 0.6, (torch.randn(1, 1, 8, 8),))
    group = task.graph.group("0")
    l1, l2 = (make(name).score(group, Statistics(task)).tolist() for name in ("l1", "l2"))
    assert l1 == pytest.approx([3.0, 8.1])
    assert l2 == pytest.approx([3.0, 2.7])
    assert make("l1").plan(task).keep["0"] == (1,)
    assert make("l2").plan(task).keep["0"] == (0,)


def test_bias_and_norm_do_not_count() -> None:
    model = net(norm=False)
    group = problem(model, 0.5).graph.group("0")
    before = filter_norms(group, weights(model), 1)
    with torch.no_grad():
        model[0].bias += 100
    assert torch.equal(filter_norms(group, weights(model), 1), before)
    expected = model[0].weight.detach().double().abs().sum((1, 2, 3))
    torch.testing.assert_close(before, expected)


def test_greedy_and_independent_differ_when_heavy_inputs_are_gone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([5.0, 5.0, 5.0, 0.1])[:, None, None, None].expand(4, 3, 1, 1))
        model[2].weight.copy_(torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 9], [1, 1, 0, 0]])[:, :, None, None])
    task = problem(model, 0.67, (torch.randn(1, 3, 4, 4),))
    independent, greedy = make("l1").plan(task), make("l1", {"greedy": "true"}).plan(task)
    assert independent.keep["0"] == greedy.keep["0"] == (0, 1, 2)
    assert independent.keep["2"] == (0, 1)  # norms 3, 9, 2
    assert greedy.keep["2"] == (0, 2)  # norms 3, 0, 2 once channel 3 is gone
    assert greedy.options == {"greedy": True}


def test_greedy_refuses_widths_by_what_other_channels_are_worth() -> None:
    task = problem(TOYS["plain"]()[0], 0.5)

    def measured(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        return by_values(problem, orders, values)

    with pytest.raises(UsageError, match="chooses channels anew"):
        make("l1", {"greedy": True}).plan(replace(task, allocator=measured))
    assert make("l1").plan(replace(task, allocator=measured)).keep


def test_zero_filters_go_and_the_output_stays() -> None:
    model = net()
    dead = [1, 4, 5, 8, 10]
    with torch.no_grad():
        model[0].weight[dead] = 0
        model[1].bias[dead] = 0
    task = problem(model, 0.6)
    plan = make("l1").plan(Problem(model, task.graph, Only("0", 7), task.budget))
    assert plan.keep["0"] == tuple(c for c in range(12) if c not in dead)
    with torch.no_grad():
        torch.testing.assert_close(compact(model, task.graph, plan)(*EXAMPLE), model(*EXAMPLE), atol=1e-6, rtol=1e-6)


class Only(MacTable):
    """MACs, but one group alone may have one other width."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        object.__setattr__(self, "choice", {name: (width,)})

    def candidates(self, graph: object) -> dict[str, tuple[int, ...]]:
        return self.choice  # type: ignore[attr-defined, no-any-return]


def test_not_invariant_to_a_scale_that_batch_norm_removes() -> None:
    model = net().train()
    scaled = copy.deepcopy(model)
    group = problem(model, 0.5).graph.group("0")
    weakest = int(filter_norms(group, weights(model), 1).argmin())
    with torch.no_grad():
        scaled[0].weight[weakest] *= 100
        torch.testing.assert_close(scaled(*EXAMPLE), model(*EXAMPLE), atol=1e-3, rtol=1e-3)
    assert int(filter_norms(group, weights(scaled), 1).argmax()) == weakest


def test_coupled_layers_are_averaged_after_normalisation_when_their_filters_differ_in_size() -> None:
    model, example = TOYS["residual"]()
    graph, view = trace(model.eval(), example), weights(model)
    group = max(graph.prunable, key=lambda g: sum(m.role == "produces" and view[m.param].dim() > 1 for m in g.members))
    made = [m for m in group.members if m.role == "produces" and view[m.param].dim() > 1]
    assert len(made) > 1
    norms = [rows(view[m.param], m).double().abs().sum(1) for m in made]
    sizes = {rows(view[m.param], m).shape[1] for m in made}
    expected = [n / n.mean() for n in norms] if len(sizes) > 1 else norms
    torch.testing.assert_close(filter_norms(group, view, 1), torch.stack(expected).mean(0))


def test_a_group_without_producer_is_not_judged() -> None:
    with pytest.raises(NotApplicable, match="no weight produces"):
        filter_norms(Group("x", 4, ()), {}, 1)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_what_a_width_is_worth_counts_once_for_every_layer_that_reads_it(name: str) -> None:
    """Three layers read the first one, and miss what it loses."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(m.out(torch.cat([m.a(x), m.b(x), m.c(x)], 1)))

    torch.manual_seed(0)
    model = Fn(forward, stem=cbr(3, 4), a=cbr(4, 2), b=cbr(4, 3, 1), c=cbr(4, 2), out=cbr(7, 2), head=head(2)).eval()
    task, method, asked = problem(model, 0.5), make(name), dict[str, Any]()

    def seen(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        asked.update(values)
        return by_values(problem, orders, values)

    plan = method.plan(replace(task, allocator=seen))
    readers = {"stem.0": 3, "a.0": 1, "b.0": 1, "c.0": 1, "out.0": 1}
    assert set(asked) == set(readers)
    value = 0.0
    for group, n in readers.items():
        scores = method.score(task.graph.group(group), Statistics(task)).double().sort(descending=True).values.numpy()
        assert asked[group] == pytest.approx(n * log_share(scores))
        value += n * log_share(scores)[len(plan.keep[group])]
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(value)


def test_log_share_is_scale_free_monotone_and_survives_degenerate_scores() -> None:
    torch.manual_seed(0)
    scores = torch.rand(20).sort(descending=True).values.double().numpy()
    curve = log_share(scores)
    assert curve.shape == (21,)
    assert (curve[0], curve[-1]) == (-float("inf"), 0.0)
    assert (curve[1:] == sorted(curve[1:])).all()
    assert log_share(1000 * scores) == pytest.approx(curve)
    assert log_share(scores * 0)[1:] == pytest.approx(log_share(scores * 0 + 1)[1:])
    assert log_share(scores - 10)[-1] == pytest.approx(0.0)  # negative scores are shifted, not refused
