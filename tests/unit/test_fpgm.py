"""FPGM (He et al., CVPR 2019): its falsifiable tests."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from deploypipe.algorithms import make
from deploypipe.algorithms.fpgm import SoftZero, scores_of
from deploypipe.algorithms.scores import geometric_median, summed_distances
from deploypipe.count import macs
from deploypipe.graph import trace
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toy_task import net, problem_of, toy_data
from tests.toys import TOYS


def filters(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(16, 144), (64, 576), (32, 9)])
def test_the_most_replaceable_filter_is_the_one_nearest_to_the_geometric_median(n: int, d: int) -> None:
    ranks = []
    for seed in range(40):
        points = filters(n, d, seed) * (1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)))
        to_median = (points - geometric_median(points)).norm(dim=1)
        ranks.append(int((to_median < to_median[summed_distances(points).argmin()]).sum()))
    assert np.mean([rank == 0 for rank in ranks]) >= 0.95
    assert max(ranks) <= 2


def test_the_geometric_median_is_the_minimum() -> None:
    points = filters(9, 3, 0)
    median = geometric_median(points)
    best = (points - median).norm(dim=1).sum()
    for shift in 0.05 * filters(50, 3, 1):
        assert (points - median - shift).norm(dim=1).sum() > best


def test_rotation_and_shift_change_nothing_where_norms_change_everything() -> None:
    points = filters(24, 32, 0)
    q = torch.linalg.qr(filters(32, 32, 1))[0]
    moved = points @ q + 5 * filters(1, 32, 2)
    assert summed_distances(points).argsort().tolist() == summed_distances(moved).argsort().tolist()
    assert spearmanr(points.norm(dim=1), moved.norm(dim=1))[0] < 0.9
    signs = torch.tensor([1.0, -1.0]).repeat(12)[:, None].double() * points[:1]
    assert summed_distances(signs).min() > 0, "w and -w are different filters: powers before distances would lose that"
    assert summed_distances(signs.abs()).max() < 1e-6


def test_planted_redundancy_goes_first_and_norms_would_take_the_others() -> None:
    for seed in range(20):
        base, rng = filters(1, 64, seed), torch.Generator().manual_seed(100 + seed)
        cluster = 1.5 * base / base.norm() * 8 + 0.1 * torch.randn(10, 64, generator=rng, dtype=torch.float64)
        spread = filters(6, 64, 200 + seed)
        points = torch.cat([cluster, 8 * spread / spread.norm(dim=1, keepdim=True)])
        assert set(np.argsort(scores_of([points], 12))[:4]) <= set(range(10))
        assert set(points.norm(dim=1).argsort()[:4].tolist()) <= set(range(10, 16))


def test_mix_cuts_by_norm_first_and_then_by_distance_among_the_rest() -> None:
    points = filters(20, 16, 3)
    order = np.argsort(scores_of([points], 12, norm_share=0.25), kind="stable")
    norms = points.norm(dim=1)
    assert order[:2].tolist() == norms.argsort()[:2].tolist()
    left = norms.argsort()[2:].sort().values
    expected = left[summed_distances(points[left]).argsort()[:6]]
    assert order[2:8].tolist() == expected.tolist()
    assert order.tolist() != np.argsort(scores_of([points], 12)).tolist()


def test_zero_filters_go_first_and_are_not_compared_with() -> None:
    """A small filter among zeros is nobody's double, but its distances to the zeros would make it look like one."""
    cluster = 0.3 * filters(6, 8, 4)
    cluster[:, 0] += 10
    small = torch.eye(8, dtype=torch.float64)[:1]
    points = torch.cat([torch.zeros(8, 8, dtype=torch.float64), small, cluster])
    order = np.argsort(scores_of([points], 4), kind="stable").tolist()
    assert set(order[:8]) == set(range(8))
    assert order[-1] == 8
    assert summed_distances(points)[8] < summed_distances(points)[9:].min()


@pytest.mark.parametrize("alive", [[5], [2, 5]])
def test_live_filters_stay_before_zeros_also_where_distances_say_nothing(alive: list[int]) -> None:
    """A single filter is at a distance of 0 from itself; equal ones are, too."""
    points = torch.zeros(8, 6, dtype=torch.float64)
    points[alive] = filters(1, 6, 1)
    assert np.argsort(-scores_of([points], len(alive)), kind="stable")[: len(alive)].tolist() == alive


def test_by_norm_alone_the_largest_stays() -> None:
    points = filters(12, 6, 2)
    assert int(np.argmax(scores_of([points], 1, norm_share=1.0))) == int(points.norm(dim=1).argmax())


def test_filters_are_zeroed_softly_and_those_zeroed_last_are_cut() -> None:
    problem, seen = problem_of(net(), 0.5), []
    on_epoch_end = SoftZero.on_epoch_end

    def spied(self: SoftZero, model: torch.nn.Module, epoch: int) -> None:
        alive = [int(model[i][0].weight.flatten(1).any(1).sum()) for i in (0, 1, 2)]
        on_epoch_end(self, model, epoch)
        seen.append((alive, [model[i][0].weight.flatten(1).any(1).nonzero().flatten().tolist() for i in (0, 1, 2)]))

    SoftZero.on_epoch_end = spied  # type: ignore[method-assign]
    try:
        method = make("fpgm", {"train_epochs": 3})
        model = method.train(problem, Trainer(toy_data(), TrainSettings(lr=0.05, batch_size=50, distill=0.0)))
    finally:
        SoftZero.on_epoch_end = on_epoch_end  # type: ignore[method-assign]
    assert [alive for alive, _ in seen[1:]] == [[16, 24, 32]] * 2, "zeroed filters grow again in the next epoch"
    assert seen[0][1] != seen[2][1] or seen[1][1] != seen[2][1], "and may be others then"
    kept = method.plan(problem_of(model, 0.5)).keep
    assert [list(kept[name]) for name in ("0.0", "1.0", "2.0")] == seen[-1][1]


