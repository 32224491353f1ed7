"""Learn from measured forms of a model how its kernels add up, and how large an error that leaves on forms left out.

A layer's ratio (time inside the model over time alone) depends on what else the caches hold, so it is learned at three amounts
of work; another kernel's time is a constant and a part in proportion to the widths that feed it. Both are fits over all forms
with few parameters. What then is wrong in all narrow forms alike is taken out by two factors on the ratios that are not the
dense form's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from deploypipe.backends.base import Profile, Timing
from deploypipe.latency.context import Anchors, Context, Overhead
from deploypipe.latency.table import LatencyTable, structure_of, width_of
from deploypipe.types import Graph, Kept, Layer

DENSE, RANDOM = "dense", "random"
_WEIGHT = 3.0  # of the dense form, to whose latency budgets refer
_SMOOTH = 0.1  # how strongly a layer's three ratios are drawn towards each other
_UNSURE_US = 1.0  # a profile counts whole microseconds
_LEAST_US = 0.05  # a kernel is never free, whatever noise says
_CAUTIOUS = 0.1  # how strongly these factors are drawn towards one
_TRUST_TIMER = 0.05  # weight of what profiling adds to a kernel as it was measured apart

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """One form of the model, measured; `two_four` names the layers whose weights held that pattern."""

    name: str
    kept: Kept
    whole: Timing
    profile: Profile
    two_four: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Row:
    """One layer, or all kernels of one operation fed by the same layers, in all forms (axis 0).

    `us` as profiled, NaN where a form has no such kernel; `count` of kernels; `at` product of a layer's widths, or sum of the
    widths that feed others; `alone` a layer's time alone.
    """

    us: Floats
    count: Floats
    at: Floats
    alone: Floats


def learned(graph: Graph, table: LatencyTable, forms: Sequence[Form], timer_us: float) -> Context:
    """Return the context of `graph`, with the error on each random form when that one is left out.

    Args:
        graph: The model.
        table: Prices every layer of it alone.
        forms: The dense form first.
        timer_us: What profiling adds to a kernel, measured apart.
    """
    seen = _Seen(graph, table, tuple(forms), timer_us)
    everything = np.ones(len(forms), bool)
    errors = []
    for index, form in enumerate(forms):
        if form.name.startswith(RANDOM):
            others = everything.copy()
            others[index] = False
            errors.append(float(seen.predicted(seen.context(others))[index] / seen.whole[index] - 1))
    return replace(seen.context(everything), errors=tuple(errors))


@dataclass(frozen=True)
class _Seen:
    graph: Graph
    table: LatencyTable
    forms: tuple[Form, ...]
    timer_us: float

    @cached_property
    def whole(self) -> Floats:
        return np.array([form.whole.quiet_us for form in self.forms])

    @cached_property
    def rows(self) -> tuple[dict[str, _Row], dict[tuple[str, tuple[str, ...]], _Row]]:
        """Return the layers by name, and all other kernels by operation and layers that feed them."""
        calls = dict[str, list[Layer]]()
        for layer in self.graph.layers:
            calls.setdefault(layer.weight, []).append(layer)
        layers, others = dict[str, _Row](), dict[tuple[str, tuple[str, ...]], _Row]()
        for index, form in enumerate(self.forms):
            waiting = {weight: list(same) for weight, same in calls.items()}
            for kernel in form.profile.kernels:
                if waiting.get(kernel.weight):
                    # A shared layer runs once for each of its calls, in order.
                    layer = waiting[kernel.weight].pop(0)
                    row = layers.get(layer.name) or layers.setdefault(layer.name, self._layer(layer))
                    row.us[index], row.count[index] = kernel.median_us, 1
                else:
                    feeds = sorted({calls[weight][0].name for weight in kernel.feeds if weight in calls})
                    key = (kernel.op, tuple(feeds))
                    row = others.get(key) or others.setdefault(key, self._other(key[1]))
                    row.us[index] += kernel.median_us
                    row.count[index] += 1
        return layers, others

    def _layer(self, layer: Layer) -> _Row:
        widths = [(layer.n_in.at(form.kept), layer.n_out.at(form.kept)) for form in self.forms]
        alone = np.array([self._alone(layer, *pair, form) for pair, form in zip(widths, self.forms, strict=True)])
        at = np.array([n_in * n_out for n_in, n_out in widths], float)
        return _Row(np.full(len(widths), np.nan), np.zeros(len(widths)), at, alone)

    def _alone(self, layer: Layer, n_in: int, n_out: int, form: Form) -> float:
        """Return what the layer's kernel takes alone: the quicker one where its weight permits a sparse one."""
        dense = self.table.kernel_us(layer, n_in, n_out)
        return min(dense, self.table.kernel_us(layer, n_in, n_out, "2:4")) if layer.name in form.two_four else dense

    def _other(self, feeds: tuple[str, ...]) -> _Row:
        width = width_of(self.graph, feeds)
        at = np.array([width.at(form.kept) for form in self.forms], float)
        return _Row(np.zeros(len(at)), np.zeros(len(at)), at, np.zeros(len(at)))

    def context(self, use: NDArray[np.bool_]) -> Context:
        """Learn from the forms in `use`."""
        speed, timer = self._clock(use)
        session = float(self.table.facts["session_us"])
        layers, others = self.rows
        scale = {name: _anchors(row, speed * (row.us - timer), use) for name, row in layers.items()}
        overhead = [_overhead(*key, row, speed * (row.us - timer * row.count), use) for key, row in others.items()]
        dense = self.forms[0]
        spent = dense.profile.sum_us - self.timer_us * len(dense.profile.kernels) + session
        additivity = spent / dense.whole.quiet_us
        context = Context(
            structure_of(self.graph), scale, (*overhead, Overhead("session", (), session)), dense.whole.quiet_us, 1.0,
            additivity, dense.whole.foreign_load, dense.whole.runs,
        )  # fmt: skip
        return self._trimmed(context, use)

    def _clock(self, use: NDArray[np.bool_]) -> tuple[float, float]:
        """Return by what profiled times are multiplied, and what profiling adds to each, so that sums become wholes.

        Least squares over the forms of `speed * (sum - timer * kernels) = whole - session`, as shares of the whole; the
        machine may have been slower or faster while it profiled.
        """
        sums = np.array([form.profile.sum_us for form in self.forms])
        counts = np.array([len(form.profile.kernels) for form in self.forms])
        weight = (_weights(self.forms) / self.whole)[use]
        apart = _TRUST_TIMER / max(self.timer_us, _LEAST_US)
        system = np.vstack([np.stack([sums[use], -counts[use]], 1) * weight[:, None], [[-self.timer_us * apart, apart]]])
        wanted = np.append((self.whole[use] - float(self.table.facts["session_us"])) * weight, 0.0)
        speed, product = np.linalg.lstsq(system, wanted, rcond=None)[0]
        return float(speed), max(0.0, float(product / speed))

    def _trimmed(self, context: Context, use: NDArray[np.bool_]) -> Context:
        """Make the dense form exact, and the others right in the middle: narrow ones and those in between."""
        exact, narrow = self._dense_exact(context), use.copy()
        narrow[0] = False
        if not narrow.any():
            return exact
        # The dense form does not change with the factors, so that predictions are linear in them.
        plain, *moved = (self.predicted(trimmed(exact, *pair)) for pair in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0)))
        slopes = np.stack([(other - plain)[narrow] / self.whole[narrow] for other in moved], 1)
        system = np.vstack([slopes, _CAUTIOUS * np.eye(2)])
        more = np.linalg.lstsq(system, np.append(1 - plain[narrow] / self.whole[narrow], [0.0, 0.0]), rcond=None)[0]
        return self._dense_exact(trimmed(exact, *(1 + more)))

    def _dense_exact(self, context: Context) -> Context:
        return replace(context, factor=context.factor * context.whole_us / float(self.predicted(context)[0]))

    @cached_property
    def priced(self) -> dict[str, _Row]:
        """All layers, those without a kernel of their own included."""
        return {layer.name: self.rows[0].get(layer.name) or self._layer(layer) for layer in self.graph.layers}

    def predicted(self, context: Context) -> Floats:
        """Return what the table with this context predicts for each form."""
        total = np.zeros(len(self.forms))
        for name, row in self.priced.items():
            total += row.alone * [context.ratio(name, int(work)) for work in row.at]
        for kernel in context.overhead:
            width = width_of(self.graph, kernel.layers)
            total += kernel.fixed_us + kernel.per_channel_us * np.array([width.at(form.kept) for form in self.forms])
        return context.factor * total


