"""ADMM on problems with known solutions, and what its hook does to a step of training."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.graph import trace
from deploypipe.ingredients.projections import KeepRows, KeepTwoInFour, KeepUnits
from deploypipe.ingredients.proximal import Admm, AdmmHook, Constraint
from deploypipe.ingredients.stacks import Stack, rows
from tests.toys import TOYS


def vector(values: Tensor, n: int) -> tuple[dict[str, Tensor], Constraint]:
    named = {"w": values.clone()[None]}
    shape = (1, len(values))
    return named, Constraint(Stack.of_weight("w", shape), KeepUnits("unstructured", n, shape))


def solved(curvature: Tensor, target: Tensor, n: int, rho: float, steps: int) -> tuple[Tensor, Tensor]:
    """Exact minimisation of 1/2 sum c (w - a)^2 with the pull, again and again; returns W and Z."""
    named, constraint = vector(target, n)
    admm = Admm([constraint], named, rho)
    for _ in range(steps):
        w = named["w"][0]
        pull = admm.pull(named)[0][1][0] / rho  # W - Z + U
        named["w"][0] = (curvature * target + rho * (w - pull)) / (curvature + rho)
        admm.update(named)
    return named["w"][0], admm._z[0][0]


def test_quadratic_of_unit_curvature_ends_at_the_largest_entries() -> None:
    for seed in range(10):
        a = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w, z = solved(torch.ones(100), a, 20, 1.0, 300)
        top = torch.argsort(a.abs(), descending=True)[:20]
        assert set(torch.nonzero(z).flatten().tolist()) == set(top.tolist())
        assert float((w - z).norm() / w.norm()) < 1e-8
        torch.testing.assert_close(z[top], a[top])


def test_a_pull_that_is_too_weak_cycles() -> None:
    gaps = []
    for seed in range(10):
        a = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        w, z = solved(torch.ones(100), a, 20, 0.3, 300)
        gaps.append(float((w - z).norm() / w.norm()))
    assert np.median(gaps) > 0.1


def test_beats_one_shot_magnitude_where_curvatures_differ() -> None:
    """f = 1/2 (w - a)' H (w - a) with a full H: the best support is not that of the largest entries."""
    ratios: dict[str, list[float]] = {"admm": [], "magnitude": []}
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64))[0]
        hessian = basis @ torch.diag(torch.logspace(-1, 1, 8, dtype=torch.float64)) @ basis.T
        a = torch.randn(8, generator=rng, dtype=torch.float64)

        def best_on(support: tuple[int, ...], hessian: Tensor = hessian, a: Tensor = a) -> float:
            index = list(support)
            w = torch.zeros(8, dtype=torch.float64)
            w[index] = torch.linalg.solve(hessian[index][:, index], (hessian @ a)[index])
            return float((w - a) @ hessian @ (w - a))

        optimum = min(best_on(support) for support in itertools.combinations(range(8), 3))
        named, constraint = vector(a, 3)
        admm = Admm([constraint], named, 0.5, growth=1.02)
        for _ in range(300):
            rho = admm._rho
            pull = admm.pull(named)[0][1][0] / rho
            right = hessian @ a + rho * (named["w"][0] - pull)
            named["w"][0] = torch.linalg.solve(hessian + rho * torch.eye(8, dtype=torch.float64), right)
            admm.update(named)
        magnitude = torch.argsort(a.abs(), descending=True)[:3]
        ratios["admm"].append(best_on(tuple(torch.nonzero(admm._z[0][0]).flatten().tolist())) / optimum)
        ratios["magnitude"].append(best_on(tuple(magnitude.tolist())) / optimum)
        assert float((named["w"] - admm._z[0]).norm() / named["w"].norm()) < 0.05
    assert np.mean(ratios["admm"]) < 1.2
    assert np.mean(ratios["magnitude"]) > 1.5


def test_z_shares_no_storage_with_the_weights() -> None:
    """With one tensor for both, the first outer iteration has no pull at all."""
    named, constraint = vector(torch.randn(20), 5)
    admm = Admm([constraint], named, 1.0)
    before = admm._z[0].clone()
    assert admm.pull(named)[0][1].abs().sum() > 0
    named["w"] += 1.0
    assert torch.equal(admm._z[0], before)
    admm.update(named)
    assert not torch.equal(admm._z[0], named["w"])
    assert (admm._z[0] != 0).sum() == 5


