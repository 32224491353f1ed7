"""Build, time, profile or run models with OpenVINO on the CPU: runs alone, with only Python (3.8 or newer), NumPy and OpenVINO.

    python3 ov_measure.py request.json      # writes answer.json beside it

It is pushed to the target with `stopwatch.py` beside it, so it imports nothing of deploypipe. Models are ONNX files, or zips
of `model.xml` and `model.bin`.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import openvino as ov
import stopwatch

PARTS = ("model.xml", "model.bin")
Turn = Dict[Tuple[str, str], float]  # (node, operation) -> microseconds
SETTLED = 3  # first runs of a freshly compiled model: it allocates, and lays its weights out anew


def read(core: Any, path: str) -> Any:
    """Read an ONNX file or an artefact."""
    try:
        if not zipfile.is_zipfile(path):
            return core.read_model(path)
        with zipfile.ZipFile(path) as packed:
            return core.read_model(*map(packed.read, PARTS))
    except (RuntimeError, KeyError, zipfile.BadZipFile) as error:
        # The reason is the last line, behind lines of OpenVINO's own source.
        raise SystemExit(f"OpenVINO cannot read '{path}': {str(error).strip().splitlines()[-1]}") from error


def compiled(core: Any, path: str, request: dict[str, Any], *, counters: bool = False) -> Any:
    """Compile a model with the threads that the request states, and make sure that it got them."""
    wanted = {
        "INFERENCE_NUM_THREADS": request["threads"], "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else a processor with bf16 units may compute in bf16
        # Each thread to its own of the cores that the process is pinned to: left to the system, two threads begin on one core,
        # and stay there for dozens of runs.
        "ENABLE_CPU_PINNING": True,
        "PERF_COUNT": counters,
    }  # fmt: skip
    made = core.compile_model(read(core, path), "CPU", wanted)
    got = {name: made.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "INFERENCE_PRECISION_HINT")}
    asked = {"INFERENCE_NUM_THREADS": request["threads"], "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": ov.Type.f32}
    if got != asked:
        raise SystemExit(f"asked for {asked}, OpenVINO gave {got}")
    return made


def request_of(made: Any) -> Any:
    """Open an inference request, its inputs filled."""
    opened = made.create_infer_request()
    for port in made.inputs:
        if port.partial_shape.is_dynamic:
            raise SystemExit(f"input '{port.any_name}' has no fixed shape: {port.partial_shape}")
        filled = stopwatch.sample_input(list(port.shape), port.element_type.to_dtype())
        opened.set_tensor(port, ov.Tensor(filled))
    return opened


def bench(request: dict[str, Any]) -> Any:
    """Time whole models in turns."""
    cores, core = stopwatch.Cores(request["threads"]), ov.Core()
    opened = {name: request_of(compiled(core, path, request)) for name, path in request["models"].items()}
    # Shared outputs stay in the request: a copy of them would cost more than a small network.
    return stopwatch.bench({name: partial(item.infer, share_outputs=True) for name, item in opened.items()}, cores, request)


def profile(request: dict[str, Any]) -> dict[str, Any]:
    """Time the kernels of several models in turns; each turn compiles anew, since counters never go back to zero."""
    cores, core = stopwatch.Cores(request["threads"]), ov.Core()
    per_block = -(-request["runs"] // stopwatch.FEW) + max(SETTLED, request["warmup"])
    graphs: dict[str, dict[str, Any]] = {}
    turns: list[dict[str, Turn]] = []

    def turn() -> None:
        seen = {}
        for name, path in request["models"].items():
            made = compiled(core, path, request, counters=True)
            graphs[name] = graph(made)
            found = counted(request_of(made), per_block)
            seen[name] = {kernel: steady(averages) for kernel, averages in found.items() if kernel[0] in graphs[name]}
        turns.append(seen)

    # Compiling is never the same work twice, so the slowness of a turn tells nothing; that of its kernels does: see `alike`.
    chosen, load = stopwatch.quiet_turns(turn, cores, request, stopwatch.FEW, slower=float("inf"))
    rows = {name: _rows(alike([turns[i][name] for i in chosen]), per_block - SETTLED) for name in graphs}
    return {"models": {name: {"graph": graphs[name], "kernels": rows[name]} for name in rows}, "foreign_load": load}


def alike(turns: list[Turn]) -> list[Turn]:
    """Return the turns of one model in which its kernels took about as long as in the quickest.

    Where the system does not pin threads, some compilations run all their kernels slower by a half: two threads share a core.
    """
    limit = (1 + stopwatch.SLOWER) * min(sum(turn.values()) for turn in turns)
    return [turn for turn in turns if sum(turn.values()) <= limit]


def _rows(turns: list[Turn], runs: int) -> list[list[Any]]:
    """Join the turns of one model, each of so many runs: [node, operation, median, p10, p90, runs]."""
    n = len(turns) * runs
    return [[*kernel, *stopwatch.spread([turn[kernel] for turn in turns if kernel in turn]), n] for kernel in turns[-1]]


def graph(made: Any) -> dict[str, Any]:
    """Return the nodes that the runtime executes: name -> [names of the model's nodes in it, nodes it reads from]."""
    nodes = {}
    for node in made.get_runtime_model().get_ordered_ops():
        fused = [name for name in str(node.get_rt_info()["originalLayersNames"].astype(str)).split(",") if name]
        sources = [port.get_source_output().get_node().get_friendly_name() for port in node.inputs()]
        nodes[node.get_friendly_name()] = [fused, sources]
    return nodes


def counted(opened: Any, runs: int) -> dict[tuple[str, str], list[int]]:
    """Run, and read the counters after each run: (node, operation) -> running averages in whole microseconds."""
    averages: dict[tuple[str, str], list[int]] = {}
    for _ in range(runs):
        opened.infer(share_outputs=True)
        for row in opened.get_profiling_info():
            if row.node_type not in ("Parameter", "Result"):
                us = row.real_time.seconds * 1_000_000 + row.real_time.microseconds
                averages.setdefault((row.node_name, row.node_type), []).append(us)
    return averages


def steady(averages: list[int]) -> float:
    """Recover a node's time per run, without its first runs, from running averages in whole microseconds.

    The runtime cuts each run down to whole microseconds, and so it cuts the average since compilation. The sum after run n
    lies between n times the average and that plus n - 1; being a sum it never falls, which narrows these bounds.
    """
    n, average = np.arange(1, len(averages) + 1), np.array(averages)
    if not average.any():  # the midpoint of the bounds would be half a microsecond too much
        return 0.5
    low = np.maximum.accumulate(n * average)
    high = np.minimum.accumulate((n * average + n - 1)[::-1])[::-1]
    late = np.arange(max(SETTLED, len(averages) // 2), len(averages))
    best = late[np.argmin((high - low)[late] / (n[late] - SETTLED))]
    sums = (low + high) / 2
    # The middle of the microsecond that each run was cut down to.
    return max(0.0, float(sums[best] - sums[SETTLED - 1]) / float(n[best] - SETTLED)) + 0.5


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Save the model as OpenVINO reads it fastest, and compile it as it will be compiled in production."""
    core = ov.Core()
    ov.save_model(read(core, request["model"]), PARTS[0], compress_to_fp16=False)
    with zipfile.ZipFile(request["artifact"], "w") as packed:
        for part in PARTS:
            # A fixed date: the same model is the same file.
            packed.writestr(zipfile.ZipInfo(part), Path(part).read_bytes())
    compiled(core, request["artifact"], request)
    return {"bytes": Path(request["artifact"]).stat().st_size}


def run(request: dict[str, Any]) -> Any:
    """Run a model on several inputs."""
    made = compiled(ov.Core(), request["model"], request)
    opened = made.create_infer_request()
    names = [port.any_name for port in made.outputs]
    return stopwatch.run_all(names, lambda inputs: list(opened.infer(inputs).values()), request)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which runtime this is, on which device."""
    version = ov.__version__.split("-")[0]  # without the build's number and hash
    return {"runtime": "openvino", "version": version, "build": ov.__version__, **stopwatch.device(request)}


if __name__ == "__main__":
    stopwatch.answer({"bench": bench, "profile": profile, "build": build, "run": run, "describe": describe})
