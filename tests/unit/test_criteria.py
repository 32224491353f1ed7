"""Rethinking the Pruning Criteria (Huang et al., NeurIPS 2021): its falsifiable tests."""

import copy
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset

from deploypipe.algorithms.scores import activation_scores, data_free, entropies, summed_distances
from deploypipe.graph import trace
from deploypipe.pipeline.criteria import _taylor, all_scores
from deploypipe.worth.criteria import (
    Pair,
    analyse,
    clustered,
    normality,
    overlap,
    remarks,
    similarity,
    similarity_rows,
    spread,
    variation,
)
from tests.toy_task import pictures, problem_of, trained_net
from tests.toys import Fn, cbr, conv, head

Scores = NDArray[np.float64]


def of(filters: Scores) -> dict[str, Scores]:
    return {
        "l1": np.abs(filters).sum(1),
        "l2": np.sqrt((filters**2).sum(1)),
        "fpgm": summed_distances(torch.from_numpy(filters)).numpy(),
    }


@pytest.mark.parametrize(
    ("n", "d", "l1_l2", "l2_fpgm", "cv"),
    [(16, 144, 0.91, 0.89, 0.053), (64, 576, 0.92, 0.978, 0.030), (256, 2304, 0.93, 0.996, 0.015)],
)
def test_on_normal_filters_norms_and_distances_rank_alike_and_barely_differ(
    n: int, d: int, l1_l2: float, l2_fpgm: float, cv: float
) -> None:
    seeds = 20 if n == 64 else 100 if n == 16 else 4
    scores = [of(np.random.default_rng(seed).normal(size=(n, d))) for seed in range(seeds)]
    groups = {name: {str(i): found[name] for i, found in enumerate(scores)} for name in ("l1", "l2", "fpgm")}
    assert similarity("l1", "l2", groups["l1"], groups["l2"]).spearman == pytest.approx(l1_l2, abs=0.03)
    assert similarity("l2", "fpgm", groups["l2"], groups["fpgm"]).spearman == pytest.approx(l2_fpgm, abs=0.03)
    found = spread("l2", groups["l2"])
    assert found.variation == pytest.approx(cv, abs=0.006)
    assert found.variation == pytest.approx(1 / np.sqrt(2 * d), rel=0.15)
    assert found.telling == (d == 144)


def test_in_two_clusters_norms_and_distances_part_ways() -> None:
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(2, 64))
        centres *= 24 / np.linalg.norm(centres, axis=1, keepdims=True)
        filters = np.repeat(centres, (24, 16), axis=0) + 0.2 * rng.normal(size=(40, 64))
        scores = of(filters)
        found.append(spearmanr(scores["l2"], scores["fpgm"]).statistic)
    assert np.mean(found) < 0.4


def test_globally_l1_and_l2_disagree_between_layers_of_different_size() -> None:
    overlaps, shares = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        layers = [rng.normal(size=(64, d)) / np.sqrt(d) for d in (27, 576)]
        l1, l2 = (np.concatenate([of(layer)[name] for layer in layers]) for name in ("l1", "l2"))
        shares.append(np.mean(np.argsort(l1)[:38] < 64))
        overlaps.append(overlap(l1, l2, 0.3))
    assert min(shares) == 1.0, "L1 takes all from the layer of the small filters"
    assert np.mean(overlaps) < 0.8


def test_a_factor_changes_nothing_and_order_of_the_pair_neither() -> None:
    rng = np.random.default_rng(0)
    a, b = ({str(i): rng.normal(size=20) ** 2 for i in range(3)} for _ in range(2))
    one = similarity("a", "b", a, b)
    other = similarity("b", "a", {k: 7 * v for k, v in b.items()}, a)
    same = similarity("a", "a", a, {k: 5 * v for k, v in a.items()})
    assert (one.spearman, one.kendall) == pytest.approx((other.spearman, other.kendall))
    assert one.overlap == pytest.approx(other.overlap)
    assert (same.spearman, same.spearman_min, same.kendall, set(same.overlap)) == (1.0, 1.0, 1.0, {1.0})
    assert variation(3 * a["0"]) == pytest.approx(variation(a["0"]))


def test_a_small_minimum_is_not_hidden_by_the_mean() -> None:
    rng = np.random.default_rng(1)
    a = {str(i): rng.normal(size=16) for i in range(4)}
    b = a | {"3": -a["3"]}
    found = similarity("a", "b", a, b)
    assert (found.spearman, found.spearman_min, found.n_groups) == (0.5, -1.0, 4)


