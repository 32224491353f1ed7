"""The whole way from a trained model to a measured artifact: the only file that knows the order of the stages.

Every stage's result is kept under a key (see `store`), so the same command resumes, and a changed option computes again
exactly what depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploypipe import saved
from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.budget import parse_budget
from deploypipe.compact import compact
from deploypipe.cost import CostTable
from deploypipe.count import MacTable, ParamTable, params
from deploypipe.data.load import Data
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline import stages
from deploypipe.pipeline.absent import device_of, stored
from deploypipe.pipeline.artifacts import accuracy_stage, artifact_stage, bench_stage, checks_stage, file_notes
from deploypipe.pipeline.bundle import bundle_stage
from deploypipe.pipeline.given import given
from deploypipe.pipeline.hinting import find_hint, hint_notes, hinted, renumbered
from deploypipe.pipeline.outcome import Findings, assemble
from deploypipe.pipeline.planning import Planner, read_rounds
from deploypipe.pipeline.record import recorded
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.several import Elsewhere, with_outcomes
from deploypipe.pipeline.sparsify import MASKED, new_order, priced, sparse_hooks, sparse_notes, two_four_outcome, two_four_stage
from deploypipe.pipeline.training import arms_stage, epochs_before, schedule, train_stage, tuned, tuning_hooks
from deploypipe.pipeline.valuing import held_back, held_out, value_notes
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Reporter
from deploypipe.reports import render
from deploypipe.reports.report import Arm, Check, Report
from deploypipe.reports.runtimes import RuntimeOutcome
from deploypipe.store import Kept, Store
from deploypipe.training.settings import TrainSettings
from deploypipe.worth.heldout import HeldOut


class Run:
    """One run: its inputs, and its stages in order."""

    def __init__(self, request: Request, store: Store, reporter: Reporter) -> None:
        self.request, self.store, self.reporter, self.elsewhere = request, store, reporter, Elsewhere(request)
        self.device = device_of(request.resolved_target(), request.folder, request.sparsity, request.asked)
        self.target = self.device.target
        self.algorithm = make(request.algo, request.options)
        found = given(request, reporter, trains=request.epochs > 0)
        self.loaded, self.data, self.inputs, self.graph = found.loaded, found.data, found.inputs, found.graph
        self.dense_key = [self.loaded.key, self.graph.fingerprint]

    @cached_property
    def table(self) -> Kept[LatencyTable]:
        """Latency of every kernel at every width that may be chosen."""
        given = self.device.known_table(self.graph, self.request.table)

        def load(root: Path) -> LatencyTable:
            return priced(LatencyTable.load(root / "table"), self.request.sparsity, self.target)

        def measure(folder: Path) -> None:
            model, example = self.loaded.model, self.loaded.example
            found = given or profile(
                model, example, self.target, graph=self.graph, reporter=self.reporter, runner=self.device.runner
            )
            found.save(folder / "table")

        key = [2, self.dense_key, asdict(self.target), self.device.planned_with, *([given.id] if given else [])]
        key += [self.request.keep] if self.request.keep else []  # groups that stay whole are measured at no other width
        return self.store.keep("profile", key, measure, load)

    @cached_property
    def cost(self) -> CostTable:
        """What the budget counts."""
        tables: dict[str, CostTable] = {"macs": MacTable(), "params": ParamTable()}
        return tables.get(self.request.metric) or self.table.value

    @cached_property
    def budget(self) -> float:
        """The budget in the cost's unit."""
        limit = parse_budget(self.request.budget, self.request.metric, self.cost.predict(self.graph))
        return self.device.within_reach(limit, self.cost, self.graph, share=self.request.budget_is_share)

    @cached_property
    def problem(self) -> Problem:
        """What the algorithm is asked. It sees training data only."""
        request = self.request
        return Problem(self.loaded.model, self.graph, self.cost, self.budget, self.fit.train, request.seed, self.reporter)

    @cached_property
    def fit(self) -> Data:
        """The data that the algorithm sees: without the part that measures widths."""
        return held_back(self.request, self.data) if self.request.value == "measured" else self.data

    @cached_property
    def trained(self) -> Kept[nn.Module] | None:
        """The model after what the algorithm trains before it plans; None if it trains nothing."""
        if not hasattr(self.algorithm, "train"):
            return None
        key = [*self.asked, torch.get_num_threads()]
        return train_stage(self.store, self.algorithm, self.problem, self.fit, self.request.training, key)

    @cached_property
    def basis(self) -> Problem:
        """What the algorithm is asked once it has trained: planning, compaction and repair start from that model."""
        return replace(self.problem, model=self.trained.value) if self.trained else self.problem

    @cached_property
    def asked(self) -> list[object]:
        """What training before planning and the plan depend on."""
        request = self.request
        source = self.table if request.metric == "latency" else request.metric
        key = [request.algo, asdict(self.algorithm), self.budget, source, self.data.key, request.seed, request.keep]
        more = [request.value] if request.value != "scores" else []
        return [*key, self.dense_key, *more, *([request.sparsity] if request.sparsity else [])]

    @cached_property
    def meter(self) -> HeldOut | None:
        """Measures what widths are worth; None if the algorithm's scores say it."""
        if self.request.value != "measured":
            return None
        key = self.trained.key if self.trained else self.loaded.key
        return held_out(self.request, self.basis.model, key, self.graph, self.data)

    @cached_property
    def plan(self) -> Kept[KeepPlan]:
        """Which channels stay."""
        request, key = self.request, [*self.asked, self.trained]
        if self.meter:
            key += [request.value_rounds, request.value_finalists, self.meter.effort]
            key += [replace(request.training, epochs=1)] if request.value_finalists > 1 else []
        planner = Planner(request, self.store, self.device, self.basis, key, lambda: self.artifact("dense"), self.meter)
        timed = request.metric == "latency" and self.device.present
        return planner.measured(self.table.value) if timed else planner.once()

    @cached_property
    def compacted(self) -> Kept[nn.Module]:
        """The smaller model, proven equal to the masked one, then repaired if the algorithm does that."""
        algorithm, plan, model = self.algorithm, self.plan.value, self.basis.model

        def cut(folder: Path) -> None:
            small = compact(model, self.graph, plan)
            proof = stages.check_compaction(model, small, self.graph, plan, self.inputs)
            if hasattr(algorithm, "repair"):
                small = algorithm.repair(small, self.basis, plan)
            saved.save_origin(folder, saved.Origin(self.loaded.spec, self.graph.fingerprint))
            saved.save_weights(small, folder / "compact.safetensors")
            (folder / "compact.json").write_text(json.dumps([asdict(c) for c in proof], indent=1) + "\n")

        return self.store.keep("compact", [1, self.plan], cut, lambda root: self._small(root / "compact.safetensors"))

    @cached_property
    def tuning(self) -> TrainSettings:
        """Settings of fine-tuning."""
        return schedule(self.algorithm, self.request.training, self.basis, self.plan.value)

    @cached_property
    def started(self) -> Kept[nn.Module]:
        """The model that fine-tuning starts from: the compacted one, with 2:4 weights if they are asked for."""
        pattern, plan = self.request.sparsity, self.plan.value
        return two_four_stage(self.store, self.compacted, self.inputs, self.target, self._small, pattern, plan)

    @cached_property
    def tuned(self) -> Kept[nn.Module]:
        """The model after fine-tuning."""
        settings, start, plan = self.tuning, self.started.value, self.plan.value

        def tune(folder: Path) -> None:
            hooks = tuning_hooks(self.algorithm, self.basis, start, plan) + sparse_hooks(self.request.sparsity, plan, start)
            order = new_order(self.store.root, self.request.sparsity, plan)
            hint = hinted(self.algorithm, self.basis.model, self.graph, plan, settings, folder, order)
            small = tuned(start, self.data, settings, self.loaded.model, folder, self.reporter, hooks, hint)
            saved.save_weights(small, folder / saved.WEIGHTS)

        key = [2 if renumbered(self.algorithm) else 1, self.started, settings, torch.get_num_threads()]
        return self.store.keep("finetune", key, tune, lambda root: self._small(root / saved.WEIGHTS))

    @cached_property
    def arms(self) -> Kept[list[Arm]] | None:
        """Other ways to train the same architecture, if the algorithm is reported beside them."""
        if not hasattr(self.algorithm, "rivals"):
            return None
        rivals = self.algorithm.rivals(self.request.training, self.basis, self.plan.value)
        n_parameters, accuracy = params(self.graph, self.plan.value), self.accuracies.value["pruned"]
        own = Arm(self.algorithm.arm, self.tuning.seed, self.tuning.epochs, n_parameters, accuracy)
        key = [self.plan, self.data.key, torch.get_num_threads()]
        hint = partial(find_hint, self.basis.model, self.graph, self.plan.value, self.algorithm)
        return arms_stage(self.store, rivals, self.data, self.loaded.model, own, key, self.reporter, hint)

    @property
    def artifacts(self) -> dict[str, Kept[Path]]:
        """The built files of the dense and of the pruned model."""
        return {side: self.artifact(side) for side in ("dense", "pruned")}

    @cache  # noqa: B019 - lives as long as the run, as the stages above do
    def artifact(self, side: str) -> Kept[Path]:
        """Export, simplify and build one model; return the stage of the built file."""
        example = self.loaded.example
        if side == "dense":
            return artifact_stage(self.store, self.device, side, self.loaded.model, example, self.dense_key)
        return artifact_stage(self.store, self.device, side, self.tuned.value, example, self.tuned)

    @cached_property
    def checks(self) -> Kept[list[Check]]:
        """Each stage's outputs against those of the stage before."""
        return checks_stage(self.store, self.device, self.tuned, self.artifact("pruned"), self.inputs, self.data.key)

    @cached_property
    def latencies(self) -> Kept[dict[str, Any]]:
        """Dense and pruned artifact measured in turns."""
        expected = self.table.value.predict(self.graph) if self.request.metric == "latency" else None
        return bench_stage(self.store, self.device, self.artifacts, expected)

    @cached_property
    def accuracies(self) -> Kept[dict[str, Any]]:
        """The one time that anything is judged on the test set."""
        models = {"dense": self.loaded.model, "compacted": self.compacted.value, "pruned": self.tuned.value}
        models |= {MASKED: self.started.value} if self.started is not self.compacted else {}
        return accuracy_stage(self.store, models, self.data, [self.tuned, self.dense_key, self.data.key], self.reporter)

    @cached_property
    def bundle(self) -> Kept[Path] | None:
        """What the owner of a device needs to measure the run; None if the device was there."""
        table = self.table if self.request.metric == "latency" else None
        return bundle_stage(self.store, self.device, self.artifacts, self.plan, table, self.graph)

    @cached_property
    def outcomes(self) -> list[Kept[RuntimeOutcome]]:
        """The same model on the other targets that were asked for."""
        key, models = [self.dense_key, self.data.key], (self.loaded.model, self.tuned)
        return self.elsewhere.outcomes(self.store, *models, self.loaded.example, self.inputs, key)

    def _small(self, weights: Path) -> nn.Module:
        return saved.restore(self.loaded.model, self.graph, self.plan.value, weights)

    def report(self) -> Report:
        """Run every stage and put the findings together."""
        self.device.require_ready()
        self.elsewhere.reach(self.reporter)
        order = self._stages()
        asked = [str(getattr(self.request, name)) for name in ("model", "target", "budget", "metric", "command")]
        key = [3, *order, asked, self.data.description]
        return self.store.keep("report", key, lambda folder: render.write(self._assembled(order), folder), Report.load).value

    def close(self) -> None:
        """Leave the devices: what lies there for this run is removed."""
        for device in (self.device, *self.elsewhere.devices):
            device.runner.close()

    def _stages(self) -> list[Kept[Any]]:
        order: list[Kept[Any] | None] = [self.table if self.request.metric == "latency" else None]
        order += [self.artifact("dense"), self.trained, self.plan]  # what cannot be exported is found before any training
        order += [self.compacted, self.started, self.tuned, self.artifact("pruned")]
        order += [self.checks, self.latencies, self.accuracies, self.arms, self.bundle, *self.outcomes]
        return [stage for stage in order if stage]

    def _assembled(self, order: Sequence[Kept[Any]]) -> Report:
        chosen, rounds = read_rounds(self.store.root)
        root, plan, pattern = self.store.root, self.plan.value, self.request.sparsity
        table = self.table.value if self.request.metric == "latency" else None
        notes = [*hint_notes(root), *file_notes(root), *sparse_notes(root, self.target, table, pattern)]
        valued = value_notes(root / f"plan-{chosen + 1}" if rounds else root)
        sparse = getattr(self.algorithm, "sparse", False)
        found = Findings(
            graph=self.graph,
            plan=plan,
            cost=self.cost,
            budget=self.budget,
            table=table,
            profile=stored(table) if table and not self.device.present else "",
            chosen=chosen,
            rounds=rounds,
            checks=self.checks.value,
            latencies=self.latencies.value,
            accuracies=self.accuracies.value,
            files={side: kept.value for side, kept in self.artifacts.items()},
            seconds={stage.stage: stage.seconds for stage in order},
            facts=self.device.facts | json.loads((root / "device.json").read_text()),
            epochs=(epochs_before(self.store.root) if self.trained else 0, self.tuning.epochs),
            sparse=(self.compacted.value, self.tuned.value) if sparse else None,
            arms=tuple(self.arms.value) if self.arms else (),
            two_four=two_four_outcome(root, self.graph, plan, table, pattern, self.device.backend, self.accuracies.value),
            notes=tuple(note for note in (*self.loaded.notes, *self.graph.notes, *valued, *notes, *self.device.notes) if note),
        )
        report = with_outcomes(assemble(self.request, self.data, self.target, found), self.outcomes)
        # The first plan, on the table as it was measured, beside the measurement that followed: nothing corrected since.
        return recorded(report, self.store.root, found.table, self.graph)
