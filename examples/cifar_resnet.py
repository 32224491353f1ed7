"""ResNet-20, -32 and -56 for CIFAR-10 (He et al., Deep Residual Learning, CVPR 2016, section 4.2), with option-A shortcuts.

    deploypipe build --model examples/cifar_resnet.py:resnet20 --weights resnet20.safetensors --data imagefolder:DIR

Parameter names equal those of the weights published at github.com/akamaster/pytorch_resnet_cifar10.

The option-A shortcut takes every second row and column and pads the channel axis with zeros. Here it is a 1x1 convolution
of stride 2 with a fixed 0/1 weight: the same numbers, but an operation that every runtime accelerates and whose two channel
axes can be pruned independently. The weight is a non-persistent buffer, so published state dicts fit. `resnet20_sliced` is
the literal form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class SelectShortcut(nn.Module):
    """Option A as a convolution: input channel `i` goes to output channel `i + (n_out - n_in) // 2`, the others are zero."""

    weight: Tensor

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        weight = torch.zeros(n_out, n_in, 1, 1)
        channels = torch.arange(n_in)
        weight[channels + (n_out - n_in) // 2, channels] = 1.0
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H/2, W/2)."""
        return F.conv2d(x, self.weight, stride=2)


class SliceShortcut(nn.Module):
    """Option A as it was published: slice rows and columns, pad channels with zeros on both sides."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.pad = (n_out - n_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H/2, W/2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity or option-A shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int, shortcut: type[SelectShortcut | SliceShortcut]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = shortcut(n_in, n_out) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, n_in, H, W) to (N, n_out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Depth 6n+2 residual network for 32x32 RGB images in [0, 1], normalised by `mean` and `std`."""

    input_size = (3, 32, 32)
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, n_blocks: int, *, n_classes: int = 10, sliced: bool = False) -> None:
        super().__init__()
        shortcut = SliceShortcut if sliced else SelectShortcut
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages = []
        for n_in, n_out in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            first = BasicBlock(n_in, n_out, 1 if n_in == n_out else 2, shortcut)
            stages.append(nn.Sequential(first, *(BasicBlock(n_out, n_out, 1, shortcut) for _ in range(n_blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(WIDTHS[-1], n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, n_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20() -> CifarResNet:
    """Return an untrained ResNet-20: 0.27 M parameters, 41 M multiply-adds."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """Return an untrained ResNet-32: 0.46 M parameters, 69 M multiply-adds."""
    return CifarResNet(5)


def resnet56() -> CifarResNet:
    """Return an untrained ResNet-56: 0.85 M parameters, 126 M multiply-adds."""
    return CifarResNet(9)


def resnet20_sliced() -> CifarResNet:
    """Return ResNet-20 with the literal slice-and-pad shortcuts."""
    return CifarResNet(3, sliced=True)
