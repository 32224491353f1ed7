"""Time a model as a whole and kernel by kernel, in full width and narrowed: how its kernels add up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deploypipe.backends.base import Profile, Timing
from deploypipe.compact import compact
from deploypipe.errors import ModelError
from deploypipe.latency.files import Anchors, Context, Overhead
from deploypipe.latency.table import LatencyTable, overhead_terms, structure_of, width_of
from deploypipe.plan import KeepPlan
from deploypipe.profiler.bench import Bench
from deploypipe.profiler.export import exported
from deploypipe.progress import Reporter
from deploypipe.types import Graph, Kept, Layer

_NARROW = 0.5  # share of its channels that each group keeps in the narrow form, as far as whole steps allow
_UNSURE_US = 1.0  # a profile counts whole microseconds
_MOST_TIMER = 2.5  # what profiling adds to a kernel inside a model, at most, over what it adds in a chain of empty kernels
_TRUSTED = (0.85, 1.2)  # the dense model over the sum of its kernels


@dataclass(frozen=True)
class _Form:
    """One form of the model, measured: kernel times alone and inside, by layer, and all kernels that are no layers."""

    kept: Kept
    whole: Timing
    alone: Mapping[str, float]
    inside: Mapping[str, float]
    others: tuple[Overhead, ...]

    def anchors(self, graph: Graph, correction: float = 1.0) -> dict[str, tuple[int, float]]:
        found = {}
        for layer in graph.layers:
            if layer.name in self.inside:
                work = layer.n_in.at(self.kept) * layer.n_out.at(self.kept)
                ratio = (self.inside[layer.name] + _UNSURE_US) / (self.alone[layer.name] + _UNSURE_US)
                found[layer.name] = (work, correction * ratio)
        return found


def in_context(bench: Bench, model: nn.Module, example: Any, graph: Graph, table: LatencyTable, reporter: Reporter) -> Context:
    """Measure how the kernels of `table` add up in `model`.

    The dense model fixes what its other kernels cost and one factor for all; the narrow form then corrects the layers, since a
    kernel that reads from memory what it found in the cache when it ran alone is slowed less the fewer channels there are.

    Raises:
        ModelError: The model cannot be exported.
        BackendError: The runtime failed.
    """
    plans: dict[str, KeepPlan] = {"dense": KeepPlan({}), "narrow": narrow_plan(graph, table)}
    files = {"dense": exported(model, example, bench.target, bench.folder / "dense")}
    try:
        small = compact(model, graph, plans["narrow"])
        files["narrow"] = exported(small, example, bench.target, bench.folder / "narrow")
    except ModelError as error:
        reporter.note(f"the model cannot be narrowed, so only its full width is known in context: {error.message}")
    reporter.advance(1)
    whole = bench.whole(files)
    reporter.advance(2, f"{whole['dense'].quiet_us:.0f} us")
    profiles = bench.profiles(files, bench.target)
    found = combined(bench, table, graph, plans, whole, profiles)
    _judge(found, whole["dense"], graph, reporter)
    return found


def combined(
    bench: Bench,
    table: LatencyTable,
    graph: Graph,
    plans: Mapping[str, KeepPlan],
    whole: Mapping[str, Timing],
    profiles: Mapping[str, Profile],
) -> Context:
    """Return how the kernels of `table` add up, from measurements of the "dense" model and perhaps of a "narrow" one."""
    forms = {name: _form(bench, table, graph, graph.kept(plans[name]), whole[name], profiles[name]) for name in profiles}
    return _context(graph, table, forms["dense"], forms.get("narrow"), profiles["dense"], bench.timer_us)


def narrow_plan(graph: Graph, table: LatencyTable) -> KeepPlan:
    """Return the plan that keeps about half of every group, on the table's candidates."""
    kept = {}
    for name, widths in table.candidates(graph).items():
        wanted = _NARROW * widths[-1]
        kept[name] = min(widths, key=lambda width: (abs(width - wanted), width))
    return KeepPlan.of_widths(kept)


def _context(
    graph: Graph, table: LatencyTable, dense: _Form, narrow: _Form | None, profile: Profile, timer_us: float
) -> Context:
    session = float(table.facts["session_us"])
    overhead = (*dense.others, Overhead("session", "run", session, (), 0))
    wide = dense.anchors(graph)
    layers = sum(us * wide.get(name, (0, 1.0))[1] for name, us in dense.alone.items())
    whole_us = dense.whole.quiet_us
    factor = whole_us / (layers + sum(kernel.us for kernel in overhead))
    additivity = profile.ratio or (profile.sum_us - len(profile.kernels) * timer_us + session) / whole_us
    context = Context(
        structure_of(graph), {name: (anchor,) for name, anchor in wide.items()}, overhead, whole_us, None, factor, additivity,
        dense.whole.foreign_load, dense.whole.runs,
    )  # fmt: skip
    if narrow is None:
        return context
    rest = sum(
        term.price(term.n_in.at(narrow.kept), term.n_out.at(narrow.kept))
        for term in overhead_terms(graph, context, float(table.facts["node_us"]))
    )
    plain = narrow.anchors(graph)
    layers = sum(us * plain.get(name, (0, 1.0))[1] for name, us in narrow.alone.items())
    correction = max(narrow.whole.quiet_us - rest, 0.0) / (factor * layers)
    few = narrow.anchors(graph, correction)
    scale: dict[str, Anchors] = {name: (few[name], anchor) if name in few else (anchor,) for name, anchor in wide.items()}
    return replace(context, scale=scale, narrow_us=narrow.whole.quiet_us)


def _form(bench: Bench, table: LatencyTable, graph: Graph, kept: Kept, whole: Timing, profiled: Profile) -> _Form:
    """Tell layers from other kernels in a profile."""
    spent = profiled.sum_us - (whole.quiet_us - float(table.facts["session_us"]))
    # Profiling adds more to a kernel between others than in a chain of empty ones; by how much, the whole model tells.
    timer = min(max(spent / len(profiled.kernels), bench.timer_us), _MOST_TIMER * bench.timer_us)
    bench = replace(bench, timer_us=timer)
    calls: dict[str, list[Layer]] = {}
    for layer in graph.layers:
        calls.setdefault(layer.weight, []).append(layer)
    names = {weight: layers[0].name for weight, layers in calls.items()}
    inside: dict[str, float] = {}
    others = []
    for kernel in profiled.kernels:
        us = bench.net(kernel.median_us)
        if calls.get(kernel.weight):
            inside[calls[kernel.weight].pop(0).name] = us  # a shared layer runs once for each of its calls, in order
        else:
            layers = tuple(dict.fromkeys(names[weight] for weight in kernel.feeds if weight in names))
            others.append(Overhead(kernel.name, kernel.op, us, layers, width_of(graph, layers).at(kept)))
    alone = {layer.name: table.kernel_us(layer, layer.n_in.at(kept), layer.n_out.at(kept)) for layer in graph.layers}
    return _Form(kept, whole, alone, inside, tuple(others))


def _judge(context: Context, whole: Timing, graph: Graph, reporter: Reporter) -> None:
    """Tell the user what makes the table less trustworthy."""
    if whole.busy:
        reporter.note(
            f"other programs took {whole.foreign_load:.0%} of the measured core: latency is taken from processor time; "
            "measure again on a quiet machine"
        )
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
