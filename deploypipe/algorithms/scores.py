"""Scores of channels that several methods share: norms, distances, batch norms, gradients, activations. Higher = keep."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.algorithms.base import filter_norms, producers, rows
from deploypipe.gates import norms_of
from deploypipe.statistics import generator, weights
from deploypipe.types import Group

WEISZFELD_STEPS = 200
Scores = NDArray[np.float64]
Judge = Callable[[Group], Scores]  # raises NotApplicable


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


def median_distances(filters: Tensor) -> Tensor:
    """Return for each of (C, K) filters its distance to their geometric median (Fermat point), (C,)."""
    distances: Tensor = torch.linalg.vector_norm(filters - geometric_median(filters), dim=1)
    return distances


def _of_filters(measure: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Group, int], Tensor]:
    def score(model: nn.Module, group: Group, seed: int) -> Tensor:
        return torch.stack([measure(layer) for layer in filters_of(group, weights(model))]).sum(0)

    return score


def _of_norms(leaf: str) -> Callable[[nn.Module, Group, int], Tensor]:
    def score(model: nn.Module, group: Group, seed: int) -> Tensor:
        norms = norms_of(model, group)
        parameters = [norm.module(model).get_parameter(leaf).detach().double() for norm in norms]
        values = [norm.per_channel(p.abs()) for norm, p in zip(norms, parameters, strict=True)]
        return torch.stack(values).sum(0)

    return score


_DATA_FREE: dict[str, Callable[[nn.Module, Group, int], Tensor]] = {
    "l1": lambda model, group, seed: filter_norms(group, weights(model), 1),
    "l2": lambda model, group, seed: filter_norms(group, weights(model), 2),
    "fpgm": _of_filters(summed_distances),
    "fermat": _of_filters(median_distances),
    "gamma": _of_norms("weight"),
    "beta": _of_norms("bias"),
    "random": lambda model, group, seed: torch.rand(group.size, generator=generator(seed, group.name), dtype=torch.float64),
}
DATA_FREE = tuple(_DATA_FREE)


def data_free(criterion: str, model: nn.Module, seed: int) -> Judge:
    """Return what scores the channels of a group by one of `DATA_FREE`: (C,), higher = keep; it may raise NotApplicable."""

    def judge(group: Group) -> Scores:
        found: Scores = _DATA_FREE[criterion](model, group, seed).double().cpu().numpy()
        return found

    return judge