def trimmed(context: Context, least: float, middle: float) -> Context:
    """Return the context with the ratios at the least and at the middle amount of work multiplied; the dense form's stay."""
    factors = (least, middle)
    scale = {
        layer: (*((work, factor * ratio) for (work, ratio), factor in zip(anchors[:-1], factors, strict=False)), anchors[-1])
        for layer, anchors in context.scale.items()
    }
    return replace(context, scale=scale)


def _weights(forms: Sequence[Form]) -> Floats:
    return np.array([_WEIGHT if form.name == DENSE else 1.0 for form in forms])


def _anchors(row: _Row, inside: Floats, use: NDArray[np.bool_]) -> Anchors:
    """Fit a layer's ratio at the least, the dense, and the middle amount of work (by its logarithm)."""
    ratio = (np.maximum(inside, _LEAST_US) + _UNSURE_US) / (row.alone + _UNSURE_US)
    known = use & np.isfinite(inside)
    least, most = int(row.at[known].min()), int(row.at[0])
    middle = round(np.sqrt(least * most))
    if not least < middle < most:
        return ((most, float(np.mean(ratio[known]))),)
    knots, x = np.log([least, middle, most]), np.log(row.at[known])
    basis = np.stack([np.interp(x, knots, unit) for unit in np.eye(3)], 1)
    weight = np.where(np.arange(len(row.at)) == 0, _WEIGHT, 1.0)[known]
    together = _SMOOTH * np.array([[1.0, -2.0, 1.0], [1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    system, wanted = np.vstack([basis * weight[:, None], together]), np.append(ratio[known] * weight, np.zeros(3))
    fitted = np.maximum(np.linalg.lstsq(system, wanted, rcond=None)[0], _LEAST_US)
    return tuple((work, float(value)) for work, value in zip((least, middle, most), fitted, strict=True))


def _overhead(op: str, feeds: tuple[str, ...], row: _Row, inside: Floats, use: NDArray[np.bool_]) -> Overhead:
    """Fit the time of other kernels to the widths that feed them; errors weigh as shares of what would be in proportion."""
    inside = np.maximum(inside, 0.0)
    if np.ptp(row.at[use]) == 0:
        return Overhead(op, feeds, float(np.mean(inside[use])))
    weight = 1 / np.sqrt(row.at[use] + 1)
    system = np.stack([np.ones(int(use.sum())), row.at[use]], 1) * weight[:, None]
    (fixed, slope), _ = nnls(system, inside[use] * weight)
    return Overhead(op, feeds, float(fixed), float(slope))
