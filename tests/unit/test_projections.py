"""Projections onto sparse sets: against brute force over all supports, and against random feasible points."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from deploypipe.errors import NotApplicable, UsageError
from deploypipe.ingredients.projections import AXES, n_units, project, survivors, two_in_four, unit_norms

SCHEMES = sorted(AXES)
EVERY = pytest.mark.parametrize("scheme", SCHEMES)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(scheme: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Index sets of the units, written down from what the words mean."""
    o, i, k = shape[0], shape[1], int(np.prod(shape[2:]))
    at = torch.arange(o * i * k).view(o, i, k)
    sets = {
        "unstructured": [at[a, b, c] for a in range(o) for b in range(i) for c in range(k)],
        "filter": [at[a] for a in range(o)],
        "channel": [at[:, b] for b in range(i)],
        "column": [at[:, b, c] for b in range(i) for c in range(k)],
        "kernel": [at[a, b] for a in range(o) for b in range(i)],
    }
    return [part.flatten() for part in sets[scheme]]


@EVERY
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (2, 4), (4, 2, 1, 1), (1, 2, 2, 2)])
def test_nearest_of_all_supports(scheme: str, shape: tuple[int, ...]) -> None:
    w, parts = weight(*shape), units(scheme, shape)
    assert n_units(shape, scheme) == len(parts)
    for n in range(len(parts) + 1):
        found = project(w, scheme, n)
        best = np.inf
        for chosen in itertools.combinations(parts, n):
            point = torch.zeros(w.numel(), dtype=w.dtype)
            for part in chosen:
                point[part] = w.flatten()[part]
            best = min(best, float((point - w.flatten()).square().sum()))
        assert float((found - w).square().sum()) == pytest.approx(best, abs=1e-12)


@EVERY
def test_feasible_idempotent_and_no_random_feasible_point_is_nearer(scheme: str) -> None:
    shape = (6, 4, 3, 3)
    w, parts = weight(*shape), units(scheme, shape)
    n = len(parts) // 3
    found = project(w, scheme, n)
    alive = sum(bool((found.flatten()[part] != 0).any()) for part in parts)
    assert alive == n
    assert torch.equal(project(found, scheme, n), found)
    assert found.data_ptr() != w.data_ptr()
    rng, distance = np.random.default_rng(0), float((found - w).square().sum())
    for _ in range(1000):
        point = torch.zeros(w.numel(), dtype=w.dtype)
        for i in rng.choice(len(parts), n, replace=False):
            point[parts[i]] = w.flatten()[parts[i]] + 0.1 * torch.from_numpy(rng.normal(size=len(parts[i])))
        assert float((point - w.flatten()).square().sum()) >= distance - 1e-12


@EVERY
def test_ties_keep_as_many_as_asked_and_the_first(scheme: str) -> None:
    """A percentile with `<` keeps all of them, or none."""
    w = torch.ones(4, 4, 2, 2)
    parts = units(scheme, w.shape)
    mask = survivors(w, scheme, len(parts) // 2).flatten()
    assert [bool(mask[part].all()) for part in parts] == [True] * (len(parts) // 2) + [False] * (len(parts) // 2)
    assert int(mask.sum()) == w.numel() // 2


def test_a_survivor_may_be_zero() -> None:
    """Masks read off `w != 0` lose it."""
    w = torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    assert survivors(w, "unstructured", 2).tolist() == [[True, False, True, False]]


@EVERY
def test_norms_are_those_of_the_units(scheme: str) -> None:
    w = weight(3, 4, 2, 2)
    expected = [float(w.flatten()[part].norm()) for part in units(scheme, w.shape)]
    np.testing.assert_allclose(unit_norms(w, scheme).flatten().numpy(), expected)


def test_two_in_four_equals_the_best_of_six_patterns_along_the_inputs() -> None:
    w = weight(8, 16, 3, 3)
    mask = two_in_four(w)
    for o, block, r, s in itertools.product(range(8), range(4), range(3), range(3)):
        entries, kept = w[o, 4 * block : 4 * block + 4, r, s].abs(), mask[o, 4 * block : 4 * block + 4, r, s]
        best = max(float(entries[list(pair)].sum()) for pair in itertools.combinations(range(4), 2))
        assert int(kept.sum()) == 2
        assert float(entries[kept].sum()) == pytest.approx(best)


def test_two_in_four_is_not_grouped_along_the_flattened_kernel() -> None:
    """The trap: blocks of four of the flattened (inputs, rows, columns) are another pattern, which no hardware takes."""
    w = weight(8, 16, 3, 3)
    wrong = two_in_four(w.reshape(8, -1)).reshape(w.shape)
    counts = wrong.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert (counts != 2).float().mean() > 0.3
    right = two_in_four(w).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert (right == 2).all()


def test_two_in_four_of_equal_magnitudes_still_keeps_two() -> None:
    assert two_in_four(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
    assert two_in_four(torch.zeros(1, 4)).sum() == 2


def test_shapes_that_do_not_fit_are_refused_with_the_reason() -> None:
    with pytest.raises(NotApplicable, match="6 inputs"):
        two_in_four(torch.ones(2, 6))


def test_wrong_requests_are_explained() -> None:
    with pytest.raises(UsageError, match="unknown scheme 'filters'") as caught:
        survivors(torch.ones(2, 2), "filters", 1)
    assert "filter" in caught.value.fix
    with pytest.raises(UsageError, match="cannot keep 3 of 2"):
        survivors(torch.ones(2, 2), "filter", 3)
