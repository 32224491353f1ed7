"""From a module to the file that runs on the target: export, simplify, build; each step kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.pipeline.stages import Device, check_files
from deploypipe.report import Check
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
    spec = device.target.build

    def export(folder: Path) -> None:
        export_onnx(model, example, folder / f"{side}.onnx", spec.opset)

    exported = store.keep(f"export-{side}", [1, origin, spec.opset], export, lambda root: root / f"{side}.onnx")

    def simplify(folder: Path) -> None:
        found = simplify_onnx(exported.value, folder / f"{side}-simplified.onnx")
        note = "" if found.ok else f"{side}.onnx was not simplified: {found.reason}"
        (folder / f"{side}-simplified.json").write_text(json.dumps(note) + "\n")

    simple = exported
    if spec.simplify:
        name = f"{side}-simplified.onnx"
        simple = store.keep(f"simplify-{side}", [1, exported], simplify, lambda root: root / name)
    built = f"{side}-built{device.backend.suffix}"
    return store.keep(
        f"build-{side}",
        [1, simple, asdict(spec), device.facts],
        lambda folder: device.build(simple.value, folder / built),
        lambda root: root / built,
    )


def checks_stage(
    store: Store,
    device: Device,
    tuned: Kept[nn.Module],
    artifact: Kept[Path],
    inputs: Sequence[tuple[Tensor, ...]],
    data_key: str,
) -> Kept[list[Check]]:
    """Compare each file of the pruned model with the one before, the first with the module; return these and earlier checks."""
    files = {"onnx": "pruned.onnx", "simplified": "pruned-simplified.onnx", "built": artifact.value.name}

    def compare(folder: Path) -> None:
        present = {stage: store.root / name for stage, name in files.items() if (store.root / name).is_file()}
        found = check_files(tuned.value, present, inputs, device)
        (folder / "checks.json").write_text(json.dumps([asdict(c) for c in found], indent=1) + "\n")

    def read(root: Path) -> list[Check]:
        texts = [(root / name).read_text() for name in ("compact.json", "checks.json")]
        return [Check(**row) for text in texts for row in json.loads(text)]

    return store.keep("verify", [1, tuned, artifact, data_key], compare, read)


def bench_stage(store: Store, device: Device, files: Mapping[str, Kept[Path]]) -> Kept[dict[str, Any]]:
    """Measure the built files in turns."""

    def bench(folder: Path) -> None:
        found = device.bench({side: file.value for side, file in files.items()})
        (folder / "latency.json").write_text(json.dumps(found, indent=1) + "\n")

    key = [1, *files.values(), asdict(device.target.measure), device.facts]
    return store.keep("bench", key, bench, lambda root: json.loads((root / "latency.json").read_text()))


def simplifier_notes(root: Path) -> list[str]:
    """Return why files were not simplified."""
    return [note for file in sorted(root.glob("*-simplified.json")) if (note := json.loads(file.read_text()))]
