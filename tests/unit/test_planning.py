"""The loop that keeps a latency budget: plan, measure, correct the table, plan again."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.measurement import Latency, Round
from deploypipe.pipeline import planning, valuing
from deploypipe.pipeline.planning import MOST_CORRECTIONS, Planner, best, read_rounds
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.valuing import value_notes
from deploypipe.plan import KeepPlan
from deploypipe.progress import Recorder
from deploypipe.store import Kept, Store
from deploypipe.targets import Target, load_target
from deploypipe.training.evaluate import Accuracy


def latency(us: float, spread: float = 0.0, runs: int = 100) -> Latency:
    return Latency(us, us * (1 - spread), us * (1 + spread), runs)


def found(pruned: float, limit: float = 50.0, *, factor: float = 1.0, predicted: float = 50.0) -> Round:
    return Round(factor, 50.0, predicted, limit, latency(pruned), latency(100.0))


class Table(MacTable):
    """A table in microseconds that says one MAC takes `factor` ns."""

    unit = "us"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def terms(self, graph):
        return tuple(replace(t, price=lambda i, o, t=t: self.factor * t.price(i, o) / 1e3) for t in super().terms(graph))

    def predict(self, graph, plan=None):
        return self.factor * super().predict(graph, plan) / 1e3

    def candidates(self, graph):
        return {group.name: tuple(range(1, group.size + 1)) for group in graph.prunable}

    def corrected(self, graph, factor):
        return Table(self.factor * factor)


@dataclass
class FakeDevice:
    """Takes `slower` times what the table says for pruned models, and what it says for the dense one."""

    graph: object
    slower: float
    facts: ClassVar[dict[str, str]] = {"runtime": "fake"}
    target: ClassVar[Target] = load_target("cpu")

    def bench(self, files: dict[str, Path], expected_us: float) -> dict[str, dict[str, float]]:
        plan = KeepPlan.load(files["pruned"])
        times = {"dense": Table().predict(self.graph), "pruned": self.slower * Table().predict(self.graph, plan)}
        return {side: {"median_us": us, "p10_us": us, "p90_us": us, "n_runs": 100} for side, us in times.items()}


class LikesTheFirst:
    """A meter that says that channels of the first group matter nine times as much as those of the second."""

    def known(self, plan: KeepPlan) -> bool:
        return False

    def measure(self, plan: KeepPlan) -> Accuracy:
        first, second = len(plan.keep.get("0", range(40))), len(plan.keep.get("2", range(48)))
        return Accuracy(0.5, 1 - 0.9 * first / 40 - 0.1 * second / 48, 100)


def settle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, budget: str = "50%", meter: LikesTheFirst | None = None
):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of some weights, the first plan leaves so much of the budget that 1 % more still fits
        model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 48, 3), nn.ReLU(), nn.Conv2d(48, 4, 3)).eval()
    graph = trace(model, torch.zeros(1, 3, 12, 12))
    plans: list[KeepPlan] = []
    monkeypatch.setattr(planning, "compact", lambda model, graph, plan: plans.append(plan))

    def built(small, graph, device, folder):
        plans[-1].save(folder / "plan.json")
        return folder / "plan.json"

    monkeypatch.setattr(planning, "built", built)
    table, recorder = Table(), Recorder()
    dense_us = table.predict(graph)
    limit = dense_us * float(budget[:-1]) / 100
    problem = Problem(model, graph, table, limit, None, 0, recorder)
    with Store(tmp_path / "run", recorder) as store:
        dense = Kept("build-dense", tmp_path, "key", 0.0, reused=False)
        request = Request(algo="l1", budget=budget, value="measured" if meter else "scores")
        device = FakeDevice(graph, slower)
        planner = Planner(request, store, device, problem, [], lambda: dense, meter)
        kept = planner.measured(table)
    chosen, rounds = read_rounds(tmp_path / "run")
    return kept.value, chosen, rounds, slower * table.predict(graph, kept.value) / limit, recorder


def test_a_table_that_is_right_needs_no_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, chosen, rounds, used, _ = settle(tmp_path, monkeypatch, slower=1.0)
    assert (chosen, len(rounds)) == (0, 1)
    assert 0.97 < used <= 1.0


@pytest.mark.parametrize("slower", [1.01, 1.1, 1.4])
def test_a_model_that_is_slower_than_predicted_is_planned_again_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    plan, chosen, rounds, used, _ = settle(tmp_path, monkeypatch, slower)
    assert not rounds[0].fits
    assert chosen == 1
    assert rounds[1].factor == pytest.approx(slower, rel=1e-6)
    assert 0.9 < used <= 1.0
    assert KeepPlan.load(tmp_path / "run" / "plan.json").keep == plan.keep


def test_a_model_that_is_much_quicker_than_predicted_gets_the_rest_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chosen, rounds, used, _ = settle(tmp_path, monkeypatch, slower=0.8)
    assert rounds[0].fits
    assert chosen == 1
    assert 0.97 < used <= 1.0


def test_a_budget_that_turns_out_to_be_out_of_reach_is_reported_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, chosen, rounds, used, recorder = settle(tmp_path, monkeypatch, slower=5000.0, budget="20%")
    assert chosen == len(rounds) - 1
    assert used > 1.0
    assert any("out of reach" in note for note in recorder.notes)


def test_that_no_plan_was_left_is_found_out_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = settle(tmp_path, monkeypatch, slower=5000.0, budget="20%")
    again = settle(tmp_path, monkeypatch, slower=5000.0, budget="20%")
    assert not again[-1].ran
    assert again[-1].notes == first[-1].notes
    assert again[0].keep == first[0].keep


def test_with_a_meter_the_loss_decides_every_plan_and_each_plan_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_scores = settle(tmp_path / "scores", monkeypatch, slower=1.1)[0]
    plan, chosen, rounds, used, _ = settle(tmp_path, monkeypatch, slower=1.1, meter=LikesTheFirst())
    assert (chosen, len(rounds)) == (1, 2)
    assert used <= 1.0
    assert len(plan.keep["0"]) == 40 > len(by_scores.keep["0"])
    for number in (1, 2):
        (note,) = value_notes(tmp_path / "run" / f"plan-{number}")
        assert "100 held-out training images" in note
    assert value_notes(tmp_path / "scores" / "run" / "plan-1") == []


def test_an_algorithm_that_chooses_widths_itself_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn:
        def plan(self, problem: Problem) -> KeepPlan:
            return KeepPlan({"0": (0, 1)})

    monkeypatch.setattr(valuing, "make", lambda name, options: Stubborn())
    with pytest.raises(UsageError, match="chooses widths itself"):
        settle(tmp_path, monkeypatch, slower=1.0, meter=LikesTheFirst())


def test_the_same_command_reuses_plans_and_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = settle(tmp_path, monkeypatch, slower=1.1)
    again = settle(tmp_path, monkeypatch, slower=1.1)
    assert again[0].keep == first[0].keep
    assert not again[-1].ran
    assert {"plan-1", "measure-plan-1", "plan-2", "measure-plan-2", "plan"} == set(again[-1].was_reused)


def test_never_more_than_the_allowed_corrections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Round, "next_factor", property(lambda self: self.factor * 1.02))
    _, chosen, rounds, _, _ = settle(tmp_path, monkeypatch, slower=1.5)
    assert len(rounds) == 1 + MOST_CORRECTIONS
    assert chosen == MOST_CORRECTIONS


def test_best_takes_the_slowest_that_fits_else_the_least_miss() -> None:
    assert best([found(55), found(48), found(44)]) == 1
    assert best([found(60), found(52), found(53)]) == 1


def test_the_next_factor_would_have_put_the_plan_on_its_measurement() -> None:
    trial = found(60.0, limit=48.0, factor=1.1, predicted=49.0)
    corrected = 49.0 / 1.1 * trial.next_factor  # what the table so corrected says about this plan
    assert corrected / 50.0 == pytest.approx(60.0 / 48.0)


def test_a_noisy_measurement_must_leave_room_for_its_error() -> None:
    noisy = replace(found(49.9), pruned=latency(49.9, spread=0.1), dense=latency(100.0, spread=0.1))
    assert not noisy.fits
    assert noisy.upper_us > 50.0
    assert found(49.9).fits


def test_a_plan_must_leave_room_for_what_differs_between_sittings() -> None:
    scattered = replace(latency(49.8), scatter=0.003)
    assert found(49.8).fits
    assert not replace(found(49.8), pruned=scattered).fits
    assert replace(found(49.5), pruned=replace(latency(49.5), scatter=0.003)).fits
    # Of a share of the dense model, the pruned model's scatter is told beside it; a time knows no such partner.
    drifting = replace(found(49.8), dense=replace(latency(100.0), scatter=0.01))
    assert drifting.fits
    assert not replace(drifting, absolute=True).fits


@pytest.mark.parametrize("seed", range(3))
def test_what_fits_keeps_its_limit_when_it_is_measured_again(seed: int) -> None:
    """The means of three draws each, the second held against the bound that the first gave: one in twenty is above."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(1.0, 0.003, (2, 20_000, 3))
    pruned = [replace(latency(mean), scatter=sd) for mean, sd in zip(first.mean(1), first.std(1, ddof=1), strict=True)]
    upper = np.array([replace(found(1.0), pruned=one).upper_us for one in pruned])
    assert np.mean(second.mean(1) > upper) == pytest.approx(0.05, abs=0.01)


def test_more_runs_make_the_median_surer() -> None:
    assert latency(10, 0.1, 400).relative_error == pytest.approx(latency(10, 0.1, 100).relative_error / 2)
