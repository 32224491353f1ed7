"""Trace: one ordinary forward pass, with channel labels travelling beside the tensors.

The only file that meets torch's dispatch modes. A dispatch mode sees every aten operation under inference mode (where
composite operations such as `linear` arrive whole); a function mode above it hands out sizes that remember their
source and keeps the sizes that `forward` wrote.
"""

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deploypipe.errors import ModelError
from deploypipe.graph.dims import COUNTS, SHAPE_GETTERS, SIZED, Dim, dims_in, fresh_shapes, written_sizes
from deploypipe.graph.frames import failed_in, innermost
from deploypipe.graph.groups import build_graph
from deploypipe.graph.labels import Labels, varies
from deploypipe.graph.outputs import copied, output_tensors
from deploypipe.graph.rules import MOVES, rule_for
from deploypipe.graph.tracer import Call, Rule, Seen, State, tensors_in
from deploypipe.graph.untouched import looked_at
from deploypipe.types import Graph

_TRACES = count()
_LOOKED_AT = (Tensor, tuple, list)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector out: what tracing makes, stays, and a collection walks everything torch has loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
@fresh_shapes()
def trace(model: nn.Module, example_inputs: Tensor | Sequence[Any]) -> Graph:
    """Run `model` once on `example_inputs` and return its layers and groups of coupled channels.

    The model is run in evaluation mode under inference mode; its training mode and parameters are left as they were. Weights
    that it computes at every pass (weight norm and its like) own no channels: `dp.fold_weights` makes plain ones of them first.

    Args:
        model: Any module; nothing in it needs to be scriptable or exportable.
        example_inputs: The positional arguments of `forward`, or a single tensor.

    Returns:
        The graph. What cannot be pruned is in `graph.fixed` with its reason.

    Raises:
        ModelError: The forward pass itself fails on these inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(g.name, g.size) for g in trace(net, torch.zeros(1, 3, 8, 8)).prunable]
        [('0', 8)]
    """
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if lazy := next((name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None):
        raise ModelError(f"'{lazy}' has no size yet", at="trace", fix="run the model once on an input: it has lazy layers")
    state, inputs = State(model), copied(example)
    tracer = _Tracer(state)
    try:
        with looked_at(state.modules.values()), _Sizes(tracer), tracer:
            outputs = model(*inputs)
    except ModelError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(example) if isinstance(t, Tensor))
        raise ModelError(
            f"the model fails on its example input: {type(error).__name__}: {error}",
            at=f"module '{failed_in(error, tracer.paths) or '(root)'}', input shapes {shapes}",
            fix="give an input that the model accepts (the factory may return (model, example_inputs))",
        ) from error
    tensors = output_tensors(outputs)
    if not tensors:
        fix = "return tensors, in containers or objects if you like"
        raise ModelError(f"the model returns no tensors but a {type(outputs).__name__}", at="forward", fix=fix)
    tracer.ask().freeze_all(tensors_in(tracer.look(tensors)), "output of the model")
    return build_graph(state, tracer.ops, example)


