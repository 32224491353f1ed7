"""What the rules work on: the state of one forward pass, and the calls they are asked about.

Rules are asked after the operations, many at a time: right after a convolution the caches are full of its data, and Python
runs at a third of its speed. So they see what is left of a tensor then, its shape and its labels.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deploypipe.graph.labels import Labels, Ledger, Vector, along, drop_axes, expand_along, flat, varies
from deploypipe.types import Kind, Role

Layers = tuple[Labels, ...]


class Seen:
    """What rules know of a tensor. A parameter or buffer has a name; an activation has labels once its rule was asked."""

    __slots__ = ("dtype", "labels", "layer", "name", "shape", "strides", "weight")

    def __init__(self, tensor: Tensor, name: str = "", *, dense: bool = False) -> None:
        """Keep shape and, unless the tensor is known to be no broadcast (`dense`), strides."""
        self.shape: tuple[int, ...] = tensor.shape
        self.strides: tuple[int, ...] = () if dense or tensor.layout is not torch.strided else tensor.stride()
        self.dtype = tensor.dtype
        self.name = name
        self.labels: Layers = ()
        self.layer = -1  # the layer call whose untouched output this is
        self.weight = bool(name)  # whether parameters and buffers alone make it: one of them, a view, something computed

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    def rigid(self, axis: int) -> bool:
        """Say whether an axis has a size of its own: more than one position, and not a broadcast."""
        return self.shape[axis] != 1 and (not self.strides or self.strides[axis] != 0)


@dataclass  # not frozen: there is one for every operation, and setting frozen fields takes four times as long
class Call:
    """One aten operation: its short name, arguments by schema name and result, with `Seen` in the place of tensors."""

    name: str
    args: Mapping[str, Any]
    out: Any
    module: str  # path of the module whose method called it
    sizes: Sequence[Any] | None  # the sizes as `forward` wrote them (view, reshape, ...), if it did
    func: Callable[..., Any]
    rest: tuple[Sequence[Any], Mapping[str, Any]]  # the arguments after the first as they came, without activations

    def on(self, labels: Labels) -> Any:
        """Apply the operation to labels in the place of its first argument."""
        args, kwargs = self.rest
        return self.func(labels, *args, **kwargs)

    @cached_property
    def where(self) -> str:
        """Human-readable place."""
        return f"{self.name} in {self.module or 'the model'}"


class LayerCall(NamedTuple):  # as frozen as a dataclass, and made in a fraction of the time
    """One call of a weighted operation, with the labels on both sides."""

    name: str
    kind: Kind
    weight: str
    bias: str
    geometry: Mapping[str, Any]
    vec_in: Vector
    vec_out: Vector
    groups: int
    group_labels: Vector | None


class AttributeUse(NamedTuple):
    """An integer of a module that equals the length of `labels` divided by `divisor`."""

    module: str
    name: str
    divisor: int
    position: int | None
    labels: Vector


class Rule(Protocol):
    """Says which labels the results of a call carry, and ties or freezes those it met.

    Returns one tuple of label layers for a single result, or a list of such tuples for several results.
    """

    def __call__(self, state: "State", call: Call) -> Layers | list[Layers]:
        """Apply the rule to one call."""
        ...


class State:
    """Labels of parameters and activations, and everything recorded on the way."""

    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self.modules = dict(model.named_modules())
        self.stored: dict[int, Seen] = {}  # parameters and buffers, by identity
        parameters = self._named("_parameters")
        buffers = self._named("_buffers")
        self.shapes = parameters | buffers
        self.buffers = frozenset(buffers)
        self.axes: dict[tuple[str, int], Vector] = {}
        self.roles: dict[tuple[str, int], Role] = {}
        self.layers: list[LayerCall] = []
        self.norms: dict[int, str] = {}  # layer call -> module of the norm that its output goes straight into
        self.norm_calls = Counter[str]()  # of the same module
        self.attributes: list[AttributeUse] = []
        self.owner_axis: list[tuple[int, int, tuple[str, int]]] = []  # label ranges born on a parameter axis
        self.added: list[tuple[int, int]] = []  # labels of two weights whose sum is used as one

    def _named(self, table: str) -> dict[str, tuple[int, ...]]:
        """Name the tensors of every module as `named_parameters` and `named_buffers` do; return their shapes."""
        stored, shapes = self.stored, {}
        for path, module in self.modules.items():
            for leaf, tensor in getattr(module, table).items():
                if tensor is not None and id(tensor) not in stored:
                    name = f"{path}.{leaf}" if path else leaf
                    stored[id(tensor)] = Seen(tensor, name, dense=True)
                    shapes[name] = tuple(tensor.shape)
        return shapes

    def layers_of(self, tensor: Any) -> Layers:
        """Return the label layers of an activation, or one layer for each axis of a parameter."""
        if not isinstance(tensor, Seen):
            return ()
        name, shape = tensor.name, tensor.shape
        if not name:
            return tensor.labels
        return tuple(expand_along(self.axis(name, axis, "carries"), axis, shape) for axis, n in enumerate(shape) if n > 1)

    def axis(self, name: str, axis: int, role: Role) -> Vector:
        """Return the labels of a parameter's axis, new ones if it has none yet."""
        key = (name, axis)
        if key not in self.axes:
            start = self.ledger.count
            self.axes[key] = self.ledger.fresh(self.shapes[name][axis])
            self.owner_axis.append((start, self.ledger.count, key))
        self._set_role(key, role)
        return self.axes[key]

    def _set_role(self, key: tuple[str, int], role: Role) -> None:
        known = self.roles.get(key, "carries")
        if known == "carries":
            self.roles[key] = role
        elif known == "produces" and role == "consumes":  # what reads could not be masked alone
            self.ledger.frozen.append((self.axes[key], f"axis {key[1]} of {key[0]} makes these channels and reads them, too"))

    def set_role_by_labels(self, labels: Labels, role: Role) -> None:
        """Give the parameter axis on which these labels were born a role (matrix products with a view of a parameter)."""
        firsts, waiting = set[int](), {int(flat(labels)[0])}
        while waiting:
            firsts |= waiting
            waiting = {b for pair in self.added for a, b in (pair, pair[::-1]) if a in waiting} - firsts
        for start, end, key in self.owner_axis:
            if any(start <= first < end for first in firsts):
                self._set_role(key, role)

    def born(self, labels: Vector) -> str:
        """Return the parameter on whose axis these labels were born; empty if on none."""
        return next((name for start, end, (name, _) in self.owner_axis if start <= labels[0] < end), "")

    def attach(self, tensor: Seen | None, axis: int, vector: Vector, role: Role, where: str) -> None:
        """State that the channels `vector` meet `axis` of `tensor` (a parameter, or something computed from one)."""
        if tensor is None:
            return
        name = tensor.name
        if name and (name, axis) not in self.axes:
            self.axes[name, axis] = vector
            self._set_role((name, axis), role)
            return
        theirs = self.along(tensor, axis, where, role)
        if theirs is None:
            self.ledger.frozen.append((vector, f"{where}: meets a weight of fixed size that is no parameter"))
        else:
            self.ledger.tie_flat(theirs, vector, where)

    def along(self, tensor: Seen, axis: int, where: str, role: Role) -> Vector | None:
        """Return the labels along one axis of a weight, None if it carries none there."""
        if tensor.name:
            return self.axis(tensor.name, axis, role)
        for labels in self.layers_of(tensor):
            if axis in varies(labels):
                self.set_role_by_labels(labels, role)
                return self.collapse(labels, axis, where)
        return None

    def collapse(self, labels: Labels, axis: int, where: str) -> Vector:
        """Return one label for each position of `axis`; labels that differ along other axes are tied."""
        spread = along(labels)
        if spread is not None and spread[0] == axis:
            return spread[1]
        others = [d for d in varies(labels) if d != axis]
        if others:
            labels = self.ledger.tie_all(labels, others, where)
        vector: Vector = drop_axes(labels, (d for d in range(labels.dim()) if d != axis)).reshape(-1).numpy()
        return vector

    def split_on(self, tensor: Seen, axes: set[int]) -> tuple[list[Labels], list[Labels]]:
        """Return the label layers of a tensor that change along one of `axes`, and the others."""
        on: list[Labels] = []
        off: list[Labels] = []
        for labels in self.layers_of(tensor):
            (on if axes & set(varies(labels)) else off).append(labels)
        return on, off

    def freeze_all(self, tensors: Sequence[Any], reason: str) -> None:
        """Freeze every label of these tensors."""
        for tensor in tensors:
            for labels in self.layers_of(tensor):
                self.ledger.freeze(labels, reason)

    def attribute(self, call: Call, name: str, labels: Vector, *, divisor: int = 1, index: int | None = None) -> bool:
        """Record that an integer of the current module states this width; False if the module has no such integer."""
        value = getattr(self.modules.get(call.module), name, None)
        if index is not None:
            value = value[index] if isinstance(value, (tuple, list)) and len(value) > index else None
        if not isinstance(value, int) or value * divisor != len(labels):
            return False
        stated = getattr(type(self.modules[call.module]), name, None)
        if isinstance(stated, property) and stated.fset is None:  # it reads the width somewhere, and will follow
            return True
        self.attributes.append(AttributeUse(call.module, name, divisor, index, labels))
        return True


def constant(n: int) -> Vector:
    """Return a vector that says "no channels here"."""
    return np.full(n, -1, dtype=np.int32)


def spread(vector: Vector, axis: int, out: Seen) -> tuple[Labels, ...]:
    """Return the layers of an activation with these labels along `axis`; none if there is no channel at all."""
    if not (vector >= 0).any():
        return ()
    return (expand_along(vector, axis, out.shape),)


def tensors_in(values: Any) -> list[Seen]:
    """Return the tensors among (nested) arguments."""
    if isinstance(values, Seen):
        return [values]
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in tensors_in(value)]
    return []
