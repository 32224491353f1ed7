"""The whole way from a trained model to a measured artifact: the only file that knows the order of the stages.

Every stage's result is kept under a key (see `store`), so the same command resumes, and a changed option computes again
exactly what depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploypipe import render, saved
from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.budget import parse_budget
from deploypipe.compact import compact
from deploypipe.cost import CostTable
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.load import Data, load_data
from deploypipe.errors import BudgetError
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.graph import trace
from deploypipe.heldout import HeldOut
from deploypipe.latency.table import LatencyTable
from deploypipe.models.load import Loaded, load_model
from deploypipe.pipeline import stages
from deploypipe.pipeline.outcome import Findings, assemble
from deploypipe.pipeline.planning import Planner, read_rounds
from deploypipe.pipeline.record import recorded
from deploypipe.pipeline.request import KEPT_BY_USER, Request
from deploypipe.pipeline.valuing import held_out, value_notes
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Reporter, Silent
from deploypipe.report import Check, Report
from deploypipe.store import CHECKPOINT, Kept, Store
from deploypipe.training.finetune import finetune
from deploypipe.types import Graph


def build(request: Request | None = None, reporter: Reporter | None = None, **changes: Any) -> Report:
    """Run the whole pipeline and return its report, which also lies in the run folder.

    Args:
        request: What to do; or give its fields by name.
        reporter: Hears how far it is.
        changes: Fields of `Request`.

    Raises:
        DeployPipeError: By class: see `errors`.

    Example:
        >>> build(model="demo", budget="60%", epochs=0, out="runs/x").budget.met  # doctest: +SKIP
        True
    """
    request = request or Request.of(**changes)
    reporter = reporter or Silent()
    request.check()
    with Store(request.folder, reporter) as store:
        report = _Run(request, store, reporter).report()
    floor, reached = request.accuracy_floor, report.pruned.accuracy
    if floor is not None and reached is not None and reached < floor:
        raise BudgetError(
            f"the pruned model's accuracy is {reached:.4f}, below the floor of {floor:.4f}",
            at=f"run {request.folder}",
            fix="allow a larger --budget, fine-tune longer (--epochs), or lower --accuracy-floor",
        )
    return report


class _Run:
    """One run: its inputs, and its stages in order."""

    def __init__(self, request: Request, store: Store, reporter: Reporter) -> None:
        self.request, self.store, self.reporter = request, store, reporter
        self.target = request.resolved_target()
        self.device = stages.Device(self.target)
        self.loaded: Loaded = load_model(str(request.model), request.weights)
        self.data: Data = load_data(
            request.data,
            normalise=self.loaded.normalise,
            size=self.loaded.input_shape,
            seed=request.seed,
            reporter=reporter,
        )
        self.inputs = stages.real_inputs(self.data, self.loaded.example)  # finds data of another shape before anything slow
        self.graph: Graph = trace(self.loaded.model, self.loaded.example).keeping(request.keep, KEPT_BY_USER)
        self.dense_key = [self.loaded.key, self.graph.fingerprint]

    # ---- stages ----------------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> Kept[LatencyTable]:
        """Latency of every kernel at every width that may be chosen."""
        given = self.request.table and stages.given_table(Path(self.request.table), self.graph, self.device)

        def measure(folder: Path) -> None:
            model, example = self.loaded.model, self.loaded.example
            found = given or profile(model, example, self.target, graph=self.graph, reporter=self.reporter)
            found.save(folder / "table")

        key = [1, self.dense_key, asdict(self.target), self.device.facts, *([given.id] if given else [])]
        return self.store.keep("profile", key, measure, lambda root: LatencyTable.load(root / "table"))

    @cached_property
    def cost(self) -> CostTable:
        """What the budget counts."""
        tables: dict[str, CostTable] = {"macs": MacTable(), "params": ParamTable()}
        return tables.get(self.request.metric) or self.table.value

    @cached_property
    def budget(self) -> float:
        """The budget in the cost's unit."""
        return parse_budget(self.request.budget, self.request.metric, self.cost.predict(self.graph))

    @cached_property
    def problem(self) -> Problem:
        """What the algorithm is asked. It sees training data only."""
        data = self.meter.fit if self.meter else self.data.train
        return Problem(self.loaded.model, self.graph, self.cost, self.budget, data, self.request.seed, self.reporter)

    @cached_property
    def meter(self) -> HeldOut | None:
        """Measures what widths are worth; None if the algorithm's scores say it."""
        return held_out(self.request, self.loaded, self.graph, self.data) if self.request.value == "measured" else None

    @cached_property
    def plan(self) -> Kept[KeepPlan]:
        """Which channels stay."""
        request, timed = self.request, self.request.metric == "latency"
        algorithm = asdict(make(request.algo, request.options))
        source = self.table if timed else request.metric
        key = [request.algo, algorithm, self.budget, source, self.data.key, request.seed, request.keep, self.dense_key]
        if self.meter:
            key += [request.value, request.value_rounds, request.value_finalists, self.meter.effort]
        planner = Planner(request, self.store, self.device, self.problem, key, lambda: self.artifact("dense"), self.meter)
        return planner.measured(self.table.value) if timed else planner.once()

    @cached_property
    def compacted(self) -> Kept[nn.Module]:
        """The smaller model, proven equal to the masked one, then repaired if the algorithm does that."""
        algorithm, plan = make(self.request.algo, self.request.options), self.plan.value

        def cut(folder: Path) -> None:
            small = compact(self.loaded.model, self.graph, plan)
            proof = stages.check_compaction(self.loaded.model, small, self.graph, plan, self.inputs)
            if hasattr(algorithm, "repair"):
                small = algorithm.repair(small, self.problem, plan)
            saved.save_origin(folder, saved.Origin(str(self.request.model), self.graph.fingerprint))
            saved.save_weights(small, folder / "compact.safetensors")
            _write_json(folder / "compact.json", [asdict(c) for c in proof])

        return self.store.keep("compact", [1, self.plan], cut, lambda root: self._small(root / "compact.safetensors"))

    @cached_property
    def tuned(self) -> Kept[nn.Module]:
        """The model after fine-tuning."""
        settings = self.request.training

        def tune(folder: Path) -> None:
            small = stages.ready(self.compacted.value, self.data, settings)
            if settings.epochs:
                teacher = self.loaded.model if settings.distill else None
                file = folder / CHECKPOINT / "state.safetensors"
                small = finetune(small, self.data, settings, teacher=teacher, checkpoint=file, reporter=self.reporter)
            saved.save_weights(small, folder / saved.WEIGHTS)

        key = [1, self.compacted, settings, torch.get_num_threads()]
        return self.store.keep("finetune", key, tune, lambda root: self._small(root / saved.WEIGHTS))

    @property
    def artifacts(self) -> dict[str, Kept[Path]]:
        """The built files of the dense and of the pruned model."""
        return {side: self.artifact(side) for side in ("dense", "pruned")}

    @cache  # noqa: B019 - lives as long as the run, as the stages above do
    def artifact(self, side: str) -> Kept[Path]:
        """Export, simplify and build one model; return the stage of the built file."""
        spec, example = self.target.build, self.loaded.example
        model, origin = (self.loaded.model, self.dense_key) if side == "dense" else (self.tuned.value, self.tuned)

        def export(folder: Path) -> None:
            export_onnx(model, example, folder / f"{side}.onnx", spec.opset)

        exported = self.store.keep(f"export-{side}", [1, origin, spec.opset], export, lambda root: root / f"{side}.onnx")

        def simplify(folder: Path) -> None:
            found = simplify_onnx(exported.value, folder / f"{side}-simplified.onnx")
            note = "" if found.ok else f"{side}.onnx was not simplified: {found.reason}"
            _write_json(folder / f"{side}-simplified.json", note)

        simple = exported
        if spec.simplify:
            name = f"{side}-simplified.onnx"
            simple = self.store.keep(f"simplify-{side}", [1, exported], simplify, lambda root: root / name)
        built = f"{side}-built{self.device.backend.suffix}"
        return self.store.keep(
            f"build-{side}",
            [1, simple, asdict(self.target.build), self.device.facts],
            lambda folder: self.device.build(simple.value, folder / built),
            lambda root: root / built,
        )

    @cached_property
    def checks(self) -> Kept[list[Check]]:
        """Each stage's outputs against those of the stage before."""
        artifact = self.artifact("pruned")
        files = {"onnx": "pruned.onnx", "simplified": "pruned-simplified.onnx", "built": artifact.value.name}

        def compare(folder: Path) -> None:
            present = {stage: self.store.root / name for stage, name in files.items() if (self.store.root / name).is_file()}
            found = stages.check_files(self.tuned.value, present, self.inputs, self.device)
            _write_json(folder / "checks.json", [asdict(c) for c in found])

        def read(root: Path) -> list[Check]:
            texts = [(root / name).read_text() for name in ("compact.json", "checks.json")]
            return [Check(**row) for text in texts for row in json.loads(text)]

        return self.store.keep("verify", [1, self.tuned, artifact, self.data.key], compare, read)

    @cached_property
    def latencies(self) -> Kept[dict[str, Any]]:
        """Dense and pruned artifact measured in turns."""
        files = self.artifacts

        def bench(folder: Path) -> None:
            _write_json(folder / "latency.json", self.device.bench({side: file.value for side, file in files.items()}))
            _write_json(folder / "device.json", self.device.state())

        key = [2, *files.values(), asdict(self.target.measure), self.device.facts]
        return self.store.keep("bench", key, bench, lambda root: json.loads((root / "latency.json").read_text()))

    @cached_property
    def accuracies(self) -> Kept[dict[str, Any]]:
        """The one time that the test set is read."""
        models = {"dense": self.loaded.model, "compacted": self.compacted.value, "pruned": self.tuned.value}

        def test(folder: Path) -> None:
            _write_json(folder / "accuracy.json", stages.accuracies(models, self.data, self.reporter))

        key = [1, self.tuned, self.dense_key, self.data.key]
        return self.store.keep("accuracy", key, test, lambda root: json.loads((root / "accuracy.json").read_text()))

    # ---- what the stages share -------------------------------------------------------------------------------------

    def _small(self, weights: Path) -> nn.Module:
        return saved.restore(self.loaded.model, self.graph, self.plan.value, weights)

    def report(self) -> Report:
        """Run every stage and put the findings together."""
        order = self._stages()
        request = self.request
        asked = [str(request.model), str(request.target), request.budget, request.metric, request.command]
        key = [2, *order, asked, self.data.description]
        return self.store.keep("report", key, lambda folder: render.write(self._assembled(order), folder), Report.load).value

    def _stages(self) -> list[Kept[Any]]:
        order: list[Kept[Any]] = [self.plan, self.compacted, self.tuned]
        order += [*self.artifacts.values(), self.checks, self.latencies, self.accuracies]
        if self.request.metric == "latency":
            order.insert(0, self.table)
        return order

    def _assembled(self, order: Sequence[Kept[Any]]) -> Report:
        chosen, rounds = read_rounds(self.store.root)
        notes = [json.loads(file.read_text()) for file in sorted(self.store.root.glob("*-simplified.json"))]
        valued = value_notes(self.store.root / f"plan-{chosen + 1}" if rounds else self.store.root)
        found = Findings(
            graph=self.graph,
            plan=self.plan.value,
            cost=self.cost,
            budget=self.budget,
            table=self.table.value if self.request.metric == "latency" else None,
            chosen=chosen,
            rounds=rounds,
            checks=self.checks.value,
            latencies=self.latencies.value,
            accuracies=self.accuracies.value,
            files={side: kept.value for side, kept in self.artifacts.items()},
            seconds={stage.stage: stage.seconds for stage in order},
            facts=self.device.facts | json.loads((self.store.root / "device.json").read_text()),
            notes=tuple(note for note in (*self.loaded.notes, *self.graph.notes, *valued, *notes) if note),
        )
        report = assemble(self.request, self.data, self.target, found)
        # The first plan, on the table as it was measured, beside the measurement that followed: nothing corrected since.
        return recorded(report, self.store.root, found.table, self.graph)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
