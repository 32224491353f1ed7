"""Build, time or run models with ncnn on the CPU: runs alone, with only Python, NumPy, ncnn and (for ONNX files) pnnx.

    python3 ncnn_measure.py request.json      # writes answer.json beside it

It is pushed to the target with `stopwatch.py` beside it, so it imports nothing of deploypipe. Models are ONNX files, or zips
of `model.param` and `model.bin`. ncnn reports failures by return codes and on stderr, never by exceptions.
"""

from __future__ import annotations

import importlib.util
import subprocess  # noqa: TID251 - the converter is a program, and this script runs on the target, not in the library
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import ncnn
import numpy as np
import stopwatch

PARTS = ("model.param", "model.bin")
CONVERTED = ("model.ncnn.param", "model.ncnn.bin")  # what pnnx calls them
HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")
SIZES = {1: "0={0}", 2: "0={1} 1={0}", 3: "0={2} 1={1} 2={0}", 4: "0={3} 1={2} 11={1} 2={0}"}  # of an Input layer


def converted(model: str, shapes: list[list[int]]) -> tuple[str, bytes]:
    """Convert an ONNX file by pnnx; return the text of `model.param`, with the inputs' shapes, and the weights."""
    found = importlib.util.find_spec("pnnx")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the converter is missing: pip install pnnx")
    program = str(Path(found.submodule_search_locations[0], "pnnx"))
    wanted = ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:  # it writes ten files beside its input
        Path(folder, "model.onnx").write_bytes(Path(model).read_bytes())
        done = subprocess.run(  # noqa: S603
            [program, "model.onnx", f"inputshape={wanted}", "fp16=0"],
            cwd=folder, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        param, weights = (Path(folder, name) for name in CONVERTED)
        if done.returncode != 0 or not param.is_file() or not weights.is_file():
            said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
            raise SystemExit(f"pnnx cannot convert the model (return code {done.returncode}): {said}")
        return stated(param.read_text(), shapes), weights.read_bytes()


def stated(param: str, shapes: list[list[int]]) -> str:
    """Write the shape of each input, without its batch axis, into its layer, where ncnn's own tools look for it."""
    left, lines = list(shapes), []
    for line in param.splitlines():
        if line.split()[:1] == ["Input"]:
            shape = left.pop(0)[1:]
            line += " " + SIZES[len(shape)].format(*shape)  # noqa: PLW2901
        lines.append(line)
    if left:
        raise SystemExit(f"pnnx left {len(left)} inputs out")
    return "\n".join(lines) + "\n"


def shapes_of(param: str) -> list[list[int]]:
    """Read back what `stated` wrote."""
    shapes = []
    for line in param.splitlines():
        if line.split()[:1] == ["Input"]:
            sizes = dict(pair.split("=") for pair in line.split() if "=" in pair)
            shapes.append([int(sizes[key]) for key in ("2", "11", "1", "0") if key in sizes])
    return shapes


class Network:
    """A loaded model with the threads that the request states, in full precision."""

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        self.param, weights = self.parts(path, request)
        self.shapes, self.net = shapes_of(self.param), ncnn.Net()
        self.net.opt.num_threads = request["threads"]
        self.net.opt.use_vulkan_compute = False
        for name in HALF:
            if not hasattr(self.net.opt, name):
                raise SystemExit(f"this ncnn has no option '{name}': its precision is unknown")
            setattr(self.net.opt, name, False)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in PARTS]
            files[0].write_text(self.param)
            files[1].write_bytes(weights)
            codes = (self.net.load_param(str(files[0])), self.net.load_model(str(files[1])))
        if codes != (0, 0):
            raise SystemExit(f"ncnn cannot load the model (return codes {codes}){self.foreign()}")

    @staticmethod
    def parts(path: str, request: dict[str, Any]) -> tuple[str, bytes]:
        """Return the text of `model.param` and the weights of an ONNX file or artefact."""
        if not zipfile.is_zipfile(path):
            return converted(path, request["shapes"][path])
        with zipfile.ZipFile(path) as packed:
            return packed.read(PARTS[0]).decode(), packed.read(PARTS[1])

    def foreign(self) -> str:
        """Name the operations that the converter passed on although ncnn has no layer for them."""
        kinds = {line.split()[0] for line in self.param.splitlines()[2:] if line.strip()}
        odd = sorted(kind for kind in kinds if "." in kind or "::" in kind)
        return f": it has no layer for {', '.join(odd)}" if odd else ""

    def mats(self, inputs: list[Any]) -> list[Any]:
        """Return the inputs, each without its batch axis, as ncnn takes them."""
        for array in inputs:
            if array.shape[0] != 1:
                raise SystemExit(f"ncnn computes one image at a time; the batch has {array.shape[0]}")
        return [ncnn.Mat(np.ascontiguousarray(array[0], np.float32)).clone() for array in inputs]

    def run(self, mats: list[Any]) -> list[Any]:
        """Compute; return the outputs in the runtime's own form."""
        outputs, names = [], self.net.input_names()
        if len(mats) != len(names):  # ncnn itself would read memory that nobody wrote
            raise SystemExit(f"the model has {len(names)} inputs, {len(mats)} were given")
        with self.net.create_extractor() as extractor:
            for name, mat in zip(names, mats):
                code = extractor.input(name, mat)
                if code != 0:
                    raise SystemExit(f"ncnn does not take input '{name}' (return code {code})")
            for name in stopwatch.in_order(self.net.output_names()):  # ncnn lists them as they are computed
                code, output = extractor.extract(name)
                if code != 0:
                    raise SystemExit(f"ncnn cannot compute output '{name}' (return code {code})")
                outputs.append(output)
        return outputs

    def sample(self) -> list[Any]:
        """Make one input for each argument."""
        return self.mats([stopwatch.sample_input([1, *shape], "f4") for shape in self.shapes])


def bench(request: dict[str, Any]) -> Any:
    """Time whole models in turns."""
    cores = stopwatch.Cores(request["threads"])
    opened = {name: Network(path, request) for name, path in request["models"].items()}
    return stopwatch.bench({name: partial(item.run, item.sample()) for name, item in opened.items()}, cores, request)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Convert, then load and run the result: return codes of converters prove nothing."""
    param, weights = converted(request["model"], request["shapes"][request["model"]])
    with zipfile.ZipFile(request["artifact"], "w") as packed:
        for name, content in zip(PARTS, (param.encode(), weights)):
            # A fixed date: the same model is the same file.
            packed.writestr(zipfile.ZipInfo(name), content)
    made = Network(request["artifact"], request)
    for output in made.run(made.sample()):
        if not np.isfinite(np.array(output)).all():
            raise SystemExit("the built model computes values that are no numbers")
    return {"bytes": Path(request["artifact"]).stat().st_size}


def run(request: dict[str, Any]) -> Any:
    """Run a model on several inputs."""
    made = Network(request["model"], request)
    n = len(made.net.output_names())
    names = ["output"] if n == 1 else [f"output_{i}" for i in range(n)]  # as they are called in the exported model

    def compute(inputs: dict[str, Any]) -> list[Any]:
        mats = made.mats([inputs[name] for name in stopwatch.in_order(inputs)])
        return [np.array(output)[None] for output in made.run(mats)]

    return stopwatch.run_all(names, compute, request)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which runtime this is, on which device."""
    return {"runtime": "ncnn", "version": ncnn.__version__, **stopwatch.device(request)}


if __name__ == "__main__":
    stopwatch.answer({"bench": bench, "build": build, "run": run, "describe": describe})
