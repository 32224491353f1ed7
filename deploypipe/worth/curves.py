"""What each width loses and what it saves, as a table: for people and as CSV."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploypipe.cost import CostTable
from deploypipe.errors import UsageError
from deploypipe.folder import explained, require_writable
from deploypipe.plan import KeepPlan
from deploypipe.reports.figures import amount
from deploypipe.reports.render import Row
from deploypipe.training.evaluate import Accuracy
from deploypipe.types import Graph
from deploypipe.worth.sensitivity import Curve

COLUMNS = ("group", "channels", "loss", "rise", "accuracy", "saves", "share")
_ELSEWHERE = "name another file with --out"


@dataclass(frozen=True)
class Point:
    """One group at one width, all others whole.

    Attributes:
        group: Its name.
        size: Its full width, channels.
        width: Channels kept.
        loss: Mean cross entropy on held-out images, nats.
        rise: Of the loss over the dense model, after isotonic cleaning: what the allocator is told, with the sign turned.
        accuracy: Share of the held-out images that are labelled right, 0 to 1.
        saves: Of the cost of the dense model, in the table's unit.
    """

    group: str
    size: int
    width: int
    loss: float
    rise: float
    accuracy: float
    saves: float


@dataclass(frozen=True)
class Curves:
    """Sensitivity of a model.

    Attributes:
        points: Groups that can save most come first; within a group the full width comes first.
        dense: Of the model as it is; `dense.n` held-out images were looked at.
        cost: Of the model as it is.
        unit: Of all costs: "us" or "MACs".
        skipped: Group -> why it was not measured.
    """

    points: tuple[Point, ...]
    dense: Accuracy
    cost: float
    unit: str
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"skipped": dict(self.skipped)}

    def save_csv(self, path: Path) -> None:
        """Write one row for each group and width; the column of the savings carries their unit.

        Raises:
            UsageError: The file cannot be written.
        """
        require_place(path)
        columns = ["group", "size", "width", "loss", "rise", "accuracy", f"saves_{self.unit.lower()}"]
        with explained(path.parent, _ELSEWHERE), path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([columns, *(list(asdict(point).values()) for point in self.points)])


def require_place(path: Path) -> None:
    """Find out before measuring whether a file can be written.

    Raises:
        UsageError: It cannot.
    """
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder, not a file", at=f"--out {path}", fix=_ELSEWHERE)
    require_writable(path.parent, _ELSEWHERE)


def curves_table(
    graph: Graph, table: CostTable, curves: Sequence[Curve], dense: Accuracy, skipped: Mapping[str, str]
) -> Curves:
    """Return the curves with what each width saves."""
    cost = table.predict(graph)

    def saves(group: str, width: int) -> float:
        return cost - table.predict(graph, KeepPlan.of_widths({group: width}))

    ordered = sorted(curves, key=lambda curve: -saves(curve.group, curve.widths[0]))
    points = [
        Point(curve.group, curve.size, width, found.loss, -float(curve.value[width]), found.top1, saves(curve.group, width))
        for curve in ordered
        for width, found in reversed(list(zip(curve.widths, curve.found, strict=True)))
    ]
    return Curves(tuple(points), dense, cost, table.unit, skipped)


def rows(curves: Curves) -> list[Row]:
    """Return one row for each group and width: the columns are COLUMNS."""
    return [
        (
            point.group,
            f"{point.width} of {point.size}",
            f"{point.loss:.4f}",
            f"{point.rise:.4f}",
            f"{100 * point.accuracy:.1f} %",
            amount(point.saves, curves.unit),
            f"{100 * point.saves / curves.cost:.1f} %",
        )
        for point in curves.points
    ]


def pairs(curves: Curves) -> list[Row]:
    """Return (word, sentence) pairs: what the table was measured on, and what is not in it."""
    dense = curves.dense
    text = f"loss {dense.loss:.4f}, accuracy {100 * dense.top1:.1f} %, {amount(curves.cost, curves.unit)}"
    measured = f"on {dense.n} held-out training images, batch norms estimated anew, nothing fine-tuned"
    return [("dense", text), ("measured", measured), *((name, f"not measured: {why}") for name, why in curves.skipped.items())]
