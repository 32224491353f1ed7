"""Simulated annealing over pruning rates, in units of the reward.

Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, AAAI 2020,
arXiv:1907.03141, section 4.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

Rates = NDArray[np.float64]  # one for each layer or group, from 0 (whole) to below 1
MOST = 0.98  # a rate is always less than 1


@dataclass(frozen=True)
class Schedule:
    """How the temperature falls.

    Attributes:
        start: First temperature, of the order of the rewards' differences. With rewards from 0 to 1 and a temperature of 20,
            as in a known implementation, everything is accepted and the search is a random walk.
        stop: Last temperature.
        evaluations: Rewards that are asked for, the first one included.
        spread: Largest change of a rate at the first temperature; it shrinks with the temperature.
    """

    start: float = 0.05
    stop: float = 0.002
    evaluations: int = 100
    spread: float = 0.35

    def temperature(self, n: int) -> float:
        """Return the temperature of evaluation n, from 0."""
        share = n / max(self.evaluations - 1, 1)
        return float(self.start * (self.stop / self.start) ** share)


def anneal(
    first: Rates,
    feasible: Callable[[Rates], Rates],
    reward: Callable[[Rates], float],
    schedule: Schedule,
    rng: np.random.Generator,
) -> tuple[Rates, float]:
    """Return the best rates that were met, and their reward.

    Args:
        first: Where the search starts; feasible.
        feasible: Makes changed rates feasible.
        reward: Of feasible rates; higher is better.
        schedule: Temperatures and number of evaluations.
        rng: Of all draws.
    """
    now, found = first, reward(first)
    best, most = now, found
    for n in range(1, schedule.evaluations):
        temperature = schedule.temperature(n)
        step = schedule.spread * temperature / schedule.start
        offer = feasible(now + rng.uniform(-step, step, len(now)))
        value = reward(offer)
        if accepted(found, value, temperature, rng):
            now, found = offer, value
        if value > most:
            best, most = offer, value
    return best, most


def accepted(before: float, after: float, temperature: float, rng: np.random.Generator) -> bool:
    """Say whether to go on from a new reward: surely if it is no worse, else with probability `exp(-(before - after) / T)`."""
    return after >= before or rng.random() < exp(-(before - after) / temperature)


def rescaled(rates: Rates, fits: Callable[[Rates], bool]) -> Rates:
    """Return the smallest multiple of the rates that fits, each kept from 0 to below 1; the largest if none does.

    Args:
        rates: Any numbers; negative ones count as a little above 0, so that every rate can be raised.
        fits: Of rates; higher rates fit if lower ones do.
    """
    rates = np.clip(rates, 1e-3, MOST)

    def scaled(share: float) -> Rates:
        """Return rates between all that can be (0) and none (1)."""
        return np.minimum(rates * (1 / max(share, 1e-9) - 1), MOST)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    return scaled(low)


def guided(sizes: NDArray[np.float64], rng: np.random.Generator) -> Rates:
    """Return random rates with which no layer is pruned less than a smaller one, and the most at most twice the least.

    Args:
        sizes: Weights of each layer.
        rng: Of the draw.
    """
    rates = np.empty(len(sizes))
    rates[np.argsort(sizes, kind="stable")] = np.sort(rng.uniform(0.5, 1, len(sizes)))
    return rates
