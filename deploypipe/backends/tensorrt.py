"""TensorRT: engines are built on the device that runs them, from ONNX files that state their precision."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.compose

from deploypipe.backends import stopwatch
from deploypipe.backends.base import Arrays, Profile
from deploypipe.backends.scripted import Scripted, answer
from deploypipe.backends.trt_flags import INSTALL
from deploypipe.backends.trt_hand import by_hand, n_two_four, sparsity_verdict
from deploypipe.backends.trt_layers import kernels
from deploypipe.backends.trt_opset import lowered
from deploypipe.export import load_onnx
from deploypipe.job import Job, JobResult
from deploypipe.precision import tiny, typed
from deploypipe.targets import Target

PROGRAM = "/usr/src/tensorrt/bin/trtexec"
_PER_MODEL_S, _BASE_S = 240.0, 600.0  # a build tries many kernels; a first one on a small board takes minutes
_PER_PROBE_S = 20.0
_MAX_PROFILED = 300


class TensorRt(Scripted):
    """NVIDIA's TensorRT from 8.4 to 11, by `trtexec` or by Python; strongly typed wherever the version knows that.

    The artifact is a zip of the engine, of what it was built on, and of what its builder said (`build.log`). It holds for that
    device and version alone, and is refused elsewhere. **Not run on hardware yet**: jobs, flags and formats follow NVIDIA's
    sources, see `trt_flags.py`.
    """

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".zip"
    script: ClassVar[str] = "trt_measure.py"
    beside: ClassVar[tuple[str, ...]] = ("trt_flags.py", "trt_answers.py", "trt_python.py")
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    options: ClassVar[Mapping[str, Any]] = {"sparse": True}
    two_four: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-2  # of half precision, with sums in half precision where TensorRT finds that quicker

    def available(self) -> tuple[bool, str]:
        """Return whether TensorRT is on this machine; a device that is reached over the network needs it there instead."""
        bindings = importlib.util.find_spec("tensorrt") and importlib.util.find_spec("polygraphy")
        found = bool(shutil.which("trtexec") or shutil.which(PROGRAM) or bindings)
        return found, "" if found else f"no trtexec on PATH, and not both of Python's tensorrt and polygraphy: {INSTALL}"

    def describe_job(self, target: Target) -> Job:
        """Ask for versions and device facts, by building something tiny."""
        return self.job("describe", target, {"model": "tiny.onnx"}, {"tiny.onnx": tiny()}, timeout_s=_BASE_S)

    def build_job(self, model: Path, target: Target) -> Job:
        """Build the engine, packed with what it was built on."""
        artifact = "artifact" + self.suffix
        stated = self.stated(model, target)
        details = {"model": "model.onnx", "artifact": artifact, "two_four": {"model.onnx": n_two_four(_loaded(stated))}}
        return self.job("build", target, details, {"model.onnx": stated}, (artifact,), _BASE_S)

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time whole models in turns; ONNX files are built first, engines are only timed.

        Probes, which come as bytes, are timed side by side in one engine, by the sums of their layers: a build for each would
        take most of a day.
        """
        probes = {name: source for name, source in models.items() if isinstance(source, bytes)}
        if len(probes) < len(models):
            return self._models_job("bench", models, target)
        self.check_precision(target)
        side_by_side = _written(joined(list(probes.values())), target)
        details = {"model": "probes.onnx", "names": list(probes)}
        timeout = _BASE_S + _PER_PROBE_S * len(probes)
        return self.job("probes", target, details, {"probes.onnx": side_by_side}, timeout_s=timeout)

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time the layers of models, beside each model as a whole."""
        return self._models_job("profile", models, target.replace(runs=min(target.measure.runs, _MAX_PROFILED)))

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels, scaled so that they add up to the whole model; `Profile.ratio` is their sum over it before.

        A built engine does not hold the names of weights: its kernels have none.
        """
        found = answer(result)["models"]
        profiles = {}
        for name, source in models.items():
            model = None if is_engine(source) else _loaded(source)
            rows = kernels(found[name], model)
            ratio = sum(kernel.median_us for kernel in rows) / found[name]["whole_us"]
            profiles[name] = Profile(tuple(kernel.times(1 / ratio) for kernel in rows), ratio=ratio)
        return profiles

    def run_job(self, model: Path, inputs: Arrays, target: Target) -> Job:
        """Run on several inputs: the first axis of every array counts them."""
        push: dict[str, Path | bytes] = {"model.onnx": self._stated(model, target)}
        rows: list[dict[str, str]] = []
        for i in range(len(next(iter(inputs.values())))):
            rows.append({name: f"input-{i}-{number}.bin" for number, name in enumerate(inputs)})
            push |= {file: np.ascontiguousarray(inputs[name][i]).tobytes() for name, file in rows[-1].items()}
        return self.job("run", target, {"model": "model.onnx", "inputs": rows}, push, timeout_s=_BASE_S)

    def read_run(self, result: JobResult) -> Arrays:
        """Return output name -> array with the same first axis, in the model's order."""
        rows = answer(result)["outputs"]
        return {
            name: np.stack([np.array(row[name]["values"], np.float32).reshape(row[name]["shape"]) for row in rows])
            for name in stopwatch.in_order(rows[0])  # trtexec writes them in any order
        }

    def told(self, target: Target, push: Mapping[str, Path | bytes]) -> Mapping[str, Any]:
        """Return the target's precision and program."""
        return {"precision": target.build.precision, "tool": target.build.tool}

    def stated(self, model: Path | bytes, target: Target) -> bytes:
        """Return the model with the target's precision written into it, in operations that every version of TensorRT reads."""
        self.check_precision(target)
        return _written(_loaded(model), target)

    def owner_job(self, models: Mapping[str, Path], target: Target) -> Job:
        """Ask for everything at once: device, latency of each model, times of its layers, what became of 2:4 sparsity.

        The files are given as they are: they state their precision already.
        """
        files = {f"{name}.onnx": path for name, path in models.items()}
        held = {file: n_two_four(_loaded(path)) for file, path in files.items()}
        details = {"models": dict(zip(models, files, strict=True)), "two_four": held, "tiny": "tiny.onnx"}
        details |= {"answer": "results.json"}
        return self.job("report", target, details, {**files, "tiny.onnx": tiny()}, ("results.json",), _BASE_S)

    def by_hand(self, models: Mapping[str, str], target: Target) -> str:
        """Return the exact commands for each generation of trtexec."""
        return by_hand(models, target.build.precision, target.measure.runs)

    def verdict(self, built: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what the builder said of 2:4 sparsity, where weights hold that pattern."""
        return sparsity_verdict(built)

    def _stated(self, source: Path | bytes, target: Target) -> Path | bytes:
        """Return what a job is given: an engine as it is."""
        return source if is_engine(source) else self.stated(source, target)

    def _models_job(self, task: str, models: Mapping[str, Path | bytes], target: Target) -> Job:
        files = {f"model-{i}.onnx": self._stated(source, target) for i, source in enumerate(models.values())}
        timeout = _BASE_S + _PER_MODEL_S * len(models)
        return self.job(task, target, {"models": dict(zip(models, files, strict=True))}, files, timeout_s=timeout)


def joined(models: Sequence[bytes]) -> onnx.ModelProto:
    """Return one model in which all of `models` lie side by side; the nodes and tensors of model 3 are called `m3__...`."""
    parts = [onnx.compose.add_prefix(onnx.load_from_string(model), f"m{i}__") for i, model in enumerate(models)]
    whole = onnx.ModelProto()
    whole.CopyFrom(parts[0])
    for part in (model.graph for model in parts[1:]):
        for field in ("node", "initializer", "input", "output"):
            getattr(whole.graph, field).extend(getattr(part, field))
    return whole


def is_engine(source: Path | bytes) -> bool:
    """Return whether this is a built artifact."""
    return isinstance(source, Path) and source.suffix == TensorRt.suffix


def _loaded(source: Path | bytes) -> onnx.ModelProto:
    return onnx.load_from_string(source) if isinstance(source, bytes) else load_onnx(source)


def _written(model: onnx.ModelProto, target: Target) -> bytes:
    return bytes(typed(lowered(model), target.build.precision).SerializeToString())
