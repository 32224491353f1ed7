"""Write a finished run into the ledger: what was predicted before measuring, and what was measured."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploypipe import __version__, ledger
from deploypipe.latency.table import LatencyTable
from deploypipe.plan import KeepPlan
from deploypipe.report import Latency, Report
from deploypipe.targets import data_folder
from deploypipe.types import Graph


def recorded(
    report: Report, run: Path, table: LatencyTable | None, graph: Graph, plan: KeepPlan, latencies: Mapping[str, Any]
) -> Report:
    """Append the run to the ledger; return the report, with a note where there is something to say.

    A ledger that cannot be written costs the run nothing but a note: its result does not depend on it.

    Args:
        report: What was asked, and where it was measured.
        run: The run folder.
        table: As it was measured, before this run corrected anything in it; without one there is no row.
        graph: Of the dense model.
        plan: Chosen on this very table.
        latencies: Of the dense model and of the model under this very plan, measured in turns.
    """
    if table is None:
        return report
    predicted = (table.predict(graph), table.predict(graph, plan))
    measured = (Latency(**latencies["dense"]), Latency(**latencies["pruned"]))
    try:
        note = ledger.append(_entry(report, run, table.id, predicted, measured))
    except OSError as error:
        note = (
            f"the run could not be written into the ledger in {data_folder()} ({error.strerror}): "
            "set DEPLOYPIPE_DATA to a folder that can be written"
        )
    return replace(report, notes=(*report.notes, note)) if note else report


def _entry(
    report: Report, run: Path, table: str, predicted: tuple[float, float], measured: tuple[Latency, Latency]
) -> ledger.Entry:
    dense, pruned = measured
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
        limit_us=report.budget.limit,
        predicted_dense_us=predicted[0],
        predicted_pruned_us=predicted[1],
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
