"""Filters fused with their likes: fewer filters, each a mixture of all, weighted by how near they are.

Lin et al., Training Compact CNNs for Image Classification using Dynamic-coded Filter Fusion, TPAMI 2023, arXiv:2107.06916,
equations 3 to 8.
"""

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploypipe.training.settings import TrainHook

COLDEST, HOTTEST = 1.0, 1e4  # T = 1/t at the start and at the end
BLURRED = 0.5  # a filter's share of its own mixture at the start of the even schedule
SOFTEST = 1e-3  # T at which mixtures are means, with an order of importance yet
SCHEDULES = ("even", "paper")


def sharpness(epoch: float, epochs: int, rise: float = 10.0) -> float:
    """Return T = 1/t in an epoch: 1 at the start, 10,000 after `epochs`.

    `T(e) = A / (1 + exp(-k e)) + T_s - A / 2` with `A = 2 (T_e - T_s) (1 + exp(-k E)) / (1 - exp(-k E))`.

    Args:
        epoch: e, from 0.
        epochs: E.
        rise: k E. The paper's k = 1 reaches half of the end after one epoch.

    >>> sharpness(0, 30), round(sharpness(30, 30))
    (1.0, 10000)
    """
    k = rise / epochs
    size = 2 * (HOTTEST - COLDEST) * (1 + exp(-rise)) / (1 - exp(-rise))
    return size / (1 + exp(-k * epoch)) + COLDEST - size / 2


def even(filters: Tensor, progress: float) -> float:
    """Return the T at which a filter's share of its own mixture is as far between a half and one as the training is.

    All others count as being at their mean distance. What T that is depends on the filters: it is in the range of 1 to 10.

    Args:
        filters: (n, d).
        progress: From 0 to 1.
    """
    n, share = len(filters), BLURRED + (1 - BLURRED) * progress
    distance = float(torch.cdist(filters.double(), filters.double()).sum()) / max(1, n * (n - 1))
    if share >= 1 or not distance:
        return HOTTEST
    return min(HOTTEST, max(SOFTEST, log((n - 1) * share / (1 - share)) / distance))


def likeness(filters: Tensor, sharp: float) -> Tensor:
    """Return the logarithms of p (n, n): row k says how near every filter is to filter k, `softmax(-|F_k - F_g| T)`.

    Args:
        filters: (n, d).
        sharp: T.
    """
    return torch.log_softmax(-torch.cdist(filters.double(), filters.double()) * sharp, dim=1)


def importance(log_p: Tensor) -> Tensor:
    """Return the (n,) mean divergences `1/n sum_g KL(p_k || p_g)`: how unlike the others a filter is, higher = keep.

    Everything stays in logarithms. `p log(p / q)` written out is 0 times minus infinity from T of about 1000 on.
    """
    own = (log_p.exp() * log_p).sum(1)
    return own - (log_p.exp() @ log_p.T).mean(1)


def reseated(before: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Return the chosen filters, each at the place that it had before, newcomers at the places of those that went.

    >>> reseated([0, 2, 5], [2, 5, 7])
    [7, 2, 5]
    """
    newcomers = iter([i for i in chosen if i not in before])
    return [i if i in chosen else next(newcomers) for i in before]


class Mixture(nn.Module):
    """Makes m filters of n: rows of a matrix of weights that no gradient reaches.

    Args:
        mix: (m, n), rows sum to 1.
    """

    def __init__(self, mix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mix", mix)

    mix: Tensor

    def forward(self, filters: Tensor) -> Tensor:
        """Return (m, ...) of filters (n, ...)."""
        return (self.mix.to(filters) @ filters.reshape(len(filters), -1)).reshape(len(self.mix), *filters.shape[1:])


def fuse(layer: Any, weight: Tensor, bias: Tensor | None, chosen: Sequence[int]) -> None:
    """Give a layer of m filters n trainable ones, of which it is a mixture; at first the chosen ones as they are."""
    mix = torch.eye(len(weight))[list(chosen)]
    layer.weight = nn.Parameter(weight.clone())
    parametrize.register_parametrization(layer, "weight", Mixture(mix), unsafe=True)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
        parametrize.register_parametrization(layer, "bias", Mixture(mix), unsafe=True)


def settle(layer: Any) -> None:
    """Leave the layer with its m mixtures only."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(layer, name):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)


class Fusing(TrainHook):
    """Chooses, before every epoch, which filters the mixtures are centred on and how sharp they are.

    Args:
        places: Name of each fused layer -> the filters that its outputs are centred on at the start.
        epochs: Of the training.
        schedule: How T rises: "even", so that filters become themselves evenly; or as in the "paper".
        rise: How fast mixtures sharpen in the paper's schedule.
    """

    def __init__(self, places: Mapping[str, Sequence[int]], epochs: int, schedule: str = "even", rise: float = 10.0) -> None:
        self.places = {name: list(chosen) for name, chosen in places.items()}
        self._epochs, self._schedule, self._rise = epochs, schedule, rise
        self.key = repr((sorted(self.places.items()), epochs, schedule, rise))

    def on_train_begin(self, model: nn.Module) -> None:
        """Mix for the first epoch."""
        self._mix(model, 0)

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Mix for the next epoch; after the last one the mixtures that it was trained with stay."""
        if epoch + 1 < self._epochs:
            self._mix(model, epoch + 1)

    @torch.no_grad()
    def _mix(self, model: nn.Module, epoch: int) -> None:
        for name, before in self.places.items():
            layer: Any = model.get_submodule(name)
            filters = layer.parametrizations.weight.original.detach().flatten(1)
            log_p = likeness(filters, self._sharpness(filters, epoch))
            best = torch.argsort(importance(log_p), descending=True, stable=True)[: len(before)]
            self.places[name] = reseated(before, sorted(best.tolist()))
            for part in layer.parametrizations.values():
                part[0].mix.copy_(log_p[self.places[name]].exp())

    def _sharpness(self, filters: Tensor, epoch: int) -> float:
        return sharpness(epoch, self._epochs, self._rise) if self._schedule == "paper" else even(filters, epoch / self._epochs)

    def state(self) -> Mapping[str, Tensor]:
        """Return which filters the mixtures are centred on."""
        return {name: torch.tensor(chosen) for name, chosen in self.places.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.places = {name: chosen.tolist() for name, chosen in state.items()}
