"""L2 norm: the root of the summed squares, whatever the layer."""

import pytest
import torch

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem, Statistics, producers, rows
from deploypipe.count import MacTable
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import weights
from tests.toys import TOYS


@pytest.mark.parametrize("name", ["plain", "depthwise", "grouped", "concat", "flatten_after_concat", "transposed"])
def test_scores_are_the_l2_norms_of_the_filters(name: str) -> None:
    model, example = TOYS[name]()
    graph, view = trace(model.eval(), example), weights(model)
    stats = Statistics(Problem(model, graph, MacTable(), 1.0))
    checked = 0
    for group in graph.prunable:
        made = producers(group, view)
        if len(made) > 1:
            continue
        weight, member, checked = view[made[0].param].double(), made[0], checked + 1
        for channel, score in enumerate(make("l2").score(group, stats).tolist()):
            owned = weight.index_select(member.axis, torch.tensor(member.slots(channel)))
            assert score == pytest.approx(float(owned.square().sum().sqrt()))
    assert checked


def test_rows_follow_the_owner_whatever_the_order_of_slots() -> None:
    model, example = TOYS["channel_shuffle"]()
    graph, view = trace(model.eval(), example), weights(model)
    for group in graph.groups:
        for member in group.members:
            matrix = rows(view[member.param], member)
            assert matrix.shape[0] == group.size
            for channel in range(group.size):
                owned = view[member.param].movedim(member.axis, 0)[list(member.slots(channel))]
                assert torch.equal(matrix[channel], owned.reshape(-1))
