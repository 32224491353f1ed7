"""Put the findings of a run together into its report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe import saved
from deploypipe.algorithms import make
from deploypipe.allocation.budget import parse_budget
from deploypipe.backends import load_backend
from deploypipe.backends.base import SUFFIX
from deploypipe.branch import branches
from deploypipe.cost import CostTable
from deploypipe.count import macs, params
from deploypipe.data.load import Data
from deploypipe.doctor import versions
from deploypipe.ingredients.sparsity import NONZERO, sparse_layers
from deploypipe.inspection import member_text
from deploypipe.latency.estimate import ESTIMATED
from deploypipe.latency.table import Context, LatencyTable
from deploypipe.measurement import Latency, Round
from deploypipe.pipeline.absent import BY_OWNER
from deploypipe.pipeline.bundle import BUNDLE
from deploypipe.pipeline.request import Request
from deploypipe.plan import KeepPlan
from deploypipe.reports.figures import BY_CHANCE, accuracy_text, standard_error
from deploypipe.reports.pattern import TwoFour
from deploypipe.reports.report import Arm, BudgetOutcome, Check, GroupOutcome, Report, Side
from deploypipe.targets import NOT_RUN, Target
from deploypipe.types import Graph

DRIFT = 0.05  # change of the dense latency since profiling that the user should hear of


@dataclass(frozen=True, eq=False)
class Findings:
    """What the stages found; `latencies` and `accuracies` are the plain values that their files hold."""

    graph: Graph
    plan: KeepPlan
    cost: CostTable
    budget: float
    table: LatencyTable | None
    profile: str
    chosen: int
    rounds: tuple[Round, ...]
    checks: list[Check]
    latencies: Mapping[str, Any]
    accuracies: Mapping[str, Any]
    files: Mapping[str, Path]
    seconds: Mapping[str, float]
    facts: Mapping[str, Any]
    epochs: tuple[int, int]  # before pruning, and of fine-tuning
    sparse: tuple[nn.Module, nn.Module] | None  # before and after fine-tuning, of a method that leaves zeros in weights
    arms: tuple[Arm, ...]
    two_four: TwoFour | None
    notes: tuple[str, ...]


def assemble(request: Request, data: Data, target: Target, found: Findings) -> Report:
    """Return the report of a run."""
    factor = found.rounds[found.chosen].factor if found.rounds else 1.0
    context = found.table.context(found.graph) if found.table else None
    return Report(
        model=str(request.model),
        data=data.description,
        target=target.name,
        algorithm=request.algo,
        value=request.value,
        recipe=request.recipe,
        profile=found.profile,
        options=asdict(make(request.algo, request.options)),
        seed=request.seed,
        epochs=found.epochs[1],
        epochs_before=found.epochs[0],
        dense=_side("dense", None, found, 1.0),
        pruned=_side("pruned", found.plan, found, factor),
        compacted_accuracy=found.accuracies["compacted"],
        n_test=found.accuracies["n_test"],
        budget=_budget(request, found, factor),
        groups=tuple(_group(found.graph, found.plan)),
        checks=tuple(found.checks),
        certificate=found.plan.certificate,
        threads=target.measure.threads,
        **_quality(found.table, context),
        seconds=found.seconds,
        artifacts=_artifacts(target, found),
        versions=versions(),
        machine=dict(found.facts),
        command=request.command,
        sparsity=sparse_layers(found.sparse[1], found.graph) if found.sparse else (),
        arms=found.arms,
        two_four=found.two_four,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=(*found.notes, *_told(found, context, target, len(data.classes))),
    )


def _budget(request: Request, found: Findings, factor: float) -> BudgetOutcome:
    predicted = _left(found, 0) if found.sparse else factor * found.cost.predict(found.graph, found.plan)
    limit, reached = _judged(request, found)
    return BudgetOutcome(request.budget, request.metric, found.cost.unit, limit, predicted, reached, found.rounds, found.chosen)


def _quality(table: LatencyTable | None, context: Context | None) -> dict[str, Any]:
    """Return what the report says of the latency table; one that was not held against the device does not add up or fail to."""
    if table is None or context is None:
        return {"table": "", "table_error": None, "table_additivity": None}
    added = context.additivity if table.source in {"measured", "fitted"} else None
    return {"table": table.source, "table_error": context.error, "table_additivity": added}


def _gone(found: Findings) -> list[str]:
    """Say which layers are not there any more."""
    gone = branches(found.graph, found.plan)
    return [f"no channel is left of {name}, so {', '.join(branch.layers)} are gone" for name, branch in gone.items()]


def _judged(request: Request, found: Findings) -> tuple[float, float]:
    """Return what the budget allows and what the built model takes, both from the same measurement or count.

    The plan was made against the dense latency of the profile; the machine may have become slower or faster since. So a share
    is taken of the dense model that was measured in turns with the pruned one.
    """
    if found.sparse:
        return found.budget, _left(found, 1)
    counted = {"macs": macs, "params": params}
    if request.metric in counted:
        return found.budget, counted[request.metric](found.graph, found.plan)
    if found.latencies:
        dense, pruned = (found.latencies[side]["median_us"] for side in ("dense", "pruned"))
    else:  # no device at hand: what the table predicts stands in, and is called so wherever it shows
        dense, pruned = found.cost.predict(found.graph), found.cost.predict(found.graph, found.plan)
    return parse_budget(request.budget, request.metric, dense), pruned


def _artifacts(target: Target, found: Findings) -> dict[str, str]:
    source = load_backend(target).source
    exported = {source: f"pruned{SUFFIX[source]}"}
    bundle = {} if found.latencies else {"bundle": BUNDLE}
    return {"artifact": found.files["pruned"].name, **exported, "weights": saved.WEIGHTS, "plan": saved.PLAN, **bundle}


def _left(found: Findings, when: int) -> float:
    """Return what the budget counts of the weights that are not zero, before (0) or after (1) fine-tuning."""
    assert found.sparse is not None, "only for methods that leave zeros"
    return NONZERO[found.cost.unit](found.sparse[when], found.graph)


def _told(found: Findings, context: Context | None, target: Target, n_classes: int) -> tuple[str, ...]:
    """Return what follows from the findings, and the user should hear of."""
    doubts = context.doubts if context else ()
    return (*_by_chance(found, n_classes), *_gone(found), *doubts, *_drift(found), *_unproven(found, target))


def _by_chance(found: Findings, n_classes: int) -> tuple[str, ...]:
    """Say so if the dense model has nothing to lose: random weights, or labels that are not the model's."""
    accuracy, n_test = found.accuracies["dense"], found.accuracies["n_test"]
    if accuracy is None or n_classes < 2 or accuracy > 1 / n_classes + 2 * standard_error(1 / n_classes, n_test):
        return ()
    return (f"{BY_CHANCE}: {accuracy_text(accuracy, n_test)} of {n_classes} classes",)


