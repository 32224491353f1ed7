"""Which layer of the exported model each kernel of ONNX Runtime is, and which layers feed the others.

The optimiser fuses, renames and re-lays nodes. What survives: a node that kept its layout keeps its name; one that did
not is called after the tensor that it wrote in the exported model, plus `_nchwc`. From that tensor the nearest layer
before it is the kernel's own.
"""

from collections.abc import Iterator, Sequence

import onnx

_LAYER_OPS = ("Conv", "Gemm", "MatMul")  # also inside FusedConv, ConvTranspose, FusedGemm, FusedMatMul


class Origins:
    """Answers for one exported model; `optimised` is what the runtime made of it (only needed for `feeds`)."""

    def __init__(self, model: onnx.ModelProto, optimised: onnx.ModelProto | None = None) -> None:
        self._exported = _Nodes(model.graph)
        self._optimised = _Nodes(optimised.graph) if optimised else self._exported

    def weight(self, kernel: str) -> str:
        """Return the weight of the layer that the kernel called `kernel` computes, or ""."""
        found = self._exported.named.get(kernel) or self._optimised.named.get(kernel)
        if found is not None and not self._optimised.is_layer(found) and not self._exported.is_layer(found):
            return ""
        node = self._exported.named.get(kernel)
        if node is not None and self._exported.is_layer(node):
            return self._exported.weight(node)
        layers = self._exported.layers_before([kernel.removesuffix("_nchwc")])
        return self._exported.weight(layers[0]) if len(layers) == 1 else ""

    def feeds(self, kernel: str) -> tuple[str, ...]:
        """Return the weights of the nearest layers before the kernel called `kernel`."""
        node = self._optimised.named.get(kernel)
        if node is None:
            return ()
        weights = [self.weight(layer.name) for layer in self._optimised.layers_before(node.input)]
        return tuple(dict.fromkeys(weight for weight in weights if weight))


class _Nodes:
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
