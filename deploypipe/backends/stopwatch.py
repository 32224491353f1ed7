"""What every measuring script shares: quiet cores, interleaved runs, facts of the device. Pushed beside the script.

A script runs alone on the target, so this file imports nothing of deploypipe: only Python (3.8 or newer) and NumPy.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Dict, NamedTuple

import numpy as np

FEW, MANY = 6, 12  # the runs of each model come in so many turns, so that slow drift meets all models alike
REWARM = 2  # runs at the start of a turn that do not count
SLOWER = 0.05  # a turn that took so much longer than the quickest one counts as disturbed

Request = Dict[str, Any]


def in_order(names: Iterable[str]) -> list[str]:
    """Sort numbered inputs or outputs as the model has them: `input_10` behind `input_2`."""
    return sorted(names, key=lambda name: (len(name), name))


class Window(NamedTuple):
    """A stretch of time: seconds that this process worked, that others took of our cores (None: unknown), that these had."""

    own: float
    others: float | None
    whole: float


class Cores:
    """The processor cores we are pinned to, and how much of their time went to others."""

    def __init__(self, threads: int) -> None:
        self.cpus: list[int] = []
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0))
            if threads > len(allowed):  # there may be more, but not for us: a container, a batch system, taskset
                raise SystemExit(
                    f"{threads} threads were asked for, this process may use {len(allowed)} cores: ask for fewer, or allow more"
                )
            before = self.busy(allowed)
            time.sleep(0.1)
            after = self.busy(allowed)
            best_first = sorted(allowed, key=lambda cpu: (-capacity(cpu), after.get(cpu, 0.0) - before.get(cpu, 0.0), cpu))
            self.cpus = sorted(best_first[:threads])
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

    def taken(self) -> Window:
        """What happened since `start`; the others' seconds are right within a tick for each core."""
        busy, own, wall = self.before
        now = self.busy(self.cpus)
        worked, passed = time.process_time() - own, time.perf_counter() - wall
        return Window(worked, sum(now.values()) - busy - worked if now else None, passed * max(1, len(now)))

    def share(self, windows: list[Window]) -> float | None:
        """Share of our cores' time that went to other programs in these windows; None where the system does not tell."""
        if any(window.others is None for window in windows):
            return None
        tick = len(self.cpus) / os.sysconf("SC_CLK_TCK")  # both counters move in ticks
        others, whole = sum(window.others or 0.0 for window in windows), sum(window.whole for window in windows)
        return round(max(0.0, others - tick) / whole, 4)


def capacity(cpu: int) -> int:
    """How much a core does, where cores of several kinds are in one chip and the system tells; else 0."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity")
    return int(file.read_text()) if file.is_file() else 0


def quiet_turns(
    turn: Callable[[], Any], cores: Cores, request: Request, wanted: int, slower: float = SLOWER
) -> tuple[list[int], float | None]:
    """Call `turn` until it was undisturbed `wanted` times, at most `attempts` times as often.

    Disturbed is a turn in which others took our cores, and one in which the same work took us clearly longer than in the
    quickest: a neighbour on the same chip empties the cache that we share with it, which no counter of the system shows.

    Returns:
        Which calls count, the least disturbed, and the share of our cores' time that went to other programs meanwhile.
    """
    windows: list[Window] = []
    most = {"share": request["max_foreign"], "slowness": slower}
    for _ in range(wanted * request["attempts"]):
        cores.start()
        turn()
        windows.append(cores.taken())
        disturbed = [disturbance(window, windows, cores, most) for window in windows]
        if disturbed.count(0.0) >= wanted:
            break
    chosen = sorted(sorted(range(len(windows)), key=lambda i: disturbed[i])[:wanted])
    return chosen, cores.share([windows[i] for i in chosen])


def disturbance(window: Window, windows: list[Window], cores: Cores, most: Mapping[str, float]) -> float:
    """Return others' share of a window and its slowness beside the quickest one, as far as each is above the most allowed."""
    quickest = max(1e-9, min(other.own for other in windows))
    found = {"share": cores.share([window]) or 0.0, "slowness": window.own / quickest - 1}
    return sum(value for name, value in found.items() if value > most[name])


