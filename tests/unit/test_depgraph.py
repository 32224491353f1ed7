"""DepGraph (Fang et al., CVPR 2023): its falsifiable tests; those of groups are in test_graph and test_compact."""

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.depgraph import GroupDecay, decay, group_squares, left, scores_after
from deploypipe.compact import compact
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toy_task import net, problem_of, toy_data
from tests.toys import TOYS, Fn, conv


def test_score_is_the_mean_of_squared_norms_over_the_members() -> None:
    model, example = TOYS["plain"]()
    with torch.no_grad():
        model[1][1].weight.normal_()
    found = group_squares(trace(model, example).group("1.0"), weights(model))
    made, scale, read = model[1][0].weight, model[1][1].weight, model[3][0].weight
    expected = (made.square().sum((1, 2, 3)) + scale.square() + read.square().sum((0, 2, 3))) / 3
    torch.testing.assert_close(found.float(), expected.detach())


def test_the_weakest_decays_sixteen_times_as_fast_as_the_strongest() -> None:
    found = decay(torch.tensor([1.0, 2.0, 5.0]), 4.0)
    assert found.tolist() == pytest.approx([16.0, 8.0, 1.0])
    assert decay(torch.tensor([3.0, 3.0]), 4.0).tolist() == [1.0, 1.0]


def test_the_gradient_of_the_regulariser_is_the_formula() -> None:
    """Two convolutions and a linear layer: the middle weight belongs to one group by its rows and to another by its columns."""

    def forward(m: Fn, x: torch.Tensor) -> torch.Tensor:
        return m.c(torch.relu(m.b(torch.relu(m.a(x)))).mean((2, 3)))

    model = Fn(forward, a=conv(3, 4), b=conv(4, 5), c=nn.Linear(5, 2)).eval()
    graph = trace(model, (torch.zeros(2, 3, 6, 6),))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    GroupDecay(graph, 0.01, 4.0).on_batch_backward(model, 0)
    a, b, c = (getattr(model, name).weight.detach() for name in "abc")

    def strength(squares: torch.Tensor) -> torch.Tensor:
        return 0.01 * 2 ** (4 * (squares.max() - squares) / (squares.max() - squares.min()))

    first = strength((a.square().sum((1, 2, 3)) + b.square().sum((0, 2, 3))) / 2)
    second = strength((b.square().sum((1, 2, 3)) + c.square().sum(0)) / 2)
    torch.testing.assert_close(model.a.weight.grad, first[:, None, None, None] * a)
    torch.testing.assert_close(model.b.weight.grad, (first[None, :, None, None] + second[:, None, None, None]) * b)
    torch.testing.assert_close(model.c.weight.grad, second * c)
    assert not model.a.bias.grad.any()


def test_training_with_it_separates_groups_and_without_it_does_not() -> None:
    """The weakest tenth of the channels falls far behind the strongest, against training for as long without regulariser."""
    spread = {}
    for reg in (0.0, 0.02):
        method = make("depgraph", {"train_epochs": 5, "reg": reg})
        settings = TrainSettings(lr=0.05, batch_size=50, distill=0.0, weight_decay=0.0)
        model = method.train(problem_of(net()), Trainer(toy_data(), settings))
        squares = group_squares(problem_of(model).graph.group("2.0"), weights(model))
        spread[reg] = float(squares.quantile(0.9) / squares.quantile(0.1))
    assert spread[0.02] > 3 * spread[0.0]


def test_what_was_cut_does_not_count_in_later_rounds() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    plan = KeepPlan({"0.0": (0, 2, 5), "1.0": tuple(range(12)), "3.0": tuple(range(8))})
    rescored = group_squares(graph.group("1.0"), left(weights(model), graph, plan))
    small = compact(model, graph, plan)
    expected = group_squares(trace(small, example).group("1.0"), weights(small))
    torch.testing.assert_close(rescored, expected)
    assert not torch.allclose(rescored, group_squares(graph.group("1.0"), weights(model)))


def test_rounds_matter_and_the_last_one_meets_the_budget() -> None:
    problem = problem_of(net(1), 0.3)
    once, often = (make("depgraph", {"steps": steps}).plan(problem) for steps in (1, 10))
    assert once.keep != often.keep
    for plan in (once, often):
        assert problem.table.predict(problem.graph, plan) <= problem.budget


def test_a_group_that_was_cut_is_not_worth_more_for_it() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    alike = {name: torch.full_like(tensor, 0.1) for name, tensor in weights(model).items()}
    size = graph.group("1.0").size
    scores, _ = scores_after(KeepPlan({"1.0": tuple(range(0, size, 2))}), alike, graph)
    np.testing.assert_allclose(scores["1.0"], np.arange(size) % 2 == 0)
    np.testing.assert_allclose(scores["0.0"], 1.0)


def test_planted_weak_channels_of_coupled_layers_go_first() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    with torch.no_grad():
        for parameter in weights(model).items():
            for group in graph.prunable:
                for member in group.members:
                    if member.param == parameter[0] and group.name == "stem.0":
                        slots = [slot for channel in (1, 6) for slot in member.slots(channel)]
                        parameter[1].index_fill_(member.axis, torch.tensor(slots), 0.0)
    squares = group_squares(graph.group("stem.0"), weights(model))
    assert np.argsort(squares.numpy())[:2].tolist() in ([1, 6], [6, 1])
