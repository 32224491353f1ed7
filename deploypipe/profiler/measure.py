"""Measure a model's latency table on its target; whatever has been measured before is reused."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.backends import load_backend
from deploypipe.backends.base import Facts, Profile
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.graph import trace
from deploypipe.latency import files as latency_file
from deploypipe.latency.files import Overhead
from deploypipe.latency.table import Context, LatencyTable, Shape, structure_of, width_of
from deploypipe.latency.widths import AllSteps, legal_widths, reachable, steps_of
from deploypipe.profiler.bench import HEAVY_MACS, Bench, opened
from deploypipe.profiler.learn import flat, learn_steps
from deploypipe.profiler.probe import Probe
from deploypipe.progress import Reporter, Silent
from deploypipe.runners import load_runner
from deploypipe.targets import Target, cache_folder, load_target
from deploypipe.types import Graph, Layer

_OUT, _IN = 14, 4  # most output and input widths measured per kernel shape: time is near linear in the inputs only
_PER_JOB = 48  # kernels timed in turns by one process
_UNSURE_US = 1.0  # a profile counts whole microseconds
_MOST_TIMER = 2.5  # what profiling adds to a kernel inside a model, at most, over what it adds in a chain of empty kernels
_TRUSTED = (0.85, 1.2)  # the dense model over the sum of its kernels


def profile(
    model: nn.Module,
    example_inputs: Any,
    target: "str | Target" = "cpu",
    *,
    cache_dir: str | Path | None = None,
    graph: Graph | None = None,
    reporter: Reporter | None = None,
) -> LatencyTable:
    """Measure what `model` costs on `target` at all widths that an allocator may choose.

    Each kernel shape is timed alone at a grid of widths, in the target's own runtime; the dense model is timed as a whole and
    kernel by kernel. Results are kept per runtime, version, threads, precision and processor, after every job: a second call
    measures what is missing, an interrupted one goes on where it was.

    Args:
        model: In any mode; it is exported in evaluation mode.
        example_inputs: A tensor, or the tuple of the model's arguments, with the batch size that will run in production.
        target: Name, or a `Target`.
        cache_dir: Where measurements are kept; by default the user's cache.
        graph: Of the model, if it has been traced already.
        reporter: Told about progress.

    Raises:
        TargetError: The target is unknown or its precision is not supported.
        ModelError: The model cannot be traced or exported.
        BackendError: The runtime is missing or failed.
    """
    chosen = load_target(target) if isinstance(target, str) else target
    tell = reporter or Silent()
    example = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    graph = graph or trace(model, example)
    backend, runner = load_backend(chosen), load_runner(chosen)
    with opened(backend, runner, chosen) as bench:
        store = _Store(Path(cache_dir) if cache_dir else cache_folder() / "profiles", bench, tell)
        table = store.table
        missing = _missing(table, graph)
        if missing:
            tell.stage("profile kernels", len(missing))
            table = store.measure(missing)
        else:
            tell.reused("profile kernels")
        structure = structure_of(graph)
        if any(context.structure == structure for context in table.contexts):
            tell.reused("profile model")
            return table
        tell.stage("profile model", 2)
        return store.keep(_in_context(store.bench, model, example, graph, table, tell))


def needed(graph: Graph, steps: AllSteps) -> list[Probe]:
    """Return every kernel to measure for `graph`: each distinct shape at a grid of legal widths."""
    legal, dense = legal_widths(graph, steps), graph.kept()
    return flat(_grid(layer, legal, dense, steps) for layer in graph.layers)


def _grid(layer: Layer, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int], steps: AllSteps) -> list[Probe]:
    shape = Shape.of(layer)
    outs = reachable(layer.n_out, legal, dense, _OUT)
    if shape.tied:
        first, second = shape.per_group
        return [Probe(shape, out // second * first, out) for out in outs]
    small = steps_of(layer, steps).small
    ins = reachable(layer.n_in, legal, dense, _OUT)
    if not set(small) & set(ins):  # small widths are run in another way than the rest: nothing may be interpolated there
        ins = reachable(layer.n_in, legal, dense, _IN)
    return [Probe(shape, n_in, n_out, relay=n_in in small) for n_in in ins for n_out in outs]


def _missing(table: LatencyTable, graph: Graph) -> list[Probe]:
    known = {(entry.shape, entry.key) for entry in table.kernels}
    probes = needed(graph, table.steps)
    return [probe for probe in probes if (probe.shape, (0 if probe.shape.tied else probe.n_in, probe.n_out)) not in known]


class _Store:
    """The measurements of one runtime on one device, on disk."""

    def __init__(self, root: Path, bench: Bench, reporter: Reporter) -> None:
        facts = bench.facts()
        self.folder, self.reporter = root / device_key(facts), reporter
        if not (self.folder / "device.json").is_file():
            reporter.stage("profile device")
            timer, node, session = bench.cost_of_measuring()
            bench = replace(bench, timer_us=timer)
            facts = {**facts, "timer_us": timer, "node_us": node, "session_us": session}
            facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            latency_file.write_device(self.folder, facts, learn_steps(partial(bench.kernels, again=0)))
        self.table = LatencyTable.load(self.folder)
        self.bench = replace(bench, timer_us=float(self.table.facts["timer_us"]))

    def measure(self, probes: Sequence[Probe]) -> LatencyTable:
        """Measure kernels job by job; each job's are on disk before the next begins."""
        done = 0
        for part in _parts(probes):
            measured = self.bench.kernels(part)
            # Read again: another process may have added its own meanwhile.
            stored = {(entry.shape, entry.key): entry for entry in latency_file.read_kernels(self.folder)}
            stored |= {(entry.shape, entry.key): entry for entry in measured.values()}
            latency_file.write_kernels(self.folder, stored.values())
            done += len(part)
            self.reporter.advance(done, part[-1].shape.title)
        self.table = LatencyTable.load(self.folder)
        return self.table

    def keep(self, context: Context) -> LatencyTable:
        latency_file.write_context(self.folder, context)
        self.table = LatencyTable.load(self.folder)
        return self.table


