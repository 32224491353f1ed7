"""What the owner of a device needs to measure a run that was made without it: models, plan, script, commands, README."""

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploypipe import saved
from deploypipe.job import PYTHON
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline.absent import stored
from deploypipe.pipeline.stages import Device
from deploypipe.plan import KeepPlan
from deploypipe.reports.figures import microseconds, unmeasured
from deploypipe.store import Kept, Store
from deploypipe.targets import Rates, Target, list_targets
from deploypipe.types import Graph

BUNDLE, MANIFEST, ANSWER, SCHEMA = "bundle", "bundle.json", "results.json", 1


def bundle_stage(
    store: Store,
    device: Device,
    files: Mapping[str, Kept[Path]],
    plan: Kept[KeepPlan],
    table: Kept[LatencyTable] | None,
    graph: Graph,
) -> Kept[Path] | None:
    """Write the bundle into the run folder; None if the device was there, so that nobody has to be asked.

    Args:
        store: Of the run.
        device: Stands in for the device.
        files: "dense" and "pruned": the models as the runtime will be given them.
        plan: Which channels were kept.
        table: What the latencies were predicted by; None if the budget was not a latency.
        graph: Of the dense model.
    """
    if device.present:
        return None

    def write(folder: Path) -> None:
        made = folder / BUNDLE
        made.mkdir()
        job = device.backend.owner_job({side: kept.value for side, kept in files.items()}, device.target)
        for name, source in job.push.items():
            (made / name).write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        plan.value.save(made / saved.PLAN)
        argv = ["python3" if part == PYTHON else part for part in job.argv]
        manifest = _manifest(store.root, device, files, plan.value, table, graph)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        by_hand = device.backend.by_hand({side: f"{side}.onnx" for side in files}, device.target)
        (made / "README.md").write_text(_readme(device, manifest, shlex.join(argv), by_hand))

    key = [2, *files.values(), plan, table, vars(device.target)["name"]]
    return store.keep(BUNDLE, key, write, lambda root: root / BUNDLE)


def _manifest(
    run: Path,
    device: Device,
    files: Mapping[str, Kept[Path]],
    plan: KeepPlan,
    table: Kept[LatencyTable] | None,
    graph: Graph,
) -> dict[str, Any]:
    plans = {"dense": None, "pruned": plan}
    predicted = {side: table.value.predict(graph, plans[side]) for side in files} if table else {}
    return {
        "schema": SCHEMA,
        "run": str(run),
        "target": _found_again(device.target),
        "precision": device.target.build.precision,
        "sha256": {side: hashlib.sha256(kept.value.read_bytes()).hexdigest() for side, kept in files.items()},
        "predicted_us": predicted,
        "latency_source": unmeasured(table.value.source, stored(table.value)) if table else "",
        "table": table.value.id if table else "",
    }


def _found_again(target: Target) -> str:
    """Return what finds the target's file again: its name, unless that is another file's."""
    path, known = Path(target.path).resolve(), list_targets().get(target.name)
    return target.name if known is not None and known.resolve() == path else str(path)


def _readme(device: Device, manifest: Mapping[str, Any], command: str, by_hand: str) -> str:
    target, folder = device.target, shlex.quote(f"{manifest['run']}/{BUNDLE}")
    figures = ", ".join(f"{side} {microseconds(us)}" for side, us in manifest["predicted_us"].items())
    parts = [
        f"# Measure this on: {target.title}",
        "This folder was written without the device at hand. Nothing in it has been built or run there"
        + (f"; its latencies are **{manifest['latency_source']}**: {figures}." if figures else "."),
        f"1. Copy the folder to the device: `scp -r {folder} USER@DEVICE:`\n"
        f"2. There, with the power mode and clocks of production: `cd {BUNDLE} && {command}`. It needs Python 3 and the "
        "runtime, builds both models, times them in turns and layer by layer, and writes "
        f"`{ANSWER}`. A first build may take minutes.\n"
        f"3. Copy `{ANSWER}` back into this folder, then: `deploypipe profile --import {folder}`. That puts "
        "the measured figures into the report, and makes a profile that later builds for this target use.",
    ]
    if by_hand:
        limits = f"These figures are for people: they cannot be imported; only the script writes `{ANSWER}`."
        parts += ["## By hand", f"The same without the script. Times are `computeMs` in the times file. {limits}", by_hand]
    if target.rates.known:
        parts += ["## What the estimate rests on", sources(target.rates)]
    return "\n\n".join(parts) + "\n"


def sources(rates: Rates) -> str:
    """Return each rate with the document that it comes from, as a Markdown list."""
    rows = (
        (f"{rates.tflops:g} TFLOPS in {rates.precision}", rates.tflops_source),
        (f"{rates.bandwidth_gb_s:g} GB/s", rates.bandwidth_source),
        (f"channels in multiples of {rates.quantum}", rates.quantum_source),
        (f"{rates.launch_us:g} us a kernel besides its work", rates.launch_source),
        (f"2:4 weights compute {rates.sparse:g} times as fast", rates.sparse_source),
    )
    return "\n".join(f"- {figure}: {source}" for figure, source in rows)
