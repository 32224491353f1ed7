"""Random channel pruning (Li et al., CVPR 2022): its falsifiable tests."""

import copy
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from deploypipe.algorithms import make, random_search
from deploypipe.algorithms.random_search import accepted, draws
from deploypipe.algorithms.scores import DATA_FREE
from deploypipe.compact import compact
from deploypipe.count import macs, params
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import evaluate
from tests.toy_task import Watched, net, problem_of, trained_net

FAST = {"images": 200, "norm_images": 200}
NAMES = ["0.0", "1.0", "2.0"]


def test_every_network_costs_what_is_wanted_once_it_is_cut() -> None:
    problem = problem_of(net(), 0.4)
    networks = accepted(problem, NAMES, make("random-search", {"n": 30}))
    assert len({tuple(kept.values()) for kept in networks}) == 30
    for kept in networks[:5]:
        small = compact(problem.model, problem.graph, KeepPlan.of_widths(kept))
        cost = macs(trace(small, problem.graph.example))
        assert 0.98 * problem.budget <= cost <= problem.budget
        assert params(problem.graph, KeepPlan.of_widths(kept)) == sum(p.numel() for p in small.parameters())


def test_more_draws_never_find_less() -> None:
    problem = problem_of(copy.deepcopy(trained_net()), 0.3)
    found = [make("random-search", {"n": n, **FAST}).plan(problem).certificate.value for n in (1, 4, 12)]
    assert found == sorted(found)
    few, many = (accepted(problem, NAMES, make("random-search", {"n": n})) for n in (3, 9))
    assert many[:3] == few


def test_ratios_cover_the_range_and_stay_wide_after_rejection() -> None:
    problem = problem_of(net(widths=(40, 40, 40)), 0.4)
    shares = np.array([[kept[name] / 40 for name in NAMES] for kept in islice(draws(problem, NAMES, (0.25, 1.0)), 500)])
    assert shares.min(0).max() <= 0.25 + 0.1 * 0.75
    assert shares.max(0).min() >= 1 - 0.1 * 0.75
    assert np.abs(np.corrcoef(shares.T) - np.eye(3)).max() < 0.15, "one factor on all of them would tie them together"
    taken = accepted(problem, NAMES, make("random-search", {"n": 100}))
    spread = np.ptp([[kept[name] / 40 for name in NAMES] for kept in taken], axis=0)
    assert spread.min() > 0.4


def test_with_random_channels_and_one_draw_it_is_plain_random_pruning() -> None:
    problem = problem_of(net(), 0.5, seed=3)
    plan = make("random-search", {"n": 1, "criterion": "random", **FAST}).plan(problem)
    assert plan.certificate.status == "best of 1 draws"
    whole = make("random").plan(replace(problem, budget=0.999 * problem.budget))
    for name in NAMES:
        kept, other = set(plan.keep[name]), set(whole.keep[name])
        assert kept <= other or other <= kept, "the same order of channels"
    again = make("random-search", {"n": 1, "criterion": "random", **FAST}).plan(replace(problem, seed=4))
    assert again.keep != plan.keep


def test_networks_are_judged_on_images_that_renew_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(copy.deepcopy(trained_net()), 0.4)
    data, judged, renewed = Watched(problem.data), list[int](), set[int]()

    def watched(*args: Any, **named: Any) -> Any:
        renewed.update(data.read)
        data.read.clear()
        found = evaluate(*args, **named)
        judged.append(len(data.read))
        assert renewed.isdisjoint(data.read)
        data.read.clear()
        return found

    monkeypatch.setattr(random_search, "evaluate", watched)
    make("random-search", {"n": 2, "images": 150, "norm_images": 128}).plan(replace(problem, data=data))
    assert judged == [150, 150]
    assert len(renewed) == 128


def test_the_statistics_that_norms_came_with_do_not_matter() -> None:
    """Left as they were, they fit no narrow network, and the most accurate one is a matter of luck."""
    problem = problem_of(copy.deepcopy(trained_net()), 0.4)
    other = copy.deepcopy(problem.model)
    for norm in (other[0][1], other[1][1], other[2][1]):
        norm.running_mean.add_(torch.arange(len(norm.running_mean)) % 3)
        norm.running_var.mul_(4.0)
    method = make("random-search", {"n": 3, "images": 100, "norm_images": 128})
    plans = [method.plan(replace(problem, model=model)) for model in (problem.model, other)]
    assert plans[0].keep == plans[1].keep
    assert plans[0].certificate.value == plans[1].certificate.value


@pytest.mark.parametrize("share", [0.02, 0.04, 0.06])
def test_budgets_that_no_draw_from_the_range_meets_are_met(share: float) -> None:
    problem = problem_of(net(widths=(40, 40, 40)), share)
    plan = make("random-search", {"n": 3, **FAST}).plan(problem)
    assert 0.95 * problem.budget <= problem.table.predict(problem.graph, plan) <= problem.budget


@pytest.mark.parametrize("criterion", DATA_FREE)
def test_every_criterion_orders_the_channels(criterion: str) -> None:
    problem = problem_of(copy.deepcopy(trained_net()), 0.4)
    plans = [make("random-search", {"n": 1, "criterion": c, **FAST}).plan(problem).keep for c in (criterion, "l2")]
    assert [len(kept) for kept in plans[0].values()] == [len(kept) for kept in plans[1].values()]
    assert (plans[0] == plans[1]) == (criterion == "l2")
