"""A look at a model that leaves it as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploypipe.graph.dims import Dim


@contextmanager
def looked_at(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode without fused attention, in inference mode, and afterwards back as they were.

    What `forward` keeps in a module meanwhile is taken out again: such tensors may never take part in training, and sizes
    still know where they came from.
    """
    modules = list(modules)
    training = [module for module in modules if module.training]
    before = [(table, dict(table)) for module in modules for table in (module.__dict__, module._buffers)]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel hides the layers inside
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module in training:
            module.training = True
        for table, known in before:
            _take_back(table, known)


def _take_back(table: dict[str, Any], known: dict[str, Any]) -> None:
    for name, value in [*table.items()]:
        if value is not known.get(name) and (isinstance(value, Dim) or (isinstance(value, Tensor) and value.is_inference())):
            if name in known:
                table[name] = known[name]
            else:
                del table[name]
