"""Count multiply-accumulates and parameters of a model under a plan, and price them for the allocator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from deploypipe.branch import branches, removed_params
from deploypipe.cost import CostTerm
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Kept, Layer, Width

N_CANDIDATES = 16


def macs(graph: Graph, plan: KeepPlan | None = None) -> int:
    """Return the multiply-accumulates of one forward pass of the traced example under `plan`.

    Counted are convolutions, linear layers and matrix products with a weight; norms, activations and biases are not.
    """
    kept, gone = graph.kept(plan), {layer for branch in branches(graph, plan).values() for layer in branch.layers}
    return sum(layer_macs(layer, kept) for layer in graph.layers if layer.name not in gone)


def params(graph: Graph, plan: KeepPlan | None = None) -> int:
    """Return the number of trainable parameters under `plan`, biases and norms included, buffers not."""
    kept, gone = graph.kept(plan), removed_params(graph, branches(graph, plan).values())
    counted = (widths for name, widths in _parameter_widths(graph).items() if name not in gone)
    return sum(prod(width.at(kept) for width in widths) for widths in counted)


def even_widths(size: int, multiple: int | None = None) -> tuple[int, ...]:
    """Return the widths to choose from: every multiple of `multiple`, and the full width; ascending.

    Without `multiple` the step is the smallest that gives at most 16 widths.

    >>> even_widths(20, 8), even_widths(64)[:3]
    ((8, 16, 20), (4, 8, 12))
    """
    step = multiple or -(-size // N_CANDIDATES)
    return tuple(sorted({*range(step, size + 1, step), size}))


@dataclass(frozen=True)
class MacTable:
    """Multiply-accumulates as the cost of a model.

    Attributes:
        multiple: Widths to choose from are multiples of this; None for at most 16 even steps.
    """

    multiple: int | None = None
    unit: str = "MACs"

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        """Return one term for each layer call; layers further down an empty branch are priced, so too high, never too low."""
        dense = graph.kept()
        return tuple(CostTerm(layer.name, layer.n_in, layer.n_out, _mac_price(layer, dense)) for layer in graph.layers)

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Return evenly spread widths for every prunable group."""
        return {group.name: even_widths(group.size, self.multiple) for group in graph.prunable}

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        """Return the multiply-accumulates under `plan`."""
        return float(macs(graph, plan))


@dataclass(frozen=True)
class ParamTable:
    """Trainable parameters as the cost of a model.

    Attributes:
        multiple: Widths to choose from are multiples of this; None for at most 16 even steps.
    """

    multiple: int | None = None
    unit: str = "params"

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        """Return one term for each parameter.

        Should more than two axes of a parameter shrink, those beyond the first two are priced whole, and so are biases and
        norms behind an empty branch: too high, never too low.
        """
        return tuple(_parameter_term(name, widths, graph.shapes[name]) for name, widths in _parameter_widths(graph).items())

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Return evenly spread widths for every prunable group."""
        return {group.name: even_widths(group.size, self.multiple) for group in graph.prunable}

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        """Return the number of parameters under `plan`."""
        return float(params(graph, plan))


def layer_macs(layer: Layer, kept: Kept) -> int:
    """Return the multiply-accumulates of one layer call when `kept[group]` channels stay in every group."""
    # A transposed convolution's positions are those of its input, and n_in * n_out / groups is the same product.
    if not layer.n_out.at(kept):
        return 0  # its branch is gone
    work = layer.positions * prod(layer.kernel) * layer.n_in.at(kept) * layer.n_out.at(kept)
    return work // layer.n_groups.at(kept)


def _mac_price(layer: Layer, dense: Kept) -> Callable[[int, int], float]:
    each, groups = layer.positions * prod(layer.kernel), layer.groups
    if not layer.n_groups.parts:
        return lambda n_in, n_out: float(each * n_in * n_out // groups)
    # Channels leave a grouped layer by whole groups, so each remaining group keeps as many inputs as it had.
    per_group = layer.n_in.at(dense) // groups
    return lambda _, n_out: float(each * n_out * per_group)


def _parameter_widths(graph: Graph) -> dict[str, tuple[Width, ...]]:
    return {
        name: tuple(graph.width(name, axis) for axis in range(len(shape)))
        for name, shape in graph.shapes.items()
        if name not in graph.buffers
    }


def _parameter_term(name: str, widths: tuple[Width, ...], shape: tuple[int, ...]) -> CostTerm:
    cut = [axis for axis, width in enumerate(widths) if width.parts][:2]
    rest = prod(n for axis, n in enumerate(shape) if axis not in cut)
    one = Width(1)
    n_in, n_out = [*(widths[axis] for axis in cut), one, one][:2]
    return CostTerm(name, n_in, n_out, lambda a, b: float(rest * a * b))
