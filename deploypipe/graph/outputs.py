"""What a model is given and what it returns: copies of the one, the tensors in the other."""

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_OPAQUE = (str, bytes, type, nn.Module, ModuleType)


def output_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors in (nested) tuples, lists, mappings, dataclasses and other objects that hold values, in their order.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> one, two = torch.zeros(1), torch.zeros(2)
    >>> [tensor.numel() for tensor in output_tensors((one, SimpleNamespace(logits=two)))]
    [1, 2]
    """
    return _tensors(outputs, set())


def copied(example: Sequence[Any]) -> tuple[Any, ...]:
    """Return the inputs with copies of their tensors: a model may write into what it is given."""
    return tuple(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, list(example)))


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in seen:  # objects may refer to each other
            seen.add(id(leaf))
            found += _tensors(_held(leaf), seen)
    return found


def _held(value: Any) -> list[Any]:
    """Return what an object that is no container to torch holds."""
    if isinstance(value, _OPAQUE):
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Collection) and not hasattr(value, "__array__"):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())
