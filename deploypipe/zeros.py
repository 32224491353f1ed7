"""What stands where a layer was removed: zeros in the shape of the layer's output, without weights.

They do not depend on the input, so that export drops whatever led to them; added to a residual stream they vanish in the
simplified model together with the sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


class Zeros(nn.Module):
    """Zeros of the shape that the replaced layer would return.

    Args:
        layer: A convolution or linear layer, with the number of output channels that is left.

    Raises:
        TypeError: The layer is of another class: a subclass may return another shape.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if type(layer) not in (*CONVOLUTIONS, nn.Linear):
            raise TypeError(type(layer).__name__)
        self.channels = int(layer.weight.shape[0])  # type: ignore[index]
        self.kernel: Sequence[int] = ()
        if isinstance(layer, CONVOLUTIONS):
            self.kernel, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
            same = layer.padding == "same"
            self.padding = [d * (k - 1) if same else 0 for k, d in zip(self.kernel, self.dilation, strict=True)]
            if not isinstance(layer.padding, str):
                self.padding = [2 * each for each in layer.padding]

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros: (N, channels, ...) after a convolution, (..., channels) after a linear layer."""
        if not self.kernel:
            return torch.zeros((*x.shape[:-1], self.channels), dtype=x.dtype, device=x.device)
        rank = len(self.kernel)
        sizes = zip(x.shape[-rank:], self.kernel, self.stride, self.dilation, self.padding, strict=True)
        out = [(n + both - d * (k - 1) - 1) // s + 1 for n, k, s, d, both in sizes]
        return torch.zeros((*x.shape[: -rank - 1], self.channels, *out), dtype=x.dtype, device=x.device)
