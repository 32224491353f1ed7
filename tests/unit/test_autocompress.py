"""AutoCompress (Liu et al., AAAI 2020): rounds, search against uniform rates, and purification that stops."""

import copy
import sys
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
from deploypipe.ingredients.annealing import Schedule, anneal
from deploypipe.ingredients.judge import Judge
from deploypipe.ingredients.purify import dead
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import recalibrate
from tests.toy_task import EVEN, accuracy, net, problem_of, toy_data, trained_net, trainer

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


SMALL: dict[str, Any] = {"rounds": 1, "retrain_epochs": 0, "evaluations": 2, "images": 50, "norm_images": 0}


def test_admm_pulls_channels_to_zero_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    task, own, fitted = replace(problem_of(net(widths=EVEN), 0.4), data=toy_data(150).train), trainer(), list[nn.Module]()
    fit = own.fit
    monkeypatch.setattr(own, "fit", lambda *args, **named: fitted.append(fit(*args, **named)) or fitted[-1])
    found: Any = make("autocompress", {**SMALL, "train_epochs": 4, "rho": 1.0}).train(task, own)
    stays = found[1][0].weight.flatten(1).any(1)
    before, pulled = (model.get_parameter("1.0.weight").detach() for model in (task.model, fitted[0]))
    assert 0 < stays.sum() < 16
    assert pulled[~stays].norm() < 0.2 * before[~stays].norm()
    assert pulled[stays].norm() > 0.9 * before[stays].norm()


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_training_ends_with_purification(delta: float) -> None:
    task = problem_of(net(widths=EVEN), 1.0)
    method = make("autocompress", {**SMALL, "train_epochs": 0, "evaluations": 10, "delta": delta})
    plan = method.plan(replace(task, model=method.train(task, trainer())))
    assert (task.table.predict(task.graph, plan) < 0.97 * task.budget) == (delta > 0)


def test_epochs_of_the_pull_are_shared_by_the_rounds_and_each_round_retrains(monkeypatch: pytest.MonkeyPatch) -> None:
    task, own, asked = problem_of(net(widths=EVEN), 0.4), trainer(), list[tuple[int, int]]()

    def spied(model: nn.Module, epochs: int, hooks: Any = (), *args: Any, **named: Any) -> nn.Module:
        asked.append((len(hooks), epochs))
        return copy.deepcopy(model)

    monkeypatch.setattr(own, "fit", spied)
    make("autocompress", {**SMALL, "rounds": 3, "train_epochs": 7, "retrain_epochs": 2}).train(task, own)
    assert asked == [(1, 2), (0, 2), (1, 2), (0, 2), (1, 3), (0, 2)]


def test_the_search_starts_with_no_group_pruned_less_than_a_smaller_one() -> None:
    """Groups of 16, 24 and 32 channels, whose layers grow as well; widths are whole numbers."""
    task, method = problem_of(net(), 0.5), make("autocompress", {**SMALL, "evaluations": 1})
    for seed in range(5):
        keep = method.plan(replace(task, seed=seed)).keep
        first, second, third = (len(keep[name]) / task.graph.group(name).size for name in ("0.0", "1.0", "2.0"))
        assert first > second - 1 / 24
        assert second > third - 1 / 24


def test_options_decide_how_the_search_cools_and_how_far_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = sys.modules["deploypipe.algorithms.autocompress"], list[Schedule]()
    monkeypatch.setattr(module, "anneal", lambda *args: seen.append(args[3]) or anneal(*args))
    task = problem_of(net(), 0.5)
    make("autocompress", {**SMALL, "evaluations": 3, "start": 0.2, "stop": 0.01, "spread": 0.1}).plan(task)
    make("autocompress", {**SMALL, "evaluations": 3, "start": 0.001}).plan(task)  # below the last temperature
    assert [seen[0].temperature(n) for n in (0, 2)] == pytest.approx([0.2, 0.01])
    assert (seen[0].evaluations, seen[0].spread) == (3, 0.1)
    assert [seen[1].temperature(n) for n in (0, 2)] == pytest.approx([0.001, 0.001])
