"""Costs of layers, fitted to the times of whole models.

What a layer of one shape costs at two widths is taken as `a * n_in * n_out + b * n_in + c * n_out` with `a, b, c >= 0`: its
arithmetic, reading, and writing (with what follows it element by element). With one constant for the model, the time of a plan
is linear in these unknowns. There are more of them than plans are worth measuring, so a first fit finds what all layers have in
common - the time of a multiply-add by kind, of an element read, of one written - and a second how each shape differs from that,
held back by a penalty that cross-validation chooses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from deploypipe.latency.files import Entry, Shape
from deploypipe.types import Graph, Kept

Vector = NDArray[np.float64]

_FOLDS = 8
_PENALTIES = tuple(10.0**power for power in np.arange(-4.0, 1.1, 0.5))
_SHARE = 0.1  # of the mean cost of a coefficient: by so much one may differ that all others have at zero
_LEAST_US = 0.001  # a file holds three digits, and a kernel is never free


@dataclass(frozen=True)
class Unknown:
    """One coefficient: what one part of the cost of a layer takes at the widths of reference, in microseconds.

    Attributes:
        shape: Of the layers; None for what a model costs besides.
        part: "work" goes with the product of the widths, "in" and "out" with one of them, "model" with nothing.
        reference: The largest widths (in, out) that layers of this shape have.
        amount: Multiply-adds, or elements read or written, at these widths.
    """

    shape: Shape | None
    part: str
    reference: tuple[int, int] = (1, 1)
    amount: float = 1.0

    @property
    def common(self) -> str:
        """What it shares the cost of a unit with."""
        return f"{self.shape.kind} of {prod(self.shape.kernel)}" if self.shape and self.part == "work" else self.part

    def at(self, n_in: int, n_out: int) -> float:
        """Return the multiple of the coefficient that two widths cost."""
        across, along = n_in / self.reference[0], n_out / self.reference[1]
        if self.shape and self.shape.tied:  # one width decides the other
            across = 1.0
        return {"work": across * along, "in": across, "out": along, "model": 1.0}[self.part]


@dataclass(frozen=True, eq=False)
class Fit:
    """Unknowns of one model and their values in microseconds."""

    graph: Graph
    unknowns: tuple[Unknown, ...]
    values: Vector

    def predict(self, kept: Kept) -> float:
        """Return the time of the model under a plan, in microseconds."""
        return float(design(self.graph, self.unknowns, [kept])[0] @ self.values)

    @property
    def constant_us(self) -> float:
        """What the model costs whatever its widths are."""
        return float(sum(us for unknown, us in zip(self.unknowns, self.values, strict=True) if unknown.shape is None))

    def entries(self, least: int) -> list[Entry]:
        """Return each shape's cost at its corners, between which a table interpolates exactly: `least` channels and all.

        Widths that nothing decides, as the channels of an image, stand there too. They were not measured: their number of
        runs is 0.
        """
        found = []
        for shape in dict.fromkeys(Shape.of(layer) for layer in self.graph.layers):
            mine = [(u, us) for u, us in zip(self.unknowns, self.values, strict=True) if u.shape == shape]
            layers = [layer for layer in self.graph.layers if Shape.of(layer) == shape]
            most_in, most_out = mine[0][0].reference
            ins = {min(least, most_in), most_in} | {layer.n_in.const for layer in layers if not layer.n_in.parts}
            outs = {min(least, most_out), most_out} | {layer.n_out.const for layer in layers if not layer.n_out.parts}
            pairs = [(n_out * most_in // most_out, n_out) for n_out in outs] if shape.tied else product(ins, outs)
            for n_in, n_out in sorted(pairs):
                us = max(_LEAST_US, float(sum(us * unknown.at(n_in, n_out) for unknown, us in mine)))
                found.append(Entry(shape, n_in, n_out, us, us, us, 0))
        return found


def unknowns_of(graph: Graph) -> tuple[Unknown, ...]:
    """Return the coefficients of a model's layers, and the one of the model."""
    dense, references = graph.kept(), dict[Shape, tuple[int, int]]()
    for layer in graph.layers:
        n_in, n_out = references.get(Shape.of(layer), (1, 1))
        references[Shape.of(layer)] = (max(n_in, layer.n_in.at(dense)), max(n_out, layer.n_out.at(dense)))
    found = [Unknown(None, "model")]
    for shape, (n_in, n_out) in references.items():
        reads, writes = (shape.rows or shape.batch * prod(size) for size in (shape.in_size, shape.out_size))
        per_output = shape.per_group[0] if shape.tied else n_in
        places = reads if shape.transposed else writes
        amounts = {"work": places * prod(shape.kernel) * per_output * n_out, "in": reads * n_in, "out": writes * n_out}
        parts = ("work", "out") if shape.tied else ("work", "in", "out")
        found += [Unknown(shape, part, (n_in, n_out), amounts[part]) for part in parts]
    return tuple(found)


def fit(graph: Graph, plans: Sequence[Kept], us: Vector) -> Fit:
    """Return the costs that explain `us`, the time of each plan in microseconds; relative errors count."""
    unknowns = unknowns_of(graph)
    rows = design(graph, unknowns, plans) / us[:, None]
    penalty = min(_PENALTIES, key=lambda value: _crossed(unknowns, rows, value))
    return Fit(graph, unknowns, _solve(unknowns, rows, penalty))


def design(graph: Graph, unknowns: Sequence[Unknown], plans: Sequence[Kept]) -> Vector:
    """Return (plans, unknowns): the multiple of each unknown that each plan costs."""
    columns: dict[Shape | None, list[int]] = {}
    for column, unknown in enumerate(unknowns):
        columns.setdefault(unknown.shape, []).append(column)
    found = np.zeros((len(plans), len(unknowns)))
    for row, kept in enumerate(plans):
        found[row, columns[None]] = 1.0
        for layer in graph.layers:
            for column in columns[Shape.of(layer)]:
                found[row, column] += unknowns[column].at(layer.n_in.at(kept), layer.n_out.at(kept))
    return found


def _solve(unknowns: Sequence[Unknown], rows: Vector, penalty: float) -> Vector:
    """Return non-negative values with `rows @ values` close to one, and close to what all have in common."""
    names = sorted({unknown.common for unknown in unknowns})
    shared = np.array([[unknown.amount * (unknown.common == name) for name in names] for unknown in unknowns])
    scale = np.maximum((rows @ shared).max(axis=0), 1e-12)  # of very different size: elements, multiply-adds
    rates = nnls(rows @ shared / scale, np.ones(len(rows)))[0] / scale
    prior = shared @ rates
    # How far a value may be from its prior goes with the prior, and for those at zero with the mean.
    weights = np.sqrt(penalty) / (prior + _SHARE * prior.mean()) / np.sqrt(len(unknowns) / len(rows))
    stacked = np.vstack([rows, np.diag(weights)])
    values: Vector = nnls(stacked, np.concatenate([np.ones(len(rows)), weights * prior]))[0]
    return values


def _crossed(unknowns: Sequence[Unknown], rows: Vector, penalty: float) -> float:
    """Return the squared relative error on plans left out of the fit, in turns."""
    total = 0.0
    for fold in range(_FOLDS):
        out = np.arange(len(rows)) % _FOLDS == fold
        total += float(((rows[out] @ _solve(unknowns, rows[~out], penalty) - 1) ** 2).sum())
    return total
