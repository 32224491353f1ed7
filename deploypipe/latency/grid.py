"""Measured times of one kernel shape between the widths that were measured."""

from bisect import bisect_left
from collections.abc import Mapping

from deploypipe.latency.widths import Steps


class Grid:
    """Measured times of one kernel shape over two widths; bilinear between them, never outside: neither above nor below."""

    def __init__(self, points: Mapping[tuple[int, int], float]) -> None:
        self.points = points
        rows: dict[int, dict[int, float]] = {}
        for (n_in, n_out), us in points.items():
            rows.setdefault(n_in, {})[n_out] = us
        self.rows = {n_in: dict(sorted(row.items())) for n_in, row in sorted(rows.items())}
        self.ins, self.outs = sorted(rows), sorted({n_out for _, n_out in points})

    @property
    def reach(self) -> str:
        """From which widths to which was measured, in words; a kernel whose widths are tied has only one."""
        spans = [f"{known[0]} to {known[-1]} {end}" for known, end in ((self.ins, "input"), (self.outs, "output")) if known[-1]]
        return f"{' and '.join(spans)} channels"

    def price(self, n_in: int, n_out: int, steps: Steps) -> float | None:
        """Return the time at these widths, None if they lie outside what was measured.

        A width between steps costs what the next step costs; one whose next step lies below all that was measured costs what
        nobody knows.
        """
        if (n_in, n_out) in self.points:
            return self.points[n_in, n_out]
        across, along = _fit(n_in, self.ins, steps), _fit(n_out, self.outs, steps)
        if across is None or along is None:
            return None
        off = any(width % steps.align and width not in known for width, known in ((n_in, self.ins), (n_out, self.outs)))
        # Rows that were measured at this very output width, as the candidates are, before those that were not.
        exact = {at: row[along] for at, row in self.rows.items() if along in row}
        found = _between(across, exact)
        if found is None:
            rows = {at: _between(along, row) for at, row in self.rows.items()}
            found = _between(across, {at: us for at, us in rows.items() if us is not None})
        return None if found is None else found * (steps.penalty if off else 1.0)


def _fit(width: int, known: list[int], steps: Steps) -> int | None:
    """Return the width that costs as much as `width`: measured, or a whole step between measured ones; None if neither."""
    if width in known:
        return width
    step = steps.up(width)
    return None if width > known[-1] or step < known[0] else min(step, known[-1])


def _between(at: int, row: Mapping[int, float]) -> float | None:
    """Interpolate linearly in an ascending row; None outside."""
    if at in row:
        return row[at]
    known = list(row)
    i = bisect_left(known, at)
    if i in (0, len(known)):
        return None
    low, high = known[i - 1], known[i]
    return row[low] + (row[high] - row[low]) * (at - low) / (high - low)