def test_rho_grows_and_the_unscaled_dual_does_not_jump() -> None:
    named, constraint = vector(torch.randn(20), 5)
    plain, growing = Admm([constraint], named, 0.5), Admm([constraint], named, 0.5, growth=1.4)
    for admm in (plain, growing):
        admm.update(named)
    assert growing._rho == pytest.approx(0.7)
    torch.testing.assert_close(growing._rho * growing._u[0], plain._rho * plain._u[0])


def test_the_state_survives() -> None:
    named, constraint = vector(torch.randn(20), 5)
    one, other = (Admm([constraint], named, 0.5, growth=1.4) for _ in range(2))
    for admm in (one, other):
        admm.update(named)
    kept = {name: tensor.clone() for name, tensor in one.state().items()}
    fresh = Admm([constraint], {"w": torch.zeros(1, 20)}, 0.1, growth=1.4)
    fresh.restore(kept)
    named["w"] += 0.3
    assert fresh.update(named) == one.update(named)
    assert fresh.gaps == one.gaps
    assert torch.equal(fresh._u[0], one._u[0])


# --- on a model


def test_the_pull_goes_through_the_optimizer() -> None:
    """With a loss of zero gradient, one step of SGD moves W by -lr rho (W - Z + U): the trap is to leave lr out."""
    model = nn.Linear(6, 4, bias=False)
    before = model.weight.detach().clone()
    constraint = Constraint(Stack.of_weight("weight", (4, 6)), KeepUnits("unstructured", 6, (4, 6)))
    hook = AdmmHook([constraint], model, rho=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model.weight.sum() * 0).backward()
    hook.on_batch_backward(model, 0)
    optimizer.step()
    expected = before - 0.1 * 0.5 * (before - constraint.project(before))
    torch.testing.assert_close(model.weight.detach(), expected)


def test_only_constrained_parameters_are_pulled_and_updates_come_at_epoch_ends() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    constraint = Constraint(Stack.of_weight("0.weight", (4, 4)), KeepUnits("filter", 2, (4, 4)))
    hook = AdmmHook([constraint], model, rho=1.0, every=2)
    model(torch.zeros(3, 4)).sum().backward()
    before = model[1].weight.grad.clone()
    hook.on_batch_backward(model, 0)
    assert torch.equal(model[1].weight.grad, before)
    assert model[0].weight.grad.abs().sum() > 0
    hook.on_epoch_end(model, 0)
    assert hook.admm.gaps == []
    hook.on_epoch_end(model, 1)
    assert len(hook.admm.gaps) == 1


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "grouped", "channel_shuffle"])
@pytest.mark.parametrize("role", ["produces", "consumes"])
def test_reading_and_adding_of_group_slices_are_adjoint(net: str, role: str) -> None:
    """<read(x), m> = <x, add(m)> for every group, whatever its index maps are."""
    model, example = TOYS[net]()
    graph = trace(model, example)
    named = {name: p.detach().double() for name, p in model.named_parameters()}
    for group in graph.prunable:
        members = tuple(m for m in group.members if m.role == role and m.param in named)
        if not members:
            continue
        stack = Stack(group.name, members)
        matrix = stack.read(named)
        assert matrix.shape[0] == group.size
        for member in members:
            for channel in range(group.size):
                mine = named[member.param].index_select(member.axis, torch.tensor(member.slots(channel)))
                got = rows(named[member.param], member)[channel]
                torch.testing.assert_close(got.square().sum(), mine.square().sum())
        other = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sums = {name: torch.zeros_like(p) for name, p in named.items()}
        stack.add(sums, other)
        left, right = float((matrix * other).sum()), sum(float((named[n] * t).sum()) for n, t in sums.items())
        assert left == pytest.approx(right)


def test_masks_are_equal_when_they_keep_the_same() -> None:
    assert KeepRows(3) == KeepRows(3)
    assert repr(KeepTwoInFour((8, 16))) == "KeepTwoInFour(shape=(8, 16))"  # part of a checkpoint's key: no addresses
    assert KeepRows(2)(torch.tensor([[1.0, 0], [3, 4], [0, 2]])).tolist() == [[False, False], [True, True], [True, True]]
