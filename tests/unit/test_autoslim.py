"""AutoSlim (Yu and Huang, 2019): greedy slimming against the analytic choice, and why batch norms must be renewed."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import log

import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.autoslim import slimmed
from deploypipe.compact import compact, difference, run
from deploypipe.count import MacTable
from deploypipe.errors import BudgetError, UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.judge import Judge
from deploypipe.plan import KeepPlan
from deploypipe.progress import Recorder
from deploypipe.training.evaluate import Accuracy, evaluate
from tests.toy_task import EVEN, accuracy, problem_of, toy_data, trained_net, trainer
from tests.toys import TOYS

QUICK = {"train_epochs": 9, "images": 200, "norm_images": 200}  # 8 steps an epoch: the 200 that judge are not trained on
GRID = (2, 4, 6, 8, 10, 12, 14, 16)
LAYERS = {"a": 1.0, "b": 3.0, "c": 0.5}
LEGAL = dict.fromkeys(LAYERS, GRID)


@cache
def supernet() -> nn.Module:
    """Do not change it."""
    return make("autoslim", QUICK).train(problem_of(trained_net(widths=EVEN), 0.1), trainer())


def knows(kept: Mapping[str, int]) -> Accuracy:
    value = sum(weight * log(kept[name]) for name, weight in LAYERS.items())
    return Accuracy(value, -value, 1)


def chain(kept: Mapping[str, int]) -> float:
    return 3.0 * kept["a"] + kept["a"] * kept["b"] + kept["b"] * kept["c"]


def analytic(budget: float) -> list[dict[str, int]]:
    """Each step takes off two channels where a log w falls least, written down without the code under test."""
    now, path = dict.fromkeys(LAYERS, 16), []
    while chain(now) > budget:
        falls = {n: LAYERS[n] * (log(now[n]) - log(now[n] - 2)) for n in LAYERS if now[n] > 2}
        least = min(falls, key=lambda n: falls[n])
        now = {**now, least: now[least] - 2}
        path.append(now)
    return path


@pytest.mark.parametrize("budget", [400, 250, 100, 60])
def test_the_steps_are_those_of_the_analytic_greedy_choice(budget: float) -> None:
    found = [kept for kept, _ in slimmed(dict.fromkeys(LAYERS, 16), LEGAL, chain, knows, budget)]
    assert found == analytic(budget)
    costs = [chain(kept) for kept in found]
    assert all(later < before for before, later in itertools.pairwise(costs))
    assert costs[-1] <= budget < costs[-2]


def test_several_targets_lie_on_one_path() -> None:
    path = [kept for kept, _ in slimmed(dict.fromkeys(LAYERS, 16), LEGAL, chain, knows, 60)]
    for budget in (400, 250, 100):
        alone = [kept for kept, _ in slimmed(dict.fromkeys(LAYERS, 16), LEGAL, chain, knows, budget)]
        assert path[: len(alone)] == alone


def test_steps_of_no_saving_are_jumped_over_on_a_staircase() -> None:
    """Latency falls by plateaus: a step within one would cost accuracy for nothing, and never end."""
    stairs = lambda kept: float(sum(-(-kept[name] // 8) for name in kept))  # noqa: E731
    path = list(slimmed(dict.fromkeys(LAYERS, 16), LEGAL, stairs, knows, 4))
    assert [sorted(kept.values()) for kept, _ in path] == [[8, 16, 16], [8, 8, 16]]
    assert list(slimmed(dict.fromkeys(LAYERS, 8), LEGAL, stairs, knows, 1)) == [], "no group alone makes it cheaper"


def test_accuracy_per_saved_cost_is_another_choice() -> None:
    price = lambda kept: 100.0 * kept["b"] + kept["a"] + kept["c"]  # noqa: E731
    first = {p: next(iter(slimmed(dict.fromkeys(LAYERS, 16), LEGAL, price, knows, 1, p)))[0] for p in ("accuracy", "ratio")}
    assert first["accuracy"]["c"] == 14
    assert first["ratio"]["b"] == 14


def test_the_start_is_the_same_network_with_its_strongest_channels_first() -> None:
    task, method = problem_of(trained_net(widths=EVEN)), make("autoslim", {"train_epochs": 0})
    start = method.train(task, trainer())
    example = task.graph.example
    assert difference(run(task.model, example), run(start, example)) < 1e-5
    norms = start[1][0].weight.flatten(1).norm(dim=1)
    assert torch.equal(norms, norms.sort(descending=True).values)
    anew = make("autoslim", {"train_epochs": 0, "start": "fresh"}).train(task, trainer())
    assert difference(run(task.model, example), run(anew, example)) > 0.1


def test_groups_with_fixed_weights_keep_their_order_and_the_user_is_told() -> None:
    model, example = TOYS["fixed_shortcut"]()
    graph, heard = trace(model, example), Recorder()
    task = replace(problem_of(trained_net(widths=EVEN)), model=model, graph=graph, reporter=heard)
    task = replace(task, budget=0.5 * task.table.predict(graph))
    start = make("autoslim", {"train_epochs": 0}).train(task, trainer())
    norms = {name: start.get_submodule(name).weight.flatten(1).norm(dim=1) for name in ("stem.0", "a.0")}
    in_order = {name: torch.equal(norm, norm.sort(descending=True).values) for name, norm in norms.items()}
    assert in_order == {"stem.0": False, "a.0": True}
    (note,) = [note for note in heard.notes if "keep their order" in note]
    assert "stem.0" in note
    assert "a.0" not in note


def test_the_supernet_holds_networks_that_work_which_the_plain_one_does_not() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.1)
    judge = Judge(task.graph, toy_data().train, 200, 200, 0)
    narrow = KeepPlan.of_widths({group.name: 4 for group in task.graph.prunable})
    plain = make("autoslim", {**QUICK, "train_epochs": 0}).train(task, trainer())
    assert judge(supernet(), narrow).top1 > 0.9
    assert judge(supernet(), narrow).top1 > judge(plain, narrow).top1 + 0.1
    assert accuracy(supernet()) > 0.95, "the largest network is trained as well"


def test_running_statistics_of_the_largest_network_mislead() -> None:
    """The trap: a sub-network judged with the statistics of the whole one looks far worse than it is."""
    task = problem_of(trained_net(widths=EVEN), 0.1)
    narrow = KeepPlan.of_widths({group.name: 4 for group in task.graph.prunable})
    renewed = Judge(task.graph, toy_data().train, 200, 200, 0)(supernet(), narrow).top1
    stale = Judge(task.graph, toy_data().train, 200, 0, 0)(supernet(), narrow).top1
    assert renewed > stale + 0.1


def test_the_plan_is_the_first_channels_within_the_budget_and_repeatable() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.25, MacTable(multiple=4))
    method = make("autoslim", {**QUICK, "train_epochs": 3, "images": 100})
    plans = []
    for _ in range(2):
        after = replace(task, model=method.train(task, trainer()))
        plans.append(method.plan(after))
    plan = plans[0]
    assert plan == plans[1]
    assert all(channels == tuple(range(len(channels))) for channels in plan.keep.values())
    assert plan.certificate is not None
    assert plan.certificate.predicted <= task.budget
    assert plan.certificate.value > 0.9
    small = compact(after.model, task.graph, plan)
    tuned = trainer().fit(small, 2)
    assert evaluate(tuned, toy_data().test).top1 > 0.95


def test_every_width_is_one_that_the_table_offers_and_is_trained() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.4, MacTable(multiple=8))
    method = make("autoslim", {**QUICK, "train_epochs": 1})
    assert set(method.plan(replace(task, model=method.train(task, trainer()))).keep) == {"0.0", "1.0", "2.0"}
    assert method.offered(task) == dict.fromkeys(("0.0", "1.0", "2.0"), (8, 16))
    assert make("autoslim", {"least": 0, "bins": 4}).offered(problem_of(trained_net(widths=EVEN)))["0.0"] == (1, 6, 11, 16)
    narrow = make("autoslim", {"least": 0.6}).offered(problem_of(trained_net(widths=EVEN), 1.0, MacTable(multiple=8)))
    assert narrow == dict.fromkeys(("0.0", "1.0", "2.0"), (16,))


def test_only_trained_widths_are_chosen_unless_the_budget_is_out_of_their_reach() -> None:
    """Greedy steps see no floor: in a layer that the task hardly needs they would go on below what was trained."""
    heard = Recorder()
    task = replace(problem_of(trained_net(widths=EVEN), 0.4), reporter=heard)
    method = make("autoslim", {**QUICK, "train_epochs": 0, "least": 0.5, "images": 50, "norm_images": 50})
    trained = method.offered(task)
    assert min(trained["1.0"]) >= 8
    plan = method.plan(replace(task, model=method.train(task, trainer())))
    assert all(len(channels) in trained[name] for name, channels in plan.keep.items())
    assert heard.notes == []
    tight = replace(task, budget=0.1 * task.table.predict(task.graph))
    assert min(method.offered(tight)["1.0"]) == 1
    assert "option least" in heard.notes[-1]
    plan = method.plan(tight)
    assert min(len(channels) for channels in plan.keep.values()) < 8
    assert plan.certificate is not None
    assert plan.certificate.predicted <= tight.budget


def test_fails_at_once_and_in_words() -> None:
    task = problem_of(trained_net(widths=EVEN))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("autoslim").plan(replace(task, budget=1.0))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("autoslim").train(replace(task, budget=1.0), trainer())
    with pytest.raises(UsageError, match="needs data"):
        make("autoslim").plan(replace(task, data=None))


Known = Mapping[tuple[int, int], tuple[float, float]]  # widths of two groups -> accuracy, loss


def narrowed(known: Known, prefer: str, cost: tuple[float, float], budget: float) -> list[tuple[int, int]]:
    """Return the widths of the groups after each step, from three channels each and at what one of them costs."""

    def look(kept: Mapping[str, int]) -> Accuracy:
        return Accuracy(*known[kept["a"], kept["b"]], 1)

    price = lambda kept: cost[0] * kept["a"] + cost[1] * kept["b"]  # noqa: E731
    path = slimmed({"a": 3, "b": 3}, dict.fromkeys("ab", (1, 2, 3)), price, look, budget, prefer)
    return [(kept["a"], kept["b"]) for kept, _ in path]


@pytest.mark.parametrize("prefer", ["accuracy", "ratio"])
def test_of_equally_accurate_networks_that_of_the_lower_loss_is_taken(prefer: str) -> None:
    known = {
        (3, 3): (0.9, 0.2),
        (2, 3): (0.9, 0.5),
        (3, 2): (0.9, 0.3),
        (2, 2): (0.9, 0.6),
        (3, 1): (0.9, 0.7),
        (1, 3): (0.9, 0.8),
    }
    assert narrowed(known, prefer, (1.0, 1.0), 4.0) == [(3, 2), (2, 2)]


def test_what_a_step_loses_is_counted_from_the_step_before() -> None:
    """The first step costs accuracy whatever it takes; then `a` costs none, and `b` a little but saves twice as much."""
    known = {(3, 3): (0.9, 0.0), (2, 3): (0.5, 0.0), (3, 2): (0.0, 0.0), (1, 3): (0.5, 0.0), (2, 2): (0.4, 0.0)}
    assert narrowed(known, "ratio", (1.0, 2.0), 7.0) == [(2, 3), (1, 3)]
