"""A task that a network of three convolutions learns in a second: which of four noisy gratings an image shows."""

import functools

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable
from deploypipe.data.load import Data
from deploypipe.graph import trace
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainSettings
from tests.toys import cbr, head

SIZE = 10


def gratings(n: int, seed: int = 0, noise: float = 0.6) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.stack([rows, columns, rows + columns, rows - columns]).float()
    phase = torch.rand(n, 1, 1, generator=rng) * 6.3
    images = torch.sin(1.6 * waves[labels] + phase)[:, None] + noise * torch.randn(n, 1, SIZE, SIZE, generator=rng)
    return TensorDataset(images, labels)


def toy_data(n: int = 1200) -> Data:
    return Data(gratings(n), gratings(800, seed=1), ("a", "b", "c", "d"), f"gratings {n}", None, "gratings")


def net(seed: int = 0, widths: tuple[int, int, int] = (16, 24, 32)) -> nn.Sequential:
    a, b, c = widths
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(cbr(1, a), cbr(a, b), nn.MaxPool2d(2), cbr(b, c), head(c))


@functools.cache
def trained_net(seed: int = 0) -> nn.Module:
    """Do not change it."""
    settings = TrainSettings(epochs=4, lr=0.05, batch_size=50, distill=0.0, seed=seed)
    return finetune(net(seed), toy_data(), settings)


def problem_of(model: nn.Module, share: float = 0.5, seed: int = 0) -> Problem:
    example = torch.zeros(2, 1, SIZE, SIZE)
    graph, table = trace(model.eval(), (example,)), MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), gratings(1200), seed)


def images(n: int = 64, seed: int = 5) -> Tensor:
    return gratings(n, seed).tensors[0]
