"""Another order of channels is the same function, on every toy."""

import numpy as np
import pytest
import torch

from deploypipe.compact import difference, run
from deploypipe.graph import trace
from deploypipe.ingredients.permute import permuted
from tests.toys import TOYS

FIXED = {"fixed_shortcut", "blurred"}


@pytest.mark.parametrize("net", sorted(TOYS))
def test_the_function_stays(net: str) -> None:
    model, example = TOYS[net]()
    graph, rng = trace(model, example), np.random.default_rng(0)
    orders = {group.name: rng.permutation(group.size).tolist() for group in graph.prunable}
    moved = permuted(model, graph, orders)
    assert difference(run(model, example), run(moved, example)) < 1e-5
    changed = [not torch.equal(a, b) for a, b in zip(model.state_dict().values(), moved.state_dict().values(), strict=True)]
    assert any(changed) or not orders or net in FIXED


def test_fixed_weights_are_left_alone() -> None:
    model, example = TOYS["fixed_shortcut"]()
    graph, rng = trace(model, example), np.random.default_rng(0)
    moved = permuted(model, graph, {group.name: rng.permutation(group.size).tolist() for group in graph.prunable})
    assert torch.equal(moved.short.weight, model.short.weight)
    assert not torch.equal(moved.a[0].weight, model.a[0].weight)


def test_channels_stand_in_the_order_given() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    order = [3, 1, 2, 0, 4, 5, 6, 7]
    moved = permuted(model, graph, {"0.0": order})
    assert torch.equal(moved[0][0].weight, model[0][0].weight[order])
    assert torch.equal(moved[0][1].running_var, model[0][1].running_var[order])
    assert torch.equal(moved[1][0].weight, model[1][0].weight[:, order])