def bench(runs: Mapping[str, Callable[[], Any]], cores: Cores, request: Request) -> dict[str, Any]:
    """Time whole models in turns, each run by a call, or by as many as take `least_us` together."""
    wanted, per_block = turns_of(request)
    often = {}
    for name, once in runs.items():
        takes = [timed(once)[0] for _ in range(max(1, request["warmup"]))]
        often[name] = per_block * max(1, int(request["least_us"] / min(takes)))

    times: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in runs}

    def turn() -> None:
        for name, once in runs.items():
            for _ in range(REWARM):  # not counted: fetch back what the other models threw out of the cache
                once()
            times[name].append([timed(once) for _ in range(often[name])])

    chosen, load = quiet_turns(turn, cores, request, wanted)
    rows = {}
    for name, values in times.items():
        wall, worked = zip(*(run for i in chosen for run in values[i]))
        # With one thread, processor time is latency without the time that other programs took from us.
        rows[name] = [*spread(wall), len(wall), spread(worked)[0] if request["threads"] == 1 else None]
    return {"models": rows, "foreign_load": load}


def timed(once: Callable[[], Any]) -> tuple[float, float]:
    """Run once; return what it took and what this process worked, in microseconds."""
    worked, start = time.process_time_ns(), time.perf_counter_ns()
    once()
    end = time.perf_counter_ns()
    return (end - start) / 1000, (time.process_time_ns() - worked) / 1000


def turns_of(request: Request) -> tuple[int, int]:
    """Return the number of turns, and the counted runs of each."""
    runs: int = request["runs"]
    wanted = min(MANY, max(FEW, runs // FEW))
    return wanted, max(1, -(-runs // wanted))


def spread(values: Any) -> list[float]:
    """Median, 10th and 90th percentile."""
    return [float(v) for v in np.percentile(values, [50, 10, 90])]


def sample_input(shape: list[int], dtype: Any) -> Any:
    """Make one input: noise for floating point, zeros for the rest."""
    dtype = np.dtype(dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.zeros(shape, dtype)


def run_all(names: list[str], compute: Callable[[dict[str, Any]], Any], request: Request) -> dict[str, Any]:
    """Compute several inputs (first axis of every array); the stacked outputs go into an .npz file."""
    with np.load(request["inputs"]) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    n = len(next(iter(inputs.values())))
    values = [compute({name: array[i] for name, array in inputs.items()}) for i in range(n)]
    columns = zip(names, zip(*values))
    outputs: Any = {name: np.stack(column) for name, column in columns}
    np.savez(request["outputs"], **outputs)
    return {"outputs": names}


def device(request: Request) -> dict[str, Any]:
    """Facts of the device that decide whether two measurements may be laid beside each other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = [(key.strip(), value.strip()) for key, colon, value in (line.partition(":") for line in lines) if colon]
    info = dict(pairs)
    # Cores of ARM have no name, only numbers of maker and design; a chip may have several designs.
    design = " ".join(sorted({value for key, value in pairs if key in ("CPU implementer", "CPU part")}))
    flags = set((info.get("flags") or info.get("Features") or "").split())
    vector = sorted(flag for flag in flags if flag.startswith(("avx", "sse4", "fma", "amx", "asimd", "sve", "neon", "f16c")))
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": info.get("model name") or design or platform.processor() or platform.machine(), "cpu_flags": vector,
        "arch": platform.machine(), "cores": os.cpu_count(),
        "governor": governor.read_text().strip() if governor.is_file() else "",
        "python": platform.python_version(), "system": platform.platform(), "threads": request["threads"],
    }  # fmt: skip


def answer(tasks: Mapping[str, Callable[[Request], dict[str, Any]]]) -> None:
    """Read the request that the command line names, do its task, write the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    Path("answer.json").write_text(json.dumps(tasks[request["task"]](request)))
