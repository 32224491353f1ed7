"""Widths that follow from one threshold or share: what they leave of the budget is filled, in order and within it."""

import numpy as np
import pytest

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.scaled import nearest_width
from deploypipe.allocation.threshold import survivors, threshold_widths, uniform_widths, worth_keeping
from deploypipe.count import MacTable
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from tests.toys import TOYS

SHARES = [0.4, 0.45, 0.5, 0.62, 0.8]
METHODS = [
    ("lamp", {}),
    ("fpgm", {"widths": "uniform"}),
    ("fpgm", {"widths": "threshold"}),
    *(("erk", {"rule": rule}) for rule in ("erk", "uniform", "uniform+")),
]


def problem(net: str, share: float, multiple: int = 1) -> Problem:
    model, example = TOYS[net]()
    graph, table = trace(model.eval(), example), MacTable(multiple=multiple)
    return Problem(model, graph, table, share * table.predict(graph))


def cost(task: Problem, kept: dict[str, int]) -> float:
    return task.table.predict(task.graph, KeepPlan.of_widths(kept))


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
@pytest.mark.parametrize("net", ["plain", "residual", "concat"])
def test_no_group_could_grow_by_itself_any_more(net: str, name: str, options: dict[str, str]) -> None:
    for share in SHARES:
        for multiple in (1, 2):
            task = problem(net, share, multiple)
            kept = task.graph.kept(make(name, options).plan(task))
            assert cost(task, kept) <= task.budget
            for group, legal in task.table.candidates(task.graph).items():
                wider = next((width for width in legal if width > kept[group]), 0)
                assert not wider or cost(task, {**kept, group: wider}) > task.budget


def test_what_is_left_goes_to_the_channels_that_come_next() -> None:
    """Below the threshold one channel after the other is asked, best first, until its group has met one that does not fit."""
    grown = 0
    for share in SHARES:
        task = problem("plain", share)
        rng = np.random.default_rng(0)
        scores = {group.name: rng.random(group.size) for group in task.graph.prunable}
        kept, found = threshold_widths(task.graph, scores, task.table, task.budget)
        counts = survivors(scores, found.value)
        widths, closed = {name: max(1, n) for name, n in counts.items()}, set[str]()
        ranked = sorted(((-score, name) for name, each in scores.items() for score in each), key=lambda channel: channel[0])
        for _, name in ranked[sum(counts.values()) :]:
            counts[name] += 1
            if name not in closed and counts[name] > widths[name]:
                fits = cost(task, {**widths, name: counts[name]}) <= task.budget
                grown += fits
                widths[name] = counts[name] if fits else widths[name]
                closed |= set() if fits else {name}
        assert {name: kept[name] for name in widths} == widths
    assert grown > 0


def test_one_share_alone_leaves_more_of_the_budget_unused() -> None:
    left: dict[str, list[float]] = {"alone": [], "filled": []}
    for share in SHARES:
        task = problem("residual", share, 2)
        legal = task.table.candidates(task.graph)
        kept, found = uniform_widths(task.graph, legal, task.table, task.budget)
        alone = {name: nearest_width(widths, found.value * widths[-1]) for name, widths in legal.items()}
        assert all(kept[name] >= width for name, width in alone.items())
        left["alone"].append(1 - cost(task, alone) / task.budget)
        left["filled"].append(1 - cost(task, kept) / task.budget)
        again, _ = uniform_widths(task.graph, legal, task.table, task.budget, alone)
        assert {name: again[name] for name in alone} == alone, "no group grows beyond what it may"
    assert np.mean(left["filled"]) < 0.5 * np.mean(left["alone"])
    assert min(left["filled"]) >= 0


def test_channels_without_any_score_are_not_filled_in() -> None:
    scores = {"a": np.array([0.5, 0.0, 0.1]), "b": np.array([-1e-300, 0.0])}
    assert worth_keeping(scores) == {"a": 2, "b": 0}
