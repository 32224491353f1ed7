"""OpenVINO on the CPU: builds its intermediate representation, times it and its kernels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx

from deploypipe.backends.base import KernelTime, Profile
from deploypipe.backends.exported import Nodes
from deploypipe.backends.scripted import Scripted, answer
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target

_BIAS_APART = "/WithoutBiases"  # what OpenVINO adds to a convolution's name when it reads the bias as a node of its own


class OpenVino(Scripted):
    """The PyPI package `openvino`, CPU device, fp32.

    The artifact is a zip of `model.xml` and `model.bin`; unpacked, any OpenVINO reads them. Latency is taken with the input
    already in the request's tensor and the outputs left there, as a program would run it.
    """

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".zip"
    script: ClassVar[str] = "ov_measure.py"

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time kernels, and ask for the graph that the runtime made of each model."""
        files = {f"model-{i}.onnx": source for i, source in enumerate(models.values())}
        return self.job("profile", target, {"models": dict(zip(models, files, strict=True))}, files)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels; each knows its layer's weight or the layers that feed it."""
        found = answer(result)
        profiles = {}
        for name, source in models.items():
            model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
            profiles[name] = Profile(kernels(found["models"][name], model), found["foreign_load"])
        return profiles


def kernels(found: Mapping[str, Any], model: onnx.ModelProto) -> tuple[KernelTime, ...]:
    """Tell which layers of the exported `model` the profiled kernels are.

    Args:
        found: `graph` maps each node of the runtime's graph to [names of the nodes fused into it, its inputs]; `kernels` are
            rows [node, operation, median, p10, p90, runs] in the order of execution.
        model: As it was profiled.
    """
    exported, graph = Nodes(model.graph), found["graph"]
    weights = {name: _weight(fused, exported) for name, (fused, _) in graph.items()}
    return tuple(
        KernelTime(name, op, weights[name], () if weights[name] else _feeds(name, graph, weights), median, p10, p90, runs)
        for name, op, median, p10, p90, runs in found["kernels"]
    )


def _weight(fused: list[str], exported: Nodes) -> str:
    """Return the weight of the first layer among the nodes that were fused into a kernel, or ""."""
    for name in fused:
        plain = name.removesuffix(_BIAS_APART)
        # A node without a name, and the last one before an output, is called after the tensor that it writes.
        node = exported.named.get(plain) or exported.writer.get(plain)
        if node is not None and exported.is_layer(node):
            return exported.weight(node)
    return ""


def _feeds(kernel: str, graph: Mapping[str, Any], weights: Mapping[str, str]) -> tuple[str, ...]:
    """Walk back from a kernel to the nearest layers."""
    found: dict[str, None] = {}
    seen, waiting = {kernel}, list(graph[kernel][1])
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if weights[name]:
            found[weights[name]] = None
        else:
            waiting.extend(graph[name][1])
    return tuple(found)
