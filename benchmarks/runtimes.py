"""All installed runtimes on the same models: latency, size and difference to torch.

    python benchmarks/runtimes.py --weights resnet20.safetensors

MobileNetV2 and ResNet-18 have random weights, which decide no latency. ResNet-20 is pruned by `l1` to half of its latency on
ONNX Runtime, once for all runtimes; `--weights` gives the published weights (see examples/cifar_resnet.py), without it they are
random too. Each model is exported, built, compared with torch and timed on one target after the other, one thread; a row is
only as good as its `foreign_load`, the share of the core that other programs took.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar_resnet

import deploypipe as dp
from deploypipe.backends import load_backend
from deploypipe.backends.base import MAX_FOREIGN
from deploypipe.graph import trace
from deploypipe.models.weights import read_weights
from deploypipe.pipeline.stages import Device
from deploypipe.profiler.export import exported
from deploypipe.reports.figures import microseconds, size
from deploypipe.targets import Target, list_targets, load_target
from deploypipe.verify import check, outputs_of

RESULTS = Path(__file__).with_name("results") / "runtimes.csv"
Case = tuple[nn.Module, torch.Tensor]
Row = dict[str, Any]


def zoo(name: str) -> Callable[[Path | None], Case]:
    def make(_: Path | None) -> Case:
        return torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)

    return make


def resnet20(weights: Path | None) -> Case:
    model = cifar_resnet.resnet20()
    if weights:
        model.load_state_dict(read_weights(weights), strict=False)  # the file leaves counters of batches out
    return model.eval(), torch.randn(1, 3, 32, 32)


def pruned_resnet20(weights: Path | None) -> Case:
    model, example = resnet20(weights)
    plan = dp.prune(model, example, algo="l1", target="cpu", budget="50%", epochs=0)
    return dp.compact(model, trace(model, (example,)), plan).eval(), example


MODELS: Mapping[str, Callable[[Path | None], Case]] = {
    "mobilenet_v2": zoo("mobilenet_v2"),
    "resnet18": zoo("resnet18"),
    "resnet20": resnet20,
    "resnet20-pruned": pruned_resnet20,
}


def installed() -> Iterator[Target]:
    """Yield the targets on this machine whose runtime is installed and runs what it builds."""
    for name in list_targets():
        target = load_target(name)
        backend = load_backend(target)
        if target.reach.via == "local" and backend.pricing != "never" and backend.available()[0]:
            yield target


def quietest(device: Device, built: Path) -> Row:
    """Time a built file again while other programs disturb it, a few times at most; the quietest time counts."""
    found: list[Row] = []
    for pause in (0, 2, 5, 10, 20):
        time.sleep(pause)
        found.append(device.bench({"m": built})["m"])
        if (found[-1]["foreign_load"] or 0.0) <= MAX_FOREIGN:
            break
    return min(found, key=lambda timing: timing["foreign_load"] or 0.0)


def measured(name: str, model: nn.Module, example: torch.Tensor, target: Target) -> Row:
    """Build, verify and time one model on one target."""
    device = Device(target)
    inputs = [(example,), (-example,)]
    with tempfile.TemporaryDirectory() as folder:
        source = exported(model, example, target, Path(folder))
        built = Path(folder, f"built{device.backend.suffix}")
        start = time.perf_counter()
        notes = device.build(source, built)
        seconds = time.perf_counter() - start
        outputs = device.run(built, {"input": np.stack([x[0].numpy() for x in inputs])})
        found = check("built", "torch", outputs_of(model, inputs), outputs, device.backend.tolerance)
        timing = quietest(device, built)
        n_bytes = built.stat().st_size
    return {
        "model": name, "target": target.name, "runtime": f"{device.facts['runtime']} {device.facts['version']}", **timing,
        "artifact_bytes": n_bytes, "build_s": seconds, "error": found.error, "tolerance": found.tolerance,
        "verified": found.passed, "notes": "; ".join(notes),
    }  # fmt: skip


def show(row: Row) -> None:
    times = f"{microseconds(row['median_us']):>8} (p10 {microseconds(row['p10_us'])}, p90 {microseconds(row['p90_us'])})"
    rest = f"load {row['foreign_load']}  {size(row['artifact_bytes'])}  off by {row['error']:.1e}"
    print(f"{row['model']:<16} {row['target']:<15} {times:<42} {rest}  {row['notes']}", flush=True)


def write(rows: list[Row], facts: Mapping[str, object]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--targets", nargs="+", help="instead of all that are installed")
    parser.add_argument("--weights", type=Path, help="of ResNet-20 (default: random)")
    parser.add_argument("--dry", action="store_true", help="do not write into benchmarks/results")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    targets = [load_target(name) for name in options.targets] if options.targets else list(installed())
    rows: list[Row] = []
    for name in options.models:
        model, example = MODELS[name](options.weights)
        mine = [measured(name, model, example, target) for target in targets]
        for row in sorted(mine, key=lambda row: row["median_us"]):
            show(row)
        print(f"{name}: fastest here is {min(mine, key=lambda row: row['median_us'])['target']}\n", flush=True)
        rows += mine
    if not options.dry:
        weights = "published" if options.weights else "random"
        write(
            rows, machine.describe({"cpu flags": " ".join(Device(targets[0]).facts["cpu_flags"]), "ResNet-20 weights": weights})
        )


if __name__ == "__main__":
    main()
