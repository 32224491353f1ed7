"""One pruned model on several targets: planned on the first one's table, built, verified and measured on each."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deploypipe.errors import BackendError
from deploypipe.measurement import Latency
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.stages import Device, check_files
from deploypipe.profiler.export import exported
from deploypipe.reports.report import Report
from deploypipe.reports.runtimes import RuntimeOutcome
from deploypipe.store import Kept, Store


class Elsewhere:
    """The targets after the first one that a request names.

    Raises:
        BackendError: The runtime of one is not installed.
    """

    def __init__(self, request: Request) -> None:
        self.devices = [Device(target) for target in request.resolved_targets()[1:]]
        for device in self.devices:
            ready, missing = device.backend.available()
            if not ready:
                at = f"target {device.target.name}"
                raise BackendError(f"backend {device.backend.name} is not installed", at=at, fix=missing)

    def outcomes(
        self,
        store: Store,
        dense: nn.Module,
        pruned: Kept[nn.Module],
        example: tuple[Any, ...],
        inputs: Sequence[tuple[Tensor, ...]],
        key: Sequence[object],
    ) -> list[Kept[RuntimeOutcome]]:
        """Build, verify and measure both models on each target; each is a stage of its own, `on-TARGET`.

        Args:
            store: Keeps the results.
            dense: The model before pruning.
            pruned: The model after fine-tuning.
            example: Inputs of either.
            inputs: Real inputs to verify on.
            key: What the dense model and the inputs were made from.
        """
        found = []
        for device in self.devices:
            name = f"on-{device.target.name}"

            def measure(folder: Path, device: Device = device, name: str = name) -> None:
                (folder / name).mkdir()
                models = {"dense": dense, "pruned": pruned.value}
                outcome = _outcome(device, models, example, inputs, folder, f"{name}/pruned{device.backend.suffix}")
                (folder / name / "outcome.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")

            def read(root: Path, name: str = name) -> RuntimeOutcome:
                return RuntimeOutcome.from_json(json.loads((root / name / "outcome.json").read_text()))

            found.append(store.keep(name, [1, *key, pruned, asdict(device.target), device.facts], measure, read))
        return found


def _outcome(
    device: Device,
    models: Mapping[str, nn.Module],
    example: tuple[Any, ...],
    inputs: Sequence[tuple[Tensor, ...]],
    folder: Path,
    artifact: str,
) -> RuntimeOutcome:
    """Do for one target what the pipeline does for the first."""
    runs = device.backend.pricing != "never"
    with tempfile.TemporaryDirectory(prefix="deploypipe-") as name:
        sources = {side: exported(model, example, device.target, Path(name, side)) for side, model in models.items()}
        notes = device.build(sources["pruned"], folder / artifact)
        times: dict[str, Any] = {"dense": None, "pruned": None}
        if runs:
            built = Path(name, f"dense{device.backend.suffix}")
            device.build(sources["dense"], built)
            found = device.bench({"dense": built, "pruned": folder / artifact})
            times = {side: Latency(**timing) for side, timing in found.items()}
        checked = check_files(models["pruned"], {"built": folder / artifact} if runs else {}, inputs, device)
    return RuntimeOutcome(
        target=device.target.name,
        runtime=runtime_of(device.facts),
        **times,
        artifact=artifact,
        artifact_bytes=(folder / artifact).stat().st_size,
        error=checked[0].error if checked else None,
        tolerance=device.backend.tolerance,
        notes=notes,
    )


def runtime_of(facts: Mapping[str, Any]) -> str:
    """Return the name and version of a runtime."""
    return f"{facts.get('runtime', 'unknown')} {facts.get('version', '')}".strip()


def _first(report: Report) -> RuntimeOutcome:
    """Return what a report says of its own target, in the same form."""
    error, tolerance = next(((c.error, c.tolerance) for c in report.checks if c.stage == "built"), (None, 0.0))
    return RuntimeOutcome(
        target=report.target,
        runtime=runtime_of(report.machine),
        dense=report.dense.latency,
        pruned=report.pruned.latency,
        artifact=report.artifacts["artifact"],
        artifact_bytes=report.pruned.artifact_bytes,
        error=error,
        tolerance=tolerance,
    )


def with_outcomes(report: Report, others: Sequence[Kept[RuntimeOutcome]]) -> Report:
    """Return the report with what was found on the other targets beside its own; unchanged if there are none."""
    if not others:
        return report
    return replace(report, runtimes=(_first(report), *(kept.value for kept in others)))
