"""Layers fitted to whole models: on times that follow the assumed form exactly, and on some that do not."""

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends.base import Timing
from deploypipe.errors import TargetError
from deploypipe.graph import trace
from deploypipe.latency.context import Context
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.profiler import whole
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.noise import ACCEPTED, Noise
from deploypipe.profiler.regression import design, fit, unknowns_of
from deploypipe.progress import Recorder
from deploypipe.targets import load_target

FACTS = {"runtime": "made up", "version": "1", "cpu_flags": ["avx"]}


class Net(nn.Module):
    """A stem, a residual block, a depthwise layer, a head; the stem has the shape of the block's layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a = nn.Conv2d(32, 48, 3, padding=1)
        self.b = nn.Conv2d(48, 32, 3, padding=1)
        self.c = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.d = nn.Conv2d(32, 64, 1)
        self.e = nn.Conv2d(64, 48, 3)
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(self.e(torch.relu(self.d(torch.relu(self.c(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net):
    return trace(net, torch.zeros(1, 3, 8, 8))


def plans_of(graph, count=45):
    steps = {layer.kind: Steps(8) for layer in graph.layers}
    return random_plans(graph, LatencyTable({}, steps, ()).candidates(graph), count, 21)


def secret(graph, seed=0):
    """Times that follow the assumed form, with coefficients that have nothing in common."""
    unknowns = unknowns_of(graph)
    values = np.random.default_rng(seed).uniform(1, 20, len(unknowns))
    return lambda kept: float(design(graph, unknowns, [kept])[0] @ values)


@pytest.mark.parametrize("seed", range(4))
def test_plans_that_the_fit_did_not_see_are_predicted(graph, seed):
    true, kept = secret(graph, seed), [graph.kept(plan) for plan in plans_of(graph)]
    found = fit(graph, kept[:36], np.array([true(k) for k in kept[:36]]))
    errors = [abs(found.predict(k) / true(k) - 1) for k in kept[36:]]
    assert np.mean(errors) < 0.02


def test_noise_in_the_times_is_not_fitted(graph):
    """Two percent of noise must not become more than two percent of error on average."""
    true, kept = secret(graph), [graph.kept(plan) for plan in plans_of(graph)]
    noisy = np.array([true(k) for k in kept[:36]]) * (1 + 0.02 * np.random.default_rng(1).standard_normal(36))
    found = fit(graph, kept[:36], noisy)
    assert np.mean([abs(found.predict(k) / true(k) - 1) for k in kept[36:]]) < 0.02


def test_costs_are_never_negative(graph):
    kept = [graph.kept(plan) for plan in plans_of(graph)]
    found = fit(graph, kept, np.random.default_rng(0).uniform(50, 100, len(kept)))
    assert (found.values >= 0).all()


def test_the_table_says_what_the_fit_says(graph):
    """The table interpolates between a few corners; of the assumed form nothing is lost by that, at no plan."""
    true, plans = secret(graph), plans_of(graph)
    found = fit(graph, [graph.kept(p) for p in plans], np.array([true(graph.kept(p)) for p in plans]))
    overhead = (whole.Overhead("model", (), found.constant_us),)
    context = Context(structure_of(graph), {}, overhead, 100.0, 1.0, 1.0, None, 1)
    steps = {layer.kind: Steps(8) for layer in graph.layers}
    table = LatencyTable(FACTS, steps, tuple(found.entries(8)), (context,))
    for plan in [KeepPlan({}), *plans]:
        assert table.predict(graph, plan) == pytest.approx(found.predict(graph.kept(plan)), abs=0.05)


class Bench:
    """Times models whose file is the plan itself, by a formula; counts how often."""

    def __init__(self, folder, graph, formula):
        self.folder, self.graph, self.formula = folder, graph, formula
        self.target, self.timed, self.noise = load_target("cpu"), [], Noise(accepted=False)
        self.backend = self

    def export(self, model, *_):
        return model if isinstance(model, dict) else self.graph.kept()

    def channel_multiple(self, facts):
        return 8

    def whole(self, files, target=None):
        self.timed += [name for name in files if name != "dense"]
        us = {name: self.formula(name, kept) for name, kept in files.items()}
        return {name: Timing(value, value, value, 12, 0.0) for name, value in us.items()}


@pytest.fixture
def made(net, graph, tmp_path, monkeypatch):
    """Run the measurement on made-up times; compaction and export give the widths themselves."""
    monkeypatch.setattr(whole, "compact", lambda model, graph, plan, check: graph.kept(plan))

    def run(formula, fresh=False, noise=None):
        bench = Bench(tmp_path, graph, formula)
        bench.noise = noise or bench.noise
        reporter = Recorder()
        table = whole.fitted_table(bench, net, None, graph, FACTS, tmp_path / "tables", reporter, fresh)
        return table, bench

    return run


def test_a_table_states_its_error_and_that_it_is_fitted(made, graph):
    true = secret(graph)
    table, bench = made(lambda name, kept: true(kept))
    assert len(bench.timed) == whole.N_FITTED + whole.N_HELD
    assert table.facts["method"] == "fitted"
    assert table.context(graph).error < 0.02
    assert len(table.context(graph).errors) == whole.N_HELD
    assert {entry.runs for entry in table.kernels} == {0}, "nothing pretends to be measured"
    assert table.predict(graph) == pytest.approx(true(graph.kept()), rel=0.03)


def test_a_second_call_measures_nothing(made, graph):
    true = secret(graph)
    first, _ = made(lambda name, kept: true(kept))
    second, bench = made(lambda name, kept: 1 / 0)
    assert bench.timed == []
    assert second.id == first.id
    _, bench = made(lambda name, kept: true(kept), fresh=True)
    assert len(bench.timed) == whole.N_FITTED + whole.N_HELD


def test_an_interrupted_measurement_goes_on_where_it_was(made, graph):
    true, seen = secret(graph), []

    def dies(name, kept):
        seen.append(name)
        if len(seen) > 25:
            raise KeyboardInterrupt
        return true(kept)

    with pytest.raises(KeyboardInterrupt):
        made(dies)
    _, bench = made(lambda name, kept: true(kept))
    assert len(bench.timed) == whole.N_FITTED + whole.N_HELD - 2 * 9, "two whole jobs were done"


def test_times_that_no_layers_explain_are_refused(made, graph):
    random = np.random.default_rng(0)
    with pytest.raises(TargetError, match=r"off by \d+%[\s\S]*--fresh[\s\S]*--metric macs"):
        made(lambda name, kept: float(random.uniform(10, 100)))


def test_whoever_accepts_noise_gets_such_a_table_which_says_so(made, graph):
    random = np.random.default_rng(0)
    table, _ = made(lambda name, kept: float(random.uniform(10, 100)), noise=Noise(accepted=True, worst=0.8))
    assert table.context(graph).far_off
    assert table.facts[ACCEPTED] == 0.8


def test_plans_in_a_file_of_another_form_count_for_nothing(made, graph, tmp_path):
    true = secret(graph)
    made(lambda name, kept: true(kept))
    (file,) = tmp_path.rglob("plans.csv")
    (file.parent / "device.json").unlink()
    for text in ("plan,us\nx,1\n", "plan,share\nx,much\n"):
        file.write_text(text)
        assert whole._known(file) == {}


def test_no_plan_judges_that_was_fitted(made, graph):
    _, bench = made(lambda name, kept: 100.0)
    plans = whole._distinct(graph, LatencyTable({}, {layer.kind: Steps(8) for layer in graph.layers}, ()).candidates(graph))
    widths = [tuple(sorted(graph.kept(plan).items())) for plan in [KeepPlan({}), *plans]]
    assert len(set(widths)) == len(widths) == len(bench.timed) + 1


def test_a_model_with_hardly_any_forms_is_refused(graph, made, monkeypatch):
    monkeypatch.setattr(Bench, "channel_multiple", lambda self, facts: 32)
    with pytest.raises(TargetError, match="narrower forms"):
        made(lambda name, kept: 100.0)


def test_a_machine_that_slows_down_does_not_count(made, graph):
    """Each job measures the dense model too: what all models of a job have in common is the machine."""
    true, speed = secret(graph), iter(range(1, 10_000))
    factor = {"now": 1.0}

    def drifting(name, kept):
        if name == "dense":
            factor["now"] = 1 + 0.3 * (next(speed) % 3)
        return factor["now"] * true(kept)

    table, _ = made(drifting)
    assert table.context(graph).error < 0.02
