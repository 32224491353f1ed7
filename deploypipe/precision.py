"""Put a precision into an ONNX graph: strongly typed runtimes compute each operation in the type that the graph states."""

import re
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploypipe.errors import ModelError, UsageError, nearest

PRECISIONS = ("fp32", "fp16")
_HALF_MAX = 65504.0  # the largest finite half
_UNSAFE = re.compile(r"[^A-Za-z0-9_./:\-]")  # in names of nodes: some runtimes write them into JSON without escaping


def typed(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a copy of `model` that states `precision` itself.

    For "fp16" every weight and every tensor in between becomes float16, by ONNX Runtime's own converter, which leaves the
    operations that have no float16 form (such as TopK) in float32 between two casts. Inputs and outputs stay float32, with a
    cast behind and before them, so that callers do not notice. A model that is float16 already is returned as it is.

    Also, in every precision: weights that are one value or one block repeated become constants of their full size, and names of
    nodes keep only letters, digits and `_./:-`, each of them once.

    Raises:
        UsageError: The precision is unknown.
        ModelError: A weight is larger than float16 can hold.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision '{precision}'", at="build.precision", fix=nearest(precision, PRECISIONS))
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _fold_fills(made.graph)
    _rename_nodes(made.graph)
    return _halved(made) if precision == "fp16" and not is_half(made) else made


def write_typed(source: Path, target: Path, precision: str) -> Path:
    """Write the model in `source` with `precision` into `target`; the file appears complete or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    onnx.save(typed(onnx.load(str(source)), precision), str(temporary))
    return temporary.replace(target)


def is_half(model: onnx.ModelProto) -> bool:
    """Return whether the weights of a model are float16 already."""
    return any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    # Imported here: the converter brings its package's whole transformer tools along.
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            largest = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))
            if not largest <= _HALF_MAX:  # the converter would cut it off, silently
                raise ModelError(
                    f"weight '{tensor.name}' reaches {largest:g}, float16 ends at {_HALF_MAX:g}",
                    at="conversion to fp16",
                    fix='use a target with precision = "fp32", or rescale that layer',
                )
    converted = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=False)
    _sort_nodes(converted.graph)  # the converter appends its casts at the end
    _rename_nodes(converted.graph)
    result: onnx.ModelProto = converted
    return result


def _fold_fills(graph: onnx.GraphProto) -> None:
    """Turn each ConstantOfShape and Tile of what is known into a constant: a runtime may else take the weight for an input."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type in _FILLS and all(name in known for name in node.input)]:
        filled = _FILLS[node.op_type](node, *(numpy_helper.to_array(known[name]) for name in node.input))
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(filled), node.output[0]))
        graph.node.remove(node)
    used = _read_in(graph)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _read_in(graph: onnx.GraphProto) -> set[str]:
    """Return all names that are read in a graph, in those inside its nodes (If, Loop) too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return read.union(*map(_read_in, inner))


def _filled(node: onnx.NodeProto, shape: NDArray[np.generic]) -> NDArray[np.generic]:
    value = next((numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"), np.zeros(1, np.float32))
    return np.broadcast_to(value.reshape(()), tuple(int(n) for n in shape))


def _tiled(node: onnx.NodeProto, block: NDArray[np.generic], times: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.tile(block, tuple(int(n) for n in times))


_FILLS: dict[str, Callable[..., NDArray[np.generic]]] = {"ConstantOfShape": _filled, "Tile": _tiled}


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put every node behind those that it reads from."""
    nodes = list(graph.node)
    writer = {tensor: i for i, node in enumerate(nodes) for tensor in node.output if tensor}
    order = TopologicalSorter(
        {i: [writer[t] for t in node.input if t in writer] for i, node in enumerate(nodes)}
    ).static_order()
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)


def _rename_nodes(graph: onnx.GraphProto) -> None:
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        name = plain = _UNSAFE.sub("_", node.name) or f"{node.op_type}_{number}"
        count = 1
        while name in taken:
            count += 1
            name = f"{plain}_{count}"
        taken.add(name)
        node.name = name


def tiny() -> bytes:
    """Return a model that is next to nothing: it shows whether a runtime builds anything at all, and on which device."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "tiny",
        [value("x", TensorProto.FLOAT, [1, 8])],
        [value("y", TensorProto.FLOAT, [1, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
