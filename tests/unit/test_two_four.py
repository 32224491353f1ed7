"""2:4 sparsity against brute force over the six patterns, closed forms and NVIDIA's own checker."""

from itertools import combinations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploypipe.graph import trace
from deploypipe.two_four import eligibility, holds, mask, permuted, project, reads, retained, search

PATTERNS = [np.isin(np.arange(4), pair) for pair in combinations(range(4), 2)]
RANDOM = np.random.default_rng(0)


def brute(four):
    """The largest magnitude that any of the six patterns keeps."""
    return max(float(np.abs(four[pattern]).sum()) for pattern in PATTERNS)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 16), (8, 16, 1, 1), (4, 8, 3, 3), (16, 4)]))
def test_of_every_four_the_best_of_the_six_patterns_stays(seed, shape):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    pruned = project(weight)
    assert holds(pruned)
    rows, kept = (np.moveaxis(w, 1, -1).reshape(-1, 4) for w in (weight, pruned))
    for four, left in zip(rows, kept, strict=True):
        assert np.count_nonzero(left) == 2
        assert np.abs(left).sum() == pytest.approx(brute(four), rel=1e-6)
    np.testing.assert_array_equal(pruned[pruned != 0], weight[mask(weight)])


def test_groups_run_along_input_channels_not_along_the_flattened_kernel():
    weight = np.zeros((1, 4, 1, 4), np.float32)
    weight[0, :2] = 1.0  # all of the first two channels, at every position: fine along channels, four in a row along positions
    assert holds(weight)
    assert not holds(weight.reshape(1, 16).reshape(1, 4, 4).transpose(0, 2, 1).reshape(1, 4, 1, 4))


def test_equal_weights_keep_the_first_and_fewer_than_two_stay_as_they_are():
    np.testing.assert_array_equal(project(np.ones((1, 4))), [[1, 1, 0, 0]])
    np.testing.assert_array_equal(project(np.array([[0.0, 3.0, 0.0, 0.0]])), [[0, 3, 0, 0]])
    assert not holds(np.array([[1.0, 1.0, 1.0, 0.0]]))


def test_an_axis_that_is_no_multiple_of_four_is_refused_not_padded():
    with pytest.raises(ValueError, match="no multiple of 4"):
        mask(np.ones((8, 3, 7, 7)))
    assert not holds(np.zeros((8, 3)))


def test_on_noise_channel_swaps_gain_as_much_as_published():
    """Pool and Yu's library reports for 128 x 64 uniform numbers: 2852 of 4083 as they come, 2913 by channel swaps."""
    columns = RANDOM.random((128, 64))
    order = search(columns)
    assert sorted(order) == list(range(64))
    before, after, total = retained(columns), retained(columns[:, order]), np.abs(columns).sum()
    assert before / total == pytest.approx(2852 / 4083, abs=0.01)
    assert after / before == pytest.approx(2913 / 2852, abs=0.01)
    assert after > before
    np.testing.assert_array_equal(search(np.ones((4, 8))), np.arange(8))


def test_two_stripes_that_crowd_each_other_are_untangled():
    columns = np.zeros((1, 8))
    columns[0, :4] = 1.0  # four large ones in one stripe, none in the other: two must move
    order = search(columns)
    assert retained(columns) == 2.0
    assert retained(columns[:, order]) == 4.0


class Net(nn.Module):
    """A residual block, a depthwise layer, a concat and a flattened head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.one, self.two = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.last, self.head = nn.Conv2d(64, 8, 1), nn.Linear(8 * 64, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        x = torch.cat([x, self.deep(x)], dim=1)
        return self.head(self.last(x).relu().flatten(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net):
    return trace(net, torch.randn(1, 3, 8, 8))


def test_layers_that_cannot_hold_the_pattern_say_why(graph):
    reasons = {found.layer: found.reason for found in eligibility(graph)}
    assert reasons["one"] == reasons["two"] == reasons["last"] == ""
    assert reasons["stem"] == "3 input channels are no multiple of 16"
    assert "depthwise" in reasons["deep"]
    assert reasons["head"] == "10 output channels are no multiple of 8"
    narrow = {**graph.kept(), "one": 12}
    assert {f.layer: f.reason for f in eligibility(graph, narrow)}["two"] == "12 input channels are no multiple of 16"


def test_channels_in_another_order_compute_the_same_and_keep_no_less(net, graph):
    weights = {name: tensor.numpy() for name, tensor in net.state_dict().items() if tensor.ndim}
    eligible = [found.weight for found in eligibility(graph) if found.eligible]
    moved, gained = dict(weights), []
    for group in graph.prunable:
        columns = reads(graph, group, moved, eligible)
        if columns is None:
            continue
        order = search(columns)
        gained.append(retained(columns[:, order]) / retained(columns))
        for name in {member.param for member in group.members}:
            moved[name] = permuted(moved[name], [m for m in group.members if m.param == name], order)
    assert len(gained) >= 2
    assert min(gained) >= 1.0
    assert max(gained) > 1.01
    other = Net().eval()
    other.load_state_dict({**net.state_dict(), **{name: torch.from_numpy(w.copy()) for name, w in moved.items()}})
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(other(x), net(x), atol=1e-5, rtol=1e-5)
    assert not torch.equal(other.one.weight, net.one.weight)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in that checker
@pytest.mark.parametrize("kind", ["conv", "gemm"])
def test_nvidia_s_own_checker_agrees(kind):
    sparse = pytest.importorskip("polygraphy.tools.sparse")
    weight = RANDOM.standard_normal((8, 16, 3, 3) if kind == "conv" else (8, 16)).astype(np.float32)
    op = "y = Conv (x, w)" if kind == "conv" else "y = Gemm <transB = 1> (x, w)"
    shape = "1, 16, 8, 8" if kind == "conv" else "1, 16"
    result = "1, 8, 6, 6" if kind == "conv" else "1, 8"

    def checked(values):
        text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{result}] y) {{ {op} }}'
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
        return sparse.SparsityPruner(model)

    good, bad = checked(project(weight)), checked(weight)
    for pruner in (good, bad):
        pruner.check()
    assert (good.sparse_tensors, bad.sparse_tensors) == ({"w"}, set())
    (theirs,) = checked(weight).prune().graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(theirs), project(weight))
