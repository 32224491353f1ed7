"""Disturbed measurements: counted turn by turn, repeated, refused, or accepted on record."""

import os

import pytest

from deploypipe.backends import stopwatch
from deploypipe.errors import TargetError
from deploypipe.profiler import noise
from deploypipe.profiler.noise import Noise


class Fake(stopwatch.Cores):
    """Cores on which every turn takes a second, of which others take what is said; our work takes `own` of it."""

    def __init__(self, loads, own=None):
        self.cpus, self.loads, self.own = [0], iter(loads), iter(own or [0.1] * len(loads))

    def start(self):
        pass

    def taken(self):
        return stopwatch.Window(next(self.own), next(self.loads), 1.0)


REQUEST = {"attempts": 3, "max_foreign": 0.05, "runs": 18}


def turns(loads, wanted=3, own=None, **options):
    calls = []
    return (*stopwatch.quiet_turns(lambda: calls.append(1), Fake(loads, own), REQUEST, wanted, **options), len(calls))


def test_quiet_turns_are_not_repeated():
    assert turns([0.0, 0.02, 0.0]) == ([0, 1, 2], pytest.approx(0.0033, abs=1e-3), 3)


def test_disturbed_turns_are_replaced_by_later_ones():
    chosen, load, called = turns([0.9, 0.0, 0.5, 0.0, 0.0])
    assert (chosen, called) == ([1, 3, 4], 5)
    assert load == 0.0


def test_the_quietest_are_kept_when_none_is_quiet():
    chosen, load, called = turns([0.9, 0.3, 0.5, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9])
    assert (chosen, called) == ([1, 2, 4], 9)
    assert load == pytest.approx((0.3 + 0.5 + 0.2 - 0.01) / 3, abs=1e-3)


def test_where_the_system_does_not_tell_every_turn_counts():
    assert turns([None, None, None]) == ([0, 1, 2], None, 3)


@pytest.mark.parametrize("load", [0.0, None])
def test_turns_in_which_our_own_work_took_longer_are_replaced(load):
    assert turns([load] * 9, own=[0.10, 0.14, 0.101, 0.13, 0.102]) == ([0, 2, 4], load, 5)
    assert turns([load] * 9, own=[0.14, 0.10, 0.141, 0.101, 0.102]) == ([1, 3, 4], load, 5)


def test_a_scatter_of_a_few_percent_is_no_disturbance():
    assert turns([0.0] * 9, own=[0.10, 0.104, 0.102])[2] == 3


def test_the_quickest_are_kept_when_the_work_never_takes_the_same_time():
    chosen, _, called = turns([0.0] * 9, own=[0.1, 0.2, 0.3, 0.4, 0.5, 0.16, 0.12, 0.6, 0.7])
    assert (chosen, called) == ([0, 5, 6], 9)
    assert turns([0.0] * 9, own=[0.1, 0.2, 0.3], slower=float("inf"))[2] == 3


@pytest.mark.parametrize(("runs", "wanted", "each"), [(1, 6, 1), (6, 6, 1), (18, 6, 3), (72, 12, 6), (100, 12, 9)])
def test_runs_are_spread_over_turns(runs, wanted, each):
    assert stopwatch.turns_of({"runs": runs}) == (wanted, each)


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.setattr(noise, "_PAUSES_S", (0.0, 0.0))

    def go(judge, loads, threads=1):
        left = list(loads)
        return judge.bounded(lambda: left.pop(0), lambda load: load, threads), len(loads) - len(left)

    return go


def test_a_quiet_measurement_stands_at_once(measure):
    judge = Noise(False)
    assert measure(judge, [0.1, 0.0]) == (0.1, 1)
    assert measure(judge, [None]) == (None, 1)
    assert judge.worst == 0.0


def test_a_disturbed_one_is_repeated(measure):
    assert measure(Noise(False), [0.8, 0.7, 0.2]) == (0.2, 3)


@pytest.mark.parametrize(("load", "threads", "stands"), [(0.4, 1, True), (0.6, 1, False), (0.1, 2, True), (0.4, 2, False)])
def test_several_threads_bear_less_than_one(measure, load, threads, stands):
    if stands:
        assert measure(Noise(False), [load], threads) == (load, 1)
    else:
        with pytest.raises(TargetError):
            measure(Noise(False), [load] * 3, threads)


def test_what_stays_disturbed_is_refused_with_advice(measure):
    with pytest.raises(TargetError, match="other programs took 90% of our processor cores") as caught:
        measure(Noise(False), [0.6, 0.7, 0.9])
    assert "--allow-noise" in caught.value.fix
    assert "DEPLOYPIPE_ALLOW_NOISE=1" in caught.value.fix


def test_accepted_noise_is_not_repeated_but_remembered(measure):
    judge = Noise(True)
    assert measure(judge, [0.7]) == (0.7, 1)
    assert measure(judge, [0.6]) == (0.6, 1)
    assert judge.worst == 0.7


def test_the_environment_accepts_noise(monkeypatch):
    for value, accepted in (("1", True), ("0", False), ("", False), ("yes", True)):
        monkeypatch.setenv("DEPLOYPIPE_ALLOW_NOISE", value)
        assert Noise().accepted is accepted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_more_threads_than_cores_that_we_may_use_are_refused():
    allowed = os.sched_getaffinity(0)
    with pytest.raises(
        SystemExit, match=f"{len(allowed) + 1} threads were asked for, this process may use {len(allowed)} cores"
    ):
        stopwatch.Cores(len(allowed) + 1)
    assert os.sched_getaffinity(0) == allowed
