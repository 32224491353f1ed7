"""Which memory layout a network is trained in."""

import torch
from torch import Tensor, nn

_BLOCKS = {"AVX512": 16}  # channels per vector register of oneDNN's convolutions; 8 on all other processors


def training_layout(model: nn.Module) -> torch.memory_format:
    """Return channels-last, unless training a layer of the model in it would write past the end of memory.

    Channels-last is 1.4 times faster for convolutions on a CPU, and what tensor cores want. But in it oneDNN's gradient of the
    weights of a strided 1x1 convolution that reads fewer channels than a vector register holds is wrong, or ends the process
    (oneDNN issue 6035; torch 2.14). Pruned residual networks have such shortcuts.
    """
    block = _BLOCKS.get(torch.backends.cpu.get_cpu_capability(), 8)
    fatal = any(_shortcut(layer) and layer.in_channels // layer.groups < block for layer in _convolutions(model))
    return torch.contiguous_format if fatal else torch.channels_last


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images or weights of four axes in a layout; all else as it is."""
    return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return the two-dimensional convolutions of a model."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _shortcut(layer: nn.Conv2d) -> bool:
    return set(layer.kernel_size) == {1} and set(layer.stride) != {1}
