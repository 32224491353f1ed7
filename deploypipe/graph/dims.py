"""Sizes that remember where they come from, so that a literal in `forward` is told from `x.shape[1]`.

While a model is traced, `x.shape` and `x.size()` give integers of this type. A plain integer that reaches `view` was
written into the model and will not follow when channels go; a `Dim` was read off a tensor and will.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from deploypipe.graph.labels import Labels

Escape = Callable[[Labels, str], None]
SHAPE_GETTERS = {torch.Tensor.shape.__get__, torch.Tensor.size}  # type: ignore[attr-defined]
COUNTS = {torch.Tensor.numel, torch.Tensor.nelement, torch.numel}
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
SIZED: dict[Any, int] = {  # functions whose written sizes a rule looks at -> position of the first size among the arguments
    torch.Tensor.view: 1,
    torch.Tensor.reshape: 1,
    torch.reshape: 1,
    torch.Tensor.expand: 1,
    torch.Tensor.unflatten: 2,
    torch.unflatten: 2,
    torch.Tensor.split: 1,
    torch.split: 1,
    F.layer_norm: 1,
    **dict.fromkeys(_CONVOLUTIONS, 6),  # their groups
}


@contextmanager
def fresh_shapes() -> Iterator[None]:
    """Let nothing know a shape from before, and nothing keep one of these sizes.

    einops remembers what it made of a shape by its integers, and a `Dim` passes for any other of its value: what it handed out
    would be a literal, or belong to another trace.
    """
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    known: Any = getattr(sys.modules.get("einops.einops"), "_reconstruct_from_shape", None)
    if hasattr(known, "cache_clear"):
        known.cache_clear()


class Dim(int):
    """An integer read off a tensor's shape; multiplication and division keep its source, other arithmetic gives it up.

    Attributes:
        source: The labels along the axis it measures, or None if no channels lie there.
    """

    source: Labels | None
    escape: Escape

    def __new__(cls, value: int, source: Labels | None, escape: Escape) -> "Dim":
        """Make the size; `escape(labels, how)` is called when it is used in a way that pruning would change."""
        self = super().__new__(cls, value)
        self.source, self.escape = source, escape
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Copy as a plain integer: a module that keeps a size can be copied, and the copy is not being traced."""
        return int, (int(int.__index__(self)),)

    def _product(self, other: Any, value: Any) -> Any:
        if not isinstance(value, int):
            return value
        theirs = other.source if isinstance(other, Dim) else None
        if self.source is not None and theirs is not None and theirs is not self.source:
            self._leave("combined with another width")
            self.escape(theirs, "combined with another width")
        return Dim(value, self.source if self.source is not None else theirs, self.escape)

    def _leave(self, how: str) -> None:
        if self.source is not None:
            self.escape(self.source, how)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, float):
            self._leave("multiplied by a float")
        return self._product(other, int.__mul__(self, other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, Dim):  # C // C: a ratio of widths follows neither
            other._leave("divided by")
        return self._product(other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        self._leave("divided by")
        return int.__rfloordiv__(self, other)

    def __add__(self, other: Any) -> Any:
        self._leave("added to")
        return int.__add__(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        self._leave("subtracted from")
        return int.__sub__(self, other)

    def __rsub__(self, other: Any) -> Any:
        self._leave("subtracted")
        return int.__rsub__(self, other)

    def __neg__(self) -> int:
        self._leave("negated")
        return int.__neg__(self)

    def __truediv__(self, other: Any) -> Any:
        self._leave("divided")
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        self._leave("divided by")
        return int.__rtruediv__(self, other)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self._leave("raised to a power")
        return int.__pow__(self, other, modulo)

    def __float__(self) -> float:
        self._leave("turned into a float")
        return int.__float__(self)


def dims_in(values: Any) -> Iterator[Labels]:
    """Yield the sources of the sizes among (nested) arguments."""
    if isinstance(values, Dim):
        if values.source is not None:
            yield values.source
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from dims_in(value)
    elif isinstance(values, slice):
        yield from dims_in((values.start, values.stop, values.step))
    elif isinstance(values, dict):
        yield from dims_in(tuple(values.values()))


def written_sizes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Return the sizes that a function of SIZED was called with, as they were written; None where they tell nothing."""
    if func in _CONVOLUTIONS:
        return [args[SIZED[func]] if len(args) > SIZED[func] else kwargs.get("groups", 1)]
    written = [*args[SIZED[func] :], *(value for key, value in kwargs.items() if key != "input")]
    if func in (torch.Tensor.split, torch.split):
        return written if next(dims_in(written[:1]), None) is not None else None
    nested = bool(written) and isinstance(written[0], (tuple, list))
    return list(written[0]) if nested else written
