"""What the smaller commands do, in plain values: inspect a model, profile it, measure an artifact."""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from deploypipe.artifact import ArtifactTimes
from deploypipe.backends.base import SUFFIX
from deploypipe.device import at_home
from deploypipe.errors import ModelError, UsageError
from deploypipe.export import load_onnx
from deploypipe.folder import explained, require_writable
from deploypipe.graph import trace
from deploypipe.inspection import Inspection, inspect_graph
from deploypipe.latency.estimate import CALIBRATED, ESTIMATED
from deploypipe.latency.table import LatencyTable, Shape
from deploypipe.latency.widths import AllSteps, Steps
from deploypipe.measurement import Latency
from deploypipe.models.load import load_model
from deploypipe.pipeline.absent import device_of, stored
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.stages import Device
from deploypipe.profiler.measure import profile
from deploypipe.profiler.noise import ACCEPTED
from deploypipe.progress import Reporter, Silent
from deploypipe.reports.figures import unmeasured
from deploypipe.types import Graph

_ELSEWHERE = "name another folder with --save"


def inspect(model: str = "demo", weights: str | Path | None = None) -> Inspection:
    """Return layers, groups, what is fixed and why, and costs of a model."""
    loaded = load_model(model, weights)
    return inspect_graph(trace(loaded.model, loaded.example), model)


def profile_model(
    request: Request,
    reporter: Reporter | None = None,
    *,
    fresh: bool = False,
    save: str | Path | None = None,
    allow_noise: bool | None = None,
) -> dict[str, Any]:
    """Measure (or find, unless `fresh`) the latency table of a model and return what was learned, in plain values.

    Of the request only model, weights, target, threads and host matter. With `save`, the part of the table that prices this
    model is written into that folder.

    Raises:
        UsageError: The folder to save into is not empty, or cannot be written; several targets are named; there is no device
            to measure afresh.
    """
    if save:
        require_writable(Path(save), _ELSEWHERE)
        if any(Path(save).iterdir()):
            raise UsageError("the folder to save the table in is not empty", at=f"--save {save}", fix="name a new folder")
    device, tell = device_of(request.only_target()), reporter or Silent()
    if fresh and not device.present:
        fix = "name a device with --host, or leave --fresh out to see what is stored or estimated"
        raise UsageError("there is no device at hand to measure afresh", at=f"--fresh --target {device.target.name}", fix=fix)
    for note in device.notes:
        tell.note(note)
    loaded = load_model(request.model, request.weights)
    graph = trace(loaded.model, loaded.example)
    table = device.known_table(graph, None) or profile(
        loaded.model, loaded.example, device.target, graph=graph, reporter=tell, fresh=fresh, allow_noise=allow_noise
    )
    if save:
        with explained(Path(save), _ELSEWHERE):
            table.only(graph).save(save)
    return _summary(device, table, graph)


def bench_artifact(
    artifact: str | Path,
    target: str | Path = "cpu",
    threads: int | None = None,
    reporter: Reporter | None = None,
    *,
    layers: bool = True,
    host: str | None = None,
    benchmark_binary: str | Path | None = None,
) -> ArtifactTimes:
    """Measure an artifact or ONNX file on a target: the whole, and with `layers` each kernel.

    Raises:
        UsageError: There is no such file, or it is none that this target runs.
    """
    path, tell = Path(artifact), reporter or Silent()
    if not path.is_file():
        raise UsageError("there is no such file", at=str(path), fix="give a built artifact or an .onnx file")
    request = Request(target=target, threads=threads, host=host, benchmark_binary=benchmark_binary)
    device = Device(at_home(request.only_target()))
    suffixes = tuple(dict.fromkeys((SUFFIX[device.backend.source], device.suffix)))
    if not path.name.endswith(suffixes):
        fix = f"give a file that ends in {' or '.join(suffixes)}, or name another --target"
        raise UsageError(f"this is no model for target {device.target.name}", at=str(path), fix=fix)
    with closing(device.runner), TemporaryDirectory(prefix="deploypipe-") as folder:
        model = in_one_file(path, Path(folder)) if path.suffix == SUFFIX["onnx"] else path
        tell.stage("bench")
        whole = Latency(**device.bench({"model": model})["model"])
        if layers:
            tell.stage("profile kernels")
            layers = device.backend.times_layers
            if not layers:
                tell.note(f"backend {device.backend.name} gives no times of single layers")
        profiled = device.profile(model) if layers else None
    return ArtifactTimes(str(path), device.target.shown, device.target.measure.threads, whole, profiled)


