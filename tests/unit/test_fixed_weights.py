"""Fixed weights, such as those of a shortcut that only picks channels, tell nothing of what a channel is worth."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem, Statistics
from deploypipe.algorithms.netadapt import _Judge
from deploypipe.algorithms.scores import DATA_FREE, data_free
from deploypipe.count import MacTable
from deploypipe.data.load import Data
from deploypipe.graph import trace
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toys import TOYS

DATA = TensorDataset(torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)
BY_WEIGHTS = ("admm", "depgraph", "erk", "fpgm", "l1", "l2", "lamp", "random", "scratch-e", "smcp")


def problems() -> list[Problem]:
    """Return the same problem with the shortcut's fixed weights as they are, and with two of its channels far larger."""
    torch.manual_seed(0)
    model, example = TOYS["fixed_shortcut"]()
    louder = copy.deepcopy(model)
    louder.short.weight[[2, 5]] *= 100
    graph, table = trace(model.eval(), example), MacTable(multiple=1)
    budget = 0.5 * table.predict(graph)
    return [Problem(each.eval(), graph, table, budget, DATA) for each in (model, louder)]


def test_statistics_show_parameters_alone() -> None:
    plain, _ = problems()
    assert Statistics(plain).weights.keys() == dict(plain.model.named_parameters()).keys()


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_no_plan_follows_them(name: str) -> None:
    plain, louder = (make(name).plan(problem).keep for problem in problems())
    assert plain == louder


def test_nor_does_the_greedy_choice() -> None:
    plain, louder = (make("l1", {"greedy": True}).plan(problem).keep for problem in problems())
    assert plain == louder


@pytest.mark.parametrize("criterion", DATA_FREE)
def test_no_criterion_scores_them(criterion: str) -> None:
    plain, louder = problems()
    for group in plain.graph.prunable:
        scores = [data_free(criterion, problem.model, 0)(group) for problem in (plain, louder)]
        np.testing.assert_array_equal(*scores)


def test_searches_order_channels_without_them() -> None:
    orders = [_Judge(make("netadapt"), problem).orders for problem in problems()]
    assert orders[0] == orders[1]
    trainer = Trainer(Data(DATA, DATA, tuple("abcd"), "toy", None, ""), TrainSettings(batch_size=8))
    plain, louder = (make("autoslim", {"train_epochs": 0}).train(problem, trainer) for problem in problems())
    assert torch.equal(plain.b[0].weight, louder.b[0].weight)
