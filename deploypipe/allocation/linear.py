"""A mixed-integer linear program under construction: variables, rows, and the solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csc_array

from deploypipe.allocation.quiet import stdout_to_stderr

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# scipy's codes; the last: HiGHS gave up, as it can where prices differ by twelve orders of magnitude
STATUS = {0: "optimal", 1: "time limit", 2: "infeasible", 4: "unsolved"}


@dataclass(frozen=True)
class Selector:
    """Variables of which exactly one is 1: column `columns[k]` says that the total is `totals[k]`."""

    totals: Ints
    columns: Ints


@dataclass(frozen=True)
class Solution:
    """What the solver found: widths, or None; and a lower limit of the objective."""

    kept: dict[str, int] | None
    bound: float
    status: str  # one of STATUS
    two_four: frozenset[str] = frozenset()  # layers


class Linear:
    """Variables between bounds, some of them whole numbers, and rows: sums of them between bounds."""

    def __init__(self) -> None:
        self._lower: list[Floats] = []
        self._upper: list[Floats] = []
        self._integer: list[Ints] = []
        self._rows: list[tuple[Ints, Floats]] = []
        self._row_bounds: list[tuple[float, float]] = []
        self._n = 0

    @property
    def n_variables(self) -> int:
        """Number of variables, binary and continuous."""
        return self._n

    def _minimise(self, objective: Floats, more: Sequence[tuple[Floats, float]], gap: float, time_limit_s: float) -> Any:
        """Return the solver's answer; `more` are further rows: factors of all variables, and the most that their sum may be."""
        with stdout_to_stderr():
            result = milp(
                objective,
                integrality=np.concatenate(self._integer),
                bounds=Bounds(np.concatenate(self._lower), np.concatenate(self._upper)),
                constraints=self._constraints(more),
                options={"mip_rel_gap": gap, "time_limit": max(time_limit_s, 1e-3)},
            )
        if result.status not in STATUS:
            raise ArithmeticError(f"HiGHS: {result.message}")  # unbounded: a bug in the program
        return result

    def _constraints(self, more: Sequence[tuple[Floats, float]]) -> LinearConstraint:
        rows = [*self._rows, *((np.flatnonzero(factors), factors[np.flatnonzero(factors)]) for factors, _ in more)]
        bounds = np.array([*self._row_bounds, *((-np.inf, limit) for _, limit in more)])
        index = np.repeat(np.arange(len(rows)), [len(columns) for columns, _ in rows])
        entries = (np.concatenate([v for _, v in rows]), (index, np.concatenate([c for c, _ in rows])))
        return LinearConstraint(csc_array(entries, shape=(len(rows), self._n)), bounds[:, 0], bounds[:, 1])

    def _variables(self, n: int, lower: float = 0.0, upper: float = 1.0, *, integer: bool = False) -> Ints:
        self._lower.append(np.full(n, lower))
        self._upper.append(np.full(n, upper))
        self._integer.append(np.full(n, int(integer), np.int64))
        self._n += n
        return np.arange(self._n - n, self._n)

    def _row(self, columns: Ints, values: Floats, low: float, high: float) -> None:
        self._rows.append((columns, values))
        self._row_bounds.append((low, high))

    def _equal(self, total: Ints | np.int64, parts: Ints) -> None:
        """Add the row `sum(parts) = total`."""
        columns = np.append(parts, total)
        self._row(columns, np.append(np.ones(len(parts)), -1.0), 0, 0)

    def _pairs(self, left: Ints, right: Ints) -> Ints:
        """Return variables (len(left), len(right)) that equal the products of two selectors' variables."""
        pairs = self._variables(len(left) * len(right)).reshape(len(left), len(right))
        for i, column in enumerate(left):
            self._equal(column, pairs[i])
        for j, column in enumerate(right):
            self._equal(column, pairs[:, j])
        return pairs
