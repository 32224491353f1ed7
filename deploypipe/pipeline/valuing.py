"""Widths by measured value in a run: `--value measured`, and the curves that `deploypipe sensitivity` shows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Allocator, Orders, Problem, Values, by_values
from deploypipe.compact import compact
from deploypipe.cost import CostTable
from deploypipe.count import MacTable
from deploypipe.data.batches import split
from deploypipe.data.load import Data
from deploypipe.errors import BudgetError, UsageError
from deploypipe.ingredients.removal import removable
from deploypipe.latency.table import structure_of
from deploypipe.pipeline.given import given
from deploypipe.pipeline.hinting import find_hint
from deploypipe.pipeline.recipe import resolved
from deploypipe.pipeline.request import BY_CHOICE, Request
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Reporter, Silent
from deploypipe.targets import cache_folder
from deploypipe.types import Graph
from deploypipe.worth.curves import Curves, curves_table
from deploypipe.worth.first_order import by_first_order
from deploypipe.worth.heldout import HELD_OUT, Effort, HeldOut, Meter, memo_name
from deploypipe.worth.sensitivity import Curve, Found, Sensitivity, Trial

VALUES_FILE = "values.json"


def held_out(request: Request, model: nn.Module, key: str, graph: Graph, data: Data) -> HeldOut:
    """Return what measures plans of this model; what it finds is kept in the user's cache, for every run with this seed.

    Args:
        request: Its seed decides what is held out, its settings of training how finalists are trained.
        model: Whose plans are measured.
        key: Of its weights.
        graph: Of the model.
        data: Whose training set is split.
    """
    effort = Effort()
    memo = (
        cache_folder() / "sensitivity" / memo_name(key, graph.fingerprint, structure_of(graph), data.key, request.seed, effort)
    )
    hint = partial(find_hint, model, graph)
    training = request.training
    return HeldOut(model, graph, data, memo, seed=request.seed, effort=effort, find_hint=hint, training=training)


def held_back(request: Request, data: Data) -> Data:
    """Return the data without the part of its training set that `held_out` measures on."""
    return replace(data, train=split(data.train, HELD_OUT, request.seed)[0], key=f"{data.key} without {HELD_OUT} held out")


def choose(request: Request, problem: Problem, meter: Meter | None, folder: Path) -> KeepPlan:
    """Ask the algorithm which channels stay; how many stay is decided in the way that the request names.

    What is worth telling about that is written into `folder`.

    Raises:
        UsageError: Widths are to be measured, or 2:4 weights chosen, but the algorithm chooses widths itself.
        BudgetError: The budget cannot be reached.
    """
    return _WAYS[request.value](request, problem, meter, folder)


def _by_scores(request: Request, problem: Problem, meter: Meter | None, folder: Path) -> KeepPlan:
    plan: KeepPlan = make(request.algo, request.options).plan(problem)
    if request.sparsity == BY_CHOICE and (plan.certificate is None or plan.certificate.bound is None):
        raise UsageError(
            f"algorithm '{request.algo}' chooses widths itself, so that nothing weighs 2:4 weights against fewer channels",
            at="--sparsity auto",
            fix="take an algorithm whose scores are allocated, such as thinet or l2, or one with --set widths=shares",
        )
    return plan


def _by_measuring(request: Request, problem: Problem, meter: Meter | None, folder: Path) -> KeepPlan:
    assert meter is not None, "whoever asks for measured values gives what measures them"
    searches: list[Found] = []

    def measured(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        sensitivity = _sensitivity(problem, orders, meter)
        scored = _scored(problem, orders, values, sensitivity)
        found = sensitivity.search(problem.budget, request.value_rounds, scored)
        searches.append(sensitivity.finals(found, request.value_finalists) if request.value_finalists > 1 else found)
        best = searches[-1].best
        return dict(best.kept), best.certificate

    plan = _ordered(request, problem, measured, searches)
    dense, found = asdict(meter.measure(KeepPlan({}))), searches[-1]
    state = {"dense": dense, "chosen": found.chosen, "trials": [_trial_json(trial) for trial in found.trials]}
    (folder / VALUES_FILE).write_text(json.dumps(state, indent=1) + "\n")
    return plan


def _by_first_order(request: Request, problem: Problem, meter: Meter | None, folder: Path) -> KeepPlan:
    asked: list[Certificate] = []

    def widths(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        kept, certificate = by_first_order(problem, orders, values)
        asked.append(certificate)
        return kept, certificate

    plan = _ordered(request, problem, widths, asked)
    (folder / VALUES_FILE).write_text(json.dumps({"by": "taylor"}) + "\n")
    return plan


_WAYS = {"scores": _by_scores, "taylor": _by_first_order, "measured": _by_measuring}  # by the request's `value`


def _scored(
    problem: Problem, orders: Orders, values: Values, sensitivity: Sensitivity
) -> tuple[dict[str, int], Certificate] | None:
    """Return what the algorithm's own values choose; None if only plans without whole branches fit, of which they know nothing.

    Raises:
        BudgetError: The budget cannot be reached at all.
    """
    try:
        return by_values(problem, orders, values)
    except BudgetError:
        sensitivity.require(problem.budget)
        return None


def value_notes(folder: Path) -> list[str]:
    """Return what the report says about measured widths; nothing if scores decided."""
    if not (folder / VALUES_FILE).is_file():
        return []
    state = json.loads((folder / VALUES_FILE).read_text())
    if state.get("by") == "taylor":
        return ["widths were chosen by how the loss changes to first order (gates on channels), before training"]
    dense, trials = state["dense"], state["trials"]
    loss = {trial["origin"]: trial["loss"] for trial in trials} | {"taken": trials[state["chosen"]]["loss"]}
    taken = trials[state["chosen"]]
    scores = f"{loss['scores']:.3f} by the algorithm's scores, " if "scores" in loss else ""
    notes = [
        f"widths were chosen by their loss on {dense['n']} held-out training images, before training: {dense['loss']:.3f} "
        f"dense, {scores}{loss['curves']:.3f} by the curves of the dense model, "
        f"{loss['taken']:.3f} for the plan taken ({taken['origin']}), {'one' if 'trained' in taken else 'the best'} of "
        f"{len(trials)} tried"
    ]
    finals = [f"{trial['trained']:.3f} ({trial['origin']})" for trial in trials if "trained" in trial]
    if finals:
        notes.append(f"finalists were trained for one epoch; their losses on all held-out images then: {', '.join(finals)}")
    return notes


def sensitivity(request: Request, reporter: Reporter | None = None) -> Curves:
    """Measure loss and accuracy of every group at every candidate width, the others whole, and what that saves.

    Args:
        request: Model, weights, data, algorithm, seed and groups to keep; with the metric "latency" savings are those of the
            target's latency table, and its widths are measured; with "macs" they are counted.
        reporter: Hears how far it is.

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    tell, request = reporter or Silent(), resolved(request)
    request.check()
    opened = given(request, tell)
    loaded, data, graph = opened.loaded, opened.data, opened.graph
    cost: CostTable = MacTable()
    if request.metric == "latency":
        cost = profile(loaded.model, loaded.example, request.only_target(), graph=graph, reporter=tell)
    meter = held_out(request, loaded.model, loaded.key, graph, data)
    problem = Problem(loaded.model, graph, cost, cost.predict(graph), meter.fit, request.seed, tell)
    found: list[Curve] = []

    def whole(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        found.extend(_sensitivity(problem, orders, meter).curves({}, "curves"))
        return by_values(problem, orders, values)  # within a budget of the whole cost nothing is cut

    plan = _ordered(request, problem, whole, found)
    return curves_table(graph, cost, found, meter.measure(KeepPlan({})), plan.skipped)


def _sensitivity(problem: Problem, orders: Orders, meter: Meter) -> Sensitivity:
    """Return what measures widths, once it is sure that channels can be cut at all.

    Raises:
        ModelError: `forward` does not follow smaller channels; the message names where.
    """
    graph, offered = problem.graph, problem.table.candidates(problem.graph)
    measured = Sensitivity(graph, problem.table, orders, meter, problem.reporter, removable(problem.model, graph))
    compact(problem.model, graph, measured.plan({name: offered[name][0] for name in orders}))
    return measured


def _ordered(request: Request, problem: Problem, allocator: Allocator, asked: list[Any]) -> KeepPlan:
    """Let the algorithm order the channels and `allocator` decide how many stay; it fills `asked`."""
    plan: KeepPlan = make(request.algo, request.options).plan(replace(problem, allocator=allocator))
    if not asked:
        raise UsageError(
            f"algorithm '{request.algo}' chooses widths itself, or judged no group: there is nothing to measure",
            at=f"--algo {request.algo}",
            fix="take an algorithm that scores channels, such as l2 or thinet, or leave out --value",
        )
    return plan


def _trial_json(trial: Trial) -> Mapping[str, Any]:
    found = {"origin": trial.origin, "loss": trial.found.loss, "accuracy": trial.found.top1}
    after = {"trained": trial.trained.loss} if trial.trained else {}
    return found | after | {"value": trial.certificate.value, "kept": dict(trial.kept)}
