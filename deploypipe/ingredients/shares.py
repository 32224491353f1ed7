"""Shares of channels that stand for densities of layers, as a rule for single weights gives them.

A weight stays if the channel that it reads and the channel that it makes both stay: the density of a layer is the product of
two shares, and layers share their channels, so that rarely all densities can be had at once. Here a layer asks of both sides
the same, the root of its density, and a group takes the mean of what its layers ask. (Shares whose products come nearest to
the densities would alternate between wide and narrow along a chain of layers: one narrow group pays for two layers.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deploypipe.types import Graph, Layer

EMPTY = 1e-12  # a density that stands for none


@dataclass(frozen=True, eq=False)
class Products:
    """How the densities of layers follow from the shares of groups that stay.

    Attributes:
        layers: Names of the weights that lose entries with the groups.
        groups: Whose shares are asked for.
        powers: (layers, groups): with which power each share enters a layer's density. Of axes with channels of several groups
            (concats), and with channels that always stay, that is the part of the axis.
    """

    layers: Sequence[str]
    groups: Sequence[str]
    powers: NDArray[np.float64]

    @classmethod
    def of(cls, graph: Graph, names: Iterable[str]) -> "Products":
        """Return what binds the groups; fixed weights, such as those of a shortcut, are no layers, nor are computed ones.

        Groups that no layer binds are left out.
        """
        wanted, found = tuple(names), dict[str, dict[str, float]]()
        for layer in graph.layers:
            if layer.weight in graph.shapes and layer.weight not in graph.buffers:
                powers = _powers(graph, layer)
                found[layer.weight] = {name: powers[name] for name in wanted if powers.get(name, 0.0) > 0}
        layers = tuple(weight for weight, powers in found.items() if powers)
        groups = tuple(name for name in wanted if any(name in powers for powers in found.values()))
        matrix = np.array([[found[weight].get(name, 0.0) for name in groups] for weight in layers], dtype=np.float64)
        return cls(layers, groups, matrix.reshape(len(layers), len(groups)))

    def shares(self, densities: ArrayLike) -> dict[str, float]:
        """Return the share of each group: the geometric mean of what its layers ask for. It rises with every density.

        Args:
            densities: One for each of `layers`, from 0 to 1.
        """
        wanted = np.log(np.clip(np.asarray(densities, dtype=np.float64), EMPTY, 1.0))
        asked = wanted / self.powers.sum(axis=1)
        means = asked @ self.powers / self.powers.sum(axis=0)
        return dict(zip(self.groups, np.exp(means).tolist(), strict=True))


def _powers(graph: Graph, layer: Layer) -> dict[str, float]:
    """Return group -> power of its share in a layer's density; a depthwise layer's filters go with its channels alone."""
    dense, powers = graph.kept(), dict[str, float]()
    for width, sign in ((layer.n_out, 1), (layer.n_in, 1), (layer.n_groups, -1)):
        for name, slots in width.parts:
            powers[name] = powers.get(name, 0.0) + sign * slots * dense[name] / width.at(dense)
    return powers