def in_one_file(model: Path, folder: Path) -> Path:
    """Return an ONNX file, or a copy in `folder` with the weights that lie in files beside it: a job takes one file along.

    Raises:
        ModelError: The weights are missing, or too large for one file.
    """
    try:
        outline = onnx.load(str(model), load_external_data=False)
    except Exception:  # the runtime says what is wrong with it
        return model
    if not any(map(uses_external_data, outline.graph.initializer)):
        return model
    whole = folder / model.name
    try:
        onnx.save(load_onnx(model), str(whole))
    except ValueError as error:
        fix = "give a model below 2 GB"
        raise ModelError(f"model and weights do not fit into one file: {error}", at=str(model), fix=fix) from error
    return whole


def _summary(device: Device, table: LatencyTable, graph: Graph) -> dict[str, Any]:
    """Return what profiling taught, in plain values."""
    target, context = device.target.shown, table.context(graph)
    predicted = table.predict(graph)
    if table.source == ESTIMATED:
        return {
            "target": target,
            "latencies": f"{unmeasured(ESTIMATED)}: there is no device at hand",
            "kernels_estimated": len(table.kernels),
            "dense_estimated_us": round(predicted, 1),
            "rests_on": dict(table.facts["rates"]),
        }
    return {
        "target": target,
        "table": table.source,
        **({} if device.present else {"latencies": unmeasured(table.source, stored(table))}),
        "runtime": f"{table.facts.get('runtime')} {table.facts.get('version')}, {table.facts.get('threads')} threads",
        "layers": _origin(table),
        f"kernels_{'estimated' if table.source == CALIBRATED else 'measured'}": _n_known(table),
        **({"of_them_with_2:4_weights": sum(e.sparsity == "2:4" for e in table.kernels)} if table.knows_two_four else {}),
        "steps": _all_steps(table.steps, graph),
        "dense_measured_us": round(context.whole_us, 1),
        "dense_predicted_us": round(predicted, 1),
        "sum_of_kernels_over_whole": round(context.additivity, 3),
        "correction_factor": round(context.factor, 3),
        "checked_plans": len(context.errors),
        "error_on_them": None if context.error is None else round(context.error, 4),
        "worst_error": round(max(map(abs, context.errors)), 4) if context.errors else None,
        "foreign_load": context.foreign_load,
        "out_of_range": list(context.doubts),
        "accepted_foreign_load": table.facts.get(ACCEPTED, 0.0),
    }


def _all_steps(steps: AllSteps, graph: Graph) -> str:
    """Return what holds for kinds of kernels, and for shapes of this model that were looked at themselves."""
    mine = {Shape.of(layer).title for layer in graph.layers}
    shown = {name: item for name, item in steps.items() if not item.edge or name in mine}
    return "; ".join(
        f"{name}: {_steps_text(item)}" for name, item in sorted(shown.items(), key=lambda row: (row[1].edge > 0, row[0]))
    )


def _n_known(table: LatencyTable) -> int:
    """Return how many kernels were measured, or calibrated by whole models."""
    return len(table.kernels) if table.source == CALIBRATED else sum(entry.runs > 0 for entry in table.kernels)


def _origin(table: LatencyTable) -> str:
    """Say what the table's layers come from."""
    n = table.facts.get("n_plans")
    return (
        f"{len(table.kernels)} costs of layers fitted to {n} whole models" if n else "kernels measured alone and in the model"
    )


def _steps_text(steps: Steps) -> str:
    text = f"steps of {steps.step}"
    if steps.align > 1:
        text += f", widths not divisible by {steps.align} cost up to {steps.penalty:.1f}x"
    return text + (f" (around {steps.edge})" if steps.edge else "")
