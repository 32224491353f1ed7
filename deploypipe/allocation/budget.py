"""Read what a user writes as a budget: a share of the dense model, or an absolute amount."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from deploypipe.errors import UsageError, nearest

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {"latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6}, "macs": _COUNTS, "params": _COUNTS}
)
_EXAMPLES = {"latency": "50%, 3ms or 800us", "macs": "50%, 1.2M, 300k or 0.5G", "params": "50%, 1.2M or 300k"}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ%]*)", re.IGNORECASE)


def parse_budget(text: str, metric: str, dense: float) -> float:
    """Return the budget that `text` states, in the unit of the metric (us, MACs or parameters).

    Args:
        text: "50%" of the dense model, or an absolute amount: "3ms", "800us" for latency; "1.2M", "300k", "0.5G" for counts.
        metric: "latency", "macs" or "params".
        dense: What the unpruned model costs, in the unit of the metric.

    Raises:
        UsageError: The text is no budget for this metric, is not positive, or is more than 100 %.

    >>> parse_budget("50%", "latency", 900.0), parse_budget("3ms", "latency", 900.0), parse_budget("1.2M", "macs", 4e6)
    (450.0, 3000.0, 1200000.0)
    """
    if metric not in UNITS:
        raise UsageError(f"unknown metric '{metric}'", at=f"--metric {metric}", fix=nearest(metric, UNITS))
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise _refuse(text, metric, "is not a number with a unit")
    number, unit = float(match[1]), match[2].lower()
    if not 0 < number < float("inf"):
        raise _refuse(text, metric, "must be more than zero")
    if unit == "%":
        if number > 100:
            raise _refuse(text, metric, "is more than the whole model")
        return dense if number == 100 else dense * number / 100  # which may round to less than all of it
    if unit not in UNITS[metric]:
        raise _refuse(text, metric, f"has the unit '{match[2]}', not one of {metric}" if unit else "has no unit")
    return number * UNITS[metric][unit]


def _refuse(text: str, metric: str, why: str) -> UsageError:
    return UsageError(f"budget '{text}' {why}", at=f"--budget {text} --metric {metric}", fix=f"write {_EXAMPLES[metric]}")
