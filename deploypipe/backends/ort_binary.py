"""ONNX Runtime by its own benchmark program, `onnxruntime_perf_test`: for devices without Python, such as phones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from deploypipe.backends.base import Arrays, Facts, Pricing, Profile, Timing
from deploypipe.backends.scripted import Scripted
from deploypipe.errors import BackendError, TargetError
from deploypipe.job import Job, JobResult
from deploypipe.precision import tiny
from deploypipe.reports.figures import UNVERIFIED
from deploypipe.targets import Target

PROGRAM = "onnxruntime_perf_test"
_LIBRARIES = ("libonnxruntime*.so*", "libc++_shared.so")  # that a build with shared libraries has beside the program
_TURNS, _MANY = 6, 4  # of each model, so that slow drift meets all alike; only two if there are more models than _MANY
_TINY, _BUILT, _ASKED, _FACTS = "tiny.onnx", "artifact.onnx", "request.json", "facts.txt"


class OrtBinary(Scripted):
    """A build of `onnxruntime_perf_test` for the device, named by `--benchmark-binary`; CPU provider, fp32, all optimisations.

    The program is pushed with each job, with the shared libraries that lie beside it here. It times whole models on inputs of
    its own making and does not hand out what they compute: outputs are compared on this machine. Its version is that file's
    hash. The artifact is the ONNX model itself, after one run on the device. Options and the result file follow ONNX
    Runtime's sources (onnxruntime/test/perftest, releases 1.10 to 1.23). Not run on hardware.
    """

    name: ClassVar[str] = "onnxruntime-binary"
    suffix: ClassVar[str] = ".onnx"
    script: ClassVar[str] = "perf_measure.sh"
    pricing: ClassVar[Pricing] = "models"
    times_layers: ClassVar[bool] = False
    computes: ClassVar[bool] = False

    def available(self) -> tuple[bool, str]:
        """Return yes: the runtime is the file that is named."""
        return True, ""

    def describe_job(self, target: Target) -> Job:
        """Ask for the processor, by running something tiny."""
        return self._timed({"tiny": tiny()}, target.replace(runs=1, warmup=0), (_FACTS,), (_TINY,))

    def read_description(self, result: JobResult) -> Facts:
        """Return the facts."""
        asked = json.loads(result.pulled[_ASKED].read_text())
        lines = result.pulled[_FACTS].read_text().splitlines()
        said = {name: value for name, _, value in (line.partition("\t") for line in reversed(lines))}  # the first one stands
        flags = said.pop("cpu_flags", "").split()
        known = {"runtime": PROGRAM, "version": asked["version"], "threads": asked["threads"], "governor": ""}
        return {**known, **said, "cpu_flags": flags}  # a device may have no governor

    def build_job(self, model: Path, target: Target) -> Job:
        """Run the model once on the device; it is its own artifact."""
        return self._timed({"built": model}, target.replace(runs=1, warmup=0), (_BUILT,), (_BUILT,))

    def read_build(self, result: JobResult) -> tuple[str, ...]:
        """Return that the model ran, and what that does not prove."""
        ran = f"{PROGRAM} ran the model on the device but does not hand out what it computes there"
        return (f"{UNVERIFIED}: {ran}: outputs were compared on this machine",) if self.read_bench(result) else ()

    def bench_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time whole models in turns."""
        return self._timed(models, target)

    def read_bench(self, result: JobResult) -> dict[str, Timing]:
        """Return name -> timing."""
        asked = json.loads(result.pulled[_ASKED].read_text())
        return {name: timing(result.pulled[f"times-{file}.csv"], asked["warmup"]) for name, file in asked["models"].items()}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Refuse.

        Raises:
            BackendError: Always.
        """
        fix = "time whole models only: --no-layers"
        raise BackendError(f"{PROGRAM} is asked for times of whole models only", at=f"target {target.name}", fix=fix)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return nothing: there is no job whose answer this could be."""
        return {}

    def run_job(self, model: Path, inputs: Arrays, target: Target) -> Job:
        """Refuse.

        Raises:
            BackendError: Always.
        """
        fix = "name a Python with onnxruntime on the device ([reach] python) and leave --benchmark-binary out"
        raise BackendError(f"{PROGRAM} does not hand out what a model computes", at=f"target {target.name}", fix=fix)

    def _timed(
        self,
        models: Mapping[str, Path | bytes],
        target: Target,
        pull: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
    ) -> Job:
        """Describe the one thing that the script does; `names` are those of the models' files, if it matters."""
        self.check_precision(target)
        program, measure = program_of(target), target.measure
        files = dict(zip(models, names or (f"model-{i}.onnx" for i in range(len(models))), strict=True))
        turns = min(_TURNS if len(models) <= _MANY else 2, measure.runs)
        runs = -(-measure.runs // turns) + measure.warmup
        version = f"sha256 {hashlib.sha256(program.read_bytes()).hexdigest()[:12]}"
        asked = {"models": files, "warmup": measure.warmup, "threads": measure.threads, "version": version}
        libraries = {path.name: path for glob in _LIBRARIES for path in sorted(program.parent.glob(glob))}
        push: dict[str, Path | bytes] = {self.script: (Path(__file__).parent / self.script).read_bytes(), PROGRAM: program}
        push |= {_ASKED: json.dumps(asked).encode(), **libraries, **{files[name]: source for name, source in models.items()}}
        argv = ("sh", self.script, str(turns), str(runs), str(measure.threads), *files.values())
        times = tuple(f"times-{file}.csv" for file in files.values())
        return Job(argv, push, (_ASKED, *times, *pull), {"LD_LIBRARY_PATH": "."} if libraries else {}, timeout_s=900.0)


def program_of(target: Target) -> Path:
    """Return the benchmark program that the target names.

    Raises:
        TargetError: It names none, or there is no such file.
    """
    path = Path(target.build.binary).expanduser()
    if not target.build.binary or not path.is_file():
        what = f"there is no file '{target.build.binary}'" if target.build.binary else "no benchmark program is named"
        fix = f"name a build of {PROGRAM} for the device: --benchmark-binary PATH, or [build] binary in the target file"
        raise TargetError(what, at=f"target {target.name}: build.binary", fix=fix)
    return path


def timing(file: Path, warmup: int) -> Timing:
    """Read a result file: `model,seconds,memory,CPU usage,run` a line, where runs count from 0 in each turn.

    Raises:
        BackendError: It is damaged, or empty.
    """
    try:
        rows = [line.rsplit(",", 4) for line in file.read_text().splitlines() if line]
        us = [1e6 * float(seconds) for _, seconds, _, _, run in rows if int(run) >= warmup]
        p10, median, p90 = (float(value) for value in np.percentile(us, [10, 50, 90]))
    except (ValueError, IndexError) as error:
        fix = "look at what the program says when it is run by hand on the device"
        raise BackendError(f"{PROGRAM} left no times: {error}", at=file.name, fix=fix) from error
    return Timing(median, p10, p90, len(us), None)