def test_recommended_is_one_of_each_cluster_that_tells_channels_apart() -> None:
    rng = np.random.default_rng(2)
    wide, flat = rng.uniform(0, 1, 30), 1 + 1e-3 * rng.uniform(0, 1, 30)
    scores = {"near": {"g": 100 + wide}, "wide": {"g": wide}, "flat": {"g": flat}, "own": {"g": rng.uniform(0, 1, 30)}}
    found = analyse(scores, {})
    assert set(found.clusters) == {("near", "wide"), ("flat",), ("own",)}
    assert found.recommended == ("wide", "own")
    words = dict(remarks(found))
    assert words["rank alike"].startswith("near, wide")
    assert "flat" in words["not applicable"]


def test_the_overlap_is_of_the_channels_that_go() -> None:
    """Of ten channels both drop the first three; what they would keep longest has nothing in common."""
    a, b = np.arange(10.0), np.array([0.0, 1, 2, 9, 8, 7, 6, 5, 4, 3])
    assert overlap(a, b, 0.3) == 1.0
    assert overlap(a, b, 0.6) == 0.5
    assert similarity("a", "b", {"g": a}, {"g": b}).overlap == pytest.approx(
        (1, 1, 1, 3 / 4, 3 / 5, 3 / 6, 4 / 7, 6 / 8, 8 / 9)
    )


def test_filters_are_compared_with_their_median_or_with_one_another() -> None:
    """On a line the point of the smallest summed distance is the middle one: 2 here."""
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.ReLU(), head(5)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, 1, 2, 3, 10])[:, None, None, None])
    group = trace(model, (torch.randn(2, 1, 8, 8),)).group("0")
    np.testing.assert_allclose(data_free("fermat", model, 0)(group), [2, 1, 0, 1, 8], atol=1e-3)
    np.testing.assert_allclose(data_free("fpgm", model, 0)(group), [16, 13, 12, 13, 34], atol=1e-3)


def test_norms_are_judged_by_their_scales_or_by_their_shifts() -> None:
    model = nn.Sequential(cbr(3, 4), head(4)).eval()
    with torch.no_grad():
        model[0][1].weight.copy_(torch.tensor([1.0, -2, 3, 0]))
        model[0][1].bias.copy_(torch.tensor([-8.0, 7, 0, 5]))
    group = trace(model, (torch.randn(2, 3, 8, 8),)).group("0.0")
    assert data_free("gamma", model, 0)(group).tolist() == [1, 2, 3, 0]
    assert data_free("beta", model, 0)(group).tolist() == [8, 7, 0, 5]


def test_clusters_are_chains() -> None:
    def pair(a: str, b: str, rho: float) -> Pair:
        return Pair(a, b, rho, rho, rho, rho, (), 1)

    pairs = [pair("a", "b", 0.95), pair("b", "c", 0.92), pair("a", "c", 0.8), pair("c", "d", 0.1)]
    assert clustered("abcd", pairs) == (("a", "b", "c"), ("d",))


def test_filters_are_compared_with_a_normal_distribution() -> None:
    rng = np.random.default_rng(0)
    normal = normality("w", rng.normal(size=(200, 27)))
    shifted = normality("w", rng.exponential(size=(200, 27)))
    tied = normality("w", rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 27)))
    assert normal.distance < 0.02 < shifted.distance
    assert abs(normal.mean) < 0.05 < shifted.mean
    assert normal.off_diagonal < 0.1 < tied.off_diagonal


