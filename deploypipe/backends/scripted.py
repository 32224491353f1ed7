"""A runtime with Python bindings: every job is one script that is pushed to the target, and leaves its answer as JSON."""

import importlib.util
import inspect
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deploypipe.backends.base import MAX_FOREIGN, Arrays, Facts, Pricing, Source, Timing
from deploypipe.errors import BackendError, TargetError, nearest
from deploypipe.job import PYTHON, Job, JobResult
from deploypipe.targets import Target

_FOLDER = Path(__file__).parent
_ATTEMPTS = 3
_LANES = {"avx512f": 16, "avx": 8}  # else 4, as SSE and NEON have


class Scripted:
    """What such backends have in common; each adds how its profile is asked for and read.

    Attributes:
        script: The measuring script's file, beside the backend's module or in this folder.
        beside: Files that are pushed beside it, likewise.
        precisions: Those that a target may ask for.
        options: Sent to the script with every request.
        packages: What must be importable; the backend's own name if none are listed.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    script: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ("stopwatch.py",)
    source: ClassVar[Source] = "onnx"
    pricing: ClassVar[Pricing] = "kernels"
    times_layers: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-3  # other kernels (Winograd, fused multiply-add)
    two_four: ClassVar[bool] = False
    computes: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    options: ClassVar[Mapping[str, Any]] = {}
    packages: ClassVar[tuple[str, ...]] = ()

    def available(self) -> tuple[bool, str]:
        """Return whether the packages are installed here, and else the line that installs those that are missing."""
        missing = [name for name in self.packages or (self.name,) if importlib.util.find_spec(name) is None]
        return not missing, f"pip install {' '.join(missing)}" if missing else ""

    def describe_job(self, target: Target) -> Job:
        """Ask for runtime version, processor and its vector extensions."""
        return self.job("describe", target, {}, timeout_s=120)

    def read_description(self, result: JobResult) -> Facts:
        """Return the facts: runtime, version, processor, threads."""
        return answer(result)

    def stated(self, model: Path, target: Target) -> bytes:
        """Return the model as it is: these runtimes are told the precision when they load it."""
        return model.read_bytes()

    def owner_job(self, models: Mapping[str, Path], target: Target) -> Job:
        """Refuse: the script has no such task."""
        fix = "name a device with --host, or measure on this machine"
        raise TargetError(f"backend {self.name} has no bundle to carry to a device", at=f"target {target.name}", fix=fix)

    def by_hand(self, models: Mapping[str, str], target: Target) -> str:
        """Return nothing: the runtime has no program of its own."""
        return ""

    def channel_multiple(self, facts: Facts) -> int:
        """Return how many fp32 values one vector register of the device holds: what kernels compute together."""
        return next((n for flag, n in _LANES.items() if any(known.startswith(flag) for known in facts["cpu_flags"])), 4)

    def build_job(self, model: Path, target: Target) -> Job:
        """Compile the model into one file."""
        artifact = "artifact" + self.suffix
        return self.job("build", target, {"model": "model.onnx", "artifact": artifact}, {"model.onnx": model}, (artifact,))

    def verdict(self, built: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what the script found worth saying."""
        return tuple(built.get("notes", ()))

    def read_build(self, result: JobResult) -> tuple[str, ...]:
        """Return what the script found worth saying."""
        return self.verdict(answer(result))

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time whole models in turns; a built artefact is a model like another."""
        files = {f"model-{i}.onnx": path for i, path in enumerate(models.values())}
        return self.job("bench", target, {"models": dict(zip(models, files, strict=True))}, files)

    def read_bench(self, result: JobResult) -> dict[str, Timing]:
        """Return name -> timing."""
        found = answer(result)
        load = found["foreign_load"]
        return {
            name: Timing(median, p10, p90, runs, load, cpu) for name, (median, p10, p90, runs, cpu) in found["models"].items()
        }

    def run_job(self, model: Path, inputs: Arrays, target: Target) -> Job:
        """Run on several inputs: the first axis of every array counts them."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **inputs)
        details = {"model": "model.onnx", "inputs": "inputs.npz", "outputs": "outputs.npz"}
        return self.job("run", target, details, {"model.onnx": model, "inputs.npz": buffer.getvalue()}, ("outputs.npz",))

    def read_run(self, result: JobResult) -> Arrays:
        """Return output name -> array with the same first axis, in the model's order."""
        names = answer(result)["outputs"]
        with np.load(result.pulled["outputs.npz"], allow_pickle=False) as outputs:
            return {name: outputs[name] for name in names}

    def job(
        self,
        task: str,
        target: Target,
        details: Mapping[str, Any],
        push: Mapping[str, Path | bytes] | None = None,
        pull: tuple[str, ...] = (),
        timeout_s: float = 900.0,
    ) -> Job:
        """Describe one task of the script.

        Raises:
            TargetError: The backend does not have the target's precision.
        """
        self.check_precision(target)
        measure = target.measure
        request = {
            "task": task, "threads": measure.threads, "warmup": measure.warmup, "runs": measure.runs,
            "max_foreign": MAX_FOREIGN, "attempts": _ATTEMPTS, "least_us": measure.least_us,
            **self.options, **self.told(target, push or {}), **details,
        }  # fmt: skip
        # As content: a linked script would find this package's modules beside it, some of which are called like a runtime.
        scripts = {file: self._beside_me(file).read_bytes() for file in (self.script, *self.beside)}
        files = {**scripts, "request.json": json.dumps(request).encode(), **(push or {})}
        return Job((PYTHON, self.script, "request.json"), files, ("answer.json", *pull), timeout_s=timeout_s)

    def _beside_me(self, file: str) -> Path:
        """Return a script's path: beside the backend's own module, which may be another package's, or else here."""
        own = Path(inspect.getfile(type(self))).parent / file
        return own if own.is_file() else _FOLDER / file

    def told(self, target: Target, push: Mapping[str, Path | bytes]) -> Mapping[str, Any]:
        """Return what this runtime's script is told besides, of the target or of the files that go with a job.

        Raises:
            BackendError, TargetError: The runtime cannot take these files, or has not what the target asks for.
        """
        return {}

    def check_precision(self, target: Target) -> None:
        """Raise TargetError if the backend does not have the target's precision."""
        if target.build.precision not in self.precisions:
            raise TargetError(
                f"backend {self.name} has no precision '{target.build.precision}'",
                at=f"{target.path or target.name}: build.precision",
                fix=nearest(target.build.precision, self.precisions),
            )


def answer(result: JobResult) -> dict[str, Any]:
    """Return what the script answered.

    Raises:
        BackendError: It is damaged.
    """
    try:
        found = json.loads(result.pulled["answer.json"].read_text())
    except (KeyError, OSError, ValueError) as error:
        raise BackendError(f"the measuring script answered nonsense: {error}", at="answer.json", fix="run it again") from error
    assert isinstance(found, dict)
    return found
