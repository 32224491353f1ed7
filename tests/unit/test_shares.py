"""Shares of channels that stand for densities of layers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.graph import trace
from deploypipe.ingredients.shares import Products
from deploypipe.types import Graph
from tests.toys import TOYS


def graph_of(net: str) -> Graph:
    model, example = TOYS[net]()
    return trace(model, example)


def of(graph: Graph) -> Products:
    return Products.of(graph, [group.name for group in graph.prunable])


def chain(*widths: int) -> Graph:
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
    return trace(nn.Sequential(*layers).eval(), (torch.zeros(1, widths[0], 4, 4),))


def test_a_density_is_the_product_of_what_is_read_and_what_is_made() -> None:
    """The density itself as the share of the filters would leave its square."""
    products = of(chain(*[16] * 8))
    shares = products.shares(np.full(7, 0.25))
    assert [shares[str(i)] for i in range(1, 5)] == pytest.approx([0.5] * 4)
    ends = [shares["0"], shares["5"]]  # the input and the logits stay: all falls on the other side of that layer
    assert ends == pytest.approx([0.25**0.75] * 2)
    assert products.powers.sum(axis=1).tolist() == [1, 2, 2, 2, 2, 2, 1]


def test_a_share_is_the_mean_of_what_the_layers_ask() -> None:
    products = of(chain(8, 16, 32, 8))
    shares = products.shares([0.9, 0.16, 0.5])
    assert shares == pytest.approx({"0": (0.9 * 0.4) ** 0.5, "1": (0.4 * 0.5) ** 0.5})
    trunk = of(graph_of("residual"))
    densities = np.random.default_rng(0).uniform(0.1, 1.0, len(trunk.layers))
    asks = dict(zip(trunk.layers, densities, strict=True))
    alone = 1.0 / np.array([2.0, 2.0, 2.0])
    wanted = [asks["stem.0.weight"], *(np.array([asks[f"{n}.weight"] for n in ("b1.0", "b2.0", "d1.0")]) ** alone)]
    named = [n for n, power in zip(trunk.layers, trunk.powers[:, trunk.groups.index("stem.0")], strict=True) if power]
    wanted += [asks["short.weight"] ** 0.5] if "short.weight" in named else []
    assert trunk.shares(densities)["stem.0"] == pytest.approx(np.exp(np.log(wanted).mean()))


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "option_a_shortcut"])
def test_shares_rise_with_the_densities_and_reach_one(net: str) -> None:
    products, rng = of(graph_of(net)), np.random.default_rng(0)
    assert set(products.shares(np.ones(len(products.layers))).values()) == {1.0}
    low = rng.uniform(0.05, 0.5, len(products.layers))
    before, after = products.shares(low), products.shares(np.sqrt(low))
    assert all(before[name] < after[name] < 1 for name in products.groups)
    assert max(products.shares(np.zeros(len(products.layers))).values()) < 1e-5


def test_a_depthwise_layer_goes_with_its_channels_alone_and_a_concat_by_parts() -> None:
    depthwise = of(graph_of("depthwise"))
    assert depthwise.powers[depthwise.layers.index("1.0.weight")].tolist() == [1.0, 0.0]
    joined = of(graph_of("concat"))
    power = dict(zip(joined.groups, joined.powers[joined.layers.index("out.0.weight")], strict=True))
    assert power == pytest.approx({"stem.0": 8 / 19, "a.0": 6 / 19, "b.0": 5 / 19, "out.0": 1.0})


def test_groups_that_stay_whole_and_fixed_weights_ask_for_nothing() -> None:
    products = Products.of(graph_of("residual"), ["b1.0"])
    assert products.groups == ("b1.0",)
    assert set(products.layers) == {"b1.0.weight", "b2.0.weight"}
    assert products.shares([0.3, 0.3]) == pytest.approx({"b1.0": 0.3})
    assert Products.of(graph_of("residual"), []).shares([]) == {}
    shortcut = graph_of("option_a_shortcut")
    assert not set(of(shortcut).layers) & shortcut.buffers
