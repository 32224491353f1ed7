"""L2 norm of each filter.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, section 4.4.

Deviations: those of `l1`. Widths come from the exact allocator, by the logarithm of the share of its norms that a group keeps,
counted once for every layer that reads the group, instead of a share for every layer that is set by hand. Coupled channels go
together, those of a residual trunk as well, by the mean of their norms over the layers that make them, each layer's divided by
their mean where filters differ in size.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deploypipe.algorithms.base import Criterion, Statistics, filter_norms
from deploypipe.types import Group


@dataclass(frozen=True)
class L2(Criterion):
    """Rank filters by the root of their summed squared weights; in coupled layers by the mean over the layers."""

    name: ClassVar[str] = "l2"

    def score(self, group: Group, stats: Statistics) -> Tensor:
        """Return the (C,) L2 norms, higher = keep."""
        return filter_norms(group, stats.weights, 2)
