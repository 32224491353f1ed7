"""What a 2:4 mask costs, in the unit of an algorithm's values: closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms.base import log_share
from deploypipe.allocation.pattern import mask_losses, n_readers
from deploypipe.graph import trace
from deploypipe.two_four import retained


class Net(nn.Module):
    """`one` is read by `two` alone; `last` reads a concat of both branches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.one, self.two = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.side, self.last = nn.Conv2d(32, 16, 1), nn.Conv2d(48, 8, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last(torch.cat([self.two(self.one(x).relu()).relu(), self.side(x).relu()], 1)).mean((2, 3))


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    net = Net().eval()
    graph = trace(net, torch.randn(1, 3, 8, 8))
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    return graph, weights


def shared(graph, scores):
    """Values as criteria state them: logarithms of shares, counted once for each reader."""
    orders = {name: np.argsort(-score, kind="stable") for name, score in scores.items()}
    values = {name: n_readers(graph.group(name)) * log_share(score[orders[name]]) for name, score in scores.items()}
    return orders, values


def magnitudes(weight, axis):
    return np.moveaxis(np.abs(weight), axis, 0).reshape(weight.shape[axis], -1).sum(1)


def test_in_shares_a_mask_costs_the_logarithm_of_what_it_keeps(task):
    """The layer's own magnitudes as scores, all channels equal: narrowing to a share costs its logarithm, at any width."""
    graph, weights = task
    weights = {**weights, "two.weight": np.ones_like(weights["two.weight"])}
    orders, values = shared(graph, {"one": magnitudes(weights["two.weight"], 1)})
    losses = mask_losses(graph, weights, orders, values, ["two"])
    assert losses == {"two": pytest.approx(-np.log(0.5))}, "of equal weights, half the magnitude stays"


def test_a_trunk_that_many_read_is_charged_for_one_reader(task):
    graph, weights = task
    assert n_readers(graph.group("stem")) == 2
    weights = {**weights, "one.weight": np.ones_like(weights["one.weight"])}
    orders, values = shared(graph, {"stem": np.ones(32)})
    assert mask_losses(graph, weights, orders, values, ["one"])["one"] == pytest.approx(-np.log(0.5))


def test_in_any_other_unit_it_costs_what_narrowing_to_the_same_magnitude_would(task):
    graph, weights = task
    sizes = magnitudes(weights["two.weight"], 1)
    order = np.argsort(-sizes)
    value = 100.0 * np.sqrt(np.arange(17))  # in points, say
    (loss,) = mask_losses(graph, weights, {"one": order}, {"one": value}, ["two"]).values()
    share = retained(weights["two.weight"]) / sizes.sum()
    held = np.cumsum(sizes[order]) / sizes.sum()
    fewer = int(np.searchsorted(held, share))  # channels that hold less; the width wanted lies between it and the next
    assert value[-1] - value[fewer + 1] <= loss <= value[-1] - value[fewer]
    assert mask_losses(graph, weights, {"one": order}, {"one": 3 * value}, ["two"])["two"] == pytest.approx(3 * loss)


def test_weights_that_hold_the_pattern_already_cost_nothing(task):
    graph, weights = task
    orders, values = shared(graph, {"one": np.ones(16)})
    halved = weights["two.weight"] * np.tile([1.0, 1.0, 0.0, 0.0], 4)[None, :, None, None]
    assert mask_losses(graph, {**weights, "two.weight": halved}, orders, values, ["two"])["two"] == pytest.approx(0, abs=1e-9)


def test_behind_a_concat_each_part_counts_by_its_magnitude(task):
    graph, weights = task
    weight = np.ones_like(weights["last.weight"])
    weight[:, 32:] = 3.0  # 16 channels of 3 against 32 of 1
    orders, values = shared(graph, {"two": np.ones(32), "side": np.ones(16)})
    one = mask_losses(graph, {**weights, "last.weight": weight}, orders, values, ["last"])["last"]
    assert one == pytest.approx(-np.log(0.5)), "both lose half"
    doubled = {**values, "side": 2 * values["side"]}
    other = mask_losses(graph, {**weights, "last.weight": weight}, orders, doubled, ["last"])["last"]
    assert other == pytest.approx((32 + 2 * 48) / 80 * -np.log(0.5))


def test_what_no_values_tell_of_is_judged_by_its_outputs_or_left_out(task):
    graph, weights = task
    orders, values = shared(graph, {"side": np.ones(16)})
    losses = mask_losses(graph, weights, orders, values, ["one", "side", "last"])
    assert set(losses) == {"side", "last"}, "stem's values are unknown: side is judged by what it writes, one by nothing"
    assert losses["side"] > 0


def test_a_width_that_ends_within_four_is_judged_by_whole_fours():
    """30 inputs may not have the pattern, 16 of them may: the loss is asked for all the same."""
    net = nn.Sequential(nn.Conv2d(3, 30, 3), nn.ReLU(), nn.Conv2d(30, 16, 3), nn.AdaptiveAvgPool2d(1)).eval()
    graph = trace(net, torch.randn(1, 3, 8, 8))
    orders, values = shared(graph, {"0": np.ones(30)})
    weights = {"2.weight": np.ones((16, 30, 3, 3), np.float32)}
    assert mask_losses(graph, weights, orders, values, ["2"])["2"] == pytest.approx(-np.log(0.5))
