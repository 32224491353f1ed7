"""Build, time, profile or run ONNX models with ONNX Runtime: runs alone, with only Python, NumPy and ONNX Runtime.

    python3 ort_measure.py request.json      # writes answer.json beside it

It is pushed to the target as one file, so it imports nothing of deploypipe.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

BLOCKS = 6  # the runs of each model come in this many turns, so that slow drift meets all models alike
REWARM = 3  # runs at the start of a turn that do not count
NUMBERS = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2", "tensor(int64)": "i8", "tensor(int32)": "i4",
           "tensor(uint8)": "u1", "tensor(int8)": "i1", "tensor(bool)": "?"}  # fmt: skip


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
    for name, value in options.items():
        setattr(settings, name, value)
    opened = ort.InferenceSession(model, settings, providers=[request["provider"]])
    got = opened.get_providers()[0]
    if got != request["provider"]:  # a missing provider is no error to ONNX Runtime: it falls back to the CPU
        raise SystemExit(f"asked for {request['provider']}, ONNX Runtime gave {got}")
    return opened


def feed(opened: Any) -> dict[str, Any]:
    """Make one input: noise for floating point, zeros for the rest."""
    random = np.random.default_rng(0)
    made = {}
    for value in opened.get_inputs():
        if not all(isinstance(size, int) for size in value.shape):
            raise SystemExit(f"input '{value.name}' has no fixed shape: {value.shape}")
        dtype = np.dtype(NUMBERS[value.type])
        made[value.name] = (
            random.standard_normal(value.shape).astype(dtype) if dtype.kind == "f" else np.zeros(value.shape, dtype)
        )
    return made


class Cores:
    """The processor cores we are pinned to, and how much of their time went to others."""

    def __init__(self, threads: int) -> None:
        self.cpus: list[int] = []
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0))
            before = self.busy(allowed)
            time.sleep(0.1)
            after = self.busy(allowed)
            idle_first = sorted(allowed, key=lambda cpu: (after.get(cpu, 0.0) - before.get(cpu, 0.0), cpu))
            self.cpus = sorted(idle_first[:threads])
            os.sched_setaffinity(0, self.cpus)
        self.start()

    @staticmethod
    def busy(cpus: list[int]) -> dict[int, float]:
        """Seconds that each core has worked since boot; empty where the system does not tell."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return {}
        rows = {int(row[0][3:]): row for row in map(str.split, lines) if row[0][:3] == "cpu" and row[0] != "cpu"}
        tick = os.sysconf("SC_CLK_TCK")
        # user nice system idle iowait irq softirq steal: all but idle and iowait is work, stolen time included
        return {cpu: sum(map(int, rows[cpu][1:4] + rows[cpu][6:9])) / tick for cpu in cpus if cpu in rows}

    def start(self) -> None:
        """Begin a measuring window."""
        self.before = (sum(self.busy(self.cpus).values()), time.process_time(), time.perf_counter())

    def foreign(self) -> float | None:
        """Share of our cores' time since `start` that went to other programs."""
        busy, own, wall = self.before
        now = self.busy(self.cpus)
        if not now:
            return None
        tick = 1.0 / os.sysconf("SC_CLK_TCK")  # both counters move in ticks
        others = sum(now.values()) - busy - (time.process_time() - own) - tick * len(now)
        return round(max(0.0, others / ((time.perf_counter() - wall) * len(now))), 4)


def guarded(sample: Any, cores: Cores, request: dict[str, Any]) -> tuple[Any, float | None]:
    """Call `sample` until other programs took no more than `max_foreign`, at most `attempts` times; keep the quietest."""
    best: tuple[Any, float | None] | None = None
    for _ in range(request["attempts"]):
        cores.start()
        value, load = sample(), cores.foreign()
        if best is None or (load or 0.0) < (best[1] or 0.0):
            best = (value, load)
        if (load or 0.0) <= request["max_foreign"]:
            break
    assert best is not None
    return best


