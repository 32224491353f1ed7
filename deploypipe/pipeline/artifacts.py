"""From a module to the file that runs on the target: export, simplify, build; each step kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deploypipe.backends.base import SUFFIX
from deploypipe.data.load import Data
from deploypipe.export import export_onnx, export_program, simplify_onnx
from deploypipe.pipeline.absent import read_returned
from deploypipe.pipeline.stages import Device, accuracies, check_files
from deploypipe.progress import Reporter
from deploypipe.reports.report import Check
from deploypipe.store import Kept, Store


def artifact_stage(
    store: Store, device: Device, side: str, model: nn.Module, example: tuple[Any, ...], origin: object
) -> Kept[Path]:
    """Export, simplify and build one model; return the stage of the built file.

    Args:
        store: Where the results are kept.
        device: Builds it.
        side: "dense" or "pruned"; begins the names of stages and files.
        model: In evaluation mode.
        example: Its inputs.
        origin: What the model was made from: part of the key.
    """
    spec, backend = device.target.build, device.backend
    name, simpler, built = exported_name(device, side), f"{side}-simplified.onnx", f"{side}-built{device.suffix}"

    def export(folder: Path) -> None:
        if backend.source == "program":
            export_program(model, example, folder / name)
        else:
            export_onnx(model, example, folder / name, spec.opset)

    def simplify(folder: Path) -> None:
        found = simplify_onnx(exported.value, folder / simpler)
        _note(folder / f"{side}-simplified.json", () if found.ok else (f"{name} was not simplified: {found.reason}",))

    def build(folder: Path) -> None:
        _note(folder / f"{side}-built.json", device.build(simple.value, folder / built))

    key = [origin, spec.opset] if backend.source == "onnx" else [origin, backend.source]
    exported = store.keep(f"export-{side}", [1, *key], export, lambda root: root / name)
    simple = exported
    if spec.simplify and backend.source == "onnx":
        simple = store.keep(f"simplify-{side}", [2, exported], simplify, lambda root: root / simpler)
    return store.keep(f"build-{side}", [3, simple, asdict(spec), device.facts], build, lambda root: root / built)


def checks_stage(
    store: Store,
    device: Device,
    tuned: Kept[nn.Module],
    artifact: Kept[Path],
    inputs: Sequence[tuple[Tensor, ...]],
    data_key: str,
) -> Kept[list[Check]]:
    """Compare each file of the pruned model with the one before, the first with the module; return these and earlier checks."""
    files = {device.backend.source: exported_name(device), "simplified": "pruned-simplified.onnx"}
    if device.backend.pricing != "never":  # else nothing here runs what was built
        files["built"] = artifact.value.name

    def compare(folder: Path) -> None:
        present = {stage: store.root / name for stage, name in files.items() if (store.root / name).is_file()}
        found = check_files(tuned.value, present, inputs, device)
        (folder / "checks.json").write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n")

    def read(root: Path) -> list[Check]:
        texts = [(root / name).read_text() for name in ("compact.json", "checks.json")]
        return [Check(**row) for text in texts for row in json.loads(text)]

    return store.keep("verify", [1, tuned, artifact, data_key], compare, read)


def bench_stage(
    store: Store, device: Device, files: Mapping[str, Kept[Path]], expected_us: float | None
) -> Kept[dict[str, Any]]:
    """Measure the built files in turns; None stands for each that nothing here runs.

    Args:
        store: Of the run.
        device: Where they run.
        files: The dense model's first.
        expected_us: What that took when the latency table was measured.
    """

    def bench(folder: Path) -> None:
        runs = device.backend.pricing != "never"
        found = device.bench({side: file.value for side, file in files.items()}, expected_us) if runs else dict.fromkeys(files)
        (folder / "latency.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / "device.json").write_text(json.dumps(device.state(), indent=1) + "\n")
        _note(folder / "latency-notes.json", device.remarks())

    returned = None if device.present else read_returned(store.root, device.target)  # the same device may be measured again
    key = [4, *files.values(), asdict(device.target.measure), device.facts, *([returned] if returned else [])]
    return store.keep("bench", key, bench, lambda root: json.loads((root / "latency.json").read_text()))


def accuracy_stage(
    store: Store, models: Mapping[str, nn.Module], data: Data, key: Sequence[object], reporter: Reporter
) -> Kept[dict[str, Any]]:
    """Test each model: the one time that the test set is read."""

    def test(folder: Path) -> None:
        (folder / "accuracy.json").write_text(json.dumps(accuracies(models, data, reporter), indent=1) + "\n")

    return store.keep("accuracy", [1, *key], test, lambda root: json.loads((root / "accuracy.json").read_text()))


def exported_name(device: Device, side: str = "pruned") -> str:
    """Return the file that the target's backend compiles from."""
    return f"{side}{SUFFIX[device.backend.source]}"


def file_notes(root: Path) -> list[str]:
    """Return what there is to say about the simplified and the built files."""
    files = sorted([*root.glob("*-simplified.json"), *root.glob("*-built.json"), *root.glob("latency-notes.json")])
    return list(dict.fromkeys(note for file in files for note in json.loads(file.read_text())))


def _note(path: Path, notes: Sequence[str]) -> None:
    path.write_text(json.dumps(list(notes)) + "\n")
