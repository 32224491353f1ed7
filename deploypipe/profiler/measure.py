"""Measure a model's latency table on its target; whatever has been measured before is reused."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.backends import load_backend
from deploypipe.backends.base import Backend, Facts
from deploypipe.device import at_home
from deploypipe.errors import TargetError
from deploypipe.folder import explained, make_folder
from deploypipe.graph import trace
from deploypipe.latency import files as latency_file
from deploypipe.latency.context import MOST_ERROR
from deploypipe.latency.table import Context, LatencyTable, Shape
from deploypipe.latency.widths import AllSteps, legal_widths, reachable, steps_of, two_four_widths
from deploypipe.profiler.bench import HEAVY_MACS, Bench, opened
from deploypipe.profiler.context import in_context
from deploypipe.profiler.edges import confirm, unconfirmed
from deploypipe.profiler.export import Export, exported
from deploypipe.profiler.learn import flat, learn_steps
from deploypipe.profiler.noise import ACCEPTED, Noise
from deploypipe.profiler.probe import Probe
from deploypipe.profiler.whole import fitted_table
from deploypipe.progress import Reporter, Silent
from deploypipe.runners import load_runner
from deploypipe.runners.base import Runner
from deploypipe.targets import ALLOW_NOISE, Target, cache_folder, load_target
from deploypipe.types import Graph, Layer

_OUT, _IN = 14, 4  # most output and input widths measured per kernel shape: time is near linear in the inputs only
_ANOTHER_CACHE = "set DEPLOYPIPE_CACHE to a folder that can be written"
_PER_JOB = 48  # kernels timed in turns by one process


def profile(  # noqa: PLR0913 - the public surface, named arguments in practice
    model: nn.Module,
    example_inputs: Any,
    target: "str | Target" = "cpu",
    *,
    cache_dir: str | Path | None = None,
    graph: Graph | None = None,
    reporter: Reporter | None = None,
    fresh: bool = False,
    allow_noise: bool | None = None,
    export: Export = exported,
    runner: Runner | None = None,
) -> LatencyTable:
    """Measure what `model` costs on `target` at all widths that an allocator may choose.

    Each kernel shape is timed alone at a grid of widths, in the target's own runtime, and with 2:4 weights too where that has
    kernels for them; the dense model is timed as a whole and kernel by kernel. (A runtime that is timed by whole models only
    gets a table that is fitted to such times.) Results are kept per runtime, version, threads, precision and processor, after
    every job: a second call measures what is missing, an interrupted one goes on where it was.

    Args:
        model: In any mode; it is exported in evaluation mode.
        example_inputs: A tensor, or the tuple of the model's arguments, with the batch size that will run in production.
        target: Name, or a `Target`.
        cache_dir: Where measurements are kept; by default the user's cache.
        graph: Of the model, if it has been traced already.
        reporter: Told about progress.
        fresh: Forget first what has been measured for this runtime, version, threads, precision and processor.
        allow_noise: Accept measurements that other programs disturbed, and a table that is off by more than a tenth, and
            record that; by default what the environment variable DEPLOYPIPE_ALLOW_NOISE says.
        export: Writes a form of the model into a folder; for callers that profile one model several times.
        runner: Reaches the target, for callers that have a connection already; else one is opened, and closed again.

    Raises:
        TargetError: The target is unknown, its precision is not supported, other programs kept its cores too busy, or what was
            measured predicts whole models badly.
        ModelError: The model cannot be traced or exported.
        BackendError: The runtime is missing or failed.
        UsageError: The cache cannot be written.
    """
    chosen = at_home(load_target(target) if isinstance(target, str) else target)
    tell = reporter or Silent()
    example = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    graph = graph or trace(model, example)
    backend = _measuring(chosen)
    noise = Noise() if allow_noise is None else Noise(allow_noise)
    root = Path(cache_dir) if cache_dir else cache_folder() / "profiles"
    with ExitStack() as stack:
        stack.enter_context(_cache(root))
        runner = runner or stack.enter_context(closing(load_runner(chosen)))
        bench = stack.enter_context(opened(backend, runner, chosen, noise, export))
        if backend.pricing == "models":
            facts = bench.facts()
            return fitted_table(bench, model, example, graph, facts, root / f"{device_key(facts)}-fitted", tell, fresh)
        store = _Store(root, bench, tell, fresh)
        table = store.confirmed(graph)
        missing = _missing(table, graph, sparse=backend.two_four)
        if missing:
            tell.stage("profile kernels", len(missing))
            table = store.measure(missing)
        else:
            tell.reused("profile kernels")
        if _is_profiled(table, graph, noise):
            tell.reused("profile model")
            return table
        return store.keep(_trusted(in_context(store.bench, model, example, graph, table, tell), noise, store.folder))


def _measuring(target: Target) -> Backend:
    """Return the target's backend.

    Raises:
        TargetError: It only converts.
    """
    backend = load_backend(target)
    if backend.pricing == "never":
        message = f"what is built for target {target.name} cannot be run here: there is no latency to measure"
        raise TargetError(message, at=f"--target {target.name}", fix="plan by counts: --metric macs or params")
    return backend


@contextmanager
def _cache(root: Path) -> Iterator[None]:
    """Make the folder of all profiles, and explain why something cannot be written there."""
    with explained(root, _ANOTHER_CACHE):
        make_folder(root, _ANOTHER_CACHE)
        yield


def _is_profiled(table: LatencyTable, graph: Graph, noise: Noise) -> bool:
    """Say whether the table knows the model as a whole, well enough; that it could not be narrowed once may have changed."""
    found = table.known(graph)
    if found is None or (found.far_off and not noise.accepted):
        return False
    only_dense = found.prices and not found.errors
    return not (only_dense and table.candidates(graph))


def _trusted(context: Context, noise: Noise, folder: Path) -> Context:
    """Return what was learned of a model, unless it predicts whole models so badly that only the user may take it.

    Raises:
        TargetError: It is off by more than a tenth, and noise is not accepted.
    """
    if context.far_off and not noise.accepted:
        raise TargetError(
            f"the latency table is off by {context.error:.0%} on whole forms of the model that it did not see, more than the "
            f"{MOST_ERROR:.0%} allowed",
            at=str(folder),
            fix=f"run it again on a quiet machine (kernels stay measured), plan by counts: --metric macs, or accept it: "
            f"deploypipe profile --allow-noise, or {ALLOW_NOISE}=1; table and report then say so",
        )
    return context


def needed(graph: Graph, steps: AllSteps, *, sparse: bool = False) -> list[Probe]:
    """Return every kernel to measure for `graph`: each distinct shape at a grid of legal widths, if `sparse` 2:4 as well."""
    legal, dense = legal_widths(graph, steps), graph.kept()
    probes = [_grid(layer, legal, dense, steps) for layer in graph.layers]
    return flat([*probes, *(_two_four(layer, legal, dense) for layer in graph.layers if sparse)])


def _two_four(layer: Layer, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int]) -> list[Probe]:
    shape = Shape.of(layer)
    return [Probe(shape, *pair, sparsity="2:4") for pair in two_four_widths(layer, legal, dense, _IN, _OUT)]


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


def _missing(table: LatencyTable, graph: Graph, *, sparse: bool) -> list[Probe]:
    known = {entry.place for entry in table.kernels}
    return [probe for probe in needed(graph, table.steps, sparse=sparse) if probe.place not in known]


class _Store:
    """The measurements of one runtime on one device, on disk."""

    def __init__(self, root: Path, bench: Bench, reporter: Reporter, fresh: bool) -> None:
        facts = bench.facts()
        self.folder, self.reporter = root / device_key(facts), reporter
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        if not (self.folder / "device.json").is_file():
            reporter.stage("profile device")
            timer, node, session = bench.cost_of_measuring()
            bench = replace(bench, timer_us=timer)
            facts = {**facts, "timer_us": timer, "node_us": node, "session_us": session}
            facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            latency_file.write_device(self.folder, facts, learn_steps(partial(bench.kernels, again=0)))
        self.table = LatencyTable.load(self.folder)
        self.bench = replace(bench, timer_us=float(self.table.facts["timer_us"]))

    def confirmed(self, graph: Graph) -> LatencyTable:
        """Look at an edge of the model's most expensive layers, unless that has been done."""
        steps = self.table.steps
        if unconfirmed(graph, steps):
            self.reporter.stage("profile edges")
            own = confirm(graph, steps, partial(self.bench.kernels, again=1))
            latency_file.write_device(self.folder, self.table.facts, {**self.table.steps, **own})
        return self._reread()

    def measure(self, probes: Sequence[Probe]) -> LatencyTable:
        """Measure kernels job by job; each job's are on disk before the next begins."""
        done = 0
        for part in _parts(probes):
            measured = self.bench.kernels(part)
            latency_file.add_kernels(self.folder, measured.values())
            done += len(part)
            self.reporter.advance(done, part[-1].shape.title)
        return self._reread()

    def keep(self, context: Context) -> LatencyTable:
        latency_file.write_context(self.folder, context)
        return self._reread()

    def _reread(self) -> LatencyTable:
        """Read the files again, and note in them what noise was accepted."""
        self.table = LatencyTable.load(self.folder)
        before, worst = float(self.table.facts.get(ACCEPTED, 0.0)), self.bench.noise.worst
        if worst > before:
            latency_file.write_device(self.folder, {**self.table.facts, ACCEPTED: worst}, self.table.steps)
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
    """Return a folder name that differs whenever two measurements must not be mixed, or are written differently."""
    condition = [facts["cpu"], facts["cpu_flags"], facts["governor"]]
    more = [facts[name] for name in ("model", "power_mode", "gpu") if facts.get(name)]
    flags = latency_file.hashed(condition + more)[:8]
    runtime = f"{facts['runtime']}-{facts['version']}"
    return f"{runtime}-{facts['arch']}-{facts['threads']}t-{facts['precision']}-{flags}-v{latency_file.SCHEMA}"
