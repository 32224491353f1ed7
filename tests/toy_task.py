"""A task that a network of three convolutions learns in a second: which of four patterns lies somewhere in the noise."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable
from deploypipe.data.batches import Data
from deploypipe.graph import trace
from deploypipe.training.evaluate import evaluate
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toys import cbr, head

CLASSES = 4
EXAMPLE = torch.zeros(1, 3, 8, 8)
GROWING, EVEN = (16, 24, 32), (16, 16, 16)  # widths of the convolutions
SETTINGS = TrainSettings(epochs=1, lr=0.05, batch_size=50, distill=0.0, weight_decay=5e-4)


def pictures(n: int, seed: int = 0, noise: float = 0.5) -> TensorDataset:
    """Return (n, 3, 8, 8) images and their classes; each class has a 4x4 pattern of its own."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(1234))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    images = noise * torch.randn(n, 3, 8, 8, generator=rng)
    for i, (row, column) in enumerate(torch.randint(0, 5, (n, 2), generator=rng).tolist()):
        images[i, :, row : row + 4, column : column + 4] += patterns[labels[i]]
    return TensorDataset(images, labels)


def images(n: int = 64, seed: int = 5) -> Tensor:
    return pictures(n, seed).tensors[0]


@cache
def toy_data(n: int = 600) -> Data:
    return Data(pictures(n), pictures(400, seed=1), tuple("abcd"), f"patterns {n}", None, "patterns")


def trainer(n: int = 600, **changes: Any) -> Trainer:
    return Trainer(toy_data(n), replace(SETTINGS, **changes))


def net(seed: int = 0, widths: tuple[int, int, int] = GROWING) -> nn.Sequential:
    a, b, c = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(cbr(3, a), cbr(a, b, stride=2), cbr(b, c), head(c)).eval()


@cache
def trained_net(seed: int = 0, widths: tuple[int, int, int] = GROWING) -> nn.Module:
    """Do not change it."""
    model = trainer(lr=0.1, seed=seed).fit(net(seed, widths), 6)
    model.zero_grad()
    return model


def problem_of(model: nn.Module, share: float = 0.5, table: Any = None, seed: int = 0) -> Problem:
    graph, table = trace(model.eval(), EXAMPLE), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), toy_data().train, seed)


def accuracy(model: nn.Module) -> float:
    return evaluate(model, toy_data().test).top1


class Watched(Dataset[Any]):
    """Data that remember what was read."""

    def __init__(self, data: Any) -> None:
        self.data, self.read = data, list[int]()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        x, y = self.data[index]
        return x, int(y)
