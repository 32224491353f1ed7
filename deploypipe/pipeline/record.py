"""Write a finished run into the ledger: what was predicted before measuring, and what was measured."""

from dataclasses import replace
from pathlib import Path

from deploypipe import __version__
from deploypipe.latency.table import LatencyTable
from deploypipe.measurement import Round
from deploypipe.reports import ledger
from deploypipe.reports.report import Report
from deploypipe.targets import data_folder
from deploypipe.types import Graph


def recorded(report: Report, run: Path, table: LatencyTable | None, graph: Graph) -> Report:
    """Append the run's first plan to the ledger; return the report, with a note where there is something to say.

    Later plans were made with a table that this run's own measurement had corrected: their predictions prove nothing. A ledger
    that cannot be written costs the run nothing but a note: its result does not depend on it.

    Args:
        report: What was asked, and what was measured.
        run: The run folder.
        table: As it was measured, before this run corrected anything in it; without one there is no row.
        graph: Of the dense model.
    """
    if table is None or not report.budget.rounds:
        return report
    note = written(_entry(report, run, table.id, table.predict(graph), report.budget.rounds[0]))
    return replace(report, notes=(*report.notes, note)) if note else report


def written(entry: ledger.Entry) -> str:
    """Append a row to the ledger; return a note for the user, also where it cannot be written, mostly empty."""
    try:
        return ledger.append(entry)
    except OSError as error:
        return (
            f"the run could not be written into the ledger in {data_folder()} ({error.strerror}): "
            "set DEPLOYPIPE_DATA to a folder that can be written"
        )


def _entry(report: Report, run: Path, table: str, predicted_dense_us: float, first: Round) -> ledger.Entry:
    dense, pruned = first.dense, first.pruned
    return ledger.Entry(
        date=report.created,
        target=report.target,
        threads=report.threads,
        runtime=str(report.machine.get("runtime", "")),
        runtime_version=str(report.machine.get("version", "")),
        processor=str(report.machine.get("cpu", "")),
        model=report.model,
        algorithm=report.algorithm,
        budget=report.budget.asked,
        limit_us=first.limit_us,
        predicted_dense_us=predicted_dense_us,
        predicted_pruned_us=first.predicted_us,
        dense_us=dense.median_us,
        dense_p10_us=dense.p10_us,
        dense_p90_us=dense.p90_us,
        pruned_us=pruned.median_us,
        pruned_p10_us=pruned.p10_us,
        pruned_p90_us=pruned.p90_us,
        n_runs=pruned.n_runs,
        foreign_load=pruned.foreign_load,
        n_corrections=report.budget.n_corrections,
        version=__version__,
        run=str(run),
        table=table,
    )