def _parts(probes: Sequence[Probe]) -> list[list[Probe]]:
    """Cut the work into jobs; long kernels are kept apart from short ones, which deserve more runs."""
    parts: list[list[Probe]] = []
    for heavy in (False, True):
        chosen = [probe for probe in probes if (probe.macs > HEAVY_MACS) == heavy]
        parts += [chosen[start : start + _PER_JOB] for start in range(0, len(chosen), _PER_JOB)]
    return parts


def device_key(facts: Facts) -> str:
    """Return a folder name that differs whenever two measurements must not be mixed."""
    flags = latency_file.hashed([facts["cpu"], facts["cpu_flags"], facts["governor"]])[:8]
    runtime = f"{facts['runtime']}-{facts['version']}"
    return f"{runtime}-{facts['arch']}-{facts['threads']}t-{facts['precision']}-{flags}"


def _exported(model: nn.Module, example: Any, target: Target, folder: Path) -> Path:
    path = export_onnx(model, example, folder / "model.onnx", target.build.opset).path
    return simplify_onnx(path, folder / "simple.onnx").path if target.build.simplify else path


def _in_context(bench: Bench, model: nn.Module, example: Any, graph: Graph, table: LatencyTable, reporter: Reporter) -> Context:
    """Time the dense model as a whole and kernel by kernel."""
    path = _exported(model, example, bench.target, bench.folder)
    whole = bench.whole({"model": path})["model"]
    reporter.advance(1, f"{whole.quiet_us:.0f} us")
    if whole.busy:
        reporter.note(
            f"other programs took {whole.foreign_load:.0%} of the measured core: latency is taken from processor time; "
            "measure again on a quiet machine"
        )
    profiled = bench.profiles({"model": path}, bench.target)["model"]
    reporter.advance(2)
    session = float(table.facts["session_us"])
    spent, n_kernels = profiled.sum_us - (whole.quiet_us - session), len(profiled.kernels)
    # Profiling adds more to a kernel between others than in a chain of empty ones; by how much, the whole model tells.
    timer = min(max(spent / n_kernels, bench.timer_us), _MOST_TIMER * bench.timer_us)
    scale, overhead = _split(replace(bench, timer_us=timer), profiled, graph, table)
    overhead = (*overhead, Overhead("session", "run", session, (), 0))
    dense = graph.kept()
    layers = (
        table.kernel_us(layer, layer.n_in.at(dense), layer.n_out.at(dense)) * scale.get(layer.name, 1.0)
        for layer in graph.layers
    )
    total = sum(layers) + sum(kernel.us for kernel in overhead)
    additivity = (profiled.sum_us - n_kernels * bench.timer_us + session) / whole.quiet_us
    found = Context(
        structure_of(graph), scale, overhead, whole.quiet_us, whole.quiet_us / total, additivity, whole.foreign_load, whole.runs
    )
    _judge(found, graph, reporter)
    return found


def _judge(context: Context, graph: Graph, reporter: Reporter) -> None:
    """Tell the user what makes the table less trustworthy."""
    if not _TRUSTED[0] <= context.factor <= _TRUSTED[1]:
        reporter.note(
            f"the dense model takes {context.factor:.2f} times the sum of its kernels: predictions are less certain than usual"
        )
    unseen = [layer.name for layer in graph.layers if layer.name not in context.scale]
    if unseen:
        names = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        reporter.note(
            f"{len(unseen)} layers have no kernel of their own in the runtime's profile and are priced alone: {names}"
        )


def _split(bench: Bench, profiled: Profile, graph: Graph, table: LatencyTable) -> tuple[dict[str, float], tuple[Overhead, ...]]:
    """Tell layers from other kernels: what each layer takes in context over alone, and what the others cost."""
    dense = graph.kept()
    calls: dict[str, list[Layer]] = {}
    for layer in graph.layers:
        calls.setdefault(layer.weight, []).append(layer)
    names = {weight: layers[0].name for weight, layers in calls.items()}
    scale: dict[str, float] = {}
    overhead = []
    for kernel in profiled.kernels:
        us = bench.net(kernel.median_us)
        if calls.get(kernel.weight):
            layer = calls[kernel.weight].pop(0)  # a shared layer runs once for each of its calls, in order
            alone = table.kernel_us(layer, layer.n_in.at(dense), layer.n_out.at(dense))
            scale[layer.name] = (us + _UNSURE_US) / (alone + _UNSURE_US)
        else:
            layers = tuple(dict.fromkeys(names[weight] for weight in kernel.feeds if weight in names))
            overhead.append(Overhead(kernel.name, kernel.op, us, layers, width_of(graph, layers).at(dense)))
    return scale, tuple(overhead)
