"""MobileNetV2 for CIFAR-10 (Sandler et al., CVPR 2018, arXiv:1801.04381), half as wide, with strides for 32x32 images.

    deploypipe build --model examples/cifar_mobilenet.py:mobilenetv2 --weights FILE --data imagefolder:DIR

Torchvision's own modules; the strides of the first layer and of the last stage are 1. Depthwise convolutions have few
multiply-adds and take long, so that a layer's share of the time differs from its share of the MACs more than in a ResNet.
"""

import torch
from torch import nn
from torchvision.models import MobileNetV2

BLOCKS = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 1], [6, 320, 1, 1]]


class CifarMobileNetV2(MobileNetV2):
    """Inverted residuals on 32x32 RGB images in [0, 1], normalised by `mean` and `std`."""

    input_size = (3, 32, 32)
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, width: float = 0.5, n_classes: int = 10) -> None:
        super().__init__(n_classes, width, inverted_residual_setting=BLOCKS, dropout=0.0)
        first = self.features[0][0]
        self.features[0][0] = nn.Conv2d(3, first.out_channels, 3, 1, 1, bias=False)


def mobilenetv2() -> nn.Module:
    """Return the network with weights drawn under a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CifarMobileNetV2()
