"""What 2:4 weights cost in the values that widths are chosen by: as much as narrowing that keeps the same magnitude.

A mask keeps a share of a layer's summed magnitude (Mishra et al. 2021, the measure of its permutations too). So does narrowing
what the layer reads, and what that costs the algorithm has said: the value of keeping the first w channels. The mask is taken
to cost what the layer would lose by being narrowed, in the algorithm's own order, to where it keeps the same share. So it is in
the same unit as the values, whichever they are; for values that are logarithms of shares it is `-log(share)`.

This is our own exchange rate: the paper prunes every layer that can be and prices none. It knows nothing of what fine-tuning
wins back, and takes weights as they lie, before channels are permuted and cut.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deploypipe.two_four import retained
from deploypipe.types import Graph, Group, Member

Floats = NDArray[np.float64]


def mask_losses(
    graph: Graph,
    weights: Mapping[str, NDArray[np.floating]],
    orders: Mapping[str, ArrayLike],
    values: Mapping[str, ArrayLike],
    layers: Iterable[str],
) -> dict[str, float]:
    """Return layer -> value given up when its weight becomes 2:4, in the unit of `values`, at least 0.

    What a layer reads decides; of several groups (a concat), each by its share of the layer's magnitude. Where no values tell
    of them, those of the channels that it writes do. A layer of which no values tell at all is left out.

    Args:
        graph: The model.
        weights: Name -> weight, (out, in, ...).
        orders: Group -> channels, the one to keep longest first.
        values: Group -> (C + 1,) value of keeping the first w channels of its order.
        layers: Names of layers whose weights may become 2:4.
    """
    wanted, losses = set(layers), dict[str, float]()
    for layer in graph.layers:
        if layer.name not in wanted:
            continue
        sizes = np.abs(weights[layer.weight]).astype(np.float64)
        fours = sizes[:, : sizes.shape[1] // 4 * 4]  # narrower widths may be allowed where the whole one is not
        share = retained(fours) / max(float(fours.sum()), 1e-300)
        for axis, role in ((1, "consumes"), (0, "produces")):
            told = [cut for cut in graph.cuts(layer.weight, axis) if cut[1].role == role and cut[0].name in values]
            if told:
                losses[layer.name] = _loss(told, sizes, axis, share, orders, values)
                break
    return losses


def n_readers(group: Group) -> int:
    """Return how many weights read the group's channels, at least 1: a residual trunk damages every block that it feeds."""
    return max(1, sum(member.role == "consumes" for member in group.members))


def _loss(
    told: list[tuple[Group, Member]],
    sizes: Floats,
    axis: int,
    share: float,
    orders: Mapping[str, ArrayLike],
    values: Mapping[str, ArrayLike],
) -> float:
    """Return the mean over groups, each with the magnitude of its slots as weight, of what narrowing it so far would cost."""
    along = np.moveaxis(sizes, axis, 0).reshape(sizes.shape[axis], -1).sum(axis=1)
    found, total = 0.0, 0.0
    for group, member in told:
        owned = member.owner >= 0
        by_channel = np.bincount(member.owner[owned], along[owned], group.size)
        value = np.asarray(values[group.name], np.float64)
        lost = value[-1] - _kept_value(by_channel[np.asarray(orders[group.name])], value, share)
        found += by_channel.sum() * max(0.0, lost) / n_readers(group)
        total += by_channel.sum()
    return float(found / max(total, 1e-300))


def _kept_value(sizes: Floats, value: Floats, share: float) -> float:
    """Return the value of so many of the first channels, in part of one too, as hold `share` of the magnitude; one at least."""
    held = np.cumsum(sizes)
    width = np.interp(share * held[-1], np.append(0.0, held), np.arange(len(held) + 1.0))
    return float(np.interp(max(1.0, width), np.arange(1.0, len(value)), value[1:]))
