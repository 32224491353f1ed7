"""ONNX models that time one kernel the way it runs inside a model: fused, in the runtime's own layout.

A runtime's profile counts whole microseconds and adds to what it times, so a kernel is timed without it: as the difference
between a model that runs the kernel `1 + repeats` times and one that runs it once. All copies read the same tensor and add
up their results, which runtimes fuse into the kernel, so that nothing else differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploypipe.latency.estimate import macs
from deploypipe.latency.files import Shape, Sparsity
from deploypipe.two_four import project

_OPSET, _IR = 20, 10
_IN = 3  # channels of a probe's input; the tensor that the kernel reads is computed from it
_WORTH = 3_000_000  # multiply-adds that the copies should add up to: enough to stand out of the clock's noise ...
_MOST = 8  # ... with no more copies than this
_TINY = 16  # channels of a convolution without work
IDLE_OPS = ("Neg", "Softmax")  # next to no work on eight numbers; the second where a runtime fuses the first with itself


@dataclass(frozen=True)
class Probe:
    """One kernel to measure: a shape at two widths.

    With `relay`, the tensor in front is made anew for each copy, so that a change of layout which the runtime needs before
    a narrow kernel is counted as well. With `sparsity` "2:4" every weight of the kernel holds that pattern, and nothing else
    does.
    """

    shape: Shape
    n_in: int
    n_out: int
    relay: bool = False
    sparsity: Sparsity = "dense"

    @property
    def place(self) -> tuple[Shape, tuple[int, int], Sparsity]:
        """Where its time stands in a table: see `Entry.place`."""
        return (self.shape, (0 if self.shape.tied else self.n_in, self.n_out), self.sparsity)

    @property
    def macs(self) -> int:
        """Multiply-adds of the kernel."""
        return macs(self.shape, self.n_in, self.n_out)

    @property
    def repeats(self) -> int:
        """How many more copies the longer models hold than the shorter ones."""
        return max(1, min(_MOST, _WORTH // self.macs))

    def models(self) -> tuple[bytes, ...]:
        """Return the models to time, in pairs of one copy and `1 + repeats` copies.

        The kernel's time is that of the first pair, less, with `relay`, that of the second; a pair's time is the difference
        of its models over `repeats`.
        """
        counts = (1, 1 + self.repeats)
        if self.shape.rows:
            return tuple(_linear(self, count) for count in counts)
        own = tuple(_conv(self, count) for count in counts)
        return (*own, *(_entering(self, count) for count in counts)) if self.relay else own


def chain(length: int, op: str) -> bytes:
    """Return a model of `length` operations that do next to nothing: it shows what a kernel costs without work."""
    nodes = [helper.make_node(op, [f"t{i}"], [f"t{i + 1}"], name=f"{op}_{i}") for i in range(length)]
    return _Model(nodes).serialised(("t0", [1, 8]), f"t{length}")


def small_layers(length: int) -> bytes:
    """Return a model of `length` tiny convolutions: kernels with as many operands as real ones, and next to no work."""
    model, tensor = _Model(), "x"
    for i in range(length):
        operands = [tensor, model.weight(f"w{i}", [_TINY, _TINY, 1, 1]), model.weight(f"b{i}", [_TINY])]
        tensor = model.add("Relu", [model.add("Conv", operands, f"c{i}")], f"y{i}")
    return model.serialised(("x", [1, _TINY, 1, 1]), tensor)


class _Model:
    """Nodes so far, and the sizes of the weights that they use."""

    def __init__(self, nodes: Sequence[onnx.NodeProto] = ()) -> None:
        self.nodes = list(nodes)
        self.sizes: list[onnx.TensorProto] = []

    def weight(self, name: str, shape: Sequence[int]) -> str:
        """Add a weight that the runtime fills when it loads the model, so that a probe is a few hundred bytes."""
        self.sizes.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}_shape"))
        # All weights differ: equal kernels on equal data would be computed once.
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.01 + 0.001 * len(self.sizes)])
        self.nodes.append(helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], name=f"{name}_fill", value=value))
        return name

    def two_four(self, name: str, shape: Sequence[int], axis: int) -> str:
        """Add a weight whose fours along `axis` hold two zeros each: one such four, pruned by magnitude, laid out in rows."""
        four = project(np.arange(4, 0, -1, dtype=np.float32) * (0.01 + 0.001 * len(self.sizes)), 0)
        block = four.reshape([4 if at == axis else 1 for at in range(len(shape))])
        times = [size // 4 if at == axis else size for at, size in enumerate(shape)]
        self.sizes += [
            numpy_helper.from_array(block, f"{name}_four"),
            numpy_helper.from_array(np.array(times, np.int64), f"{name}_times"),
        ]
        self.nodes.append(helper.make_node("Tile", [f"{name}_four", f"{name}_times"], [name], name=f"{name}_fill"))
        return name

    def kernel(self, probe: Probe, name: str, shape: Sequence[int], axis: int) -> str:
        """Add the weight of the kernel that is timed; its input channels lie along `axis`."""
        return self.two_four(name, shape, axis) if probe.sparsity == "2:4" else self.weight(name, shape)

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes))
        return output

    def serialised(self, source: tuple[str, Sequence[int]], sink: str) -> bytes:
        value = helper.make_tensor_value_info
        inputs, outputs = [value(source[0], TensorProto.FLOAT, source[1])], [value(sink, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "probe", inputs, outputs, self.sizes)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        return bytes(model.SerializeToString())


def _conv(probe: Probe, count: int) -> bytes:
    shape, model, total = probe.shape, _Model(), ""
    groups = probe.n_in // shape.per_group[0] if shape.tied else 1
    attributes = {
        "kernel_shape": list(shape.kernel), "strides": list(shape.stride), "dilations": list(shape.dilation), "group": groups,
        "pads": list(shape.padding) * (2 if len(shape.padding) == len(shape.kernel) else 1),
    }  # fmt: skip
    if shape.transposed:
        weight, op = [probe.n_in, probe.n_out // groups, *shape.kernel], "ConvTranspose"
        attributes["output_padding"] = _output_padding(shape)
    else:
        weight, op = [probe.n_out, probe.n_in // groups, *shape.kernel], "Conv"
    entering = _before(model, probe, "e0")
    for i in range(count):
        if i and probe.relay:
            entering = _before(model, probe, f"e{i}")
        operands = [entering, model.kernel(probe, f"w{i}", weight, 1), model.weight(f"b{i}", [probe.n_out])]
        total = _accumulate(model, model.add(op, operands, f"c{i}", **attributes), total, f"y{i}")
    return model.serialised(("x", [shape.batch, _IN, *shape.in_size]), total)


def _entering(probe: Probe, count: int) -> bytes:
    """Only what stands in front of the kernel."""
    model, total = _Model(), ""
    for i in range(count):
        total = _accumulate(model, _before(model, probe, f"e{i}", relu=False), total, f"y{i}")
    return model.serialised(("x", [probe.shape.batch, _IN, *probe.shape.in_size]), total)


def _before(model: _Model, probe: Probe, name: str, *, relu: bool = True) -> str:
    """Compute the tensor that the kernel reads by a convolution, so that it comes in the runtime's own layout."""
    weight = model.weight(f"{name}_w", [probe.n_in, _IN, *[1] * len(probe.shape.kernel)])
    out = model.add("Conv", ["x", weight], f"{name}_c")
    return model.add("Relu", [out], name) if relu else out


def _accumulate(model: _Model, result: str, total: str, name: str) -> str:
    if total:
        result = model.add("Add", [result, total], f"{name}_s")
    return model.add("Relu", [result], name)


def _linear(probe: Probe, count: int) -> bytes:
    model, total = _Model(), ""
    for i in range(count):
        weight = model.kernel(probe, f"w{i}", [probe.n_in, probe.n_out], 0)
        total = model.add("Gemm", ["x", weight, total or model.weight("b", [probe.n_out])], f"y{i}")
    return model.serialised(("x", [probe.shape.rows, probe.n_in]), total)


def _output_padding(shape: Shape) -> list[int]:
    padding = shape.padding[: len(shape.kernel)]
    axes = zip(shape.in_size, shape.out_size, shape.kernel, shape.stride, padding, shape.dilation, strict=True)
    return [out - ((size - 1) * stride - 2 * pad + gap * (kernel - 1) + 1) for size, out, kernel, stride, pad, gap in axes]
