"""Prices of layers and of other kernels inside a model, from their times in its measured forms.

There are few forms, so that a fit first finds what all layers of a kind have in common - what an element costs to read, one to
write, a weight to fetch - and then how each layer differs from that, held back by a penalty. No price is negative. Errors weigh
as shares of the form's latency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from deploypipe.latency.context import Overhead, Price
from deploypipe.latency.files import Shape

_COMMON = 0.02  # how strongly what layers of a kind have in common is drawn towards the time alone
_OWN = 0.1  # how strongly a layer's own prices are drawn towards what its kind has in common
_CAUTIOUS = 0.02  # how strongly prices of other kernels are drawn towards zero
_KNEE = 0.5  # of the full width: from there on other kernels may take more for each channel
_KILO = 1e-3  # prices are fitted for a thousand elements

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerTimes:
    """One layer in all forms (axis 0): `us` inside the model, NaN where a form has no such kernel; `alone_us`; its widths."""

    shape: Shape
    us: Floats
    alone_us: Floats
    n_in: Floats
    n_out: Floats

    @property
    def kind(self) -> tuple[str, bool]:
        """What layers have prices in common: those of one kind; pointwise ones move more for what they compute."""
        return self.shape.kind, prod(self.shape.kernel) == 1

    @property
    def elements(self) -> tuple[float, float, float]:
        """Thousands of elements of one input channel, of one output channel, and of the weight of one pair of them."""
        shape = self.shape
        reads, writes = (shape.rows or shape.batch * prod(size) for size in (shape.in_size, shape.out_size))
        weights = prod(shape.kernel) * (shape.per_group[0] if shape.tied else 1)
        return _KILO * reads, _KILO * writes, _KILO * weights

    @cached_property
    def parts(self) -> Floats:
        """Return (forms, 5): time alone, one, thousands of elements read and written, thousands of weights."""
        reads, writes, weights = self.elements
        pairs = self.n_out if self.shape.tied else self.n_in * self.n_out
        return np.stack([self.alone_us, np.ones(len(self.us)), reads * self.n_in, writes * self.n_out, weights * pairs], axis=1)

    def price(self, found: Floats, full: int) -> Price:
        """Return the price that fitted multiples of the parts mean; `full` is the product of the dense form's widths."""
        alone, fixed, read, written, fetched = map(float, found)
        reads, writes, weights = self.elements
        output, pair = (fetched * weights, 0.0) if self.shape.tied else (0.0, fetched * weights)
        return Price(alone, fixed, read * reads, written * writes + output, pair, full=full)


@dataclass(frozen=True)
class OtherTimes:
    """Kernels of one operation fed by the same layers, in all forms (axis 0): `us`, and `widths` (forms, feeding layers).

    `count` are the kernels; `block` the channels of a whole block; `single` says that one group of channels decides all widths.
    """

    us: Floats
    count: Floats
    widths: NDArray[np.int64]
    block: int
    single: bool


def layer_prices(times: Mapping[str, LayerTimes], weights: Floats) -> dict[str, Floats]:
    """Return for each layer the multiples of its parts that explain its time inside the model.

    Args:
        times: Layers by name.
        weights: (forms,) of each form's errors in microseconds; zero leaves a form out.
    """
    kinds = dict[tuple[str, bool], list[str]]()
    for name, layer in times.items():
        kinds.setdefault(layer.kind, []).append(name)
    found = dict[str, Floats]()
    for names in kinds.values():
        rows = {name: _weighed(times[name], weights) for name in names}
        common = _common(np.vstack([system for system, _ in rows.values()]), np.concatenate([us for _, us in rows.values()]))
        found |= {name: _ridge(system, us, _OWN, common) for name, (system, us) in rows.items()}
    return found


def _weighed(layer: LayerTimes, weights: Floats) -> tuple[Floats, Floats]:
    known = (weights > 0) & np.isfinite(layer.us)
    return layer.parts[known] * weights[known, None], layer.us[known] * weights[known]


def _common(system: Floats, wanted: Floats) -> Floats:
    """Return what layers have in common, drawn towards what they take alone by a share of what they take inside."""
    alone = np.eye(system.shape[1])[0]
    return _ridge(system, wanted, _COMMON * float(np.linalg.norm(wanted)) / _norms(system)[0], alone)


def _ridge(system: Floats, wanted: Floats, penalty: float, prior: Floats) -> Floats:
    """Return non-negative values with `system @ values` close to `wanted`, and close to `prior` in units of their effect."""
    norms = _norms(system)
    stacked = np.vstack([system / norms, penalty * np.eye(len(norms))])
    values: Floats = nnls(stacked, np.concatenate([wanted, penalty * prior * norms]))[0]
    return values / norms


def _norms(system: Floats) -> Floats:
    norms: Floats = np.maximum(np.linalg.norm(system, axis=0), 1e-12)
    return norms


def overhead_price(op: str, layers: Sequence[str], times: OtherTimes, weights: Floats) -> Overhead:
    """Return what other kernels take: a constant and a part in proportion, and more of both where blocks are not full.

    What one group decides may rise faster above half of the full width: where it leaves a near cache is not known, and half is
    close enough to tell.
    """
    use, total = weights > 0, times.widths.sum(axis=1).astype(float)
    if np.ptp(total[use]) == 0:
        return Overhead(op, tuple(layers), max(0.0, float(np.mean(times.us[use]))))
    columns, knee = [np.ones(len(total)), total], _KNEE * float(total.max())
    if times.single:  # of several groups it would be no sum over groups
        ragged = (times.widths % times.block != 0).any(axis=1).astype(float)
        columns += [ragged, ragged * total, np.maximum(0.0, total - knee)]
    system = np.stack(columns, axis=1)[use] * weights[use, None]
    wanted = np.maximum(times.us, 0.0)[use] * weights[use]
    found = _ridge(system, wanted, _CAUTIOUS, np.zeros(len(columns)))
    fixed, slope, ragged_fixed, ragged_slope, beyond = map(float, (*found, 0.0, 0.0, 0.0)[:5])
    return Overhead(op, tuple(layers), fixed, slope, ragged_fixed, ragged_slope, times.block, beyond, knee)
