"""AutoCompress (Liu et al., AAAI 2020): rounds, search against uniform rates, and purification that stops."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.autocompress import _Search
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.threshold import uniform_widths
from deploypipe.compact import compact, difference, run
from deploypipe.count import MacTable, ParamTable
from deploypipe.errors import BudgetError, UsageError
from deploypipe.ingredients.judge import Judge
from deploypipe.ingredients.purify import dead
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import recalibrate
from tests.toy_task import EVEN, accuracy, problem_of, toy_data, trained_net, trainer

QUICK: dict[str, Any] = {"rounds": 2, "train_epochs": 4, "evaluations": 40, "rho": 0.3, "images": 200, "norm_images": 200}


def after(task: Problem, seed: int = 0, **options: Any) -> Problem:
    return replace(task, model=make("autocompress", {**QUICK, **options}).train(task, trainer(seed=seed, lr=0.02)))


def test_the_plan_is_what_is_alive_and_within_the_budget() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.3)
    found = after(task)
    plan = make("autocompress", QUICK).plan(found)
    assert plan.certificate is not None
    assert plan.certificate.status == "alive"
    assert plan.certificate.predicted <= task.budget
    small = compact(found.model, task.graph, plan)
    assert difference(run(found.model, task.graph.example), run(small, task.graph.example)) < 1e-5
    assert accuracy(recalibrate(small, task.data)) > 0.9
    assert accuracy(found.model) == accuracy(small)


def test_a_smaller_budget_later_is_searched_among_the_living() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.3)
    found = after(task)
    method = make("autocompress", QUICK)
    plan, tighter = method.plan(found), method.plan(replace(found, budget=0.7 * task.budget))
    assert tighter.certificate is not None
    assert tighter.certificate.status == "annealing"
    assert tighter.certificate.predicted <= 0.7 * task.budget
    assert all(set(kept) <= set(plan.keep[name]) for name, kept in tighter.keep.items())


def test_rounds_go_down_by_the_same_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    task, budgets = problem_of(trained_net(widths=EVEN), 0.25, ParamTable()), []
    method = make("autocompress", {**QUICK, "rounds": 3, "train_epochs": 0, "retrain_epochs": 0, "evaluations": 2, "delta": 0})
    kind, plan = type(method), type(method).plan
    monkeypatch.setattr(kind, "plan", lambda self, p: (budgets.append(p.budget), plan(self, p))[1])
    method.train(task, trainer())
    dense = task.table.predict(task.graph)
    assert budgets == pytest.approx([dense * 0.25 ** (n / 3) for n in (1, 2, 3)])
    assert budgets[-1] == task.budget


def test_rates_become_widths_on_offer_that_fit() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.4, MacTable(multiple=4))
    search = _Search(make("autocompress", QUICK), task)
    kept, value = search.rates_that_fit()
    assert search.cost(kept) <= task.budget
    assert all(width in (4, 8, 12, 16) for width in kept.values())
    assert value == search.accuracy(kept)
    assert search.alive == dict.fromkeys(("0.0", "1.0", "2.0"), 16)


@pytest.mark.slow
def test_search_and_admm_beat_uniform_rates_and_admm_at_an_eighth_of_the_parameters() -> None:
    method, better = make("autocompress", {**QUICK, "rounds": 1, "evaluations": 60}), 0
    for seed in range(3):
        task = problem_of(trained_net(seed, EVEN), 0.12, ParamTable(multiple=1))
        search = _Search(method, task)
        uniform, _ = uniform_widths(task.graph, search.alive, task.table, task.budget)
        found = []
        for kept in (search.rates_that_fit()[0], {name: uniform[name] for name in search.alive}):
            plan, own = search.plan(kept), trainer(seed=seed, lr=0.02)
            small = own.fit(compact(method._pulled(task, plan, own, 1), task.graph, plan), 1)
            found.append(accuracy(recalibrate(small, task.data)))
        better += found[0] > found[1]
    assert better >= 2


def test_purification_removes_what_is_dead_for_nothing() -> None:
    task = problem_of(trained_net(widths=EVEN), 1.0)
    model = trainer().fit(task.model, 0)
    with torch.no_grad():
        model[2][0].weight[:, [3, 8]] = 0
        model[1][0].weight[[5]] = 0
        model[1][1].weight[[5]] = 0
        model[1][1].bias[[5]] = 0
    search = _Search(make("autocompress", {**QUICK, "delta": 0}), replace(task, model=model, table=MacTable(multiple=1)))
    assert dead(model, task.graph) == {"1.0": (3, 5, 8)}
    assert search.alive["1.0"] == 13
    plan = make("autocompress", {**QUICK, "delta": 0}).plan(replace(task, model=model))
    assert set(range(16)) - set(plan.keep["1.0"]) == {3, 5, 8}
    small = compact(model, task.graph, plan)
    assert difference(run(model, task.graph.example), run(small, task.graph.example)) < 1e-6


@pytest.mark.parametrize("delta", [0.0, 0.02, 0.5])
def test_purification_stops_where_accuracy_would_fall_by_more_than_delta(delta: float) -> None:
    task = problem_of(trained_net(widths=EVEN), 1.0)
    method = make("autocompress", {**QUICK, "delta": delta, "evaluations": 40})
    pure = method._purified(task)
    judge = Judge(task.graph, toy_data().train, 200, 200, 0)
    plan = method.plan(replace(task, model=pure))
    base, found = judge(task.model, KeepPlan({})).top1, judge(pure, plan).top1
    assert base - found <= delta + 1e-9
    cost = task.table.predict(task.graph, plan)
    assert cost <= task.table.predict(task.graph)
    assert (cost < 0.97 * task.table.predict(task.graph)) == (delta > 0)
    assert sum(p.numel() for p in compact(pure, task.graph, plan).parameters()) <= sum(p.numel() for p in pure.parameters())


def test_fails_at_once_and_in_words() -> None:
    task = problem_of(trained_net(widths=EVEN))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("autocompress").train(replace(task, budget=1.0), trainer())
    with pytest.raises(UsageError, match="needs data"):
        make("autocompress").plan(replace(task, data=None))
    assert isinstance(task.model, nn.Module)
