"""Layer densities by rule (Evci et al., ICML 2020; Gale et al., 2019): their falsifiable tests."""

from collections.abc import Mapping
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.erk import erk_densities
from deploypipe.allocation.scaled import nearest_width, scaled_widths
from deploypipe.cost import CostTerm
from deploypipe.count import MacTable
from deploypipe.errors import BudgetError
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.progress import Recorder
from deploypipe.types import Graph, Group, Width
from tests.toys import TOYS, cbr, head

# Widths 16 to 64, as in the small residual networks for 32 x 32 images.
SHAPES = [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (10, 64)]


def problem(net: str = "plain", share: float = 0.5, table: MacTable | None = None) -> Problem:
    model, example = TOYS[net]()
    graph, table = trace(model, example), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph))


def widths(task: Problem, **options: str) -> dict[str, int]:
    return {name: len(channels) for name, channels in make("erk", options).plan(task).keep.items()}


@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_densities_sum_up_and_never_exceed_one(density: float) -> None:
    sizes = np.array([prod(shape) for shape in SHAPES])
    found = erk_densities(SHAPES, density)
    assert found.max() <= 1.0
    assert abs((found * sizes).sum() - density * sizes.sum()) < 1


def test_published_shape_of_the_rule() -> None:
    """First convolution nearly whole, the largest one thinnest; a cap that is applied once misses the target."""
    ends, sizes = np.array([sum(s) for s in SHAPES[:-1]]), np.array([prod(s) for s in SHAPES[:-1]])
    found = erk_densities(SHAPES[:-1], 0.1)
    assert found[0] > 0.85
    assert found[-1] == found.min() < 0.08
    np.testing.assert_allclose(found, 0.1 * sizes.sum() / ends.sum() * ends / sizes)
    once = np.minimum(0.5 * sizes.sum() / ends.sum() * ends / sizes, 1.0)
    assert (once * sizes).sum() < 0.5 * sizes.sum() - 100
    assert (erk_densities(SHAPES[:-1], 0.5) * sizes).sum() == pytest.approx(0.5 * sizes.sum())


def test_densities_rise_with_the_overall_density() -> None:
    curves = np.array([erk_densities(SHAPES, density) for density in np.linspace(0.01, 1, 100)])
    assert (np.diff(curves, axis=0) >= -1e-12).all()
    assert (curves[-1] == 1).all()
    assert len(erk_densities([], 0.5)) == 0


def test_uniform_gives_every_group_the_same_share_and_erk_does_not() -> None:
    task = problem(table=MacTable(multiple=1))
    sizes = task.graph.kept()
    plan = make("erk", {"rule": "uniform"}).plan(task)
    assert plan.certificate is not None
    for name, channels in plan.keep.items():  # the nearest widths to one share, and what still fitted
        assert len(channels) >= round(plan.certificate.value * sizes[name] - 0.01)
    assert sum(len(c) == round(plan.certificate.value * sizes[name] - 0.01) for name, c in plan.keep.items()) >= 2
    erk = {name: n / sizes[name] for name, n in widths(task).items()}
    assert erk["0.0"] > erk["1.0"] + 0.1


def test_the_share_of_a_layers_filters_is_not_its_density() -> None:
    """The channels that it reads go, too: of equal layers with a fixed density each side gives the root."""
    graph = trace(nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(6))).eval(), (torch.zeros(1, 32, 8, 8),))
    shares = make("erk")._shares(graph, [group.name for group in graph.prunable])(0.36)
    assert [shares[name] for name in ("1", "2", "3")] == pytest.approx([0.6] * 3)


def test_uniform_plus_guards_the_ends() -> None:
    task = problem(share=0.25)
    plain, guarded = widths(task, rule="uniform"), make("erk", {"rule": "uniform+"}).plan(task)
    assert plain["0.0"] < 8
    assert "0.0" not in guarded.keep or len(guarded.keep["0.0"]) == 8
    assert "first layer" in guarded.skipped["0.0"]
    assert len(guarded.keep["3.0"]) >= 2  # a fifth of 8 channels
    with pytest.raises(BudgetError, match="smallest reachable cost"):
        make("erk", {"rule": "uniform+"}).plan(problem(share=0.02))