def test_filters_of_many_weights_are_compared_by_a_part_of_them() -> None:
    """All covariances of a flattened image's linear layer would take gigabytes."""
    rng, shared = np.random.default_rng(0), np.random.default_rng(1).normal(size=(40, 1))
    tracemalloc.start()
    free = normality("w", rng.normal(size=(40, 20_000)))
    tied = normality("w", shared + 0.1 * rng.normal(size=(40, 20_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (free.n, free.d) == (40, 20_000)
    assert free.off_diagonal < 0.2 < 0.9 < tied.off_diagonal < 1.1
    assert peak < 200e6  # 3.2e9 for all of them


def test_gradients_are_those_of_all_classes_also_where_images_are_sorted() -> None:
    """Folders are read class by class; the first images of one are all cats."""
    task = problem_of(copy.deepcopy(trained_net()))
    images, labels = pictures(600).tensors
    order = torch.argsort(labels, stable=True)
    seen = []

    class Sorted(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            seen.append(int(labels[order[index]]))
            return images[order[index]], seen[-1]

    _taylor(replace(task, data=Sorted()), "gate", 128)
    assert set(seen) == {0, 1, 2, 3}
    assert min(seen.count(label) for label in range(4)) > 15


def test_activations_are_those_that_the_reader_meets() -> None:
    model = copy.deepcopy(trained_net())
    with torch.no_grad():
        model[0][1].bias[3] = -50.0  # never on
        model[0][1].weight[5], model[0][1].bias[5] = 0.0, 2.0  # always the same
    problem = problem_of(model)
    x = pictures(200).tensors[0]
    found = activation_scores(model, problem.graph, x.split(64))
    with torch.no_grad():
        met = torch.relu(model[0][1](model[0][0](x)))
    np.testing.assert_allclose(found["apoz"]["0.0"], (met != 0).double().mean((0, 2, 3)), atol=1e-3)
    assert found["apoz"]["0.0"][3] == 0
    assert found["entropy"]["0.0"][[3, 5]].tolist() == [0.0, 0.0]
    assert found["entropy"]["0.0"].max() > 1
    assert not [m for m in model.modules() if m._forward_pre_hooks]


class Block(nn.Module):
    """Two weights that functions use: only the first one meets the input of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(0.2 * torch.randn(8, 8, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(F.relu(F.conv2d(x, self.w1, padding=1)), self.w2, padding=1)


def test_what_only_functions_read_has_no_activation_scores() -> None:
    model = nn.Sequential(cbr(3, 8), conv(8, 8), nn.ReLU(), Block(), nn.ReLU(), head(8)).eval()
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    assert [group.name for group in graph.prunable] == ["0.0", "1", "3.w1"]
    found = activation_scores(model, graph, [torch.randn(8, 3, 8, 8)])
    assert set(found["apoz"]) == set(found["entropy"]) == {"0.0", "1"}, "the trunk is read by the last layer, too"


def test_activations_of_a_layer_that_is_called_by_keyword() -> None:
    model = Fn(lambda m, x: m.head(m.b(input=m.a(x))), a=cbr(3, 8), b=conv(8, 8), head=head(8)).eval()
    x = torch.randn(8, 3, 8, 8)
    found = activation_scores(model, trace(model, (x,)), [x])["apoz"]["a.0"]
    with torch.no_grad():
        np.testing.assert_allclose(found, (model.a(x) != 0).double().mean((0, 2, 3)), atol=1e-6)


def test_entropy_is_that_of_equal_bins() -> None:
    values = np.stack([np.arange(16.0), np.r_[np.zeros(8), np.ones(8)], np.ones(16)], axis=1)
    np.testing.assert_allclose(entropies(values), [np.log(16), np.log(2), 0.0], atol=1e-12)


def test_all_criteria_judge_every_group_of_a_plain_net_alike_when_asked_twice() -> None:
    problem = problem_of(copy.deepcopy(trained_net()))
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    first, second = (all_scores(problem, 128) for _ in range(2))
    expected = {"l1", "l2", "fpgm", "fermat", "gamma", "beta", "taylor-gate", "taylor-weight", "apoz", "entropy"}
    assert set(first) == expected
    for name, groups in first.items():
        assert {g: len(s) for g, s in groups.items()} == {"0.0": 16, "1.0": 24, "2.0": 32}, name
        assert all(np.array_equal(groups[g], second[name][g]) for g in groups), name
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


def test_flattened_channels_are_read_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2)).eval()
    x = pictures(20).tensors[0]
    graph = problem_of(nn.Sequential(model)).graph
    found = activation_scores(nn.Sequential(model), graph, [x])["apoz"]
    with torch.no_grad():
        expected = (model[1](model[0](x)) != 0).double().mean((0, 2, 3))
    np.testing.assert_allclose(next(iter(found.values())), expected, atol=1e-6)


def test_criteria_without_a_common_group_have_no_figures() -> None:
    norms = {"conv": np.arange(4.0)}
    found = analyse({"l1": norms, "slimming": {}, "l2": norms}, {})
    assert [
        (pair.spearman, pair.overlap, pair.n_groups) for pair in found.pairs if "slimming" in (pair.first, pair.second)
    ] == [(None, None, 0)] * 2
    json.dumps(found.to_json(), allow_nan=False)
    rows = similarity_rows(found)
    assert rows[0][0] == "l1, l2"
    assert rows[-1][1:] == ("-", "-", "-", "-", "-", "0")
    assert found.clusters == (("l1", "l2"), ("slimming",))
