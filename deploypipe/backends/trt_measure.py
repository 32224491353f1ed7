"""Build, time, profile or run models with TensorRT: runs alone on the device, with only Python's own library.

    python3 trt_measure.py request.json      # writes answer.json beside it

It drives `trtexec`, the program that comes with every TensorRT for Jetson and in NVIDIA's containers, or, where that is missing
and Python has `tensorrt` and `polygraphy`, the Python interface (`trt_python.py`, pushed beside it). Models are ONNX files that
state their precision, or zips of an engine and of what it was built on: an engine that was built elsewhere is refused.
Which flags a version of trtexec takes stands in `trt_flags.py`, what it answers in `trt_answers.py`. Not run on hardware yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Dict

import trt_answers as answers
import trt_flags as flags

BLOCKS, MANY = 6, 4  # turns of each model, so that slow drift meets all alike; only two if there are more models than MANY
PROFILES = 3  # profiles of each model: their medians give a spread, which one profile does not have
FALLBACK = "/usr/src/tensorrt/bin/trtexec"  # where JetPack puts it, outside PATH
PLAN, ABOUT, LOG = "engine.plan", "engine.json", "build.log"
BESIDE = ("numpy", "polygraphy")  # what Python's interface needs besides TensorRT: these, and only these, come from PyPI

Request = Dict[str, Any]


class Trtexec:
    """TensorRT by its command-line program; every call is a process."""

    def __init__(self, program: str) -> None:
        self.program = program
        banner = self._start(["--help"], may_fail=True)
        self.version = flags.version_of(banner)
        if self.version < flags.OLDEST:
            raise SystemExit(
                f"{program} is TensorRT {flags.shown(self.version)}, this needs {flags.shown(flags.OLDEST)} or newer"
            )

    def build(self, model: str, engine: str, request: Request) -> dict[str, Any]:
        """Build an engine; return what it was built on, and what was said about sparsity. All that was said lies beside it."""
        cache = timing_cache(self.version)
        start = time.monotonic()
        asked = flags.build(self.version, model, engine, request["precision"], sparse=request["sparse"], cache=str(cache))
        log = self._start(asked)
        if not Path(engine).is_file():
            raise SystemExit(f"trtexec ended well and left no engine: {answers.last(log)}")
        Path(f"{engine}.log").write_text(log, encoding="utf-8")
        return {
            **answers.device_of(log),
            **answers.sparsity_of(log),
            "seconds": round(time.monotonic() - start, 1),
            "arguments": asked,
        }

    def times(self, engine: str, runs: int, warmup_ms: int) -> tuple[list[float], dict[str, str]]:
        """Return microseconds of the GPU for each run, and the device."""
        log = self._start(flags.measure(self.version, engine, runs, warmup_ms, "times.json"))
        return answers.run_times("times.json", runs), answers.device_of(log)

    def layers(self, engine: str, runs: int, warmup_ms: int) -> dict[str, Any]:
        """Return the median microseconds of each layer, in order, and the model's nodes in each."""
        self._start(flags.profile(self.version, engine, runs, warmup_ms, "profile.json", "layers.json"))
        return {
            "times": answers.layer_times("profile.json"),
            "nodes": answers.layer_nodes(json.loads(Path("layers.json").read_text())),
        }

    def outputs(self, engine: str, inputs: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Run once on raw files; return output -> shape and values."""
        self._start(flags.run(self.version, engine, inputs, "outputs.json"))
        found: dict[str, dict[str, Any]] = answers.outputs("outputs.json")
        return found

    def _start(self, arguments: list[str], *, may_fail: bool = False) -> str:
        done = subprocess.run(
            [self.program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode and not may_fail:
            raise SystemExit(f"trtexec failed with exit code {done.returncode}: {answers.last(done.stdout)}")
        return done.stdout


def timing_cache(version: tuple[int, ...]) -> Path:
    """Return where the times of kernels are kept on this device, so that the next build need not take them again."""
    folder = Path.home() / ".cache" / "deploypipe" / "tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"timing-{flags.shown(version)}.cache"


class Engines:
    """The engines of a request's models: built here, or unpacked and checked."""

    def __init__(self, way: Any, request: Request) -> None:
        self.way, self.request = way, request
        self.found: dict[str, tuple[str, dict[str, Any]]] = {}

    def of(self, path: str) -> tuple[str, dict[str, Any]]:
        """Return an engine file, and what is known about it."""
        if path not in self.found:
            engine = f"{Path(path).stem}-{len(self.found)}.plan"
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as packed:
                    about = json.loads(packed.read(ABOUT))
                    Path(engine).write_bytes(packed.read(PLAN))
                if about["version"] != flags.shown(self.way.version):
                    refuse(about, f"TensorRT {flags.shown(self.way.version)}")
            else:
                held = self.request.get("two_four", {}).get(path, 0)  # weights with that pattern, as the sender counted them
                built = self.way.build(path, engine, self.request)
                about = {"version": flags.shown(self.way.version), "two_four": held, **built}
            self.found[path] = (engine, about)
        return self.found[path]

    def times(self, path: str, runs: int) -> list[float]:
        """Time an engine; refuse it if it was built on another device."""
        engine, about = self.of(path)
        us: list[float]
        us, device = self.way.times(engine, runs, warmup_ms(self.request))
        if device["gpu"] != about["gpu"]:
            refuse(about, device["gpu"])
        return us


def refuse(about: dict[str, Any], here: str) -> None:
    """End: engines hold for the device and version that they were built on."""
    raise SystemExit(f"the engine was built on {about['gpu']} with TensorRT {about['version']}, this is {here}: build it here")


def warmup_ms(request: Request) -> int:
    """Return how long to warm up: trtexec counts milliseconds, targets count runs."""
    return max(200, 20 * int(request["warmup"]))


def bench(way: Any, request: Request, engines: Engines | None = None) -> dict[str, Any]:
    """Time whole models in turns."""
    engines = engines or Engines(way, request)
    models = request["models"]
    turns = min(BLOCKS if len(models) <= MANY else 2, request["runs"])
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, path in models.items():
            times[name] += engines.times(path, -(-request["runs"] // turns))
    rows = {name: [*answers.spread(us), len(us), None] for name, us in times.items()}
    return {"models": rows, "foreign_load": None, "built": {name: engines.of(path)[1] for name, path in models.items()}}


def profile(way: Any, request: Request, engines: Engines | None = None) -> dict[str, Any]:
    """Time the layers of models, and beside them each model as a whole: a profile runs without a CUDA graph and is slower."""
    engines = engines or Engines(way, request)
    found = {}
    for name, path in request["models"].items():
        whole = answers.spread(engines.times(path, request["runs"]))[0]
        times = min(PROFILES, request["runs"])
        taken = [way.layers(engines.of(path)[0], request["runs"] // times, warmup_ms(request)) for _ in range(times)]
        columns = zip(*(one["times"] for one in taken))
        rows = [
            [column[0][0], *answers.spread([us for _, us, _ in column]), sum(n for _, _, n in column)] for column in columns
        ]
        found[name] = {"rows": rows, "nodes": taken[0]["nodes"], "whole_us": whole}
    return {"models": found, "foreign_load": None}


def probes(way: Any, request: Request) -> dict[str, Any]:
    """Time many small models that lie side by side in one file: one build instead of hundreds. Each sums up its layers."""
    found = profile(way, {**request, "models": {"all": request["model"]}})["models"]["all"]
    sums = answers.by_part(found["rows"], found["nodes"], len(request["names"]))
    runs = found["rows"][0][-1]
    return {"models": {name: [*us, runs, None] for name, us in zip(request["names"], sums)}, "foreign_load": None}


def build(way: Any, request: Request) -> dict[str, Any]:
    """Build an engine, and pack it with what it was built on and with what the builder said, if that can be had."""
    engine, about = Engines(way, request).of(request["model"])
    with zipfile.ZipFile(request["artifact"], "w") as packed:
        packed.write(engine, PLAN)
        packed.writestr(ABOUT, json.dumps(about, indent=1))
        if Path(f"{engine}.log").is_file():
            packed.write(f"{engine}.log", LOG, compress_type=zipfile.ZIP_DEFLATED)
    return {"bytes": Path(engine).stat().st_size, **about}


def run(way: Any, request: Request) -> dict[str, Any]:
    """Run a model on several inputs, each a raw file."""
    engine, _ = Engines(way, request).of(request["model"])
    return {"outputs": [way.outputs(engine, inputs) for inputs in request["inputs"]]}


def describe(way: Any, request: Request) -> dict[str, Any]:
    """Say which TensorRT this is, on which device; it builds something to be sure that it can.

    Nothing that changes from minute to minute: by these facts it is told whether a result still holds.
    """
    about = way.build(request["model"], "describe.plan", request)
    board = text("/proc/device-tree/model") or cpu_name()
    mode = re.search(r"NV Power Mode: *(\S+)", answer_of(["nvpmodel", "-q"]))
    return {
        "runtime": "tensorrt", "version": flags.shown(way.version), "gpu": about["gpu"], "cpu": board, "cpu_flags": [],
        "capability": about["capability"], "arch": platform.machine(), "governor": text(flags.GOVERNOR),
        "system": platform.platform(), "python": platform.python_version(), "threads": request["threads"],
        **({"power_mode": mode[1]} if mode else {}),
    }  # fmt: skip


def report(way: Any, request: Request) -> dict[str, Any]:
    """Everything that the owner of a device is asked for: who it is, the models as a whole, their layers."""
    facts = describe(way, {**request, "model": request["tiny"]})
    engines = Engines(way, request)
    hashes = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in request["models"].items()}
    timed = {"bench": bench(way, request, engines), "profile": profile(way, request, engines)}
    clocks = answer_of(["jetson_clocks", "--show"])
    return {"facts": facts, "passing": {"clocks": clocks} if clocks else {}, "sha256": hashes, **timed}


def text(path: str) -> str:
    """Return what a small file of the system says, or nothing."""
    try:
        return Path(path).read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def cpu_name() -> str:
    """Return the processor's name."""
    found = re.search(r"model name\s*: (.+)", text("/proc/cpuinfo"))
    return found[1] if found else platform.machine()


def answer_of(command: list[str]) -> str:
    """Return what a program of the board's says on one line, or nothing if there is no such program."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    return " ".join(done.stdout.split())


def way_of(request: Request) -> Any:
    """Return how TensorRT can be used here: the program that the target names or one that is found, else Python's interface."""
    tool = os.path.expanduser(request["tool"])  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if tool and not shutil.which(tool):  # another version would be measured instead
        raise SystemExit(f"there is no program '{tool}' here\nfix: correct [build] tool in the target file, or leave it out")
    for program in (tool, shutil.which("trtexec"), FALLBACK):
        if program and shutil.which(program):
            return Trtexec(program)
    try:
        import trt_python  # noqa: PLC0415 - pushed beside this script; needs packages that few have

        return trt_python.PythonApi()
    except (ImportError, OSError, TypeError) as error:
        raise SystemExit(
            f"there is no TensorRT here: no trtexec on PATH, none at {FALLBACK}, and Python's interface fails ({error})\n"
            f"fix: {remedy(error)}"
        ) from error


def remedy(error: Exception) -> str:
    """Return what helps if neither the program nor Python's interface can be used."""
    if isinstance(error, TypeError):  # how the bindings say that there is no GPU
        return "TensorRT's Python package finds no GPU: see whether nvidia-smi lists one, else install NVIDIA's driver"
    if getattr(error, "name", None) in BESIDE and importlib.util.find_spec("tensorrt"):
        return f"{sys.executable} -m pip install {' '.join(BESIDE)}"
    return str(flags.INSTALL)


TASKS = {
    "bench": bench,
    "probes": probes,
    "profile": profile,
    "build": build,
    "run": run,
    "describe": describe,
    "report": report,
}


def main(path: str) -> None:
    """Read the request, do its task, write the answer."""
    request = json.loads(Path(path).read_text())
    Path(request.get("answer", "answer.json")).write_text(json.dumps(TASKS[request["task"]](way_of(request), request)))


if __name__ == "__main__":
    main(sys.argv[1])
