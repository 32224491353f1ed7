"""LAMP (Lee et al., ICLR 2021): its falsifiable tests."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.lamp import densities, lamp, squared_norms
from deploypipe.allocation.threshold import survivors
from deploypipe.count import MacTable, ParamTable
from deploypipe.errors import NotApplicable
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import weights
from deploypipe.types import Group
from tests.toys import TOYS


def layers(*scales: float, n: int = 100) -> list[np.ndarray]:
    """Squared norms of filters of nine weights, of these scales; descending."""
    rng = np.random.default_rng(0)
    return [np.sort(((scale * rng.normal(size=(n, 9))) ** 2).sum(1))[::-1] for scale in scales]


def test_the_largest_channel_of_every_layer_scores_exactly_one() -> None:
    for squared in layers(1, 0.01, 10, 1e-150):
        scores = lamp(squared)
        assert scores[0] == 1.0
        assert scores[1:].max() < 1
    counts = survivors({str(i): lamp(squared) for i, squared in enumerate(layers(1, 0.01, 10))}, 3 / 300)
    assert counts == {"0": 1, "1": 1, "2": 1}


def test_equation_by_hand() -> None:
    """Ascending squares 1, 4, 4, 9: each over the sum of itself and those that stay longer."""
    assert lamp(np.array([9.0, 4.0, 4.0, 1.0])) == pytest.approx([1.0, 4 / 13, 4 / 17, 1 / 18])


def test_scaling_a_layer_changes_nothing_where_global_magnitude_empties_layers() -> None:
    squared = {str(scale): values for scale, values in zip((1, 0.01, 10), layers(1, 0.01, 10), strict=True)}
    equal = {name: values / values[0] for name, values in squared.items()}
    for name, values in squared.items():
        np.testing.assert_allclose(lamp(values), lamp(equal[name]), rtol=1e-12)
    by_lamp = survivors({name: lamp(values) for name, values in squared.items()}, 1 / 3)
    by_magnitude = survivors(squared, 1 / 3)
    assert min(by_lamp.values()) >= 15
    assert by_magnitude == {"1": 0, "0.01": 0, "10": 100}


def test_a_whole_layer_made_larger_behind_a_norm_keeps_the_plan_but_changes_that_of_plain_magnitude() -> None:
    model, example = TOYS["plain"]()
    graph, table = trace(model, example), MacTable(multiple=1)
    problem = Problem(model, graph, table, 0.5 * table.predict(graph))
    before = make("lamp").plan(problem).keep
    groups = {group.name: np.sort(squared_norms(group, weights(model)))[::-1] for group in graph.prunable}
    plain_before = survivors(groups, 0.5)
    with torch.no_grad():
        model[1][0].weight *= 100
    assert make("lamp").plan(problem).keep == before
    groups = {group.name: np.sort(squared_norms(group, weights(model)))[::-1] for group in graph.prunable}
    assert survivors(groups, 0.5) != plain_before


def test_keeps_the_order_of_magnitudes_inside_a_layer() -> None:
    model, example = TOYS["residual"]()
    graph, table = trace(model, example), MacTable(multiple=1)
    plan = make("lamp").plan(Problem(model, graph, table, 0.5 * table.predict(graph)))
    for name, channels in plan.keep.items():
        squared = squared_norms(graph.group(name), weights(model))
        gone = np.setdiff1d(np.arange(len(squared)), channels)
        assert not len(gone) or squared[list(channels)].min() >= squared[gone].max()
        assert (np.diff(lamp(np.sort(squared)[::-1])) < 0).all()


def test_squared_norms_of_coupled_layers_are_summed_and_biases_do_not_count() -> None:
    model, example = TOYS["residual"]()
    group = trace(model, example).group("short")
    before = squared_norms(group, weights(model))
    parts = [model.short.weight, model.d2[0].weight]
    expected = sum(part.detach().double().square().sum((1, 2, 3)) for part in parts)
    np.testing.assert_allclose(before, expected.numpy())
    with torch.no_grad():
        model.short.bias += 100
        model.d2[1].weight *= 100
    assert (squared_norms(group, weights(model)) == before).all()


def test_densities_of_layers_are_those_of_one_threshold_on_the_scores_of_single_weights() -> None:
    squared = [np.array([9.0, 4.0, 4.0, 1.0]), np.array([1.0, 0.5])]  # 1, 4/13, 4/17, 1/18 and 1, 1/3
    at = densities(squared)
    assert [at(n / 6).tolist() for n in range(1, 7)] == [
        [0.25, 0.5], [0.25, 0.5], [0.25, 1.0], [0.5, 1.0], [0.75, 1.0], [1.0, 1.0],
    ]  # fmt: skip
    assert at(0.0).tolist() == [0.25, 0.5], "no layer is emptied"
    large = [np.sort(np.random.default_rng(i).normal(size=n) ** 2)[::-1] for i, n in enumerate((400, 3000, 20_000))]
    for share in (0.1, 0.4, 0.8):
        assert densities(large)(share) @ [400, 3000, 20_000] == pytest.approx(share * 23_400, abs=2)


def stages() -> nn.Sequential:
    widths = (16, 16, 16, 64, 64, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((3, *widths))]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def test_wide_groups_keep_more_channels_than_narrow_ones_where_scores_of_channels_would_keep_as_many() -> None:
    model = stages()
    graph, table = trace(model, (torch.zeros(1, 3, 8, 8),)), ParamTable(multiple=1)
    problem = Problem(model, graph, table, 0.3 * table.predict(graph))
    plans = {of: make("lamp", {"of": of}).plan(problem) for of in ("weights", "channels")}
    kept = {of: graph.kept(plan) for of, plan in plans.items()}
    assert kept["channels"]["4"] < 2 * kept["channels"]["1"]
    assert kept["weights"]["4"] > 2 * kept["weights"]["1"]


def test_ties_and_zeros() -> None:
    assert survivors({"a": np.ones(3), "b": np.ones(3)}, 0.5) == {"a": 3, "b": 0}
    assert lamp(np.zeros(3)).tolist() == [1.0, 0.0, 0.0]
    assert survivors({}, 0.5) == {}
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    graph, table = trace(model, (torch.randn(1, 3, 8, 8),)), MacTable(multiple=1)
    assert make("lamp").plan(Problem(model, graph, table, 0.5 * table.predict(graph))).keep["0"] == (0, 1, 2)


def test_tiny_weights_among_many_do_not_lose_their_order() -> None:
    """A running sum in float32 swallows them."""
    scores = lamp(np.concatenate([np.full(1000, 1e4), np.linspace(2, 1, 1000) * 1e-6]))
    assert (np.diff(scores) < 0).all()


def test_a_group_without_producer_is_not_judged() -> None:
    with pytest.raises(NotApplicable, match="no weight produces"):
        squared_norms(Group("x", 4, ()), {})
