"""Scores of channels that several methods share: norms, distances, batch norms, activations. Higher = keep."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deploypipe.algorithms.base import producers, rows
from deploypipe.types import Group

WEISZFELD_STEPS = 200


def filters_of(group: Group, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the (C, K) filters of each layer that makes the group's channels, as double.

    Raises:
        NotApplicable: No weight produces the channels.
    """
    return [rows(weights[member.param], member).double() for member in producers(group, weights)]


def summed_distances(filters: Tensor) -> Tensor:
    """Return for each of (C, K) filters the sum of its Euclidean distances to all of them, (C,)."""
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def geometric_median(points: Tensor, steps: int = WEISZFELD_STEPS) -> Tensor:
    """Return the (K,) point with the smallest sum of distances to (N, K) points, by Weiszfeld's iteration."""
    median = points.mean(0)
    for _ in range(steps):
        inverse = 1 / (points - median).norm(dim=1).clamp_min(1e-12)
        median = (inverse[:, None] * points).sum(0) / inverse.sum()
    return median
