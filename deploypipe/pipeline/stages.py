"""What single stages of the pipeline do, apart from where their results are kept."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil, inf
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.backends import load_backend
from deploypipe.backends.base import Arrays, Facts, Profile, Timing
from deploypipe.compact import across_norms, mask
from deploypipe.cost import CostTable
from deploypipe.data.batches import count, take
from deploypipe.data.load import Data
from deploypipe.device import facts_of, installed
from deploypipe.errors import BackendError, ModelError
from deploypipe.export import check_opset
from deploypipe.latency.stale import refuse_stale
from deploypipe.latency.table import LatencyTable
from deploypipe.plan import KeepPlan
from deploypipe.profiler.sittings import joined, scatter, sit
from deploypipe.progress import Reporter
from deploypipe.reports.report import Check
from deploypipe.runners import load_runner
from deploypipe.targets import Target, load_target, noise_accepted
from deploypipe.training.evaluate import evaluate, recalibrate
from deploypipe.training.settings import TrainSettings
from deploypipe.types import Graph
from deploypipe.verify import check, outputs_of, require

REFERENCE = "cpu"  # the target that runs exported files here, as a check
N_INPUTS = 8  # real inputs that every verification runs on
_SITTINGS, _MORE, _PAUSE_S = 3, 4, 3.0  # measurements of the same models, those that repeat one, and seconds before such
COMPACT_TOLERANCE = 1e-4  # float32 sums in another order


class Device:
    """A target's backend and runner together: build, run and measure there.

    Attributes:
        present: Whether there is a device; else see `absent`.
        notes: What the report should say about it.
    """

    present: ClassVar[bool] = True

    def __init__(self, target: Target) -> None:
        self.target = target
        self.notes: tuple[str, ...] = ()
        self.backend, self.runner = load_backend(target), load_runner(target)

    @property
    def suffix(self) -> str:
        """Of the built file."""
        return self.backend.suffix

    @cached_property
    def facts(self) -> Facts:
        """Runtime, versions, processor and threads of the device."""
        with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
            return facts_of(self.backend, self.runner, self.target, Path(folder))

    def require_builder(self) -> None:
        """Find out before anything slow whether this machine can make files for the target.

        Raises:
            UsageError: The target states an operator set that cannot be exported.
            BackendError: The runtime is to run here, and is not installed.
        """
        if self.backend.source == "onnx":
            check_opset(self.target.build.opset, f"{self.target.path or self.target.name}: build.opset")
        ready, missing = installed(self.backend, self.target)
        if self.present and self.runner.here and not ready:
            at = f"target {self.target.name}"
            raise BackendError(f"backend {self.backend.name} is not installed", at=at, fix=missing)

    def require_ready(self) -> None:
        """Find out as well whether the device can be used, if there is one.

        Raises:
            DeployPipeError: It cannot: see `require_builder` and `facts_of`.
        """
        self.require_builder()
        _ = self.facts

    def state(self) -> Facts:
        """Return how the device is reached, and what changes there from minute to minute: temperature, clocks."""
        return {"reached": self.runner.place, **self.runner.describe().passing}

    def remarks(self) -> tuple[str, ...]:
        """Return what the report should say of the measured latencies, besides these."""
        return ()

    def build(self, model: Path, artifact: Path) -> tuple[str, ...]:
        """Compile an exported model into `artifact`; return what the user should know about it."""
        with tempfile.TemporaryDirectory(dir=artifact.parent, prefix=".build-") as folder:
            result = self.runner.run(self.backend.build_job(model, self.target), Path(folder))
            next(iter(result.pulled[name] for name in result.pulled if name.startswith("artifact"))).replace(artifact)
            return self.backend.read_build(result)

    def run(self, model: Path, inputs: Arrays) -> list[NDArray[np.generic]]:
        """Return the outputs of an exported model or artifact, stacked over the inputs.

        They are computed on this machine, by the runtime of the target REFERENCE, if the backend does not hand them out.
        """
        if not self.backend.computes:
            return Device(load_target(REFERENCE)).run(model, inputs)
        with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
            result = self.runner.run(self.backend.run_job(model, inputs, self.target), Path(folder))
            return list(self.backend.read_run(result).values())

    def bench(self, models: Mapping[str, Path], expected_us: float | None = None) -> dict[str, Any]:
        """Measure models in turns, in several sittings; return for each the fields of a `Latency`.

        Two processes that run the same model differ by more than the runs inside of one do: where its memory happens to lie.

        Args:
            models: Built files.
            expected_us: What the first one took before. While it takes clearly longer, sittings are repeated after a pause, a
                few times at most; the quickest count.
        """
        measure = self.target.measure
        target = replace(self.target, measure=replace(measure, runs=ceil(measure.runs / _SITTINGS)))

        def take() -> dict[str, Timing]:
            with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
                return self.backend.read_bench(self.runner.run(self.backend.bench_job(models, target), Path(folder)))

        most = _SITTINGS + (0 if expected_us is None or noise_accepted() else _MORE)
        first = next(iter(models))
        found = sit(take, lambda timings: timings[first].quiet_us, _SITTINGS, most, expected_us or inf, _PAUSE_S)
        scatters = scatter(found, first)
        return {
            name: {
                "median_us": t.median_us,
                "p10_us": t.p10_us,
                "p90_us": t.p90_us,
                "n_runs": t.runs,
                "foreign_load": t.foreign_load,
                "scatter": scatters[name],
            }
            for name, t in joined(found, first).items()
        }

    def tolerance(self, stage: str) -> float:
        """Return by how much the outputs of a stage's file may differ, as a share of the largest one."""
        return self.backend.tolerance

    @property
    def planned_with(self) -> Facts:
        """What of the facts the latency table depends on."""
        return self.facts

    def known_table(self, graph: Graph, given: str | Path | None) -> LatencyTable | None:
        """Return the latency table in the folder `given`; None if there is none, since the device can be measured."""
        return given_table(Path(given), graph, self) if given else None

    def within_reach(self, limit: float, cost: CostTable, graph: Graph, *, share: bool) -> float:
        """Return the budget to plan for: what was asked for, since measuring shows what can be reached.

        Args:
            limit: The budget, in the unit of `cost`.
            cost: What it counts.
            graph: Of the dense model.
            share: Whether the user gave it as a share of the dense model.
        """
        return limit

    def profile(self, model: Path) -> Profile:
        """Measure the kernels of a model."""
        with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
            result = self.runner.run(self.backend.profile_job({"model": model}, self.target), Path(folder))
            return self.backend.read_profile(result, {"model": model})["model"]


