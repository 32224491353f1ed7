"""Measure the same thing at several times, and let those count in which nobody else slowed the device down.

A neighbour on the same chip who empties the cache that we share makes a large model slower by a tenth and more, for seconds,
and a small one not at all. No counter of the system shows it, nor does a measurement that lies within such a spell as a whole.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from deploypipe.backends.base import Timing

T = TypeVar("T")
SLOWER = 0.04  # than the quickest: a sitting that something slowed down


def sit(
    take: Callable[[], T], us: Callable[[T], float], wanted: int, most: int, best: float = float("inf"), pause_s: float = 0.0
) -> list[T]:
    """Return the `wanted` quickest of as many sittings as it takes until so many of them are alike, in the order taken.

    Args:
        take: Measures once.
        us: What a reference that is part of every sitting took, the dense model for example.
        wanted: How many sittings count.
        most: Number of sittings that are taken at most.
        best: What the reference took when it was measured before.
        pause_s: Seconds before a sitting that repeats another.
    """
    taken: list[T] = []
    while len(taken) < max(wanted, most):
        if len(taken) >= wanted:
            time.sleep(pause_s)
        taken.append(take())
        limit = (1 + SLOWER) * min(best, *map(us, taken))
        if sum(us(found) <= limit for found in taken) >= wanted:
            break
    quickest = sorted(range(len(taken)), key=lambda index: us(taken[index]))[:wanted]
    return [taken[index] for index in sorted(quickest)]


def joined(measured: Sequence[Mapping[str, Timing]], reference: str, more_us: Sequence[float] = ()) -> dict[str, Timing]:
    """Return each model's time: its mean share of the reference's, which is the median of all times that it was measured.

    Args:
        measured: Models timed in turns, the same in each.
        reference: Name of one of them.
        more_us: The reference's times elsewhere.
    """
    level = float(np.median([*(one[reference].quiet_us for one in measured), *more_us]))
    scales = [level / one[reference].quiet_us for one in measured]
    return {name: _mean([one[name] for one in measured], scales) for name in measured[0]}


def scatter(measured: Sequence[Mapping[str, Timing]], reference: str) -> dict[str, float]:
    """Return the standard deviation of each model's time over sittings, as a share; of its share of the reference's time.

    For the reference, of its own time. 0 where there was one sitting.
    """
    if len(measured) < 2:
        return dict.fromkeys(measured[0], 0.0)
    levels = np.array([one[reference].quiet_us for one in measured])
    times = {name: np.array([one[name].quiet_us for one in measured]) for name in measured[0]}
    shares = {name: us if name == reference else us / levels for name, us in times.items()}
    return {name: float(np.std(share, ddof=1) / np.mean(share)) for name, share in shares.items()}


def _mean(timings: Sequence[Timing], scales: Sequence[float]) -> Timing:
    """Return the mean of timings, each multiplied by its scale."""

    def mean(name: str) -> float:
        return float(np.mean([scale * getattr(timing, name) for timing, scale in zip(timings, scales, strict=True)]))

    cpu = None if any(timing.cpu_us is None for timing in timings) else mean("cpu_us")
    loads = [timing.foreign_load for timing in timings if timing.foreign_load is not None]
    runs = sum(timing.runs for timing in timings)
    return Timing(mean("median_us"), mean("p10_us"), mean("p90_us"), runs, max(loads, default=None), cpu)