def bench(request: dict[str, Any]) -> dict[str, Any]:
    """Time whole models in turns."""
    cores = Cores(request["threads"])
    opened = {name: session(path, request) for name, path in request["models"].items()}
    feeds = {name: feed(item) for name, item in opened.items()}
    per_block = max(1, -(-request["runs"] // BLOCKS))
    for name, item in opened.items():
        for _ in range(request["warmup"]):
            item.run(None, feeds[name])

    def sample() -> dict[str, list[tuple[float, float]]]:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
        for _ in range(BLOCKS):
            for name, item in opened.items():
                for _ in range(REWARM):  # not counted: fetch back what the other models threw out of the cache
                    item.run(None, feeds[name])
                for _ in range(per_block):
                    worked, start = time.process_time_ns(), time.perf_counter_ns()
                    item.run(None, feeds[name])
                    end = time.perf_counter_ns()
                    times[name].append(((end - start) / 1000, (time.process_time_ns() - worked) / 1000))
        return times

    times, load = guarded(sample, cores, request)
    rows = {}
    for name, values in times.items():
        wall, worked = zip(*values, strict=True)
        # With one thread, processor time is latency without the time that other programs took from us.
        rows[name] = [*spread(wall), len(wall), spread(worked)[0] if request["threads"] == 1 else None]
    return {"models": rows, "foreign_load": load}


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Time the kernels of several models in turns."""
    cores = Cores(request["threads"])
    per_block = max(1, -(-request["runs"] // BLOCKS)) + 1
    n_turns, optimised = -(-request["warmup"] // per_block) + BLOCKS, request.get("optimised", {})

    def sample() -> tuple[dict[str, list[list[Any]]], dict[str, bytes]]:
        opened = {}
        for index, (name, path) in enumerate(request["models"].items()):
            options = {"enable_profiling": True, "profile_file_prefix": f"profile-{index}"}
            if name in optimised:
                options["optimized_model_filepath"] = optimised[name]
            opened[name] = session(path, request, **options)
        feeds = {name: feed(item) for name, item in opened.items()}
        for _ in range(n_turns):
            for name, item in opened.items():
                for _ in range(per_block):
                    item.run(None, feeds[name])
        rows = {name: kernels(item.end_profiling(), per_block, n_turns) for name, item in opened.items()}
        return rows, {path: Path(path).read_bytes() for path in optimised.values()}

    (rows, graphs), load = guarded(sample, cores, request)
    for path, content in graphs.items():  # names of layout nodes differ from session to session: keep those of these rows
        Path(path).write_bytes(content)
    return {"models": rows, "foreign_load": load}


def kernels(path: str, per_block: int, n_turns: int) -> list[list[Any]]:
    """Read a profile: [node, operation, median, p10, p90, runs] in the order of execution, warm-up left out."""
    events = json.loads(Path(path).read_text())
    Path(path).unlink()
    suffix = "_kernel_time"
    times: dict[tuple[str, str], list[int]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            times.setdefault((event["name"][: -len(suffix)], event["args"]["op_name"]), []).append(event["dur"])
    rows = []
    for (name, op), spent in times.items():
        each = len(spent) // (per_block * n_turns)  # above 1 inside a loop
        per_run = [sum(spent[i * each : (i + 1) * each]) for i in range(per_block * n_turns)] if each else []
        counted = [t for i, t in enumerate(per_run) if i % per_block and i // per_block >= n_turns - BLOCKS]
        if counted:
            # The runtime cuts durations down to whole microseconds: the middle of that microsecond is the fair value.
            middle = [t + 0.5 for t in counted]
            p10, p90 = np.percentile(middle, [10, 90])
            rows.append([name, op, statistics.median_grouped(middle, 1), float(p10), float(p90), len(middle)])
    return rows


def spread(values: Any) -> list[float]:
    """Median, 10th and 90th percentile."""
    return [float(v) for v in np.percentile(values, [50, 10, 90])]


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Save the optimised model, and load it again as it will be loaded in production."""
    session(request["model"], request, optimized_model_filepath=request["artifact"])
    session(request["artifact"], {**request, "built": True})
    return {"bytes": Path(request["artifact"]).stat().st_size}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run a model on several inputs (first axis of every array); the stacked outputs go into an .npz file."""
    opened = session(request["model"], request)
    with np.load(request["inputs"]) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    n = len(next(iter(inputs.values())))
    values = [opened.run(None, {name: array[i] for name, array in inputs.items()}) for i in range(n)]
    names = [value.name for value in opened.get_outputs()]
    columns = zip(names, zip(*values, strict=True), strict=True)
    outputs: Any = {name: np.stack(column) for name, column in columns}
    np.savez(request["outputs"], **outputs)
    return {"outputs": names}


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Facts that decide whether two measurements may be laid beside each other."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines()) if key}
    flags = set((info.get("flags") or info.get("Features") or "").split())
    vector = sorted(flag for flag in flags if flag.startswith(("avx", "sse4", "fma", "amx", "asimd", "sve", "neon", "f16c")))
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "runtime": "onnxruntime", "version": ort.__version__, "providers": ort.get_available_providers(),
        "cpu": info.get("model name") or platform.processor() or platform.machine(), "cpu_flags": vector,
        "arch": platform.machine(), "cores": os.cpu_count(),
        "governor": governor.read_text().strip() if governor.is_file() else "",
        "python": platform.python_version(), "system": platform.platform(), "threads": request["threads"],
    }  # fmt: skip


TASKS = {"bench": bench, "profile": profile, "build": build, "run": run, "describe": describe}


def main() -> None:
    """Read the request, do its task, write the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    if request["threads"] > 1 and hasattr(ort, "set_global_thread_pool_sizes"):
        # One pool for all sessions: the idle threads of a hundred pools would spin and disturb the one that is measured.
        ort.set_global_thread_pool_sizes(request["threads"], 1)
        request["shared_threads"] = True
    answer = TASKS[request["task"]](request)
    Path("answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
