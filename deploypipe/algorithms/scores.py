"""Scores of channels that several methods share: norms, distances, batch norms, gradients, activations. Higher = keep."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.algorithms.base import filter_norms, producers, rows
from deploypipe.ingredients.gates import norms_of
from deploypipe.ingredients.statistics import Plain, evaluating, first, generator, trained_weights
from deploypipe.types import Graph, Group

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
        return torch.stack([measure(layer) for layer in filters_of(group, trained_weights(model))]).sum(0)

    return score


def _of_norms(leaf: str) -> Callable[[nn.Module, Group, int], Tensor]:
    def score(model: nn.Module, group: Group, seed: int) -> Tensor:
        norms = norms_of(model, group)
        parameters = [norm.module(model).get_parameter(leaf).detach().double() for norm in norms]
        values = [norm.per_channel(p.abs()) for norm, p in zip(norms, parameters, strict=True)]
        return torch.stack(values).sum(0)

    return score


_DATA_FREE: dict[str, Callable[[nn.Module, Group, int], Tensor]] = {
    "l1": lambda model, group, seed: filter_norms(group, trained_weights(model), 1),
    "l2": lambda model, group, seed: filter_norms(group, trained_weights(model), 2),
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


ENTROPY_BINS = 16


def activation_scores(model: nn.Module, graph: Graph, inputs: Iterable[Tensor]) -> dict[str, dict[str, Scores]]:
    """Return "apoz" and "entropy" scores by group, from what the first convolution or linear layer that reads each group meets.

    "apoz": the share of values that are not zero, 1 - APoZ (Hu et al., Network Trimming, 2016, arXiv:1607.03250). "entropy":
    that of the distribution over images of the mean value, in bins between its extremes (Luo and Wu, An Entropy-based Pruning
    Method for CNN Compression, 2017, arXiv:1706.05791). Groups that none reads are missing: what a module of another class
    does with its input before a weight reads it is not known.

    Args:
        model: Is run in evaluation mode.
        graph: Its channel graph.
        inputs: Batches of the model's input.
    """
    modules = dict(model.named_modules())
    alive: dict[str, list[Tensor]] = {}
    means: dict[str, list[Tensor]] = {}

    def read(group: Group, owner: Tensor, axis: int, x: Tensor) -> None:
        slots = x.movedim(axis, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
        owned, n = owner >= 0, int((owner == 0).sum())
        by_channel = slots.new_zeros(2, len(x), group.size)
        for i, values in enumerate((slots.ne(0).float().mean(2), slots.float().mean(2))):
            by_channel[i].index_add_(1, owner[owned], values[:, owned] / n)
        alive.setdefault(group.name, []).append(by_channel[0])
        means.setdefault(group.name, []).append(by_channel[1])

    handles = []
    for group in graph.prunable:
        for member in group.members:
            module = modules.get(member.param.rpartition(".")[0])
            if member.role == "consumes" and isinstance(module, Plain) and member.param.endswith("weight"):
                axis, owner = (-1 if isinstance(module, nn.Linear) else 1), torch.from_numpy(member.owner)
                hook = partial(_input, partial(read, group, owner, axis))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                break
    try:
        with evaluating(model), torch.inference_mode():
            for batch in inputs:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    apoz = {name: torch.cat(parts).double().mean(0).numpy() for name, parts in alive.items()}
    return {"apoz": apoz, "entropy": {name: entropies(torch.cat(parts).double().numpy()) for name, parts in means.items()}}


def _input(read: Callable[[Tensor], None], module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    read(first(args, named))


def entropies(values: Scores, bins: int = ENTROPY_BINS) -> Scores:
    """Return the entropy (nats) of each column of (N, C) values, in equal bins between its smallest and largest value."""
    low, span = values.min(0), np.ptp(values, axis=0)
    index = np.minimum((bins * (values - low) / np.where(span > 0, span, 1)).astype(int), bins - 1)
    shares = np.stack([(index == i).mean(0) for i in range(bins)])
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    found: Scores = -(shares * logs).sum(0)
    return found
