"""One pruned model on several targets: planned on the first one's table, built, verified and measured on each."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deploypipe.measurement import Latency
from deploypipe.pipeline.absent import device_of
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.stages import Device, check_files
from deploypipe.profiler.export import exported
from deploypipe.progress import Reporter
from deploypipe.reports.report import Report
from deploypipe.reports.runtimes import RuntimeOutcome
from deploypipe.store import Kept, Store

_NOT_AT_HAND = (
    "no device is at hand: its file is made, and checked on this machine, but not measured; name a device with --host, or "
    "build for this target alone, with an estimate and a bundle for the owner of a device"
)


class Elsewhere:
    """The targets after the first one that a request names. Where no device is at hand, a file is made and not measured.

    Raises:
        UsageError: A target states an operator set that cannot be exported.
        BackendError: The runtime of one that is on this machine is not installed.
    """

    def __init__(self, request: Request) -> None:
        self.devices = [device_of(target) for target in request.resolved_targets()[1:]]
        for device in self.devices:
            device.require_builder()

    def reach(self, reporter: Reporter) -> None:
        """Ask devices that are not this machine what they are: what cannot be used is found before anything slow.

        Raises:
            TargetError: A target names no device, or the device is another kind of machine.
            BackendError: A device cannot be reached, or the runtime is missing there.
        """
        for device in self.devices:
            if not device.present:
                reporter.note(f"target {device.target.name}: {_NOT_AT_HAND}")
            elif not device.runner.here:
                _ = device.facts

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
                outcome = _outcome(device, models, example, inputs, folder, f"{name}/pruned{device.suffix}")
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
            built = Path(name, f"dense{device.suffix}")
            device.build(sources["dense"], built)
            found = device.bench({"dense": built, "pruned": folder / artifact})
            times |= {side: Latency(**timing) for side, timing in found.items()}
        checked = check_files(models["pruned"], {"built": folder / artifact} if runs else {}, inputs, device)
    return RuntimeOutcome(
        target=device.target.name,
        runtime=runtime_of(device.facts),
        **times,
        artifact=artifact,
        artifact_bytes=(folder / artifact).stat().st_size,
        error=checked[0].error if checked else None,
        tolerance=device.backend.tolerance,
        notes=(*notes, *device.notes, *(() if device.present else (_NOT_AT_HAND,))),
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
