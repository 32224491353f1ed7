"""Build, time, profile or run ONNX models with ONNX Runtime: runs alone, with Python 3.8 or newer and onnxruntime only.

    python3 ort_measure.py request.json      # writes answer.json beside it

It is pushed to the target with `stopwatch.py` beside it, so it imports nothing of deploypipe.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import stopwatch

NUMBERS = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4",
           "tensor(uint8)": "u1", "tensor(int8)": "i1", "tensor(bool)": "?"}  # fmt: skip
ORT_MAGIC = b"ORTM"


def session(model: str, request: dict[str, Any], **options: Any) -> Any:
    """Open `model` with the threads and provider that the request states, and make sure that it got that provider."""
    settings = ort.SessionOptions()
    if request["threads"] > 1 and request.get("shared_threads"):
        settings.use_per_session_threads = False
    else:
        settings.intra_op_num_threads = request["threads"]
        settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if request.get("built"):  # an artefact is optimised already
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if request.get("platform"):
        model = flat(model, request["platform"])
        settings.add_session_config_entry("session.load_model_format", "ORT")
    for name, value in options.items():
        setattr(settings, name, value)
    opened = ort.InferenceSession(model, settings, providers=[request["provider"]])
    got = opened.get_providers()[0]
    if got != request["provider"]:  # a missing provider is no error to ONNX Runtime: it falls back to the CPU
        raise SystemExit(f"asked for {request['provider']}, ONNX Runtime gave {got}")
    return opened


def flat(model: str, platform: str) -> str:
    """Return `model` in the ORT format, converted for a platform ("amd64" or "arm") unless it has that format already.

    "Fixed" style: all optimisations are in the file, so that a build of the runtime without an optimiser runs it as fast. The
    blocked layout is among them on amd64 only.
    """
    if Path(model).read_bytes()[4:8] == ORT_MAGIC:
        return model
    from onnxruntime.tools.convert_onnx_models_to_ort import (  # noqa: PLC0415 - takes a second, needed for this format only
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    # A copy: the converter follows links and would write beside the user's own file.
    with tempfile.TemporaryDirectory(dir=".") as folder, contextlib.redirect_stdout(io.StringIO()):
        copy = shutil.copyfile(model, Path(folder, "model.onnx"))
        convert_onnx_models_to_ort(copy, optimization_styles=[OptimizationStyle.Fixed], target_platform=platform)
        made = Path(model + ".ort")
        if copy.with_suffix(".ort").is_file():
            copy.with_suffix(".ort").replace(made)
    if not made.is_file():  # whatever the converter says
        raise SystemExit(f"the converter of ONNX Runtime wrote no '{made}'")
    return str(made)


def feed(opened: Any) -> dict[str, Any]:
    """Make one input."""
    made = {}
    for value in opened.get_inputs():
        if not all(isinstance(size, int) for size in value.shape):
            raise SystemExit(f"input '{value.name}' has no fixed shape: {value.shape}")
        made[value.name] = stopwatch.sample_input(value.shape, NUMBERS[value.type])
    return made


def bench(request: dict[str, Any]) -> Any:
    """Time whole models in turns."""
    cores = stopwatch.Cores(request["threads"])
    opened = {name: session(path, request) for name, path in request["models"].items()}
    return stopwatch.bench({name: partial(item.run, None, feed(item)) for name, item in opened.items()}, cores, request)


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Time the kernels of several models in turns."""
    cores = stopwatch.Cores(request["threads"])
    wanted, per_block = stopwatch.turns_of(request)
    optimised, opened = request.get("optimised", {}), {}
    for index, (name, path) in enumerate(request["models"].items()):
        options = {"enable_profiling": True, "profile_file_prefix": f"profile-{index}"}
        if name in optimised:
            options["optimized_model_filepath"] = optimised[name]
        opened[name] = session(path, request, **options)
    calls = {name: partial(item.run, None, feed(item)) for name, item in opened.items()}

    def turn() -> None:
        for once in calls.values():
            for _ in range(stopwatch.REWARM + per_block):
                once()

    for once in calls.values():
        for _ in range(request["warmup"]):
            once()
    chosen, load = stopwatch.quiet_turns(turn, cores, request, wanted)
    counted = [
        request["warmup"] + i * (stopwatch.REWARM + per_block) + stopwatch.REWARM + j for i in chosen for j in range(per_block)
    ]
    return {"models": {name: kernels(item.end_profiling(), counted) for name, item in opened.items()}, "foreign_load": load}


def kernels(path: str, counted: list[int]) -> list[list[Any]]:
    """Read a profile: [node, operation, median, p10, p90, runs] in the order of execution, of the runs that count."""
    events = json.loads(Path(path).read_text())
    Path(path).unlink()
    suffix = "_kernel_time"
    times: dict[tuple[str, str], list[int]] = {}
    n_runs = 0
    for event in events:
        n_runs += event["name"] == "model_run"
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            times.setdefault((event["name"][: -len(suffix)], event["args"]["op_name"]), []).append(event["dur"])
    if counted and n_runs <= max(counted):
        raise SystemExit(f"ONNX Runtime recorded {n_runs} runs only, of {max(counted) + 1}: lower [measure] warmup")
    rows = []
    for (name, op), spent in times.items():
        each = len(spent) // n_runs  # above 1 inside a loop
        if each:
            # The runtime cuts durations down to whole microseconds: the middle of that microsecond is the fair value.
            middle = [sum(spent[i * each : (i + 1) * each]) + 0.5 for i in counted]
            p10, p90 = np.percentile(middle, [10, 90])
            rows.append([name, op, statistics.median_grouped(middle, 1), float(p10), float(p90), len(middle)])
    return rows


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Save the optimised model, and load and run it as it will be in production."""
    if request.get("platform"):
        Path(flat(request["model"], request["platform"])).replace(request["artifact"])
    else:
        session(request["model"], request, optimized_model_filepath=request["artifact"])
    made = session(request["artifact"], {**request, "built": True})
    made.run(None, feed(made))
    return {"bytes": Path(request["artifact"]).stat().st_size}


def run(request: dict[str, Any]) -> Any:
    """Run a model on several inputs."""
    opened = session(request["model"], request)
    return stopwatch.run_all([value.name for value in opened.get_outputs()], partial(opened.run, None), request)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which runtime this is, on which device."""
    return {
        "runtime": "ort-mobile" if request.get("platform") else "onnxruntime", "version": ort.__version__,
        "providers": ort.get_available_providers(), **stopwatch.device(request),
    }  # fmt: skip


TASKS = {"bench": bench, "profile": profile, "build": build, "run": run, "describe": describe}


def one_pool(request: dict[str, Any]) -> Any:
    """Do the task with one thread pool for all sessions: the idle threads of a hundred would disturb the measured one."""
    if request["threads"] > 1 and hasattr(ort, "set_global_thread_pool_sizes"):
        ort.set_global_thread_pool_sizes(request["threads"], 1)
        request["shared_threads"] = True
    return TASKS[request["task"]](request)


if __name__ == "__main__":
    stopwatch.answer(dict.fromkeys(TASKS, one_pool))
