"""A small problem that a small network learns in a second: noisy patterns, moved about, in four classes."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable
from deploypipe.data.batches import Data
from deploypipe.graph import trace
from deploypipe.training.evaluate import evaluate
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toys import cbr, head

CLASSES = 4
SETTINGS = TrainSettings(epochs=1, lr=0.05, batch_size=50, distill=0.0, weight_decay=5e-4)


def pictures(n: int, seed: int, size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Each class has a 4x4 pattern of its own, laid somewhere into noise."""
    rng = torch.Generator().manual_seed(1234)
    patterns = torch.randn(CLASSES, channels, 4, 4, generator=rng)
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = 0.5 * torch.randn(n, channels, size, size, generator=rng)
    for i, (row, column) in enumerate(torch.randint(0, size - 3, (n, 2), generator=rng).tolist()):
        images[i, :, row : row + 4, column : column + 4] += patterns[labels[i]]
    return images, labels


@cache
def data(n: int = 600) -> Data:
    return Data(TensorDataset(*pictures(n, 0)), TensorDataset(*pictures(400, 1)), tuple("abcd"), f"shapes {n}", None, "shapes")


def trainer(n: int = 600, **changes: Any) -> Trainer:
    return Trainer(data(n), replace(SETTINGS, **changes))


def untrained(seed: int = 0, width: int = 16) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(cbr(3, width), cbr(width, width, stride=2), cbr(width, width), head(width)).eval()


@cache
def trained(seed: int = 0, width: int = 16) -> nn.Module:
    model = trainer(lr=0.1, seed=seed).fit(untrained(seed, width), 6)
    model.zero_grad()
    return model


def problem(model: nn.Module, share: float = 0.5, table: Any = None, seed: int = 0) -> Problem:
    graph, table = trace(model, (torch.zeros(1, 3, 8, 8),)), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), data().train, seed)


def accuracy(model: nn.Module) -> float:
    return evaluate(model, data().test).top1
