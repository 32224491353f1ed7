"""TensorRT for people: the exact commands to type on a device, and what its builder said about 2:4 sparsity, in a sentence."""

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import numpy_helper

from deploypipe.backends import trt_flags
from deploypipe.two_four import holds

_GENERATIONS = {
    "TensorRT 8.4 and 8.5 (JetPack 5)": (8, 5, 2),
    "TensorRT 8.6 (JetPack 6.0)": (8, 6, 2),
    "TensorRT 10 (JetPack 6.1 and later)": (10, 3, 0),
    "TensorRT 11": (11, 1, 0),
}
_WARMUP_MS = 500
_SPARSE_SINCE = (8, 0)  # compute capability of Ampere, whose tensor cores were the first to skip zeros


def by_hand(models: Mapping[str, str], precision: str, runs: int) -> str:
    """Return in Markdown what to type for each model (name -> ONNX file), by generation of trtexec."""
    parts = []
    for title, version in _GENERATIONS.items():
        lines = []
        for name, file in models.items():
            plan = f"{name}.plan"
            build = trt_flags.build(version, file, plan, precision, sparse=True, cache="timing.cache")
            measure = trt_flags.measure(version, plan, runs, _WARMUP_MS, f"{name}-times.json")
            profile = trt_flags.profile(version, plan, runs, _WARMUP_MS, f"{name}-profile.json", f"{name}-layers.json")
            lines += [f"trtexec {' '.join(arguments)}" for arguments in (build, measure, profile)]
        parts.append(f"{title}:\n\n```\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(parts)


def n_two_four(model: onnx.ModelProto) -> int:
    """Return how many weights of layers hold the 2:4 pattern along their input channels."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = {node.input[1]: _inputs_axis(node) for node in model.graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}}
    found = ((weights[name], axis) for name, axis in axes.items() if name in weights and len(weights[name].dims) >= 2)
    return sum(holds(numpy_helper.to_array(tensor), axis) for tensor, axis in found)


def sparsity_verdict(built: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what became of weights that hold the 2:4 pattern; nothing if none do."""
    held, found, chose = built.get("two_four", 0), built.get("sparse_found"), built.get("sparse_chose", 0)
    capability = built.get("capability", "")
    if not (held or found):
        return ()
    if not chose and _too_old(capability):
        return (f"{built['gpu']} (compute capability {capability}) has no sparse tensor cores: 2:4 gives nothing on it",)
    if found is None:
        said = "TensorRT says nothing about sparse kernels: whether it uses them is not known"
        return (f"the 2:4 pattern is in {_counted(held, 'weight')}, and {said}",)
    if not found:
        said = "TensorRT found no layer that could use sparse kernels"
        return (f"the 2:4 pattern is in {_counted(held, 'weight')}, and {said}: 2:4 gave nothing here",)
    evidence = f"TensorRT found {_counted(found, 'layer')} that could use sparse kernels and chose them for {chose}"
    return (f"{evidence}: 2:4 gave nothing here" if not chose else evidence,)


def _inputs_axis(node: onnx.NodeProto) -> int:
    """Return along which axis of a layer's weight its input channels lie."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "Conv" or transposed else 0


def _too_old(capability: str) -> bool:
    """Return whether a GPU is known to be from before sparse tensor cores."""
    parts = capability.split(".")
    return all(part.isdigit() for part in parts) and tuple(map(int, parts)) < _SPARSE_SINCE


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
