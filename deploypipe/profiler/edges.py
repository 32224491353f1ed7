"""Confirm on a model's most expensive layers what was learned about widths for their kind, and keep where they differ."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from deploypipe.latency.files import Shape
from deploypipe.latency.widths import AllSteps, Steps, steps_of
from deploypipe.profiler.learn import SLOWER, Measure, flat, saves
from deploypipe.profiler.probe import Probe
from deploypipe.types import Graph, Layer

_PER_KIND = 2  # shapes of each kind of kernel that are confirmed
_VISIBLE = 0.08  # a step is judged where half of it is at least this share of the channels: beyond lies noise


def unconfirmed(graph: Graph, steps: AllSteps) -> dict[str, Layer]:
    """Return title -> layer of the most expensive prunable shapes of each kind whose own edge has not been looked at."""
    work, first = Counter[str](), dict[str, Layer]()
    dense = graph.kept()
    for layer in graph.layers:
        step = steps.get(layer.kind, Steps()).step
        if step > 1 and layer.n_out.parts and layer.n_out.at(dense) >= 2 * step:
            title = Shape.of(layer).title
            first.setdefault(title, layer)
            work[title] += Probe(Shape.of(layer), layer.n_in.at(dense), layer.n_out.at(dense)).macs
    chosen, taken = dict[str, Layer](), Counter[str]()
    for title, _ in work.most_common():
        kind = first[title].kind
        if taken[kind] < _PER_KIND:
            taken[kind] += 1
            chosen[title] = first[title]
    return {title: layer for title, layer in chosen.items() if title not in steps}


def confirm(graph: Graph, steps: AllSteps, measure: Measure) -> dict[str, Steps]:
    """Measure around one edge of each unconfirmed shape; return title -> its own steps."""
    layers, dense = unconfirmed(graph, steps), graph.kept()
    around = {title: _around(layer, layer.n_in.at(dense), layer.n_out.at(dense), steps) for title, layer in layers.items()}
    if not around:
        return {}
    found = measure(flat(probes.values() for probes in around.values()))
    return {
        title: own_steps({name: found[probe].median_us for name, probe in probes.items()}, probes["edge"].n_out, of)
        for title, probes in around.items()
        for of in (steps_of(layers[title], steps),)
    }


def _around(layer: Layer, n_in: int, n_out: int, steps: AllSteps) -> dict[str, Probe]:
    """Return the kernel at the last whole step, half a step and a channel below it, and off with its inputs."""
    shape, step = Shape.of(layer), steps_of(layer, steps).step
    edge = n_out // step * step
    unit = shape.per_group[1] if shape.tied else 1

    def at(width: int) -> Probe:
        return Probe(shape, width // unit * shape.per_group[0] if shape.tied else n_in, width)

    probes = {"edge": at(edge)}
    for name, width in (("half", edge - step // 2), ("off", edge - 1)):
        if width % unit == 0:
            probes[name] = at(width)
    if layer.n_in.parts and not shape.tied and n_in > step:
        whole = n_in // step * step
        probes |= {"in": Probe(shape, whole, edge), "in off": Probe(shape, whole - 1, edge)}
    return probes


def own_steps(us: Mapping[str, float], edge: int, of: Steps) -> Steps:
    """Return the steps of one shape from the times around its edge; what cannot be told is as in its kind.

    Args:
        us: Times at the "edge", "half" a step below, one channel "off"; with whole inputs ("in") and one fewer ("in off").
        edge: The width at the edge.
        of: Steps of the kind.
    """
    step = of.step
    if (
        "half" in us
        and step // 2 / edge >= _VISIBLE
        and step // 2 % of.align == 0
        and saves(us["half"], us["edge"], step // 2, edge)
    ):
        step //= 2
    pairs = [(us[name], us[whole]) for name, whole in (("off", "edge"), ("in off", "in")) if name in us]
    if of.align == 1 or not pairs:
        return replace(of, step=step, edge=edge)
    worst = max(off / whole for off, whole in pairs)
    align, penalty = (of.align, worst) if worst > SLOWER else (1, 1.0)
    return replace(of, step=step, align=align, penalty=penalty, edge=edge)
