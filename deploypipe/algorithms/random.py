"""Random channels: the baseline that every criterion has to beat.

Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv:2205.05676: the selection inside
a layer. Deviation: the widths come from the allocator (with equal shares for all channels on average), not from sampling.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deploypipe.algorithms.base import Criterion, Statistics
from deploypipe.ingredients.statistics import generator
from deploypipe.types import Group


@dataclass(frozen=True)
class Random(Criterion):
    """Rank channels by a draw that depends on the seed and on the group's name alone."""

    name: ClassVar[str] = "random"

    def score(self, group: Group, stats: Statistics) -> Tensor:
        """Return (C,) uniform random numbers, higher = keep."""
        return torch.rand(group.size, generator=generator(stats.seed, group.name), dtype=torch.float64)
