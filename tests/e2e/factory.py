"""A model and data small enough to run the real command line in a test: stripes in one channel, in the other, or none."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Block(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.a, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.bn2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.b(torch.relu(self.bn1(self.a(x))))))


class Net(nn.Module):
    input_size = (2, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.block = Block(48, 64)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


class Viewed(Net):
    """Its code only runs on the plain memory layout, as that of many tutorials does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48 * 12 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).view(x.size(0), -1))


def viewed() -> nn.Module:
    torch.manual_seed(0)
    return Viewed()


def raises() -> nn.Module:
    return nn.Conv2d(3, 8, "three")


def data() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)

    def images(n: int) -> TensorDataset:
        labels = torch.arange(n) % 3
        x = 0.5 * torch.randn(n, 2, 12, 12, generator=generator)
        for c in range(3):
            x[labels == c, c % 2, c::3] += 1.0
        return TensorDataset(x, labels)

    return images(480), images(120)
