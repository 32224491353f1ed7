"""Check a latency table on whole models that it has never seen, and take out what it gets wrong in all of them alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deploypipe.compact import compact
from deploypipe.latency.files import Context
from deploypipe.latency.table import LatencyTable
from deploypipe.plan import KeepPlan
from deploypipe.profiler.bench import Bench
from deploypipe.profiler.export import exported
from deploypipe.progress import Reporter
from deploypipe.types import Graph

N_PLANS = 8
_SECONDS, _FEWEST = 20.0, 12  # of measuring all plans together; runs of each, at least
_SEED = 20  # of the plans


def checked(
    bench: Bench, model: nn.Module, example: Any, graph: Graph, table: LatencyTable, reporter: Reporter, n_plans: int = N_PLANS
) -> Context:
    """Return the context of `graph`, corrected by one factor and with the error that is left on random plans.

    The models are measured in turns with the dense one, and compared as shares of it, so that a machine that has become slower
    does not count. The factor multiplies what layers take in the narrow form, hence by half in between, and nothing in the
    dense one. An error is that of a plan which did not take part in its factor (leave-one-out).

    Raises:
        ModelError: A pruned model cannot be compacted or exported.
        BackendError: The runtime failed.
    """
    context = table.context(graph)
    plans = random_plans(graph, table.candidates(graph), n_plans, _SEED)
    reporter.stage("check table", n_plans + 1)
    files = {"dense": exported(model, example, bench.target, bench.folder / "check-dense")}
    for number, plan in enumerate(plans):
        files[str(number)] = exported(compact(model, graph, plan), example, bench.target, bench.folder / f"check-{number}")
        reporter.advance(number + 1)
    shares = _measured(bench, files, context.whole_us)
    one, two = (_predicted(table, graph, scaled(context, factor), plans) for factor in (1.0, 2.0))
    fixed, moving = (2 * one - two) / shares, (two - one) / shares  # relative: predicted / measured = fixed + factor * moving
    factor = _fit(fixed, moving)
    errors = [float(fixed[i] + _fit(np.delete(fixed, i), np.delete(moving, i)) * moving[i] - 1) for i in range(len(plans))]
    reporter.advance(n_plans + 1)
    return replace(scaled(context, factor), trim=factor, errors=tuple(errors))


def random_plans(graph: Graph, candidates: Mapping[str, tuple[int, ...]], count: int, seed: int) -> list[KeepPlan]:
    """Draw plans; each has its own leaning between narrow and wide, so that latencies spread over the whole range."""
    random = np.random.default_rng(seed)
    plans = []
    for lean in np.linspace(0.4, 3.0, count):
        shares = random.beta(lean, 1.5, len(candidates))
        kept = {
            name: widths[int(share * len(widths))] for (name, widths), share in zip(candidates.items(), shares, strict=True)
        }
        plans.append(KeepPlan.of_widths(kept))
    return plans


def scaled(context: Context, factor: float) -> Context:
    """Return the context with layers of the narrow form `factor` times as slow."""
    scale = {
        layer: ((anchors[0][0], factor * anchors[0][1]), *anchors[1:]) if len(anchors) > 1 else anchors
        for layer, anchors in context.scale.items()
    }
    return replace(context, scale=scale)


def _measured(bench: Bench, files: Mapping[str, Path], dense_us: float) -> NDArray[np.float64]:
    """Return what the plans take if the dense model takes `dense_us`."""
    runs = int(1e6 * _SECONDS / (len(files) * dense_us))
    target = bench.target.replace(runs=max(_FEWEST, min(bench.target.measure.runs, runs)))
    found = bench.whole(files, target)
    dense = found.pop("dense").quiet_us
    return np.array([dense_us * timing.quiet_us / dense for timing in found.values()])


def _predicted(table: LatencyTable, graph: Graph, context: Context, plans: Sequence[KeepPlan]) -> NDArray[np.float64]:
    changed = table.with_context(context)
    return np.array([changed.predict(graph, plan) for plan in plans])


def _fit(fixed: NDArray[np.float64], moving: NDArray[np.float64]) -> float:
    """Return the factor that makes `fixed + factor * moving` closest to one; one if nothing moves."""
    power = float(moving @ moving)
    return float(moving @ (1 - fixed) / power) if power > 0 else 1.0
