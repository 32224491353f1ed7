"""Measurements at several times: the undisturbed ones count."""

import pytest

from deploypipe.backends.base import Timing
from deploypipe.measurement import Latency
from deploypipe.pipeline import stages
from deploypipe.profiler import sittings
from deploypipe.profiler.sittings import scatter, sit
from deploypipe.targets import load_target


def run(times, wanted=2, most=5, **options):
    left = list(times)
    found = sit(lambda: left.pop(0), float, wanted, most, **options)
    return found, len(times) - len(left)


def test_alike_sittings_are_not_repeated():
    assert run([100, 103, 90]) == ([100, 103], 2)


def test_what_was_slowed_down_is_taken_again():
    assert run([100, 130, 128, 101, 90]) == ([100, 101], 4)
    assert run([130, 101, 128, 100, 90]) == ([101, 100], 4)


def test_the_quickest_count_in_the_order_taken_when_no_two_are_alike():
    assert run([140, 100, 130, 120, 110]) == ([100, 110], 5)


def test_a_spell_that_lasts_is_seen_beside_what_was_measured_before():
    assert run([130, 131, 132]) == ([130, 131], 2)
    assert run([130, 131, 102, 101], best=100.0) == ([102, 101], 4)
    assert run([130, 131, 132, 133, 134], best=100.0) == ([130, 131], 5)


def test_never_fewer_than_wanted():
    assert run([100, 150, 130], wanted=3, most=1) == ([100, 150, 130], 3)


def test_only_repeated_sittings_wait(monkeypatch):
    pauses = []
    monkeypatch.setattr(sittings.time, "sleep", pauses.append)
    run([100, 130, 128, 101], pause_s=3.0)
    assert pauses == [3.0, 3.0]
    with pytest.raises(IndexError):
        run([100, 130, 128])


def sitting(dense, pruned):
    return {name: Timing(us, us, us, 10, 0.0) for name, us in {"dense": dense, "pruned": pruned}.items()}


def test_scatter_is_of_the_share_of_the_reference():
    alike = [sitting(100.0, 50.0), sitting(130.0, 65.0)]
    assert scatter(alike, "dense")["pruned"] == 0.0
    assert scatter(alike, "dense")["dense"] == pytest.approx(30 / 2**0.5 / 115)
    apart = scatter([sitting(100.0, 50.0), sitting(100.0, 51.0), sitting(100.0, 49.0)], "dense")
    assert apart == {"dense": 0.0, "pruned": pytest.approx(0.02)}


def test_one_sitting_tells_nothing_of_scatter():
    assert scatter([sitting(100.0, 50.0)], "dense") == {"dense": 0.0, "pruned": 0.0}


class Answers:
    """A backend and runner whose jobs are the numbers of runs that were asked for, and answer what was given."""

    def __init__(self, *times):
        self.left, self.runs = list(times), []

    def bench_job(self, models, target):
        return target.measure.runs

    def run(self, job, folder):
        self.runs.append(job)
        return self.left.pop(0)

    def read_bench(self, found):
        return sitting(*found)


def benched(monkeypatch, answers, expected_us=None, noise="0"):
    monkeypatch.setattr(stages, "_SITTINGS", 3)
    monkeypatch.setattr(sittings.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("DEPLOYPIPE_ALLOW_NOISE", noise)
    device = stages.Device(load_target("cpu").replace(runs=100))
    device.backend = device.runner = answers
    return {side: Latency(**found) for side, found in device.bench({"dense": "d", "pruned": "p"}, expected_us).items()}


def test_a_device_measures_in_three_processes_that_share_the_runs(monkeypatch):
    answers = Answers((100.0, 50.0), (110.0, 55.0), (102.0, 52.02), (1.0, 1.0))
    found = benched(monkeypatch, answers)
    assert answers.runs == [34, 34, 34]
    assert found["dense"].median_us == pytest.approx(102.0)
    assert found["pruned"].median_us == pytest.approx(102.0 * (0.5 + 0.5 + 0.51) / 3), "its mean share of the dense model"
    assert found["pruned"].scatter == pytest.approx(0.01 / 3**0.5 / (1.51 / 3))
    assert found["pruned"].n_runs == 30


def test_a_device_repeats_what_was_slower_than_before(monkeypatch):
    slow = ((130.0, 50.0), (130.0, 50.0))
    found = benched(monkeypatch, Answers(*slow, *3 * [(100.0, 50.0)], (1.0, 1.0)), expected_us=99.0)
    assert found["dense"].median_us == 100.0
    assert found["pruned"].scatter == 0.0
    accepted = benched(monkeypatch, Answers(*slow, *3 * [(100.0, 50.0)]), expected_us=99.0, noise="1")
    assert accepted["dense"].median_us == 130.0, "where noise is accepted, the first three count"
