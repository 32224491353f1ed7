"""Finished runs side by side: what they reached, and which widths they chose."""

from collections.abc import Mapping
from dataclasses import dataclass

from deploypipe.reports.advice import points_lost
from deploypipe.reports.figures import accuracy_text, count, faster_text, microseconds, size
from deploypipe.reports.render import Row, latency_text
from deploypipe.reports.report import GroupOutcome, Report

COLUMNS = (
    *("run", "target", "algorithm", "budget", "met", "accuracy", "lost", "predicted", "latency", "faster"),
    *("file", "parameters", "MACs"),
)


@dataclass(frozen=True)
class Widths:
    """Which channels each run kept: a row for each group that some run pruned, a column for each run; and what is left out."""

    columns: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def outcome_rows(reports: Mapping[str, Report]) -> tuple[Row, ...]:
    """Return one row for each run, the most accurate first: the columns are COLUMNS."""
    return tuple(_outcome_row(name, report) for name, report in _ordered(reports).items())


def widths(reports: Mapping[str, Report]) -> Widths:
    """Lay the widths beside each other, runs in the order of `outcome_rows`, groups in the order of the model."""
    ordered = _ordered(reports)
    runs = [{group.name: group for group in report.groups} for report in ordered.values()]
    names = list(dict.fromkeys(name for run in runs for name in run))
    shared = [name for name in names if all(name in run for run in runs)]
    pruned = [name for name in shared if any(run[name].kept < run[name].size for run in runs)]
    rows = tuple((name, *(_width(run[name]) for run in runs)) for name in pruned)
    return Widths(("group", *ordered), rows, tuple(_notes(list(ordered.values()), len(names) - len(shared), not pruned)))


def _notes(reports: list[Report], n_alone: int, nothing: bool) -> list[str]:
    models = sorted({report.model for report in reports})
    notes = []
    if len(models) > 1:
        notes.append(f"the runs are of different models ({', '.join(models)}): groups are matched by name alone")
    data = sorted({report.data for report in reports})
    if len(data) > 1:
        notes.append(f"accuracies are of different data ({'; '.join(data)})")
    if n_alone:
        notes.append(f"{n_alone} group{'s' * (n_alone != 1)} left out that not every run has")
    if nothing:
        notes.append("no run pruned a group that all runs have")
    return notes


def _ordered(reports: Mapping[str, Report]) -> Mapping[str, Report]:
    return dict(sorted(reports.items(), key=lambda item: -(item[1].pruned.accuracy or 0.0)))


def _outcome_row(name: str, report: Report) -> Row:
    pruned, lost = report.pruned, points_lost(report.dense, report.pruned)
    return (
        name,
        report.target if report.threads == 1 else f"{report.target}, {report.threads} threads",
        report.method,
        f"{report.budget.asked} {report.budget.metric}",
        "yes" if report.budget.met else "no",
        accuracy_text(pruned.accuracy, report.n_test),
        "" if lost is None else f"{100 * lost:.2f}",
        "none" if pruned.predicted_us is None else microseconds(pruned.predicted_us) + _origin(report),
        latency_text(pruned.latency),
        faster_text(report.speedup),
        size(pruned.artifact_bytes),
        count(pruned.n_parameters),
        count(pruned.n_macs),
    )


def _origin(report: Report) -> str:
    """Say so if the latency table was not measured, or not on the run's own device."""
    if report.profile:
        return f" ({report.table}, stored profile)"
    return "" if report.table in ("", "measured", "fitted") else f" ({report.table}, not measured)"


def _width(group: GroupOutcome) -> str:
    return f"{group.size} -> {group.kept}" if group.kept < group.size else str(group.size)
