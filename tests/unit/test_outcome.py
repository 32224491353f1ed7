"""The verdict on a latency budget: from one measurement, whatever the table said before."""

from types import SimpleNamespace

import pytest

from deploypipe.latency.table import Context, LatencyTable
from deploypipe.pipeline.outcome import _by_chance, _drift, _judged, _quality
from deploypipe.pipeline.request import Request


def findings(dense_then: float, dense_now: float, pruned_now: float) -> SimpleNamespace:
    table = SimpleNamespace(predict=lambda graph: dense_then, source="measured")
    latencies = {"dense": {"median_us": dense_now}, "pruned": {"median_us": pruned_now}}
    return SimpleNamespace(table=table, graph=None, latencies=latencies, budget=0.5 * dense_then, sparse=None)


def test_a_share_is_one_of_the_dense_model_measured_beside_it() -> None:
    limit, reached = _judged(Request(budget="50%"), findings(192.4, 161.9, 86.3))
    assert limit == pytest.approx(80.95)
    assert reached > limit, "within half of the old dense latency, but not of the present one"


def test_an_amount_stays_what_it_is() -> None:
    assert _judged(Request(budget="90us"), findings(192.4, 161.9, 86.3)) == (90.0, 86.3)


@pytest.mark.parametrize(("then", "now", "told"), [(192.4, 161.9, True), (150.0, 161.9, True), (166.1, 165.1, False)])
def test_drift_since_profiling_is_told(then: float, now: float, told: bool) -> None:
    notes = _drift(findings(then, now, 80.0))
    assert bool(notes) == told
    assert not told or (f"{then:.0f} us" in notes[0] and f"{now:.0f} us" in notes[0])


def test_an_estimate_is_no_measurement_that_a_device_has_drifted_from() -> None:
    found = findings(192.4, 161.9, 80.0)
    found.table.source = "estimated"
    assert _drift(found) == ()


@pytest.mark.parametrize(("facts", "told"), [({}, 0.91), ({"method": "fitted"}, 0.91), ({"source": "estimated"}, None)])
def test_only_tables_held_against_the_device_state_their_additivity(facts: dict[str, str], told: float | None) -> None:
    found = Context("net", {}, (), 100.0, 1.0, 0.91, 0.0, 30, (0.14, -0.14))
    table = LatencyTable(facts, {}, (), (found,))
    assert _quality(table, found) == {"table": table.source, "table_error": pytest.approx(0.14), "table_additivity": told}
    assert _quality(None, None) == {"table": "", "table_error": None, "table_additivity": None}


@pytest.mark.parametrize(("accuracy", "classes", "told"), [(0.1, 10, True), (0.13, 10, True), (0.2, 10, False), (0.2, 3, True)])
def test_a_dense_model_that_guesses_is_told_of(accuracy: float, classes: int, told: bool) -> None:
    found = SimpleNamespace(accuracies={"dense": accuracy, "n_test": 300})
    assert bool(_by_chance(found, classes)) == told
