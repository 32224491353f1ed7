"""The layers of an exported model, as backends need them to recognise a runtime's kernels."""

from collections.abc import Iterator, Sequence

import onnx

_LAYER_OPS = ("Conv", "Gemm", "MatMul")  # also inside FusedConv, ConvTranspose, FusedGemm, FusedMatMul


class Nodes:
    """A graph's nodes by name and by the tensors that they write."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.named = {node.name: node for node in graph.node if node.name}
        self.writer = {tensor: node for node in graph.node for tensor in node.output if tensor}
        # A weight may also come from a node without inputs of its own, which the runtime folds into a constant.
        self.constant = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            if (node.input and all(name in self.constant for name in node.input)) or node.op_type == "Constant":
                self.constant.update(node.output)

    def is_layer(self, node: onnx.NodeProto) -> bool:
        """Return whether a node applies a weight."""
        return any(op in node.op_type for op in _LAYER_OPS) and bool(self.weight(node))

    def weight(self, node: onnx.NodeProto) -> str:
        """Return the constant operand of a layer: the second input, or the first if the second is no constant."""
        operands: Sequence[str] = [node.input[i] for i in (1, 0) if i < len(node.input)]
        return next((name for name in operands if name in self.constant), "")

    def layers_before(self, tensors: Sequence[str]) -> list[onnx.NodeProto]:
        """Return the nearest layers from which `tensors` are computed, walking back through all other nodes."""
        return list(self._walk(tensors))

    def _walk(self, tensors: Sequence[str]) -> Iterator[onnx.NodeProto]:
        seen: set[str] = set()
        waiting = list(tensors)
        while waiting:
            tensor = waiting.pop()
            node = self.writer.get(tensor)
            if node is None or tensor in seen:
                continue
            seen.add(tensor)
            if self.is_layer(node):
                yield node
            else:
                waiting.extend(node.input)
