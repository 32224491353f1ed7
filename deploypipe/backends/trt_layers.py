"""Which layers of the exported model the layers of a TensorRT engine are: by the names of the ONNX nodes that it fused."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from deploypipe.backends.base import KernelTime
from deploypipe.backends.exported import Nodes

_COPY = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to ")
_FUSED = re.compile(
    r"\s*(?:\+|\|\||,|\.\.\.)\s*"
)  # "a + b", "a || b" (merged side by side), "PWN(a, b)", "{ForeignNode[a...b]}"
_WRAPPED = re.compile(r"PWN\(|ForeignNode\[|[(){}\[\]]")


def kernels(found: Mapping[str, Any], model: onnx.ModelProto | None) -> tuple[KernelTime, ...]:
    """Tell which layers of `model` the profiled layers of its engine are.

    A layer that fuses several weighted layers gives one row for each of them; its time is shared out by the number of their
    weights, which is exact for what TensorRT merges side by side (same input, same positions). Layers without a weight, such
    as copies between formats, are overhead that follows the nearest layers in front of it.

    Args:
        found: `rows` are [name, median, p10, p90 (microseconds), runs] in the order of execution; `nodes` maps a name to the
            ONNX nodes that the engine's own description states for it, where it does.
        model: As it was built; None if only the engine is at hand: its layers are then not attributed.
    """
    exported = Nodes((model or onnx.ModelProto()).graph)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer} if model else {}
    rows: list[KernelTime] = []
    for name, median, p10, p90, runs in found["rows"]:
        nodes = _nodes(name, found["nodes"].get(name, ()), exported)
        layers = {} if _COPY.match(name) else {exported.weight(node): node for node in nodes if exported.is_layer(node)}
        op = "Reformat" if _COPY.match(name) else next(iter([*layers.values(), *nodes]), onnx.NodeProto()).op_type
        if not layers:
            feeds = _feeds(nodes, exported)
            rows.append(KernelTime(name, op, "", feeds, median, p10, p90, runs))
        total = sum(sizes.get(weight, 1) for weight in layers)
        for weight, node in layers.items():
            share = sizes.get(weight, 1) / total
            rows.append(KernelTime(name, node.op_type, weight, (), share * median, share * p10, share * p90, runs))
    return tuple(rows)


def _nodes(name: str, stated: Sequence[str], exported: Nodes) -> list[onnx.NodeProto]:
    """Return the ONNX nodes that a layer is made of, as far as they can be told."""
    parts = _FUSED.split(_WRAPPED.sub(" ", _COPY.sub("", name)))
    names = dict.fromkeys([*stated, *(part.strip() for part in parts)])
    return [exported.named[part] for part in names if part in exported.named]


def _feeds(nodes: Sequence[onnx.NodeProto], exported: Nodes) -> tuple[str, ...]:
    before = exported.layers_before([tensor for node in nodes for tensor in node.input])
    return tuple(dict.fromkeys(exported.weight(node) for node in before))
