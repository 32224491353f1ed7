"""L2 norm of each filter.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, section 4.4.
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
