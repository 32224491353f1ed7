"""The embedded demo model: a small residual CNN for scikit-learn's handwritten digits.

`python -m deploypipe.train_demo [FILE]` trains it from scratch (seeded, two threads) and writes `demo.safetensors`, which
is shipped beside this file: 99.15 % of the test digits (352 of 355).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploypipe.data.images import DIGITS_NORMALISE, DIGITS_SIZE

N_RIGHT, N_TEST = 352, 355  # of the shipped weights
WEIGHTS = Path(__file__).with_name("demo.safetensors")


def conv_norm(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution and its batch norm."""
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out))


class Residual(nn.Module):
    """Two 3x3 convolutions around an identity, or around a 1x1 convolution where the width or the size changes."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.a = conv_norm(n_in, n_out, 3, stride)
        self.b = conv_norm(n_out, n_out, 3)
        self.shortcut = nn.Identity() if n_in == n_out and stride == 1 else conv_norm(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H/stride, W/stride)."""
        return F.relu(self.b(F.relu(self.a(x))) + self.shortcut(x))


class Squeeze(nn.Module):
    """Weigh channels by a gate computed from their means (Hu et al., Squeeze-and-Excitation Networks, CVPR 2018)."""

    def __init__(self, width: int, n_hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, n_hidden, 1), nn.Conv2d(n_hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """Widen, depthwise 3x3, squeeze-and-excite, narrow, around an identity (as in MobileNetV3, Howard et al., ICCV 2019)."""

    def __init__(self, width: int, n_wide: int) -> None:
        super().__init__()
        self.widen = conv_norm(width, n_wide, 1)
        self.depthwise = conv_norm(n_wide, n_wide, 3, groups=n_wide)
        self.squeeze = Squeeze(n_wide, n_wide // 8)
        self.narrow = conv_norm(n_wide, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        wide = self.squeeze(F.relu(self.depthwise(F.relu(self.widen(x)))))
        return torch.add(self.narrow(wide), x)


class DemoNet(nn.Module):
    """Residual stages of 48, 64 and 80 channels at 16x16, 8x8 and 4x4, the second with a depthwise and an SE part."""

    input_size = DIGITS_SIZE
    mean, std = DIGITS_NORMALISE

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(1, 48, 3)
        self.stage1 = Residual(48, 48)
        self.stage2 = nn.Sequential(Residual(48, 64, 2), Inverted(64, 128))
        self.stage3 = Residual(64, 80, 2)
        self.classifier = nn.Linear(80, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map digits (N, 1, 16, 16) to logits (N, 10)."""
        x = self.stage3(self.stage2(self.stage1(F.relu(self.stem(x)))))
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


def demo_net() -> DemoNet:
    """Return the model with untrained weights."""
    return DemoNet()
