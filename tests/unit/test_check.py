"""The check of a latency table on whole models, against a device that is known exactly."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends.base import Timing
from deploypipe.graph import trace
from deploypipe.latency.files import Context, Entry, Shape
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.profiler import check
from deploypipe.profiler.check import N_PLANS, checked, random_plans, scaled
from deploypipe.progress import Silent
from deploypipe.targets import Target, load_target

EXAMPLE = torch.zeros(1, 3, 10, 10)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Conv2d(48, 5, 3)).eval()


@pytest.fixture(scope="module")
def graph(net):
    return trace(net, EXAMPLE)


@pytest.fixture
def table(graph):
    entries = [
        Entry(Shape.of(layer), n_in, n_out, 1 + 0.01 * n_in * n_out, 1, 1, 9)
        for layer in graph.layers
        for n_in in (3, 16, 32, 48, 64)
        for n_out in (5, 16, 32, 48, 64)
    ]
    dense = graph.kept()
    anchors = {
        layer.name: (
            (layer.n_in.at(dense) * layer.n_out.at(dense) // 4, 1.0),
            (layer.n_in.at(dense) * layer.n_out.at(dense), 1.0),
        )
        for layer in graph.layers
    }
    context = Context(structure_of(graph), anchors, (), 100.0, 40.0, 1.0, 1.0, 0.0, 9)
    steps = {"conv": Steps(16)}
    found = LatencyTable({}, steps, tuple(entries), (context,))
    whole = found.predict(graph)
    return replace(found, contexts=(replace(context, whole_us=whole),))


@dataclass
class FakeBench:
    """Takes what `truth` says, times `drift`, times 1 +- noise."""

    truth: LatencyTable
    graph: object
    drift: float = 1.0
    noise: float = 0.0
    target: ClassVar[Target] = load_target("cpu")
    folder: ClassVar[Path] = Path()

    def whole(self, files, target):
        random = np.random.default_rng(3)
        found = {}
        for name, plan in files.items():
            us = self.drift * self.truth.predict(self.graph, plan) * (1 + self.noise * random.standard_normal())
            found[name] = Timing(us, us, us, target.measure.runs, 0.0)
        return found


@pytest.fixture
def run(net, graph, table, monkeypatch):
    monkeypatch.setattr(check, "compact", lambda model, graph, plan: plan)
    monkeypatch.setattr(check, "exported", lambda model, *rest: model if isinstance(model, KeepPlan) else KeepPlan({}))

    def go(factor: float, **bench) -> Context:
        truth = replace(table, contexts=(scaled(table.context(graph), factor),))
        fake = FakeBench(truth, graph, **bench)
        return checked(fake, net, EXAMPLE, graph, table, Silent())

    return go


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_what_is_wrong_in_all_plans_alike_is_taken_out(run, factor: float) -> None:
    found = run(factor)
    assert found.trim == pytest.approx(factor)
    assert len(found.errors) == N_PLANS
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_a_machine_that_became_slower_is_no_error(run) -> None:
    assert run(1.0, drift=1.3).trim == pytest.approx(1.0)


def test_the_dense_model_keeps_its_price(run, table, graph) -> None:
    corrected = replace(table, contexts=(run(1.25),))
    assert corrected.predict(graph) == pytest.approx(table.predict(graph))


def test_errors_are_those_of_plans_left_out(run, table, graph) -> None:
    """Every stored error must be the one that a table corrected by the other plans alone makes."""
    found = run(1.1, noise=0.05)
    plans = random_plans(graph, table.candidates(graph), N_PLANS, check._SEED)
    random = np.random.default_rng(3)
    truth = replace(table, contexts=(scaled(table.context(graph), 1.1),))
    times = [truth.predict(graph, plan) * (1 + 0.05 * random.standard_normal()) for plan in [KeepPlan({}), *plans]]
    shares = np.array(times[1:]) / times[0] * table.context(graph).whole_us

    def loss(factor: float, left_out: int) -> float:
        trial = replace(table, contexts=(scaled(table.context(graph), factor),))
        return sum(
            (trial.predict(graph, p) / m - 1) ** 2 for i, (p, m) in enumerate(zip(plans, shares, strict=True)) if i != left_out
        )

    for left_out in (0, 5):
        grid = np.linspace(0.8, 1.4, 601)
        factor = grid[np.argmin([loss(g, left_out) for g in grid])]
        trial = replace(table, contexts=(scaled(table.context(graph), factor),))
        error = trial.predict(graph, plans[left_out]) / shares[left_out] - 1
        assert found.errors[left_out] == pytest.approx(error, abs=2e-3)
    assert found.error > 0.005


def test_plans_are_legal_spread_and_repeatable(graph, table) -> None:
    candidates = table.candidates(graph)
    plans = random_plans(graph, candidates, 8, 1)
    for plan in plans:
        plan.check(graph)
        assert all(len(channels) in candidates[name] for name, channels in plan.keep.items())
    shares = [table.predict(graph, plan) / table.predict(graph) for plan in plans]
    assert max(shares) - min(shares) > 0.3
    assert [p.keep for p in plans] == [p.keep for p in random_plans(graph, candidates, 8, 1)]
