"""Which memory layout networks run and train in.

Channels-last is 1.4 times faster for convolutions on a CPU, and what tensor cores want; but not every network can.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deploypipe.data.batches import seeded

_BLOCKS = {"AVX512": 16}  # channels per vector register of oneDNN's convolutions; 8 on all other processors


def fast_layout(model: nn.Module, inputs: Tensor) -> torch.memory_format:
    """Return channels-last if the model runs on such images, else the plain layout.

    Code like `x.view(len(x), -1)` behind a convolution cannot. Two images are tried, in eval mode.

    Args:
        model: On any device.
        inputs: A batch (B, ...), on any device; what has not four axes has no other layout.
    """
    if inputs.dim() != 4:
        return torch.contiguous_format
    try:
        with in_mode(model, training=False), torch.inference_mode():
            model(laid_out(inputs[:2].to(device_of(model)), torch.channels_last))
    except Exception:  # if this is not about the layout, the model fails in the plain one, too, and is reported there
        return torch.contiguous_format
    return torch.channels_last


def lay_out(model: nn.Module, inputs: Tensor) -> torch.memory_format:
    """Put the model into the layout to train it in, the fast one unless it cannot, and return that layout.

    Args:
        model: Only its memory changes.
        inputs: Some images (B, ...), to try.
    """
    volumes = any(tensor.dim() == 5 for tensor in model.state_dict().values())  # of other layouts
    layout = torch.contiguous_format
    if not volumes and not has_narrow_shortcut(model):
        layout = fast_layout(model.to(memory_format=torch.channels_last), inputs)
        if layout is torch.channels_last and not _trains_in(model, inputs, layout):
            layout = torch.contiguous_format
    model.to(memory_format=layout)
    return layout


def _trains_in(model: nn.Module, inputs: Tensor, layout: torch.memory_format) -> bool:
    """Say whether a copy of the model runs in training mode as well, where it may have further branches."""
    try:
        twin = copy.deepcopy(model).train()
        with torch.no_grad(), seeded(0):
            twin(laid_out(inputs[:2].to(device_of(model)), layout))
    except Exception:  # as in fast_layout
        return False
    return True


def has_narrow_shortcut(model: nn.Module) -> bool:
    """Whether training the model in channels-last may end the process.

    oneDNN's gradient of the weights of a strided 1x1 convolution that reads fewer channels than a vector register holds is
    wrong there, or writes past its memory (oneDNN issue 6035; torch 2.14). Pruned residual networks have such shortcuts.
    """
    block = _BLOCKS.get(torch.backends.cpu.get_cpu_capability(), 8)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    strided = [layer for layer in layers if set(layer.kernel_size) == {1} and set(layer.stride) != {1}]
    return any(layer.in_channels // layer.groups < block for layer in strided)


def laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images or weights of four axes, copied to a layout; all else as it is."""
    # `contiguous` leaves images of one channel as they are, whose strides fit both layouts but mean one of them to operators.
    return tensor.clone(memory_format=layout) if tensor.dim() == 4 else tensor


def device_of(model: nn.Module) -> torch.device:
    """Return where the parameters of a model are; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Switch every module, and put back the mode that each of them had."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
