"""Which widths a runtime runs well: steps learned by measurement, and the channel counts that land on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm

from deploypipe.two_four import IN, OUT, PLAIN
from deploypipe.types import Graph, Group, Layer, Width

MAX_CANDIDATES = 14


@dataclass(frozen=True)
class Steps:
    """How latency follows the channel count of one kind of kernel, or of one shape of it.

    Attributes:
        step: Latency is constant between multiples of this.
        align: Counts that are not a multiple of this leave the runtime's fast path ...
        penalty: ... and take this many times as long as the next full step.
        small: Counts below one step that are still quicker than a whole step, descending.
        edge: The width around which this was measured for one shape; 0 for a kind.
    """

    step: int = 1
    align: int = 1
    penalty: float = 1.0
    small: tuple[int, ...] = ()
    edge: int = 0

    def __post_init__(self) -> None:
        if self.step < 1 or self.align < 1:
            raise ValueError(f"a step of {self.step} channels, aligned to {self.align}")

    def up(self, width: int) -> int:
        """Return the width that costs as much as `width`: the next multiple of the step."""
        return width if width in self.small else -(-width // self.step) * self.step


AllSteps = Mapping[str, Steps]  # kind of kernel, or title of one shape -> its steps


def title(kind: str, kernel: tuple[int, ...], stride: tuple[int, ...], in_size: tuple[int, ...], rows: int) -> str:
    """Return a shape in words; shapes that differ in padding or dilation only are called alike."""
    if not in_size:
        return f"{kind} on {rows} rows"
    across, step, size = ("x".join(map(str, value)) for value in (kernel, stride, in_size))
    return f"{kind} {across} stride {step} on {size}"


def steps_of(layer: Layer, steps: AllSteps) -> Steps:
    """Return the steps that hold for `layer`: its shape's own, or its kind's; one by one where kernels showed none."""
    own = steps.get(title(layer.kind, layer.kernel, layer.stride, layer.in_size, 0 if layer.in_size else layer.positions))
    return own or steps.get("linear" if layer.kind == "matmul" else layer.kind, Steps())


def legal_widths(graph: Graph, steps: AllSteps, multiple: int = 1) -> dict[str, tuple[int, ...]]:
    """Return for every prunable group the channel counts that put all its layers on whole steps, ascending.

    The full count is always among them; at most 14 are evenly spread. Groups of a few steps also get the counts below one
    step with which some layer gains and none leaves its fast path. In a layer fed by several groups each group lands on whole
    steps by itself, and never below one: its tensor could not be joined with the others in the runtime's own layout, and all of
    them would have to be laid out anew.

    Args:
        graph: With the groups.
        steps: Of each kind of kernel.
        multiple: All counts but the full one are multiples of this in all layers, those below one step too.
    """
    return {group.name: _legal(group, _uses(graph, group), steps, multiple) for group in graph.prunable}


def _uses(graph: Graph, group: Group) -> list[tuple[Layer, int, bool]]:
    """Return the layers whose widths the group decides, with the channels that each of its units has there, and if alone."""
    found = []
    for layer in graph.layers:
        for width in (layer.n_in, layer.n_out):
            found += [(layer, slots, len(width.parts) == 1) for name, slots in width.parts if name == group.name]
    return found


def _legal(group: Group, uses: list[tuple[Layer, int, bool]], steps: AllSteps, multiple: int) -> tuple[int, ...]:
    unit = 1
    for layer, slots, _ in uses:
        step = lcm(steps_of(layer, steps).step, multiple)
        unit = lcm(unit, step // gcd(step, slots))
    unit = min(unit, group.size)
    chosen = {*_spread(unit, group.size), group.size}
    plain = all(slots == 1 and alone for _, slots, alone in uses)
    if plain and group.size <= 4 * unit:
        kinds = [steps_of(layer, steps) for layer, _, _ in uses]
        gaining = {width for kind in kinds for width in kind.small if width < group.size}
        chosen |= {width for width in gaining if all(width % lcm(kind.align, multiple) == 0 for kind in kinds)}
    return tuple(sorted(chosen))


def _spread(unit: int, size: int) -> range:
    """Return multiples of `unit` up to `size`, not more than the allowed number."""
    every = -(-(size // unit) // (MAX_CANDIDATES - 1))
    return range(unit * every, size + 1, unit * every) if every > 1 else range(unit, size + 1, unit)


def reachable(width: Width, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int], most: int) -> tuple[int, ...]:
    """Return the values of `width` to measure, ascending, the smallest and the full one included.

    With one group these are exact; with several (concatenation) they are spread from all-smallest to full in steps of the
    smallest group's first step.

    Args:
        width: Of a layer.
        legal: Group -> channel counts, from `legal_widths`.
        dense: Group -> its full channel count.
        most: How many values are wanted at most.
    """
    free = [(name, slots) for name, slots in width.parts if name in legal]
    full = width.at(dense)
    if not free:
        return (full,)
    if len(width.parts) == 1:
        name, slots = free[0]
        return _thin(tuple(width.const + slots * count for count in legal[name]), most)
    least = width.at({**dense, **{name: legal[name][0] for name, _ in free}})
    step = max(1, min(slots * legal[name][0] for name, slots in free))
    inner = range(-(-least // step) * step, full, step)
    return _thin(tuple(sorted({least, *inner, full})), most)


def two_four_widths(
    layer: Layer, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int], most_in: int, most_out: int
) -> list[tuple[int, int]]:
    """Return the pairs of widths at which to price a layer with 2:4 weights; none if it cannot have them.

    They span all widths that the pattern allows (see `two_four.allowed`) and the layer can reach.
    """
    if layer.kind not in PLAIN:
        return []
    ins, outs = _multiples(layer.n_in, IN, legal, dense), _multiples(layer.n_out, OUT, legal, dense)
    return [(n_in, n_out) for n_in in _thin(ins, most_in) for n_out in _thin(outs, most_out)]


def _multiples(width: Width, unit: int, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int]) -> tuple[int, ...]:
    """Return the multiples of `unit` that a width reaches, or, where several groups decide it, lie between what it reaches."""
    every = reachable(width, legal, dense, width.at(dense) + 1)
    if len(width.parts) > 1:
        return tuple(range(-(-every[0] // unit) * unit, every[-1] + 1, unit))
    return tuple(value for value in every if value % unit == 0)


def _thin(values: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Keep at most `most` of the values: both ends and an even choice between them."""
    if len(values) <= most:
        return values
    last = len(values) - 1
    return tuple(values[round(i * last / (most - 1))] for i in range(most))
