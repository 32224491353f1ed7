"""Stand-ins for the Python packages `tensorrt` and `polygraphy`, for tests: what the Python way calls, answered by the stand-in
for trtexec. Names and parameters are those of Polygraphy 0.53, which a test compares where it is installed.

    install(folder, (10, 3, 0))      # writes folder/tensorrt.py and folder/polygraphy/...
"""

from pathlib import Path

TENSORRT = '''"""A stand-in."""
from types import SimpleNamespace

__version__ = "{version}"
Logger = type("Logger", (), {{"ERROR": 1, "__init__": lambda self, level: None}})
ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
LayerInformationFormat = SimpleNamespace(JSON="json")


class Builder:
    def __init__(self, logger):
        if {headless}:
            raise TypeError("pybind11::init(): factory function returned nullptr")


class IProfiler:
    def __init__(self):
        self.ready = True
'''
TRT = '''"""A stand-in."""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, {tests!r})
import trtexec_standin as real

import numpy as np
import tensorrt

VERSION, DEVICE = {version!r}, "NVIDIA Orin"


class CreateConfig:
    def __init__(self, *, fp16=False, sparse_weights=False, profiling_verbosity=None, load_timing_cache=None):
        self.asked = dict(fp16=fp16, sparse=sparse_weights, verbosity=profiling_verbosity, cache=load_timing_cache)


def network_from_onnx_path(path, strongly_typed=False):
    return SimpleNamespace(path=path, typed=strongly_typed)


def engine_from_network(network, config, save_timing_cache=None):
    asked = config.asked
    options = {{"--onnx": network.path}}
    options |= {{"--stronglyTyped": ""}} if network.typed else {{}}
    options |= {{"--fp16": ""}} if asked["fp16"] else {{}}
    options |= {{"--sparsity": "enable"}} if asked["sparse"] else {{}}
    options |= {{"--profilingVerbosity": asked["verbosity"], "--timingCacheFile": save_timing_cache}}
    real.parsed([name + ("=" + value if value else "") for name, value in options.items()], VERSION)
    return Engine(real.built(options, VERSION, DEVICE))


class Engine:
    def __init__(self, content):
        self.content = content
        self.layers = real.json.loads(content.split(b"\\n", 5)[4])

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, format):
        assert format == tensorrt.LayerInformationFormat.JSON
        real.export_layers("inspected.json", self.layers, True)
        return Path("inspected.json").read_text()


def save_engine(engine, path):
    Path(path).write_bytes(engine.content)


def engine_from_bytes(serialized_engine):
    return Engine(serialized_engine)


class TrtRunner:
    def __init__(self, engine):
        self.engine, self.context = engine, SimpleNamespace(profiler=None)

    def __enter__(self):
        self.model = real.model_of(self.engine.content)
        return self

    def __exit__(self, *error):
        del self.model

    def get_input_metadata(self):
        shapes = {{v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in self.model.graph.input}}
        return {{name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}}

    def infer(self, feed_dict, check_inputs=True, copy_outputs_to_host=True):
        for name, _, us in self.engine.layers:
            if self.context.profiler:
                assert self.context.profiler.ready
                self.context.profiler.report_layer_time(name, 1.2 * us / 1000)
        if copy_outputs_to_host:
            for name, value in feed_dict.items():
                np.asarray(value, np.float32).tofile(name + ".feed")
            return real.compute(self.model, ",".join(f"{{name}}:{{name}}.feed" for name in feed_dict))

    def last_inference_time(self):
        return sum(us for _, _, us in self.engine.layers) / 1e6
'''
CUDA = '''"""A stand-in."""


class DeviceArray:
    def __init__(self, shape=None, dtype=None):
        self.shape, self.dtype = shape, dtype

    def copy_from(self, host_buffer, stream=None):
        assert (host_buffer.shape, host_buffer.dtype) == (self.shape, self.dtype)
        return self
'''
GPU = """#!/bin/sh
[ "$*" = "--query-gpu=name,compute_cap --format=csv,noheader" ] && echo "NVIDIA Orin, 8.7"
"""


def install(folder: Path, version: tuple[int, int, int], *, headless: bool = False) -> None:
    """Write the packages, and nvidia-smi."""
    files = {
        "tensorrt.py": TENSORRT.format(version=".".join(map(str, version)), headless=headless),
        "polygraphy/__init__.py": "",
        "polygraphy/backend/__init__.py": "",
        "polygraphy/backend/trt.py": TRT.format(tests=str(Path(__file__).parent), version=version),
        "polygraphy/cuda.py": CUDA,
        "nvidia-smi": GPU,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "nvidia-smi").chmod(0o755)