@dataclass(frozen=True)
class _Operation:
    """What is known of an aten operation before it is called."""

    rule: Rule | None
    moves: bool  # the rule applies the operation to labels
    dense: bool  # it computes its result, so that no axis of it is a broadcast
    name: str
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, func: Any) -> "_Operation":
        schema = func._schema
        defaults = {a.name: a.default_value if a.has_default_value() else None for a in schema.arguments}
        name = schema.name.rpartition("::")[2]
        dense = not any(a.alias_info for a in schema.returns) or schema.is_mutable
        return cls(rule_for(func), name in MOVES, dense, name, tuple(defaults), defaults)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every aten operation that labels could pass through, and asks the rules about them."""

    def __init__(self, state: State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state
        # The attribute on activations; parameters are looked up by identity. Modules may keep activations of earlier traces.
        self.mark = f"_deploypipe_seen_{next(_TRACES)}"
        self.ops: Counter[str] = Counter()
        self.sizes: Sequence[Any] | None = None
        self.paths = {id(module): path for path, module in state.modules.items()}
        self._operations: dict[int, _Operation] = {}
        self._noted: list[tuple[_Operation, Any, Any, Any, Any, Any, str, Any]] = []
        self._touched = False  # whether a parameter, or something computed from one, is among the arguments

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nobody compiles while tracing; guarding against it costs as much as the rules."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = self._operations.get(id(func))
        if operation is None:
            operation = self._operations[id(func)] = _Operation.of(func)
        if operation.rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        self.ops[operation.name] += 1
        self._touched = False
        stored, seen = self.state.stored, []
        for value in args:  # `look`, written out for the usual arguments: it runs with cold caches
            if isinstance(value, Tensor):
                found = stored.get(id(value)) or getattr(value, self.mark, None)
                self._touched = self._touched or found is not None
                seen.append(found or Seen(value))
            else:
                seen.append(self._look(value) if isinstance(value, (tuple, list)) else value)
        named = {key: self._look(value) for key, value in kwargs.items()} if kwargs else kwargs
        if self._touched:
            # Tensors of floats are activations, which must not outlive the operation; rules that replay it need none of them.
            rest = [None if isinstance(v, Tensor) and v.is_floating_point() else v for v in args[1:]] if operation.moves else ()
            where = innermost(self.paths)
            self._noted.append(
                (operation, func, seen, named, (rest, kwargs), self._result(out, operation.dense), where, self.sizes)
            )
        return out

    def look(self, values: Sequence[Any]) -> list[Any]:
        """Return (nested) arguments with `Seen` in the place of tensors."""
        return [self._look(value) if isinstance(value, _LOOKED_AT) else value for value in values]

    def _look(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self.state.stored.get(id(value)) or getattr(value, self.mark, None)
            if found is None:
                return Seen(value)
            self._touched = True
            return found
        return self.look(value) if type(value) in {tuple, list} and any(isinstance(v, _LOOKED_AT) for v in value) else value

    def _result(self, out: Any, dense: bool) -> Any:
        """Return the same for a result, new and without labels yet; parameters that are written in place stay parameters."""
        if isinstance(out, Tensor):
            if id(out) in self.state.stored:
                return self.state.stored[id(out)]
            seen = Seen(out, dense=dense)
            setattr(out, self.mark, seen)
            return seen
        return [self._result(part, dense) for part in out] if isinstance(out, (tuple, list)) else out

    def ask(self) -> State:
        """Ask the rules about all operations noted so far; return the state, which is up to date then."""
        noted, self._noted = self._noted, []
        if noted:  # operations on labels are none of the model's: neither mode may see them
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.inference_mode():
                for operation, func, seen, named, rest, out, where, sizes in noted:
                    bound = dict(zip(operation.parameters, seen, strict=False))
                    if len(bound) < len(operation.parameters):
                        bound = {**operation.defaults, **bound, **named}
                    self._apply(operation.rule, Call(operation.name, bound, out, where, sizes, func, rest))
        return self.state

    def _apply(self, rule: Rule | None, call: Call) -> None:
        if rule is None:
            self.state.freeze_all(tensors_in(list(call.args.values())), f"{call.where}: deploypipe has no rule for it")
            layers: Any = ()
        else:
            layers = rule(self.state, call)
        results = tensors_in(call.out)
        if isinstance(layers, tuple):
            layers = [layers] * len(results)
        weight = _only_weights(call)
        for tensor, found in zip(results, layers, strict=True):
            tensor.labels, tensor.weight = found, tensor.weight or weight


def _only_weights(call: Call) -> bool:
    """Say whether an operation sees no activation; most see one first, and the rest need not be looked at."""
    first = next(iter(call.args.values()), None)
    return isinstance(first, Seen) and first.weight and all(t.weight for t in tensors_in(tuple(call.args.values())))


class _Sizes(TorchFunctionMode):
    """Hands out sizes that remember their source, and keeps the sizes that `forward` wrote."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.measured = False  # whether a number of channels was ever read: until then no call can hold one

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SHAPE_GETTERS:
            return self._sized(args[0], func(*args, **kwargs), args[1:] or tuple(kwargs.values()))
        if func in COUNTS:
            return prod(self._sized(args[0], args[0].shape, ()))
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        if func in SIZED:
            sized = args[0] if args else kwargs["input"]
            if self.measured and not self._layers(sized):  # no rule will look at it: a width must not leave this way
                self._let_go((args[1:], kwargs), func)
            self.tracer.sizes = written_sizes(func, args, kwargs)
            try:
                return func(*args, **kwargs)
            finally:
                self.tracer.sizes = None
        if self.measured and func is not torch.Tensor.__getitem__:
            self._let_go((args, kwargs), func)
        return func(*args, **kwargs)

    def _let_go(self, arguments: Any, func: Any) -> None:
        for source in dims_in(arguments):
            self._escape(source, f"used as an argument of {getattr(func, '__name__', func)}")

    def _sized(self, tensor: Tensor, shape: Any, dim: tuple[Any, ...]) -> Any:
        layers = self._layers(tensor) if hasattr(tensor, self.tracer.mark) else ()

        def measure(value: int, axis: int) -> Dim:
            source: Labels | None = next((labels for labels in layers if axis in varies(labels)), None)
            self.measured = self.measured or source is not None
            return Dim(value, source, self._escape)

        if dim and dim[0] is not None:
            return measure(shape, int(dim[0]) % max(tensor.dim(), 1))
        return torch.Size([measure(value, axis) for axis, value in enumerate(shape)])

    def _layers(self, tensor: Tensor) -> tuple[Labels, ...]:
        return self.tracer.ask().layers_of(*self.tracer.look([tensor]))

    def _escape(self, labels: Labels, how: str) -> None:
        where = innermost(self.tracer.paths) or "the model"
        self.tracer.state.ledger.freeze(labels, f"forward of {where}: the number of channels is {how}")

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        reason = f"multi-head attention in {innermost(self.tracer.paths)}: its embedding size is fixed"
        self.tracer.ask().freeze_all(tensors_in(self.tracer.look([*args[:3], *tree_leaves(out)])), reason)
        return out
