"""Measured latency of a model under any plan: kernel times by shape and width, and the context they run in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import lcm
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from weakref import WeakKeyDictionary

from deploypipe.cost import CostTerm
from deploypipe.errors import TargetError
from deploypipe.latency import files as latency_file
from deploypipe.latency.context import Context, Overhead
from deploypipe.latency.files import Entry, Shape, Sparsity
from deploypipe.latency.grid import Grid
from deploypipe.latency.widths import AllSteps, legal_widths, steps_of, two_four_widths
from deploypipe.plan import KeepPlan
from deploypipe.two_four import PLAIN, allowed
from deploypipe.types import Graph, Layer, Width

__all__ = ["Context", "Entry", "LatencyTable", "Shape", "structure_of"]
Masks = Literal["never", "everywhere", "by choice"]
PAYS = 0.99  # of the dense kernel's time: a kernel with 2:4 weights that takes more saves nothing that can be told from noise


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Kernel times of one runtime on one device, and how they add up in the models that were profiled.

    A model costs `factor * (sum of its layers + overhead)`. A layer costs what its kernel took alone at these widths, and what
    it takes inside the model to fetch all that it touches, learned from several forms of the model (see `Price`). Overhead are
    all other kernels, likewise learned inside the model; they follow the widths of the layers that feed them. The unpruned
    model comes out as it was measured.

    Attributes:
        facts: Runtime, version, threads, precision, processor, date, and the two constants of the measuring method:
            `timer_us` (what profiling adds to each kernel; already taken off) and `node_us` (what a kernel without work costs).
        steps: What was learned about widths, per kind of kernel.
        kernels: Measured kernel times.
        contexts: One for each profiled model.
        masks: Which weights of a plan are 2:4: none; all that may be (`masked`); or those that the plan names (`offering`).
        profiled: The steps that measured widths lie on, where `steps` are coarser (`aligned`).
        multiple: What all channel counts to choose from are multiples of (`aligned`), but for the full ones.
    """

    facts: Mapping[str, Any]
    steps: AllSteps
    kernels: tuple[Entry, ...]
    contexts: tuple[Context, ...] = ()
    unit: str = "us"
    masks: Masks = "never"
    profiled: AllSteps | None = None
    multiple: int = 1
    _grids: Mapping[tuple[Shape, Sparsity], Grid] = field(init=False, repr=False)
    _terms: "WeakKeyDictionary[Graph, tuple[CostTerm, ...]]" = field(init=False, repr=False, default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        points: dict[tuple[Shape, Sparsity], dict[tuple[int, int], float]] = {}
        for entry in self.kernels:
            points.setdefault((entry.shape, entry.sparsity), {})[entry.key] = entry.median_us
        object.__setattr__(self, "_grids", MappingProxyType({kernel: Grid(grid) for kernel, grid in points.items()}))

    @cached_property
    def id(self) -> str:
        """A short key of all measurements that the table predicts from; saving and loading keep it."""
        key = latency_file.identity(self.facts, self.steps, self.kernels, self.contexts)
        return f"{self.facts['source']}-{key}" if "source" in self.facts else key

    @property
    def source(self) -> str:
        """Where the figures come from: "measured", "fitted" to whole models, "calibrated", or "estimated"."""
        return str(self.facts.get("source") or self.facts.get("method") or "measured")

    @cached_property
    def knows_two_four(self) -> bool:
        """Whether kernels were priced with 2:4 weights too."""
        return any(sparsity == "2:4" for _, sparsity in self._grids)

    def masked(self) -> "LatencyTable":
        """Return the table for plans whose weights are 2:4 wherever they may be.

        Such a weight costs the less of both kernels: the pattern permits the sparse one and forbids none. Without measurements
        of these the prices stay those of dense weights. The model without a plan keeps its dense weights.
        """
        return replace(self, masks="everywhere")

    def offering(self) -> "LatencyTable":
        """Return the table with the alternative of 2:4 weights for each layer, as `CostTerm.two_four`; a plan names the layers.

        Raises:
            TargetError: No kernel has been measured with 2:4 weights.
        """
        if not self.knows_two_four:
            raise self._unmeasured("the table has no prices of kernels with 2:4 weights")
        return replace(self, masks="by choice")

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        """Return one term per layer, one per group for the other kernels, and a constant one. Prices are in microseconds.

        Raises:
            TargetError: The model, or a kernel of it, has not been measured; names the command that does.
        """
        if graph not in self._terms:
            context = self.context(graph)
            layers = [self._layer_term(call, layer, graph, context) for call, layer in graph.calls]
            self._terms[graph] = (*layers, *overhead_terms(graph, context))
        return self._terms[graph]

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        """Return for every prunable group the channel counts that land on whole steps, ascending, with the full count.

        Each is within what was measured: of coarser steps more fit among the few that are offered, but none that is narrower.
        """
        least = {name: widths[0] for name, widths in legal_widths(graph, self.profiled or self.steps).items()}
        legal = legal_widths(graph, self.steps, self.multiple)
        return {name: tuple(width for width in widths if width >= least[name]) for name, widths in legal.items()}

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        """Return the latency in microseconds under `plan` (of the whole model, with dense weights, without a plan).

        Counts between steps cost what the next step costs; counts off the runtime's alignment also the measured penalty.

        Raises:
            TargetError: The model, or a kernel of it, has not been measured; names the command that does.
        """
        if plan is None:
            return sum(term.under(graph.kept()) for term in self._plain.terms(graph))
        kept = graph.kept(plan)
        return sum(term.under(kept, plan.two_four) for term in self.terms(graph))

    @cached_property
    def _plain(self) -> "LatencyTable":
        return self if self.masks == "never" else replace(self, masks="never")

    def context(self, graph: Graph) -> Context:
        """Return how the kernels add up in the model of `graph`.

        Raises:
            TargetError: The model has not been profiled with this runtime.
        """
        found = self.known(graph)
        if found is None:
            raise self._unmeasured("the model has not been profiled as a whole, or only with fewer channels")
        return found

    def known(self, graph: Graph) -> Context | None:
        """Return how the kernels add up in the model of `graph`, or in a wider form of it; None if it has not been profiled."""
        structure, kept, free = structure_of(graph), graph.kept(), {group.name for group in graph.prunable}
        work = {name: layer.n_in.at(kept) * layer.n_out.at(kept) for name, layer in graph.calls}
        fitting = (one for one in self.contexts if one.structure == structure and one.covers(work) and not free & {*one.held})
        return next(fitting, None)

    def corrected(self, graph: Graph, factor: float) -> "LatencyTable":
        """Return the table with the prices of the model of `graph` multiplied by `factor`.

        Raises:
            TargetError: The model has not been profiled with this runtime.
        """
        mine = self.context(graph)
        return self.with_context(replace(mine, factor=mine.factor * factor))

    def aligned(self, multiple: int) -> "LatencyTable":
        """Return the table with only such channel counts to choose from as are multiples of `multiple`, too."""
        coarser = {kind: replace(one, step=lcm(one.step, multiple)) for kind, one in self.steps.items()}
        return replace(self, steps=coarser, profiled=self.profiled or self.steps, multiple=lcm(self.multiple, multiple))

    def with_context(self, context: Context) -> "LatencyTable":
        """Return the table with this context, in the place of the one that it had for the same model."""
        others = (known for known in self.contexts if known.structure != context.structure)
        return replace(self, contexts=(*others, context))

    def only(self, graph: Graph) -> "LatencyTable":
        """Return the part of the table that prices the model of `graph`.

        Raises:
            TargetError: The model has not been profiled with this runtime.
        """
        shapes = {Shape.of(layer) for layer in graph.layers}
        kernels = tuple(entry for entry in self.kernels if entry.shape in shapes)
        return replace(self, kernels=kernels, contexts=(self.context(graph),))

    def kernel_us(self, layer: Layer, n_in: int, n_out: int, sparsity: Sparsity = "dense") -> float:
        """Return what the kernel of `layer` takes alone at these widths.

        Raises:
            TargetError: It has not been measured at such a width, or not with such weights.
        """
        shape = Shape.of(layer)
        grid = self._grids.get((shape, sparsity))
        found = grid.price(0 if shape.tied else n_in, n_out, steps_of(layer, self.profiled or self.steps)) if grid else None
        if found is None:
            weights = f"{sparsity} weights, " * (sparsity != "dense")
            message = f"no measurement for {shape.title} with {weights}{n_in} input and {n_out} output channels"
            raise self._unmeasured(message + (f" (known: {grid.reach})" if grid else ""), layer.name)
        return found

    def save(self, folder: str | Path) -> None:
        """Write the table as `device.json`, `kernels.csv` and one JSON file per model."""
        latency_file.write_table(Path(folder), self.facts, self.steps, self.kernels, self.contexts)

    @classmethod
    def load(cls, folder: str | Path) -> "LatencyTable":
        """Read what `save` wrote.

        Raises:
            TargetError: The folder is no table, is damaged, or has another schema.
        """
        return cls(*latency_file.read_table(Path(folder)))

    def _layer_term(self, call: str, layer: Layer, graph: Graph, context: Context) -> CostTerm:
        """Price a call of a layer, also with 2:4 weights if it alone may have them: widths allow it, none shares its weight."""

        @cache
        def price(n_in: int, n_out: int) -> float:
            return self._layer_us(call, layer, context, n_in, n_out)

        @cache
        def two_four(n_in: int, n_out: int) -> float:
            dense = price(n_in, n_out)
            if not (n_in and n_out and allowed(n_in, n_out)):
                return dense
            us = self._layer_us(call, layer, context, n_in, n_out, "2:4")
            return us if us < PAYS * dense else dense

        if self.masks == "never" or not self.knows_two_four or layer.kind not in PLAIN:
            return CostTerm(layer.name, layer.n_in, layer.n_out, price)
        if self.masks == "everywhere":
            return CostTerm(layer.name, layer.n_in, layer.n_out, two_four)
        alone = sum(other.weight == layer.weight for other in graph.layers) == 1
        possible = alone and two_four_widths(layer, self.candidates(graph), graph.kept(), 2, 2)
        return CostTerm(layer.name, layer.n_in, layer.n_out, price, two_four if possible else None)

    def _layer_us(
        self, call: str, layer: Layer, context: Context, n_in: int, n_out: int, sparsity: Sparsity = "dense"
    ) -> float:
        """Return what a layer takes in the model, where a sparse kernel is taken to fetch as much as the dense one."""
        if not (n_in and n_out):
            return 0.0  # its branch is gone
        return context.us(call, self.kernel_us(layer, n_in, n_out, sparsity), n_in, n_out)

    def _unmeasured(self, message: str, layer: str = "") -> TargetError:
        target = self.facts.get("target", "cpu")
        at = f"latency table of target {target}" + (f", layer {layer}" if layer else "")
        command = f"deploypipe profile --model MODEL --target {target}"
        return TargetError(message, at=at, fix=f"measure it: {command}, with a MODEL of these widths (a pruned one will do)")


def structure_of(graph: Graph) -> str:
    """Return a key of what a model computes, widths aside: a pruned model has the structure of the whole one."""
    layers = [[layer.name, *vars(Shape.of(layer)).values()] for layer in graph.layers]
    return latency_file.hashed([layers, sorted(graph.ops.items())])


def widths_of(graph: Graph, layers: tuple[str, ...]) -> tuple[Width, ...]:
    """Return the output widths of the named layers; a name that the graph does not have is left out."""
    by_name = {layer.name: layer.n_out for layer in graph.layers}
    return tuple(by_name[name] for name in layers if name in by_name)


def overhead_terms(graph: Graph, context: Context) -> list[CostTerm]:
    """Price the other kernels: one term for each group, and a constant one.

    What several groups feed is linear in their widths, so that it splits exactly into one part for each. What one group alone
    feeds is gone when that group has no channels left.
    """
    constant, slopes, own = 0.0, dict[str, float](), dict[str, list[tuple[Overhead, tuple[Width, ...]]]]()
    for kernel in context.overhead:
        widths = widths_of(graph, kernel.layers)
        groups = dict.fromkeys(group for width in widths for group in width.groups)
        if len(groups) == 1:
            own.setdefault(next(iter(groups)), []).append((kernel, widths))
            continue
        constant += kernel.us([width.const for width in widths])
        for group, slots in (part for width in widths for part in width.parts):
            slopes[group] = slopes.get(group, 0.0) + kernel.per_channel_us * slots
    total = context.factor * constant
    terms = [CostTerm("overhead", Width(0), Width(0), lambda n_in, n_out: total)]
    for group in dict.fromkeys((*own, *slopes)):
        price = _group_price(group, own.get(group, ()), slopes.get(group, 0.0), context.factor)
        terms.append(CostTerm(f"overhead:{group}", Width(0), Width(0, ((group, 1),)), price))
    return terms


def _group_price(
    group: str, own: Sequence[tuple[Overhead, tuple[Width, ...]]], slope: float, factor: float
) -> Callable[[int, int], float]:
    @cache
    def price(n_in: int, n_out: int) -> float:
        total = slope * n_out
        for kernel, widths in own:
            at = [width.at({group: n_out}) for width in widths]
            total += kernel.us(at) if any(at) else 0.0
        return factor * total

    return price