def given_table(folder: Path, graph: Graph, device: Device) -> LatencyTable:
    """Return a stored table's part for the model of `graph`.

    Raises:
        TargetError: It is no table, does not hold on this device, or does not price this model.
    """
    table = LatencyTable.load(folder)
    if device.present:
        refuse_stale(table.facts, {**device.facts, "precision": device.target.build.precision}, str(folder))
    table = table.only(graph)
    table.predict(graph)
    return table


def real_inputs(data: Data, example: Sequence[Any], n: int = N_INPUTS) -> list[tuple[Tensor, ...]]:
    """Return `n` inputs of the example's batch size from the training set.

    Raises:
        ModelError: The data does not have the shape or the type that the model takes.
    """
    first = example[0]
    batch = first.shape[0]
    order = torch.arange(n * batch) % count(data.train)
    images = take(data.train, order)[0]
    if images.shape[1:] != first.shape[1:]:
        raise ModelError(
            f"the data has inputs of shape {tuple(images.shape[1:])}, the model takes {tuple(first.shape[1:])}",
            at="--data and --model",
            fix="give data of the model's size, or let the factory return (model, example_inputs) of the data's size",
        )
    if images.dtype != first.dtype:
        raise ModelError(
            f"the data has inputs of {images.dtype}, the model takes {first.dtype}",
            at="--data and --model",
            fix=f"let the Dataset return inputs of {first.dtype}, or the factory a model and example inputs of {images.dtype}",
        )
    return [(part.contiguous(), *example[1:]) for part in torch.split(images, batch)]


def check_compaction(
    model: nn.Module, small: nn.Module, graph: Graph, plan: KeepPlan, inputs: Sequence[tuple[Tensor, ...]]
) -> list[Check]:
    """Compare the compacted with the masked model; nothing to compare where a norm runs across pruned channels.

    Raises:
        BackendError: They differ.
    """
    if across_norms(graph, plan):
        return []
    masked = outputs_of(mask(model, graph, plan), inputs)
    result = check("compacted", "masked dense model", masked, outputs_of(small, inputs), COMPACT_TOLERANCE)
    return [require(result, "this is a bug in deploypipe or a forward that depends on widths; keep groups whole with --keep")]


def check_files(
    model: nn.Module, files: Mapping[str, Path], inputs: Sequence[tuple[Tensor, ...]], device: Device
) -> list[Check]:
    """Compare each file (in order) with the stage before it, the first with the torch model.

    Raises:
        BackendError: A difference exceeds the tolerance.
    """
    tensors = [[arg.numpy() for arg in args if isinstance(arg, Tensor)] for args in inputs]
    names = ["input"] if len(tensors[0]) == 1 else [f"input_{i}" for i in range(len(tensors[0]))]
    arrays = {name: np.stack([args[i] for args in tensors]) for i, name in enumerate(names)}
    before, reference = "torch", outputs_of(model, inputs)
    found = []
    for stage, path in files.items():
        outputs = device.run(path, arrays)
        found.append(
            require(
                check(stage, before, reference, outputs, device.tolerance(stage)),
                f"look at {path.name}; another --target or opset may avoid the operation that differs",
            )
        )
        before, reference = stage, outputs
    return found


def ready(small: nn.Module, data: Data, settings: TrainSettings) -> nn.Module:
    """Return the compacted model with renewed batch norm statistics: where training starts, or with 0 epochs ends."""
    return recalibrate(small, data.train, seed=settings.seed, batch_size=settings.batch_size, augment=data.augment)


def accuracies(models: Mapping[str, nn.Module], data: Data, reporter: Reporter) -> dict[str, Any]:
    """Return the share of the test set that each model labels right, and the size of the test set."""
    found: dict[str, Any] = {name: evaluate(model, data.test, reporter=reporter).top1 for name, model in models.items()}
    return found | {"n_test": count(data.test)}
