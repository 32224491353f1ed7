"""The operator set that every TensorRT reads: a graph is written in it wherever that changes nothing of what it computes.

torch exports operator set 18 and later. TensorRT 8.5 and 8.6 (JetPack 5 and 6.0) read up to 17 (onnx-tensorrt, its
docs/operators.md of these releases); above all, 18 made the axes of reductions an input, which those releases do not document,
and torch writes global pooling as such a reduction. Later versions read 17 as well, so that all are given the same file.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, helper, numpy_helper

OPSET, IR = 17, 8
_UNDONE = 18  # what this set changed is undone below, or refused by ONNX's own checker
# Of these, 19 and 20 changed no more than the types that they take.
_MORE_TYPES = frozenset(("Cast", "Constant", "ConstantOfShape", "Equal", "Identity", "Reshape", "Shape", "Size"))
_MAIN = ("", "ai.onnx")


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` in operator set 17 if every operation has the same meaning there, and else as it is.

    Axes of reductions become an attribute again; an attribute that 17 does not know goes if it says what 17 does anyhow. What
    remains is judged by ONNX's checker and its shape inference, which know what 17 allows. The given model is left alone.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in _MAIN), 0)
    if opset <= OPSET or model.functions or not all(_can_be_told(node, opset) for node in model.graph.node):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = _constants(made.graph)
    for node in made.graph.node:
        if node.domain in _MAIN:
            _rewrite(node, opset, constants)
    for entry in made.opset_import:
        entry.version = OPSET if entry.domain in _MAIN else entry.version
    made.ir_version = min(made.ir_version, IR)
    try:
        # Older files must state the shapes of outputs, too.
        made = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
        onnx.checker.check_model(made)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return model
    return made


def _can_be_told(node: onnx.NodeProto, opset: int) -> bool:
    """Return whether a node has a counterpart in 17, as far as its operation tells; one with a graph inside is left alone."""
    if node.domain not in _MAIN:
        return True
    nested = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    if nested or not defs.has(node.op_type, OPSET, ""):
        return False
    return defs.get_schema(node.op_type, opset).since_version <= _UNDONE or node.op_type in _MORE_TYPES


def _rewrite(node: onnx.NodeProto, opset: int, constants: Mapping[str, NDArray[np.generic]]) -> None:
    """Say in the words of 17 what a node says in those of `opset`, as far as that can be said."""
    now, then = (defs.get_schema(node.op_type, version).attributes for version in (opset, OPSET))
    for attribute in list(node.attribute):
        usual = attribute.name in now and attribute == now[attribute.name].default_value
        # Without a count 17 splits into equal parts; the checker refuses if there are none.
        if attribute.name not in then and (usual or attribute.name == "num_outputs"):
            node.attribute.remove(attribute)
    if node.op_type.startswith("Reduce") and "axes" in then and len(node.input) == 2 and node.input[1] in constants:
        axes = constants[node.input[1]].tolist()
        del node.input[1]
        node.attribute.extend([helper.make_attribute("axes", axes)] if axes else [])


def _constants(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    """Return the small tensors of whole numbers that a graph knows: axes are among them."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    found |= {node.output[0]: a.t for node in nodes for a in node.attribute if a.name == "value"}
    whole = {name: tensor for name, tensor in found.items() if tensor.data_type == onnx.TensorProto.INT64}
    return {name: numpy_helper.to_array(tensor) for name, tensor in whole.items()}
