"""Refuse a latency table that was measured under other conditions than those that hold now."""

from collections.abc import Mapping
from typing import Any

from deploypipe.errors import TargetError

CONDITIONS = (
    "runtime", "version", "precision", "threads", "arch", "cpu", "cpu_flags", "gpu", "model", "governor", "power_mode",
)  # fmt: skip


def refuse_stale(measured: Mapping[str, Any], now: Mapping[str, Any], at: str) -> None:
    """Compare the facts of a table with those of the device as it is now; a condition that neither knows is no difference.

    Args:
        measured: Facts of the table.
        now: Facts of the device, with the precision of the target.
        at: Where the table comes from.

    Raises:
        TargetError: The table does not hold here; says what differs, and how to measure it again.
    """
    differences = [name for name in CONDITIONS if measured.get(name) != now.get(name)]
    if differences:
        shown = "; ".join(f"{name} was {_shown(measured.get(name))}, is {_shown(now.get(name))}" for name in differences)
        raise TargetError(
            f"the latency table does not hold on this device: {shown}",
            at=at,
            fix="measure it here: deploypipe profile --model MODEL --target TARGET --save FOLDER, or leave --table out",
        )


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
