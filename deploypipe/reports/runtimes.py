"""One pruned model on several runtimes: what was found on each, and which is fastest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploypipe.measurement import Latency
from deploypipe.reports.figures import UNKNOWN, faster_text, markdown_table, microseconds, size

COLUMNS = ("target", "runtime", "dense", "pruned", "change", "file", "difference to torch")


@dataclass(frozen=True)
class RuntimeOutcome:
    """The pruned model on one of several targets that were asked for.

    Attributes:
        target: Name of the target.
        runtime: Its runtime and version.
        dense: Latency of the dense model there, measured in turns with ...
        pruned: ... that of the pruned one; both None if nothing here runs it.
        artifact: Path of the built file below the run folder.
        artifact_bytes: Its size.
        error: Largest difference to the torch model's outputs, as a share of the largest; None if nothing here runs it.
        tolerance: The most that is allowed.
        notes: What else the user should know, in sentences.
    """

    target: str
    runtime: str
    dense: Latency | None
    pruned: Latency | None
    artifact: str
    artifact_bytes: int
    error: float | None
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Measured latency before over after; None unless both were measured."""
        return self.dense.median_us / self.pruned.median_us if self.dense and self.pruned else None

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "RuntimeOutcome":
        """Read what `dataclasses.asdict` gave."""
        times = {side: Latency(**state[side]) if state[side] else None for side in ("dense", "pruned")}
        return cls(**{**state, **times, "notes": tuple(state["notes"])})


def by_speed(outcomes: Sequence[RuntimeOutcome]) -> list[RuntimeOutcome]:
    """Return the outcomes with a measured latency, the fastest pruned model first."""
    timed = [(outcome.pruned.median_us, i) for i, outcome in enumerate(outcomes) if outcome.pruned]
    return [outcomes[i] for _, i in sorted(timed)]


def rows(outcomes: Sequence[RuntimeOutcome]) -> tuple[tuple[str, ...], ...]:
    """Return the comparison as a table, the fastest first; the columns are COLUMNS."""
    timed = by_speed(outcomes)
    return tuple(_row(outcome) for outcome in [*timed, *(outcome for outcome in outcomes if outcome not in timed)])


def verdict(outcomes: Sequence[RuntimeOutcome]) -> str:
    """Say in one sentence where the pruned model is fastest."""
    timed = by_speed(outcomes)
    if len(timed) < 2:
        return "fewer than two of the runtimes could be measured here: nothing to compare"
    first, second = ((outcome.target, outcome.pruned.median_us) for outcome in timed[:2] if outcome.pruned)
    lead = second[1] / first[1] - 1
    return f"{first[0]} is fastest here: {microseconds(first[1])}, {100 * lead:.0f} % ahead of {second[0]}"


def section(outcomes: Sequence[RuntimeOutcome]) -> str:
    """Return the comparison as a part of a Markdown page; empty if there is none."""
    if not outcomes:
        return ""
    what = (
        "The same pruned model, planned on the first target's latency table. Dense and pruned are measured in turns on each "
        "target, one target after the other."
    )
    notes = [f"- {outcome.target}: {note}" for outcome in outcomes for note in outcome.notes]
    parts = ("## Runtimes", what, markdown_table(COLUMNS, rows(outcomes)), f"**{verdict(outcomes)}**", "\n".join(notes))
    return "\n\n".join(part for part in parts if part)


def _row(outcome: RuntimeOutcome) -> tuple[str, ...]:
    times = (microseconds(latency.median_us) if latency else UNKNOWN for latency in (outcome.dense, outcome.pruned))
    error = "not verified" if outcome.error is None else f"{outcome.error:.1e} of at most {outcome.tolerance:.0e}"
    return (outcome.target, outcome.runtime, *times, faster_text(outcome.speedup), size(outcome.artifact_bytes), error)