def _drift(found: Findings) -> tuple[str, ...]:
    """Say so if the dense model's latency is not what it was when the table was measured."""
    if found.table is None or not found.latencies or found.table.source == ESTIMATED:
        return ()
    then, now = found.table.predict(found.graph), found.latencies["dense"]["median_us"]
    if abs(then / now - 1) <= DRIFT:
        return ()
    return (
        f"the dense model took {then:.0f} us when its latency table was measured and {now:.0f} us now: predictions are off by "
        "as much, and the plan was chosen on the old figures",
    )


def _unproven(found: Findings, target: Target) -> tuple[str, ...]:
    """Say so if this version has never met such hardware, and its owner has not measured this very run."""
    if target.run_on_hardware or any(note.startswith(BY_OWNER) for note in found.notes):
        return ()
    return (f"{NOT_RUN}: nothing has been built or measured on a device of target {target.name} with this version",)


def _side(name: str, plan: KeepPlan | None, found: Findings, factor: float) -> Side:
    return Side(
        accuracy=found.accuracies[name],
        n_parameters=params(found.graph, plan),
        n_macs=macs(found.graph, plan),
        artifact_bytes=found.files[name].stat().st_size,
        latency=Latency(**found.latencies[name]) if found.latencies.get(name) else None,
        predicted_us=factor * found.table.predict(found.graph, plan) if found.table else None,
    )


def _group(graph: Graph, plan: KeepPlan) -> list[GroupOutcome]:
    kept = graph.kept(plan)
    members = {g.name: tuple(map(member_text, g.members)) for g in graph.groups}
    return [
        GroupOutcome(g.name, g.size, kept[g.name], members[g.name], g.coupled_by, g.fixed, plan.skipped.get(g.name, ""))
        for g in graph.groups
    ]
