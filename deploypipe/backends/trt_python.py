"""TensorRT by its Python interface, through Polygraphy: what `trtexec` does elsewhere. Pushed beside `trt_measure.py`.

For machines where `import tensorrt` works and there is no trtexec, such as those with NVIDIA's wheels. Needs `polygraphy`,
which hides what differs between versions 8.6 to 11. Not run on hardware yet.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import trt_answers
from polygraphy.backend.trt import CreateConfig, TrtRunner, engine_from_bytes, engine_from_network, network_from_onnx_path
from polygraphy.backend.trt import save_engine as keep
from polygraphy.cuda import DeviceArray


class PythonApi:
    """The same methods as `Trtexec`."""

    def __init__(self) -> None:
        self.version = tuple(int(part) for part in trt.__version__.split(".")[:3])
        trt.Builder(trt.Logger(trt.Logger.ERROR))  # raises TypeError without a GPU: better now than in the middle of a job

    def build(self, model: str, engine: str, request: dict[str, Any]) -> dict[str, Any]:
        """Build an engine; the builder's verdict on sparsity is only in trtexec's log, so it is not known here."""
        import trt_measure  # noqa: PLC0415 - it is the program that imports this module

        start = time.monotonic()
        cache = str(trt_measure.timing_cache(self.version))
        weak = {"fp16": True} if self.version < (10, 0) and request["precision"] == "fp16" else {}
        config = CreateConfig(
            sparse_weights=request["sparse"],
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
            load_timing_cache=cache,
            **weak,
        )
        typed = {} if self.version < (10, 0) else {"strongly_typed": True}
        keep(engine_from_network(network_from_onnx_path(model, **typed), config, save_timing_cache=cache), engine)
        return {**device(), "seconds": round(time.monotonic() - start, 1), "arguments": ["polygraphy"]}

    def times(self, engine: str, runs: int, warmup_ms: int) -> tuple[list[float], dict[str, str]]:
        """Return microseconds of each run, and the device.

        Inputs and outputs stay on the device, as with trtexec; other than there, the time is the host's, without a CUDA graph.
        """
        with TrtRunner(engine_from_bytes(Path(engine).read_bytes())) as runner:
            feed = _noise(runner)
            for _ in range(max(3, warmup_ms // 10)):
                runner.infer(feed, copy_outputs_to_host=False)
            us = []
            for _ in range(runs):
                runner.infer(feed, copy_outputs_to_host=False)
                us.append(1e6 * runner.last_inference_time())
        return us, device()

    def layers(self, engine: str, runs: int, warmup_ms: int) -> dict[str, Any]:
        """Return the median microseconds of each layer, in order, and the model's nodes in each."""
        loaded = engine_from_bytes(Path(engine).read_bytes())
        with TrtRunner(loaded) as runner:
            seen = _Layers()
            runner.context.profiler = seen
            feed = _noise(runner)
            for _ in range(runs):
                runner.infer(feed, copy_outputs_to_host=False)
        inspector = loaded.create_engine_inspector()
        info = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        times = [[name, 1000 * float(np.median(ms)), len(ms)] for name, ms in seen.ms.items()]
        return {"times": times, "nodes": trt_answers.layer_nodes(info)}

    def outputs(self, engine: str, inputs: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Run once on raw files; return output -> shape and values."""
        with TrtRunner(engine_from_bytes(Path(engine).read_bytes())) as runner:
            wanted = runner.get_input_metadata()
            feed = {name: np.fromfile(file, np.float32).reshape(tuple(wanted[name].shape)) for name, file in inputs.items()}
            found = {name: np.asarray(value) for name, value in runner.infer(feed).items()}
        return {name: {"shape": list(value.shape), "values": value.ravel().tolist()} for name, value in found.items()}


class _Layers(trt.IProfiler):  # type: ignore[misc] # known on the device only
    """Collects the layers' milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.ms: dict[str, list[float]] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.ms.setdefault(layer_name, []).append(ms)


def device() -> dict[str, str]:
    """Return the GPU's name, which TensorRT itself does not tell."""
    import trt_measure  # noqa: PLC0415

    said = trt_measure.answer_of(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"])
    name, _, capability = said.partition(",")
    return {"gpu": name.strip() or "unknown GPU", "capability": capability.strip()}


def _noise(runner: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shapes = {name: tuple(about.shape) for name, about in runner.get_input_metadata().items()}
    noise = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: DeviceArray(shape=shapes[name], dtype=np.float32).copy_from(value) for name, value in noise.items()}
