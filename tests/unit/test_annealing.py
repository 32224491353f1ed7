"""Annealing over rates: feasible steps, acceptance, and a toy whose optimum is known."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from deploypipe.ingredients.annealing import MOST, Schedule, accepted, anneal, guided, rescaled

Rates = NDArray[np.float64]


def toy(seed: int) -> tuple[Callable[[Rates], float], Callable[[Rates], bool], float]:
    """The reward 1 - sum a r^3, the constraint that the weighted mean rate is 0.6, and the best reward under it."""
    rng = np.random.default_rng(seed)
    a, w = rng.uniform(0.01, 0.2, 8), rng.dirichlet(np.ones(8) * 5)

    def reward(rates: Rates) -> float:
        return float(1 - (a * rates**3).sum())

    # Lagrange: 3 a r^2 = mu w, with r capped; the multiplier by bisection.
    low, high = 0.0, 1e3
    for _ in range(200):
        mu = (low + high) / 2
        best = np.minimum(np.sqrt(mu * w / (3 * a)), MOST)
        low, high = (mu, high) if w @ best < 0.6 else (low, mu)
    return reward, lambda rates: bool(w @ rates >= 0.6 - 1e-9), reward(np.minimum(np.sqrt(high * w / (3 * a)), MOST))


def test_annealing_comes_near_the_optimum_and_beats_random_search() -> None:
    gaps, wins = [], 0
    for seed in range(20):
        reward, fits, optimum = toy(seed)
        rng = np.random.default_rng(seed)
        first = rescaled(rng.uniform(0, 1, 8), fits)
        rates, found = anneal(first, lambda r, fits=fits: rescaled(r, fits), reward, Schedule(evaluations=300), rng)
        assert fits(rates)
        assert found == reward(rates) <= optimum + 1e-6
        chance = max(reward(rescaled(rng.uniform(0, 1, 8), fits)) for _ in range(300))
        gaps.append(optimum - found)
        wins += found > chance
    assert max(gaps) < 0.03
    assert np.mean(gaps) < 0.012
    assert wins >= 16


def test_a_temperature_far_above_the_rewards_is_a_random_walk() -> None:
    """The trap: temperatures of 100 to 20 with rewards between 0 and 1 accept everything."""
    gaps = {start: [] for start in (0.05, 100.0)}
    for start, found in gaps.items():
        for seed in range(20):
            reward, fits, optimum = toy(seed)
            rng = np.random.default_rng(seed)
            schedule = Schedule(start, start / 25, 300)
            first = rescaled(rng.uniform(0, 1, 8), fits)
            found.append(optimum - anneal(first, lambda r, fits=fits: rescaled(r, fits), reward, schedule, rng)[1])
    assert np.mean(gaps[0.05]) < 0.8 * np.mean(gaps[100.0])


@pytest.mark.parametrize(("drop", "temperature", "share"), [(0.01, 0.05, 0.82), (0.05, 0.05, 0.37), (0.01, 20.0, 0.9995)])
def test_a_worse_reward_is_accepted_as_often_as_it_should_be(drop: float, temperature: float, share: float) -> None:
    rng = np.random.default_rng(0)
    assert np.mean([accepted(0.5, 0.5 - drop, temperature, rng) for _ in range(4000)]) == pytest.approx(share, abs=0.03)
    assert all(accepted(0.5, 0.5, temperature, rng) for _ in range(20))


def test_changed_rates_meet_the_constraint_closely_and_stay_below_one() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        w = rng.dirichlet(np.ones(6))
        found = rescaled(rng.uniform(-0.5, 1.5, 6), lambda rates, w=w: bool(w @ rates >= 0.7))
        assert found.min() >= 0
        assert found.max() <= MOST < 1
        assert 0.7 - 1e-9 <= w @ found < 0.7 + 1e-5
    out_of_reach = rescaled(np.array([0.2, 0.5]), lambda rates: False)
    assert out_of_reach.tolist() == [MOST, MOST]


def test_the_guided_start_never_prunes_a_layer_less_than_a_smaller_one() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        sizes = rng.uniform(10, 1e6, 9)
        rates = guided(sizes, rng)
        ordered = rates[np.argsort(sizes)]
        assert (np.diff(ordered) >= 0).all()
        scaled = rescaled(rates, lambda r: r.mean() >= 0.5)[np.argsort(sizes)]
        assert (np.diff(scaled) >= -1e-12).all()


def test_the_temperature_falls_and_steps_shrink_with_it() -> None:
    schedule = Schedule(0.05, 0.002, 50)
    path = [schedule.temperature(n) for n in range(50)]
    assert path[0] == pytest.approx(0.05)
    assert path[-1] == pytest.approx(0.002)
    assert all(b < a for a, b in itertools.pairwise(path))
    steps: list[float] = []

    def feasible(rates: Rates) -> Rates:
        steps.append(float(np.abs(rates).max()))
        return np.zeros(4)

    anneal(np.zeros(4), feasible, lambda rates: 0.0, schedule, np.random.default_rng(0))
    assert len(steps) == 49
    assert max(steps[:5]) <= 0.35
    assert max(steps[-5:]) <= 0.35 * 0.002 / 0.05 * 1.4