def test_below_its_guard_uniform_plus_gives_way_as_far_as_the_budget_asks() -> None:
    """One group beside the first layer: just below a fifth of it the cheapest width is far from what the budget allows."""
    graph = trace(nn.Sequential(cbr(3, 8), cbr(8, 40), head(40)).eval(), (torch.zeros(1, 3, 8, 8),))
    table, heard = MacTable(multiple=1), Recorder()
    for n in (1, 3, 5, 7, 8, 9, 20):
        budget = table.predict(graph, KeepPlan.of_widths({"1.0": n}))
        task = Problem(nn.Sequential(cbr(3, 8), cbr(8, 40), head(40)), graph, table, budget, reporter=heard)
        assert widths(task, rule="uniform+") == {"1.0": n}
    assert len(heard.notes) == 4, "below eight of forty"


def test_the_guard_holds_while_others_can_be_narrower() -> None:
    model = nn.Sequential(cbr(3, 8), cbr(8, 40), cbr(40, 40), head(40)).eval()
    graph, table = trace(model, (torch.zeros(1, 3, 8, 8),)), MacTable(multiple=1)
    for n in (1, 2, 5):
        budget = table.predict(graph, KeepPlan.of_widths({"1.0": n, "2.0": 8}))
        assert widths(Problem(model, graph, table, budget), rule="uniform+") == {"1.0": n, "2.0": 8}


def test_the_largest_filters_stay() -> None:
    task = problem()
    with torch.no_grad():
        task.model[1][0].weight[[2, 5]] *= 20
        task.model[1][0].weight[7] *= 0.01
    kept = make("erk").plan(task).keep["1.0"]
    assert {2, 5} <= set(kept)
    assert 7 not in kept


def test_only_widths_of_the_table_and_the_largest_density_that_fits() -> None:
    table = MacTable(multiple=4)
    for net in ("plain", "residual", "concat"):
        task = problem(net, 0.6, table)
        plan, legal = make("erk").plan(task), table.candidates(task.graph)
        assert all(len(channels) in legal[name] for name, channels in plan.keep.items())
        assert table.predict(task.graph, plan) <= task.budget
        assert plan.certificate is not None
        assert plan.certificate.bound is None
        # A hundredth more density is over budget, or asks for nothing that is not kept.
        shares = make("erk")._shares(task.graph, plan.keep)
        more = shares(plan.certificate.value + 0.01)
        wider = {name: nearest_width(legal[name], more[name] * task.graph.group(name).size) for name in plan.keep}
        same = all(width <= len(plan.keep[name]) for name, width in wider.items())
        assert same or cost_of(task, wider) > task.budget


def cost_of(task: Problem, kept: Mapping[str, int]) -> float:
    return task.table.predict(task.graph, KeepPlan({name: tuple(range(n)) for name, n in kept.items()}))


class Dip(MacTable):
    """One group that is dear when it is narrow, as a kernel off its fast path."""

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        return {1: 9.0, 2: 4.0, 3: 6.0, 4: 10.0}[graph.kept(plan)["a"]]

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        prices = {1: 9.0, 2: 4.0, 3: 6.0, 4: 10.0}
        return (CostTerm("a", Width(3), Width(0, (("a", 1),)), lambda _, n: prices[n]),)

    def candidates(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        return {"a": (1, 2, 3, 4)}


def test_where_narrow_is_dear_the_budget_is_still_met_or_refused_with_the_true_minimum() -> None:
    graph = Graph((), (Group("a", 4, ()),), (), {}, {}, ())

    def at(share: float) -> dict[str, int]:
        return {"a": max(1, round(4 * share))}

    kept, certificate = scaled_widths(graph, at, Dip(), 5.0)
    assert (kept, certificate.predicted, certificate.status) == ({"a": 2}, 4.0, "cheapest")
    with pytest.raises(BudgetError, match="cost is 4 "):
        scaled_widths(graph, at, Dip(), 3.0)