def test_frozen_filters_are_not_zeroed_since_they_could_not_grow_again() -> None:
    problem = problem_of(net(), 0.5)
    problem.model[1][0].weight.requires_grad_(False)
    model = make("fpgm", {"train_epochs": 2}).train(problem, Trainer(toy_data(), TrainSettings(batch_size=50, distill=0.0)))
    assert torch.equal(model[1][0].weight, problem.model[1][0].weight)
    assert int(model[2][0].weight.flatten(1).any(1).sum()) < 32


def test_every_group_loses_the_same_share() -> None:
    problem = problem_of(net(), 0.5)
    plan = make("fpgm").plan(problem)
    shares = [len(plan.keep[group.name]) / group.size for group in problem.graph.prunable]
    assert max(shares) - min(shares) < 0.07
    assert macs(problem.graph, plan) <= problem.budget


def test_one_threshold_does_not_ask_how_large_the_filters_of_a_layer_are() -> None:
    """Sums of distances grow with scale, width and fan-in: raw ones would empty the layers where these are small."""
    model = net()
    problem = problem_of(model, 0.5)
    method = make("fpgm", {"widths": "threshold"})
    before, (scores, _) = method.plan(problem).keep, method._scores(problem)
    for group in problem.graph.prunable:
        raw = scores_of([model[int(group.name[0])][0].weight.detach().double().flatten(1)], group.size)
        assert np.argsort(scores[group.name], kind="stable").tolist() == np.argsort(raw, kind="stable").tolist()
        assert scores[group.name].mean() == pytest.approx(1.0)
    assert min(len(kept) / problem.graph.group(name).size for name, kept in before.items()) > 0.2
    with torch.no_grad():
        model[1][0].weight *= 10  # the norm behind it takes that back
    assert method.plan(problem).keep == before


def test_coupled_layers_are_judged_together() -> None:
    model, example = TOYS["residual"]()
    group = trace(model, example).group("stem.0")
    layers = [layer[0].weight.detach().double().flatten(1) for layer in (model.stem, model.b2)]
    expected = summed_distances(layers[0]) + summed_distances(layers[1])
    np.testing.assert_allclose(scores_of(layers, group.size), expected.numpy())


def zeroed(norm_share: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return the residual toy before and after five channels of its first trunk and seven of its second are set to zero."""
    model, example = TOYS["residual"]()
    with torch.no_grad():
        model.b2[0].weight *= 10  # so that distances of the first layer decide nothing
    before = copy.deepcopy(model)
    SoftZero(trace(model, example), {"stem.0": 3, "short": 3}, norm_share).on_epoch_end(model, 0)
    return before, model


def gone(weight: Tensor) -> list[int]:
    return (~weight.flatten(1).any(1)).nonzero().flatten().tolist()


def test_in_a_coupled_group_the_same_filters_of_all_layers_are_zeroed() -> None:
    before, after = zeroed()
    for first, second, n in (("stem.0", "b2.0", 5), ("short", "d2.0", 7)):
        weights = [after.get_submodule(name).weight for name in (first, second)]
        assert len(gone(weights[0])) == n
        assert gone(weights[0]) == gone(weights[1])
        stays = [i for i in range(len(weights[0])) if i not in gone(weights[0])]
        assert torch.equal(weights[0][stays], before.get_submodule(first).weight[stays])
    assert torch.equal(after.b1[0].weight, before.b1[0].weight), "no other layer is touched"


def test_in_a_coupled_group_the_distances_of_all_layers_decide_what_is_zeroed() -> None:
    before, after = zeroed()
    distances = [summed_distances(layer[0].weight.detach().double().flatten(1)) for layer in (before.stem, before.b2)]
    assert gone(after.stem[0].weight) == sorted((distances[0] + distances[1]).argsort()[:5].tolist())
    assert gone(after.stem[0].weight) != sorted(distances[0].argsort()[:5].tolist())


def test_biases_go_with_their_filters() -> None:
    before, after = zeroed()
    assert before.short.bias.all()
    assert (after.short.bias == 0).nonzero().flatten().tolist() == gone(after.short.weight)


def smallest(weight: Tensor, n: int) -> list[int]:
    return sorted(weight.flatten(1).norm(dim=1).argsort()[:n].tolist())


def test_with_mix_alone_what_goes_has_the_smallest_norms() -> None:
    model = net()
    plans = {share: make("fpgm", {"norm_share": share}).plan(problem_of(model, 0.5)).keep["1.0"] for share in (0.0, 1.0)}
    dropped = {share: sorted(set(range(24)) - set(kept)) for share, kept in plans.items()}
    assert dropped[1.0] == smallest(model[1][0].weight, len(dropped[1.0]))
    assert dropped[0.0] != smallest(model[1][0].weight, len(dropped[0.0]))


def test_with_mix_alone_what_is_zeroed_while_training_has_the_smallest_norms() -> None:
    model, own = net(), Trainer(toy_data(100), TrainSettings(lr=1e-6, batch_size=50, distill=0.0))
    for share in (0.0, 1.0):
        trained = make("fpgm", {"norm_share": share, "train_epochs": 1}).train(problem_of(model, 0.5), own)
        found = gone(trained[1][0].weight)
        assert (found == smallest(model[1][0].weight, len(found))) == (share == 1.0)
        assert found
