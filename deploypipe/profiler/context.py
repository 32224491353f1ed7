"""Time forms of a model, from dense to narrow, as wholes and kernel by kernel: what the table learns its context from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from deploypipe.backends.base import Timing
from deploypipe.compact import compact
from deploypipe.errors import ModelError
from deploypipe.latency.context import Context
from deploypipe.latency.table import LatencyTable
from deploypipe.plan import KeepPlan
from deploypipe.profiler.bench import Bench
from deploypipe.profiler.check import N_PLANS, random_plans
from deploypipe.profiler.fit import DENSE, RANDOM, Form, Turn, learned
from deploypipe.profiler.sittings import joined, sit
from deploypipe.progress import Reporter
from deploypipe.targets import Target
from deploypipe.types import Graph

_SHARES = (0.5, 0.2)  # of its channels that each group keeps in the even forms, as far as whole steps allow
_SEED = 20  # of the random forms
_SECONDS, _FEWEST = 4.0, 12  # of measuring all forms once; runs of each, at least
_PART = 0.5  # of what the dense form takes, the mean of all forms takes, roughly
_PROFILED = 36  # profiled runs of each form at most: all forms together tell, and each run writes down every kernel
_TURN_SECONDS = 1.0  # of timing the dense form alone, as a whole and by kernel, in one turn
_SITTINGS, _MOST = 3, 8  # how often all forms and a turn are measured: so often undisturbed, but at most
_PROFILES = 3  # how often all forms are profiled at most, until their kernels are as quick as in the turns
_AGAIN = 6  # so many turns more are taken while kernels do not add up


def in_context(bench: Bench, model: nn.Module, example: Any, graph: Graph, table: LatencyTable, reporter: Reporter) -> Context:
    """Measure how the kernels of `table` add up in `model`, and how well the table then predicts forms it has not seen.

    Raises:
        ModelError: The model cannot be exported.
        BackendError: The runtime failed.
        TargetError: Other programs kept the cores too busy.
    """
    plans = _plans(graph, table)
    reporter.stage("profile model", len(plans) + 3)
    files = _exported(bench, model, example, graph, plans, reporter)
    reporter.advance(len(plans))
    target = bench.target.replace(runs=_runs(bench, files))
    most, again = (_SITTINGS, 1) if bench.noise.accepted else (_MOST, _PROFILES)
    sittings = sit(lambda: _sitting(bench, files, target), lambda found: found.wholes[DENSE].quiet_us, _SITTINGS, most)
    turns = [sitting.turn for sitting in sittings]
    reporter.advance(len(plans) + 1, f"{sittings[0].wholes[DENSE].quiet_us:.0f} us")
    profiled = target.replace(runs=min(bench.target.measure.runs, _PROFILED))
    quick = min(profile.sum_us for _, profile in turns)
    (profiles,) = sit(lambda: bench.profiles(files, profiled), lambda found: found[DENSE].sum_us, 1, again, quick)
    reporter.advance(len(plans) + 2)
    wholes = joined([sitting.wholes for sitting in sittings], DENSE, [turn[0].quiet_us for turn in turns])
    forms = [Form(name, graph.kept(plans[name]), wholes[name], profiles[name]) for name in files]
    found = learned(graph, table, forms, bench.timer_us, _steady(turns))
    for _ in range(_AGAIN):
        if found.adds_up:
            break
        turns.append(_turn(bench, files[DENSE], wholes[DENSE].quiet_us))
        found = learned(graph, table, forms, bench.timer_us, _steady(turns))
    reporter.advance(len(plans) + 3)
    _judge(found, forms[0].whole, graph, reporter)
    return found


def _plans(graph: Graph, table: LatencyTable) -> dict[str, KeepPlan]:
    """Return the forms: dense, evenly narrowed, and random ones."""
    candidates = table.candidates(graph)
    plans = {DENSE: KeepPlan({})}
    if candidates:
        plans |= {f"even-{share:.0%}": even_plan(candidates, share) for share in _SHARES}
        plans |= {f"{RANDOM}-{i}": plan for i, plan in enumerate(random_plans(graph, candidates, N_PLANS, _SEED))}
    return plans


def even_plan(candidates: Mapping[str, tuple[int, ...]], share: float) -> KeepPlan:
    """Return the plan that keeps about this share of every group, on the candidates."""
    nearest = {name: min(widths, key=lambda width: abs(width - share * widths[-1])) for name, widths in candidates.items()}
    return KeepPlan.of_widths(nearest)


def _exported(
    bench: Bench, model: nn.Module, example: Any, graph: Graph, plans: Mapping[str, KeepPlan], reporter: Reporter
) -> dict[str, Path]:
    files = {DENSE: bench.export(model, example, bench.target, bench.folder / DENSE)}
    try:
        for number, (name, plan) in enumerate(plans.items()):
            if name not in files:
                files[name] = bench.export(compact(model, graph, plan), example, bench.target, bench.folder / name)
            reporter.advance(number)
    except ModelError as error:
        reporter.note(f"the model cannot be narrowed, so only its full width is known in context: {error.message}")
        return {DENSE: files[DENSE]}
    return files


def _runs(bench: Bench, files: Mapping[str, Path]) -> int:
    dense_us = bench.whole({DENSE: files[DENSE]}, bench.target.replace(runs=1))[DENSE].quiet_us
    return max(_FEWEST, min(bench.target.measure.runs, int(1e6 * _SECONDS / (_PART * len(files) * dense_us))))


@dataclass(frozen=True)
class _Sitting:
    """All forms as wholes, in turns, and right after that a turn of the dense form."""

    wholes: Mapping[str, Timing]
    turn: Turn


def _sitting(bench: Bench, files: Mapping[str, Path], target: Target) -> _Sitting:
    wholes = bench.whole(files, target)
    return _Sitting(wholes, _turn(bench, files[DENSE], wholes[DENSE].quiet_us))


def _turn(bench: Bench, dense: Path, whole_us: float) -> Turn:
    """Time the dense form as a whole and by kernel, right after each other: drift meets both alike."""
    runs = max(_FEWEST, min(bench.target.measure.runs, _PROFILED, int(1e6 * _TURN_SECONDS / whole_us)))
    target, files = bench.target.replace(runs=runs), {DENSE: dense}
    return bench.whole(files, target)[DENSE], bench.profiles(files, target)[DENSE]


def _steady(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns in which neither the whole nor its kernels were disturbed, or those that were least."""
    times = np.array([(whole.quiet_us, profile.sum_us) for whole, profile in turns])
    slowness = (times / times.min(0)).max(1)
    return [turns[index] for index in np.argsort(slowness, kind="stable")[:_SITTINGS]]


def _judge(context: Context, whole: Timing, graph: Graph, reporter: Reporter) -> None:
    """Tell the user what makes the table less trustworthy."""
    if whole.busy:
        taken = f"other programs took {whole.foreign_load:.0%} of the measured cores"
        how = "latency is taken from processor time" if whole.cpu_us else "times are too long"
        reporter.note(f"{taken}: {how}; measure again on a quiet machine")
    for doubt in context.doubts:
        reporter.note(doubt)
    unseen = [name for name, _ in graph.calls if name not in context.prices]
    if unseen:
        names = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        reporter.note(
            f"{len(unseen)} layers have no kernel of their own in the runtime's profile and are priced alone: {names}"
        )
