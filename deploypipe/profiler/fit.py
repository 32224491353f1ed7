"""Learn from measured forms of a model how its kernels add up, and how large an error that leaves on forms left out.

The prices of layers and of other kernels are fits over all forms with few parameters (see `prices`). A profile of one form may
have been taken while the machine was slower or faster: each form's kernels are scaled so that they add up to its whole. What
then is wrong in all narrow forms alike is taken out by one factor, and what the dense form takes beyond, where everything is
full, is a price of full layers. How fast that falls as layers become narrower differs from model to model, and with how much of
the last cache the neighbours leave: of a few powers, the one that predicts forms best that were left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from deploypipe.backends.base import Profile, Timing
from deploypipe.latency.context import Context, Overhead
from deploypipe.latency.table import LatencyTable, Shape, structure_of, widths_of
from deploypipe.latency.widths import steps_of
from deploypipe.profiler.prices import Floats, LayerTimes, OtherTimes, layer_prices, overhead_price
from deploypipe.types import Graph, Kept, Layer

DENSE, RANDOM = "dense", "random"
_LEAST_US = 0.05  # a kernel is never free, whatever noise says
_TRUST_TIMER = 0.05  # weight of what profiling adds to a kernel as it was measured apart
_POWERS = (8, 4, 2)  # of a layer's share of work, with which the price of a full model may fall; the first where all do equally
_ALIKE = 0.7  # narrow forms whose layers are as full as that do not tell what only full ones take
_LEAST_PRICE = -0.5  # of what layers take: a full model is no quicker than that

Turn = tuple[Timing, Profile]  # of one model, right after each other


@dataclass(frozen=True)
class Form:
    """One form of the model, measured; `two_four` names the layers whose weights held that pattern."""

    name: str
    kept: Kept
    whole: Timing
    profile: Profile
    two_four: frozenset[str] = frozenset()


def learned(graph: Graph, table: LatencyTable, forms: Sequence[Form], timer_us: float, turns: Sequence[Turn] = ()) -> Context:
    """Return the context of `graph`, with the error on each random form when that one is left out.

    Args:
        graph: The model.
        table: Prices every layer of it alone.
        forms: The dense form first.
        timer_us: What profiling adds to a kernel, measured apart.
        turns: Of the dense form, for its additivity; by default those measurements that it was learned from.
    """
    seen = _Seen(graph, table, tuple(forms), timer_us)
    everything = np.ones(len(forms), bool)
    left_out = [index for index, form in enumerate(forms) if form.name.startswith(RANDOM)]
    fits = {index: seen.fitted(everything & (np.arange(len(forms)) != index)) for index in left_out}
    errors = {power: [seen.error(index, fit, power) for index, fit in fits.items()] for power in _POWERS}
    power = min(errors, key=lambda power: float(np.abs(errors[power]).sum()))
    additivity = seen.additivity(turns or [(forms[0].whole, forms[0].profile)])
    held = tuple(group.name for group in graph.groups if group not in graph.prunable)
    found = seen.exact(seen.fitted(everything), power)
    return replace(found, errors=tuple(errors[power]), additivity=additivity, held=held)


@dataclass(frozen=True)
class _Fit:
    """Prices learned from the forms in `use`, not yet right for the dense form."""

    use: NDArray[np.bool_]
    context: Context


@dataclass(frozen=True)
class _Seen:
    graph: Graph
    table: LatencyTable
    forms: tuple[Form, ...]
    timer_us: float

    @cached_property
    def whole(self) -> Floats:
        return np.array([form.whole.quiet_us for form in self.forms])

    @property
    def session_us(self) -> float:
        return float(self.table.facts["session_us"])

    @cached_property
    def rows(self) -> tuple[dict[str, LayerTimes], dict[tuple[str, tuple[str, ...]], OtherTimes]]:
        """Return the layers by call, and all other kernels by operation and layers that feed them, in times as profiled."""
        calls = dict[str, list[tuple[str, Layer]]]()
        for name, layer in self.graph.calls:
            calls.setdefault(layer.weight, []).append((name, layer))
        layers, others = dict[str, LayerTimes](), dict[tuple[str, tuple[str, ...]], OtherTimes]()
        for index, form in enumerate(self.forms):
            waiting = {weight: list(same) for weight, same in calls.items()}
            for kernel in form.profile.kernels:
                if waiting.get(kernel.weight):
                    # A shared layer runs once for each of its calls, in order.
                    name, layer = waiting[kernel.weight].pop(0)
                    row = layers.get(name) or layers.setdefault(name, self._layer(layer))
                    row.us[index] = kernel.median_us
                else:
                    feeds = sorted({calls[weight][0][1].name for weight in kernel.feeds if weight in calls})
                    key = (kernel.op, tuple(feeds))
                    other = others.get(key) or others.setdefault(key, self._other(key[1]))
                    other.us[index] += kernel.median_us
                    other.count[index] += 1
        return layers, others

    def _layer(self, layer: Layer) -> LayerTimes:
        widths = np.array([(layer.n_in.at(form.kept), layer.n_out.at(form.kept)) for form in self.forms])
        alone = np.array([self._alone(layer, form) for form in self.forms])
        return LayerTimes(Shape.of(layer), np.full(len(widths), np.nan), alone, *widths.T.astype(float))

    def _alone(self, layer: Layer, form: Form) -> float:
        """Return what the layer's kernel takes alone: the quicker one where its weight permits a sparse one."""
        pair = layer.n_in.at(form.kept), layer.n_out.at(form.kept)
        dense = self.table.kernel_us(layer, *pair)
        return min(dense, self.table.kernel_us(layer, *pair, "2:4")) if layer.name in form.two_four else dense

    def _other(self, feeds: tuple[str, ...]) -> OtherTimes:
        widths = widths_of(self.graph, feeds)
        at = np.array([[width.at(form.kept) for width in widths] for form in self.forms]).reshape(len(self.forms), len(widths))
        block = max((steps_of(layer, self.table.steps).step for layer in self.graph.layers if layer.name in feeds), default=1)
        single = len({group for width in widths for group in width.groups}) == 1
        return OtherTimes(np.zeros(len(at)), np.zeros(len(at)), at, block, single)

    def error(self, index: int, fit: _Fit, power: int) -> float:
        """Return the relative error of a prediction for one form."""
        return float(self.predicted(self.exact(fit, power))[index] / self.whole[index] - 1)

    def fitted(self, use: NDArray[np.bool_]) -> _Fit:
        """Learn from the forms in `use`; the dense one is always among them."""
        timer, weights = self.timer(use), use / self.whole
        speed = self._speeds(timer)
        layers, others = self.rows
        timed = {name: replace(row, us=speed * (row.us - timer)) for name, row in layers.items()}
        found = layer_prices(timed, weights)
        prices = {name: row.price(found[name], int(row.n_in[0] * row.n_out[0])) for name, row in timed.items()}
        overhead = [
            overhead_price(*key, replace(row, us=speed * (row.us - timer * row.count)), weights) for key, row in others.items()
        ]
        dense, session = self.forms[0].whole, Overhead("session", (), self.session_us)
        structure, facts = structure_of(self.graph), (dense.quiet_us, 1.0, 1.0, dense.foreign_load, dense.runs)
        return _Fit(use, Context(structure, prices, (*overhead, session), *facts))

    def timer(self, use: NDArray[np.bool_]) -> float:
        """Return what profiling adds to each kernel of this model.

        Least squares over the forms of `speed * (sum - timer * kernels) = whole - session`, as shares of the whole; the
        machine may have been slower or faster while it profiled.
        """
        sums, counts = self._sums
        weight = 1 / self.whole[use]
        apart = _TRUST_TIMER / max(self.timer_us, _LEAST_US)
        system = np.vstack([np.stack([sums[use], -counts[use]], 1) * weight[:, None], [[-self.timer_us * apart, apart]]])
        speed, product = np.linalg.lstsq(system, np.append((self.whole[use] - self.session_us) * weight, 0.0), rcond=None)[0]
        return max(0.0, float(product / speed))

    @cached_property
    def _sums(self) -> tuple[Floats, Floats]:
        profiles = [form.profile for form in self.forms]
        return np.array([found.sum_us for found in profiles]), np.array([len(found.kernels) for found in profiles], float)

    def _speeds(self, timer: float) -> Floats:
        """Return by what each form's kernels are multiplied, so that they add up to its whole."""
        sums, counts = self._sums
        least = _LEAST_US * np.maximum(counts, 1)
        speeds: Floats = np.maximum(self.whole - self.session_us, least) / np.maximum(sums - timer * counts, least)
        return speeds

    def additivity(self, turns: Sequence[Turn]) -> float:
        """Return what the dense form's kernels add up to, over its whole in the same turn: the median of turns."""
        timer = self.timer(np.ones(len(self.forms), bool))
        sums = [profile.sum_us - timer * len(profile.kernels) + self.session_us for _, profile in turns]
        return float(np.median([us / whole.quiet_us for us, (whole, _) in zip(sums, turns, strict=True)]))

    def exact(self, fit: _Fit, power: int) -> Context:
        """Make the narrow forms right on average, and the dense form exactly.

        What it takes beyond is laid on its layers in proportion to their times, and falls with that power of their share of
        work: the narrower a form, the more of it stays in the cache.
        """
        priced = {name: replace(price, crowd_power=power) for name, price in fit.context.prices.items()}
        context = replace(fit.context, prices=priced)
        plain, crowded = self.predicted(context), self._crowded(context)
        narrow, dense_us = fit.use.copy(), context.whole_us
        narrow[0] = False
        if narrow.any():
            sums, full = (float(np.mean(us[narrow] / self.whole[narrow])) for us in (plain, crowded))
            if full * plain[0] < _ALIKE * sums * crowded[0]:
                factor, price = map(float, np.linalg.solve([[plain[0], crowded[0]], [sums, full]], [dense_us, 1.0]))
                if factor > 0 and price > _LEAST_PRICE * factor:
                    return _crowded_by(replace(context, factor=factor), self._dense_us(context), price / factor)
        return replace(context, factor=dense_us / float(plain[0]))

    def _dense_us(self, context: Context) -> dict[str, float]:
        rows = self.rows[0].items()
        return {name: context.us(name, row.alone_us[0], int(row.n_in[0]), int(row.n_out[0])) for name, row in rows}

    def _crowded(self, context: Context) -> Floats:
        """Return what layers would take if each took its dense time, multiplied by how full it is."""
        total = np.zeros(len(self.forms))
        for name, us in self._dense_us(context).items():
            row, price = self.rows[0][name], context.prices[name]
            total += [us * price.crowding(int(n_in), int(n_out)) for n_in, n_out in zip(row.n_in, row.n_out, strict=True)]
        return total

    @cached_property
    def priced(self) -> dict[str, LayerTimes]:
        """All layers, those without a kernel of their own included."""
        return {name: self.rows[0].get(name) or self._layer(layer) for name, layer in self.graph.calls}

    def predicted(self, context: Context) -> Floats:
        """Return what the table with this context predicts for each form."""
        total = np.zeros(len(self.forms))
        for name, row in self.priced.items():
            at = zip(row.alone_us, row.n_in, row.n_out, strict=True)
            total += [context.us(name, float(alone), int(n_in), int(n_out)) for alone, n_in, n_out in at]
        for kernel in context.overhead:
            widths = widths_of(self.graph, kernel.layers)
            total += [context.factor * kernel.us([width.at(form.kept) for width in widths]) for form in self.forms]
        return total


def _crowded_by(context: Context, dense_us: dict[str, float], share: float) -> Context:
    """Return the context with a share of each layer's dense time as its price of being full."""
    prices = {name: replace(price, crowded_us=share * dense_us[name]) for name, price in context.prices.items()}
    return replace(context, prices=prices)
