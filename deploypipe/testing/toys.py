"""Small networks that contracts are tried on: one of each way in which channels are coupled."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a convolution that keeps the size of its input."""
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=bias)


def cbr(n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution, its batch norm and a ReLU."""
    layer = conv(n_in, n_out, kernel, stride, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))


def head(channels: int) -> nn.Sequential:
    """Return a pool and four logits."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def plain() -> nn.Module:
    """Return layers in a row."""
    return nn.Sequential(cbr(3, 8), cbr(8, 12), nn.MaxPool2d(2), cbr(12, 8), head(8))


def depthwise() -> nn.Module:
    """Return layers whose outputs are coupled to their inputs."""
    return nn.Sequential(cbr(3, 8), cbr(8, 8, groups=8), cbr(8, 12, 1), cbr(12, 12, groups=12), head(12))


class Residual(nn.Module):
    """Two blocks, one with a shortcut that is a layer: what is added is coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b2 = cbr(3, 8), cbr(8, 6), cbr(6, 8)
        self.short = conv(8, 10, 1, stride=2)
        self.d1, self.d2, self.head = cbr(8, 8, stride=2), cbr(8, 10), head(10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 4)."""
        x = self.stem(x)
        x = F.relu(x + self.b2(self.b1(x)))
        found: Tensor = self.head(F.relu(self.short(x) + self.d2(self.d1(x))))
        return found


class Concat(nn.Module):
    """A layer that reads the channels of three others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = cbr(3, 8), cbr(8, 6), cbr(8, 5, 1)
        self.out, self.head = cbr(19, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, 4)."""
        x = self.stem(x)
        found: Tensor = self.head(self.out(torch.cat([self.a(x), x, self.b(x)], 1)))
        return found


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "plain": plain, "residual": Residual, "depthwise": depthwise, "concat": Concat,
}  # fmt: skip
