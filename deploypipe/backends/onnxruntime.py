"""ONNX Runtime on the CPU: builds the optimised model, times it and its kernels."""

import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx

from deploypipe.backends.base import MAX_FOREIGN, Arrays, Facts, KernelTime, Profile, Timing
from deploypipe.backends.ort_origin import Origins
from deploypipe.errors import BackendError, TargetError, nearest
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.targets import Target

_SCRIPT = Path(__file__).with_name("ort_measure.py")
_PROVIDER = "CPUExecutionProvider"
_PRECISIONS = ("fp32",)
_ATTEMPTS = 3
_MAX_PROFILED = 100  # one profiled run of a 50-node model writes about 40 kB


class OnnxRuntime:
    """The PyPI package `onnxruntime`, CPU provider, fp32."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"

    def available(self) -> tuple[bool, str]:
        """Return whether the package is installed here."""
        found = importlib.util.find_spec("onnxruntime") is not None
        return found, "" if found else "pip install onnxruntime"

    def describe_job(self, target: Target) -> Job:
        """Ask for runtime version, processor and its vector extensions."""
        return _job("describe", target, {}, timeout_s=120)

    def read_description(self, result: JobResult) -> Facts:
        """Return the facts: runtime, version, processor, threads."""
        return _answer(result)

    def build_job(self, model: Path, target: Target) -> Job:
        """Save the optimised model; it is bound to this kind of CPU."""
        details = {"model": "model.onnx", "artifact": "artifact.onnx"}
        return _job("build", target, details, push={"model.onnx": model}, pull=("artifact.onnx",))

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time whole models in turns; a built artefact is a model like another."""
        files = {f"model-{i}.onnx": path for i, path in enumerate(models.values())}
        return _job("bench", target, {"models": dict(zip(models, files, strict=True))}, push=files)

    def read_bench(self, result: JobResult) -> dict[str, Timing]:
        """Return name -> timing."""
        answer = _answer(result)
        load = answer["foreign_load"]
        return {
            name: Timing(median, p10, p90, runs, load, cpu) for name, (median, p10, p90, runs, cpu) in answer["models"].items()
        }

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time kernels; for models given as files also ask for the optimised graph, which tells what feeds each kernel."""
        files = {f"model-{i}.onnx": source for i, source in enumerate(models.values())}
        optimised = {name: f"optimised-{i}.onnx" for i, (name, source) in enumerate(models.items()) if isinstance(source, Path)}
        target = target.replace(runs=min(target.measure.runs, _MAX_PROFILED))
        details = {"models": dict(zip(models, files, strict=True)), "optimised": optimised}
        return _job("profile", target, details, push=files, pull=tuple(optimised.values()))

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels; each knows its layer's weight or the layers that feed it."""
        answer = _answer(result)
        profiles = {}
        for index, (name, source) in enumerate(models.items()):
            seen = result.pulled.get(f"optimised-{index}.onnx")
            model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
            origins = Origins(model, onnx.load(str(seen)) if seen else None)
            profiles[name] = Profile(_kernels(answer["models"][name], origins), answer["foreign_load"])
        return profiles

    def run_job(self, model: Path, inputs: Arrays, target: Target) -> Job:
        """Run on several inputs: the first axis of every array counts them."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **inputs)
        details = {"model": "model.onnx", "inputs": "inputs.npz", "outputs": "outputs.npz"}
        push: dict[str, Path | bytes] = {"model.onnx": model, "inputs.npz": buffer.getvalue()}
        return _job("run", target, details, push=push, pull=("outputs.npz",))

    def read_run(self, result: JobResult) -> Arrays:
        """Return output name -> array with the same first axis, in the model's order."""
        names = _answer(result)["outputs"]
        with np.load(result.pulled["outputs.npz"], allow_pickle=False) as outputs:
            return {name: outputs[name] for name in names}


def _job(
    task: str,
    target: Target,
    details: Mapping[str, Any],
    *,
    push: Mapping[str, Path | bytes] | None = None,
    pull: tuple[str, ...] = (),
    timeout_s: float = 900.0,
) -> Job:
    if target.build.precision not in _PRECISIONS:
        raise TargetError(
            f"backend onnxruntime has no precision '{target.build.precision}'",
            at=f"{target.path or target.name}: build.precision",
            fix=nearest(target.build.precision, _PRECISIONS),
        )
    measure = target.measure
    request = {
        "task": task, "provider": _PROVIDER, "threads": measure.threads, "warmup": measure.warmup, "runs": measure.runs,
        "max_foreign": MAX_FOREIGN, "attempts": _ATTEMPTS, **details,
    }  # fmt: skip
    # As content: a linked script would find this package's own onnxruntime.py beside it and import that.
    files = {"ort_measure.py": _SCRIPT.read_bytes(), "request.json": json.dumps(request).encode(), **(push or {})}
    return Job((PYTHON, "ort_measure.py", "request.json"), files, ("answer.json", *pull), timeout_s=timeout_s)


def _answer(result: JobResult) -> dict[str, Any]:
    try:
        answer = json.loads(result.pulled["answer.json"].read_text())
    except (KeyError, OSError, ValueError) as error:
        raise BackendError(f"the measuring script answered nonsense: {error}", at="answer.json", fix="run it again") from error
    assert isinstance(answer, dict)
    return answer


def _kernels(rows: list[list[Any]], origins: Origins) -> tuple[KernelTime, ...]:
    kernels: list[KernelTime] = []
    feeds: tuple[str, ...] = ()
    for name, op, median, p10, p90, runs in rows:
        weight = origins.weight(name)
        # A node that the optimiser made without a name follows what ran just before it.
        feeds = () if weight else origins.feeds(name) or feeds
        kernels.append(KernelTime(name, op, weight, feeds, median, p10, p90, runs))
        feeds = feeds or (weight,)
    return tuple(kernels)
