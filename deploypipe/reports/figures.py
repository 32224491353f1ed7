"""Figures as text for people: counts, times, sizes, accuracies, tables."""

from collections.abc import Iterable, Sequence
from math import sqrt

UNKNOWN = "not measured"
UNVERIFIED = "UNVERIFIED"  # begins a note that must not be overlooked
BY_CHANCE = f"{UNVERIFIED}: the dense model is right no more often than by chance"  # so that no loss can be seen


def count(number: float) -> str:
    """Return a count in three digits: 41.3 k, 1.82 G."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            digits = 2 if number < 10 * factor else 1 if number < 100 * factor else 0
            return f"{number / factor:.{digits}f} {unit}"
    return f"{number:.0f}"


def microseconds(us: float) -> str:
    """Return a time in three digits: 812 us, 3.04 ms, 1.20 s."""
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if us >= factor:
            digits = 2 if us < 10 * factor else 1 if us < 100 * factor else 0
            return f"{us / factor:.{digits}f} {unit}"
    return f"{us:.0f} us" if us >= 100 else f"{us:.1f} us"


def size(n_bytes: int) -> str:
    """Return a file size: 180 kB, 46.8 MB."""
    return f"{count(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes} B"


def amount(value: float, unit: str) -> str:
    """Return a budget's number in its own unit."""
    return microseconds(value) if unit == "us" else f"{count(value)} {unit}"


def faster_text(speedup: float | None) -> str:
    """Return a speed-up in words: 1.93x faster."""
    return "" if speedup is None else f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def unmeasured(source: str, profile: str = "") -> str:
    """Say what latencies are that the run did not measure: by their table's source, or by which stored profile it is."""
    return f"from {profile}, not measured in this run" if profile else f"{source}, not measured" if source else UNKNOWN


def accuracy_text(value: float | None, n_test: int) -> str:
    """Return an accuracy with its standard error: 97.22 % ± 0.87."""
    return UNKNOWN if value is None else f"{100 * value:.2f} % ± {100 * standard_error(value, n_test):.2f}"


def standard_error(accuracy: float | None, n_test: int) -> float:
    """Return the standard error of an accuracy, 0.01 = one point."""
    return sqrt(accuracy * (1 - accuracy) / n_test) if accuracy is not None and n_test else 0.0


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
