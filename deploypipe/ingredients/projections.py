"""Exact projections onto sparse weights: which entries of a weight stay when only so many may differ from zero.

Zhang et al., A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers, ECCV 2018,
arXiv:1804.03294, section 3.3; the pattern of two in four: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021,
arXiv:2104.08378, section 3.

All of these sets are unions of coordinate subspaces, so that the nearest point keeps the units of the largest norm and sets the
others to zero. Keeping the mask, not the projected weight, says what was chosen also where a weight happens to be zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deploypipe.errors import NotApplicable, UsageError, nearest

# What is kept or dropped as one: a unit spans these axes of a weight seen as (outputs, inputs, positions of the kernel).
AXES: dict[str, tuple[int, ...]] = {
    "unstructured": (),
    "kernel": (2,),
    "column": (0,),
    "filter": (1, 2),
    "channel": (0, 2),
}
BLOCK, IN_BLOCK = 4, 2  # of the pattern 2:4


def survivors(weight: Tensor, scheme: str, n: int) -> Tensor:
    """Return the mask of the `n` units of `weight` with the largest Euclidean norm; of equal ones the first stay.

    Args:
        weight: (O, I, ...) of a convolution or linear layer.
        scheme: A name in `AXES`: what a unit is.
        n: Units that stay, 0 to all of them.

    Returns:
        Booleans of the weight's shape: True stays.

    Raises:
        UsageError: The scheme is unknown, or there are not as many units.
    """
    norms = unit_norms(weight, scheme)
    if not 0 <= n <= norms.numel():
        at = f"{scheme} of a weight of shape {tuple(weight.shape)}"
        raise UsageError(f"cannot keep {n} of {norms.numel()} units", at=at, fix=f"keep 0 to {norms.numel()}")
    chosen = torch.zeros(norms.numel(), dtype=torch.bool, device=weight.device)
    chosen[torch.argsort(norms.flatten(), descending=True, stable=True)[:n]] = True
    return chosen.view_as(norms).expand(_cube(weight).shape).reshape(weight.shape)


def project(weight: Tensor, scheme: str, n: int) -> Tensor:
    """Return the nearest weight with at most `n` units that differ from zero, in storage of its own."""
    return weight * survivors(weight, scheme, n)


def unit_norms(weight: Tensor, scheme: str) -> Tensor:
    """Return the norms of a weight's units, with the axes that a unit spans reduced to one: (O, 1, 1) for filters.

    Raises:
        UsageError: The scheme is unknown.
    """
    if scheme not in AXES:
        raise UsageError(f"unknown scheme '{scheme}'", at="projection", fix=nearest(scheme, AXES))
    squares = _cube(weight).detach().double().square()
    return (squares.sum(AXES[scheme], keepdim=True) if AXES[scheme] else squares).sqrt()


def n_units(shape: tuple[int, ...], scheme: str) -> int:
    """Return of how many units a weight of this shape consists.

    >>> n_units((8, 3, 5, 5), "kernel"), n_units((8, 3, 5, 5), "column")
    (24, 75)
    """
    return unit_norms(torch.empty(shape, device="cpu"), scheme).numel()


def two_in_four(weight: Tensor) -> Tensor:
    """Return the mask that keeps the two largest magnitudes of every four consecutive inputs; of equal ones the first.

    Blocks run along the input axis, separately for every output and kernel position, as sparse matrix units read them.

    Args:
        weight: (O, I, ...), with I a multiple of 4.

    Raises:
        NotApplicable: I is no multiple of 4.
    """
    n_in = weight.shape[1]
    if n_in % BLOCK:
        raise NotApplicable(f"{n_in} inputs do not divide into blocks of {BLOCK}")
    blocks = _cube(weight).detach().abs().movedim(1, 2)
    blocks = blocks.reshape(*blocks.shape[:2], -1, BLOCK)
    order = torch.argsort(blocks, dim=-1, descending=True, stable=True)
    stays = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., :IN_BLOCK], True)
    return stays.flatten(2).movedim(2, 1).reshape(weight.shape)


Mask = Callable[[Tensor], Tensor]  # (rows, K) of a weight -> booleans of that shape: what its projection keeps


@dataclass(frozen=True)
class KeepRows:
    """Keeps the `n` rows of the largest norm: the channels of a group, whose slices lie side by side in a row."""

    n: int

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mask of a (channels, K) matrix."""
        return survivors(values, "filter", self.n)


@dataclass(frozen=True)
class KeepUnits:
    """Keeps the `n` units of the largest norm of one weight of this shape."""

    scheme: str
    n: int
    shape: tuple[int, ...]

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mask of the weight, seen as a (outputs, K) matrix."""
        return survivors(values.reshape(self.shape), self.scheme, self.n).view_as(values)


@dataclass(frozen=True)
class KeepTwoInFour:
    """Keeps two of every four consecutive inputs of one weight of this shape."""

    shape: tuple[int, ...]

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mask of the weight, seen as a (outputs, K) matrix."""
        return two_in_four(values.reshape(self.shape)).view_as(values)


def _cube(weight: Tensor) -> Tensor:
    """Return the weight as (outputs, inputs, kernel positions)."""
    return weight.reshape(*weight.shape[:2], -1)
