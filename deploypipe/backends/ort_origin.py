"""Which layer of the exported model each kernel of ONNX Runtime is, and which layers feed the others.

The optimiser fuses, renames and re-lays nodes. What survives: a node that kept its layout keeps its name; one that did
not is called after the tensor that it wrote in the exported model, plus `_nchwc`. From that tensor the nearest layer
before it is the kernel's own.
"""

import onnx

from deploypipe.backends.exported import Nodes


class Origins:
    """Answers for one exported model; `optimised` is what the runtime made of it (only needed for `feeds`)."""

    def __init__(self, model: onnx.ModelProto, optimised: onnx.ModelProto | None = None) -> None:
        self._exported = Nodes(model.graph)
        self._optimised = Nodes(optimised.graph) if optimised else self._exported

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
