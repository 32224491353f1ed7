"""The latency table of a runtime that is timed by whole models only: random plans are measured, and layers fitted to them.

The model is compacted under plans that spread over the whole range of widths; each is timed in turns with the dense model. To
most of them layers are fitted (see `regression`), the others judge that: a table that is off by more than a tenth is refused.
"""

import csv
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deploypipe.backends.base import Facts
from deploypipe.compact import compact
from deploypipe.errors import TargetError
from deploypipe.latency.context import MOST_ERROR, Context, Overhead
from deploypipe.latency.files import hashed, write_file
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.profiler.bench import Bench
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.noise import ACCEPTED
from deploypipe.profiler.regression import Fit, fit
from deploypipe.progress import Reporter
from deploypipe.types import Graph

N_FITTED, N_HELD = 36, 9  # plans that the fit sees; plans that judge it
_PER_JOB, _SEED, _DRAWN = 9, 21, 3  # plans of one job; how many are drawn for each that is taken
_SECONDS, _FEWEST = 5.0, 12  # of measuring one job; runs of each plan, at least


def fitted_table(
    bench: Bench, model: nn.Module, example: Any, graph: Graph, facts: Facts, root: Path, reporter: Reporter, fresh: bool
) -> LatencyTable:
    """Return the table of `graph`, measured before or now; plans measured before an interruption are not measured again.

    Args:
        bench: Times whole models.
        model: To compact under each plan.
        example: Its inputs.
        graph: Of the model.
        facts: Of the runtime and the device.
        root: Where fitted tables of this runtime on this device are kept.
        reporter: Told about progress.
        fresh: Forget first what has been measured for this model.

    Raises:
        ModelError: A pruned model cannot be compacted or exported.
        BackendError: The runtime failed.
        TargetError: The fit is off by more than a tenth on plans that it did not see.
    """
    fitted = [group.name for group in graph.prunable]  # nothing is learned of widths that were not to change
    folder = root / hashed([structure_of(graph), sorted(graph.kept().items()), fitted])
    if fresh and folder.exists():
        shutil.rmtree(folder)
    if (folder / "device.json").is_file():
        kept_table = LatencyTable.load(folder)
        known = kept_table.known(graph)
        if known and (bench.noise.accepted or not known.far_off):  # else it was half written, or accepted another time
            reporter.reused("profile model")
            return kept_table
    multiple = bench.backend.channel_multiple(facts)
    steps: dict[str, Steps] = {kind: Steps(multiple) for kind in ("linear", *(layer.kind for layer in graph.layers))}
    plans = _distinct(graph, LatencyTable({}, steps, ()).candidates(graph))
    folder.mkdir(parents=True, exist_ok=True)
    context, times = _timed(bench, model, example, graph, plans, folder / "plans.csv", reporter)
    held = np.arange(len(plans)) % ((N_FITTED + N_HELD) // N_HELD) == 0  # each leaning between narrow and wide is among them
    kept = [graph.kept(), *(graph.kept(plan) for plan, out in zip(plans, held, strict=True) if not out)]
    found = fit(graph, kept, np.array([context.whole_us, *times[~held]]))
    facts = {**facts, "method": "fitted", "n_plans": len(kept), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    table = LatencyTable(facts, steps, tuple(found.entries(multiple)), (_completed(context, found),))
    judges = [plan for plan, out in zip(plans, held, strict=True) if out]
    errors = [table.predict(graph, plan) / us - 1 for plan, us in zip(judges, times[held], strict=True)]
    table = table.with_context(replace(table.context(graph), errors=tuple(map(float, errors))))
    if bench.noise.worst:
        table = replace(table, facts={**table.facts, ACCEPTED: bench.noise.worst})
    if not bench.noise.accepted:
        _require(table.context(graph), folder)
    table.save(folder)
    return table


def _distinct(graph: Graph, candidates: Mapping[str, tuple[int, ...]]) -> list[KeepPlan]:
    """Draw plans of different widths, none of them dense: one that was fitted must not judge the fit."""
    drawn = {_key(graph, plan): plan for plan in random_plans(graph, candidates, _DRAWN * (N_FITTED + N_HELD), _SEED)}
    drawn.pop(_key(graph, KeepPlan({})), None)
    if len(drawn) <= N_HELD:
        raise TargetError(
            f"the model has only {len(drawn)} narrower forms on whole steps: too few to tell what its layers cost",
            at="latency table of whole models",
            fix="plan by counts: --metric macs",
        )
    plans = list(drawn.values())
    n = min(len(plans), N_FITTED + N_HELD)
    return [plans[i * len(plans) // n] for i in range(n)]


def _key(graph: Graph, plan: KeepPlan) -> str:
    return hashed(sorted(graph.kept(plan).items()))


def _timed(
    bench: Bench, model: nn.Module, example: Any, graph: Graph, plans: Sequence[KeepPlan], file: Path, reporter: Reporter
) -> tuple[Context, NDArray[np.float64]]:
    """Measure the dense model, then each plan as a share of it, job by job; what stands in `file` already is not repeated."""
    reporter.stage("profile plans", len(plans))
    dense = bench.export(model, example, bench.target, bench.folder / "dense")
    whole = bench.whole({"dense": dense})["dense"]
    if whole.busy:
        reporter.note(f"other programs took {whole.foreign_load:.0%} of the measured core: measure again on a quiet machine")
    shares = _known(file)
    keys = [_key(graph, plan) for plan in plans]
    missing = [i for i, key in enumerate(keys) if key not in shares]
    for start in range(0, len(missing), _PER_JOB):
        files = {"dense": dense}
        for i in missing[start : start + _PER_JOB]:
            small = compact(model, graph, plans[i], check=False)
            files[str(i)] = bench.export(small, example, bench.target, bench.folder / f"plan-{i}")
            reporter.advance(len(plans) - len(missing) + start, f"plan {i + 1}")
        runs = int(1e6 * _SECONDS / (len(files) * whole.quiet_us))
        found = bench.whole(files, bench.target.replace(runs=max(_FEWEST, min(bench.target.measure.runs, runs))))
        us = found.pop("dense").quiet_us
        shares |= {keys[int(name)]: timing.quiet_us / us for name, timing in found.items()}
        _keep(file, shares)
    reporter.advance(len(plans))
    us = whole.quiet_us
    held = tuple(group.name for group in graph.groups if group not in graph.prunable)
    context = Context(structure_of(graph), {}, (), us, 1.0, 1.0, whole.foreign_load, whole.runs, held=held)
    return context, np.array([us * shares[key] for key in keys])


def _completed(context: Context, found: Fit) -> Context:
    """Return the context with what the model costs besides its layers.

    The factor stays one: one that makes the dense model right would take the fit's error there into all other plans.
    """
    overhead = (Overhead("model", (), found.constant_us),)
    return replace(context, overhead=overhead, additivity=found.predict(found.graph.kept()) / context.whole_us)


def _require(context: Context, folder: Path) -> None:
    if context.far_off:
        raise TargetError(
            f"layers fitted to the times of whole models are off by {context.error:.0%} on plans that the fit did not see, "
            f"more than the {MOST_ERROR:.0%} allowed",
            at=str(folder),
            fix="measure on a quiet machine: deploypipe profile --fresh, plan by counts: --metric macs, or accept it: "
            "deploypipe profile --allow-noise; table and report then say so",
        )


def _known(file: Path) -> dict[str, float]:
    """Read the shares measured so far; a file of another form counts for nothing."""
    if not file.is_file():
        return {}
    with file.open(newline="") as opened, suppress(KeyError, TypeError, ValueError):
        return {row["plan"]: float(row["share"]) for row in csv.DictReader(opened)}
    return {}


def _keep(file: Path, shares: dict[str, float]) -> None:
    lines = ["plan,share", *(f"{key},{share:.6f}" for key, share in shares.items())]
    write_file(file, "\n".join(lines) + "\n")
