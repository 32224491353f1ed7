"""Lower convex hulls of price curves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def lower_hull(x: Ints, y: Floats) -> Ints:
    """Return the indices of the corners of the lower convex hull of points with ascending x."""
    hull: list[int] = []
    slack = 1e-9 * float(np.abs(y).max(initial=0.0))
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            share = (x[b] - x[a]) / (x[i] - x[a])
            if y[b] < y[a] + share * (y[i] - y[a]) - slack:
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, np.int64)


def touches(totals: Ints, hulls: Sequence[Ints], prices: Floats) -> bool:
    """Whether every column of prices lies on its hull: then it is convex and the envelope is the price itself."""
    slack = 1e-8 * float(np.abs(prices).max(initial=0.0))
    return all(
        bool((prices[:, j] - np.interp(totals, totals[hull], prices[hull, j]) <= slack).all()) for j, hull in enumerate(hulls)
    )
