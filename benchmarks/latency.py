"""Predicted against measured latency of whole models under random plans: how far the latency table may be trusted.

    python benchmarks/latency.py                             # all models, one and two threads, 20 plans each
    python benchmarks/latency.py --models resnet20 demo --threads 1
    python benchmarks/latency.py --target cpu-openvino       # another target's table goes to latency-BACKEND.csv
    python benchmarks/latency.py --models                    # measures nothing: sums up what is in the file

Widths are drawn from the table's own candidates, so most pairs of widths of a plan were never measured as such, and with
another seed than the plans that the table learned from. All plans of a model are timed in turns with the dense model, in jobs
at several times, of which those three count that a neighbour slowed down least. `ratio_error` compares predicted and measured
latency relative to the dense model in the same jobs, so that a machine that became slower between profiling and checking does
not count; `error` compares the plain microseconds. The bar of 3 % is for what one factor for the whole machine leaves: each
plan's microseconds against its prediction times the mean of all other plans' ("after one factor"). `scatter` is the standard
deviation of that relative latency over the three jobs: what no table can predict.

A machine whose speed changed between profile and check cannot be judged: where the dense model, which the table returns as
it was measured, is off by over 8 %, both are done again from the start, twice at most; `attempts` says how often they were
done. The other plans decide nothing.

The file is written after every model and number of threads; a second call goes on with what is missing (--fresh: from the
start). All its rows are of one machine and runtime: on another one, name another file with --out. Row `dense` of a model also
says what its profile cost: seconds, and kernels measured for it. Each model starts with an empty cache, unless --cache names
one for all.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from scipy.stats import spearmanr
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import cifar_resnet

from deploypipe.backends import load_backend
from deploypipe.backends.base import Timing
from deploypipe.compact import compact
from deploypipe.graph import trace
from deploypipe.models.load import load_model
from deploypipe.plan import KeepPlan
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.export import exported
from deploypipe.profiler.measure import profile
from deploypipe.profiler.sittings import joined, scatter, sit
from deploypipe.progress import Recorder
from deploypipe.runners import load_runner
from deploypipe.targets import Target, load_target

RESULTS = Path(__file__).with_name("results")
DEFAULT_TARGET = "cpu"
Row = dict[str, Any]


def resnet20() -> tuple[nn.Module, torch.Tensor]:
    return cifar_resnet.resnet20(), torch.randn(1, 3, 32, 32)


def resnet56() -> tuple[nn.Module, torch.Tensor]:
    return cifar_resnet.resnet56(), torch.randn(1, 3, 32, 32)


def demo() -> tuple[nn.Module, torch.Tensor]:
    loaded = load_model("demo")
    return loaded.model, loaded.example[0]


def zoo(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def make() -> tuple[nn.Module, torch.Tensor]:
        extra = {"init_weights": False} if name == "googlenet" else {}  # its own way takes a minute
        return torchvision.models.get_model(name, weights=None, **extra), torch.randn(1, 3, 224, 224)

    return make


ALL = (
    "resnet20", "resnet56", "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "efficientnet_b0", "shufflenet_v2_x1_0", "squeezenet1_1", "regnet_y_400mf", "densenet121", "googlenet",
)  # fmt: skip
COLUMNS = (
    "model", "threads", "plan", "predicted_us", "measured_us", "wall_us", "p10_us", "p90_us", "runs", "foreign_load", "error",
    "ratio_error", "factor", "additivity", "table_error", "profile_s", "kernels_new", "kernels", "date", "scatter", "attempts",
)  # fmt: skip
SAME = ("runtime", "version", "cpu", "cpu_flags", "cores", "torch")  # facts that all rows of a file share
SECONDS, FEWEST = 4.0, 12  # of measuring all plans of a model once, roughly; runs of each, at least
CHANGED, ATTEMPTS = 0.08, 3  # the dense model is off by so much: the machine is no longer the one that was profiled
SITTINGS, MOST, PAUSE_S = 3, 8, 3.0  # so often undisturbed, but at most; seconds before another
MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"resnet20": resnet20, "resnet56": resnet56, "demo": demo}


class Told(Recorder):
    """Remembers how much each stage of a profile had to do."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, int] = {}

    def stage(self, name: str, total: int | None = None) -> None:
        """Remember its steps."""
        self.work[name] = total or 0


class Subject:
    """A model and its pruned forms as files: exported once, timed with any number of threads."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model, self.example = MODELS.get(name, zoo(name))()
        self.model.eval()
        self.graph = trace(self.model, (self.example,))
        self.files: dict[tuple[torch.Size, ...], Path] = {}

    def export(self, model: nn.Module, example: Any, target: Target, folder: Path) -> Path:
        """Return the file of a form of the model, exported when it is met first; latency does not depend on values."""
        key = tuple(value.shape for value in model.state_dict().values())
        if key not in self.files:
            self.files[key] = exported(model, example, target, self.folder / f"form-{len(self.files)}")
        return self.files[key]

    def file(self, plan: KeepPlan | None, target: Target) -> Path:
        """Return the exported model under `plan`."""
        small = compact(self.model, self.graph, plan) if plan else self.model
        return self.export(small, self.graph.example, target, self.folder)


def check(subject: Subject, target: Target, n_plans: int, seed: int, cache: Path | None) -> list[Row]:
    """Profile a model, predict and measure plans, again if the machine changed; return one row per plan, dense first."""
    for attempt in range(1, ATTEMPTS + 1):
        rows = checked(subject, target, n_plans, seed, cache or subject.folder / f"cache-{attempt}", fresh=attempt > 1)
        rows[0]["attempts"] = attempt
        off = rows[0]["error"]
        if abs(off) <= CHANGED:
            break
        print(f"  {subject.name}: the dense model is off by {off:+.0%}: the machine changed", file=sys.stderr, flush=True)
    return rows


def checked(subject: Subject, target: Target, n_plans: int, seed: int, cache: Path, *, fresh: bool) -> list[Row]:
    graph, told = subject.graph, Told()
    start = time.perf_counter()
    table = profile(
        subject.model, subject.example, target, graph=graph, cache_dir=cache, reporter=told, fresh=fresh, export=subject.export
    )
    seconds, context = time.perf_counter() - start, table.context(graph)
    for note in told.notes:
        print(f"  {subject.name}: {note}", file=sys.stderr, flush=True)
    plans = {"dense": None} | {
        str(i): plan for i, plan in enumerate(random_plans(graph, table.candidates(graph), n_plans, seed))
    }
    files = {name: subject.file(plan, target) for name, plan in plans.items()}
    runs = max(FEWEST, min(target.measure.runs, int(1e6 * SECONDS / (0.5 * len(files) * context.whole_us))))
    take, dense_of = partial(measured, files, target.replace(runs=runs)), lambda found: found["dense"].quiet_us
    taken = sit(take, dense_of, SITTINGS, MOST, pause_s=PAUSE_S)
    timings, scatters = joined(taken, "dense"), scatter(taken, "dense")
    dense_us, dense = table.predict(graph), timings["dense"]
    common = {"model": subject.name, "threads": target.measure.threads, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    rows = []
    for name, plan in plans.items():
        predicted, timing = table.predict(graph, plan), timings[name]
        times = {"p10_us": timing.p10_us, "p90_us": timing.p90_us, "runs": timing.runs, "foreign_load": timing.foreign_load}
        judged = {"predicted_us": predicted, "measured_us": timing.quiet_us, "wall_us": timing.median_us}
        ratio = (predicted / dense_us) / (timing.quiet_us / dense.quiet_us) - 1
        errors = {"error": predicted / timing.quiet_us - 1, "ratio_error": ratio, "scatter": scatters[name]}
        rows.append({**common, "plan": name, **judged, **times, **errors})
    cost = {"profile_s": seconds, "kernels_new": told.work.get("profile kernels", 0), "kernels": len(table.only(graph).kernels)}
    rows[0] |= {"factor": context.factor, "additivity": context.additivity, "table_error": context.error, **cost}
    return rows


def measured(files: dict[str, Path], target: Target) -> dict[str, Timing]:
    """Time models in one job, in turns."""
    backend, runner = load_backend(target), load_runner(target)
    with tempfile.TemporaryDirectory() as folder:
        return backend.read_bench(runner.run(backend.bench_job(files, target), Path(folder)))


def facts_of(target: Target) -> dict[str, str]:
    """Return what stands on top of the file."""
    backend = load_backend(target)
    with tempfile.TemporaryDirectory() as folder:
        found = backend.read_description(load_runner(target).run(backend.describe_job(target), Path(folder)))
    command = "python benchmarks/latency.py " + " ".join("DIR" if "/" in arg else arg for arg in sys.argv[1:])
    facts = {**found, "torch": torch.__version__, "command": command.strip()}
    return {name: str(value) for name, value in facts.items() if name != "threads"}


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """Return the facts and rows of a file; both empty if there is none, or if it has other columns."""
    lines = path.read_text().splitlines() if path.is_file() else []
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    return (facts, list(rows)) if tuple(rows.fieldnames or ()) == COLUMNS else ({}, [])


def write(path: Path, facts: dict[str, str], rows: Iterable[Row]) -> None:
    """Write the file anew; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in facts.items())
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    temporary.replace(path)


def after_one_factor(rows: Sequence[Row]) -> np.ndarray:
    """Return each plan's error (n,) after the machine's speed is corrected by what all other plans say of it."""
    ratios = np.array([float(row["predicted_us"]) / float(row["measured_us"]) for row in rows])
    others = (ratios.sum() - ratios) / max(1, len(ratios) - 1)
    return np.abs(ratios / others - 1)


def judged(rows: Sequence[Row]) -> dict[str, float]:
    """Return what the rows of one model and number of threads, dense first, say of its predictions; errors are relative."""
    dense, plans = rows[0], rows[1:]
    shape = after_one_factor(plans)
    predicted, taken = ([float(row[name]) for row in plans] for name in ("predicted_us", "measured_us"))
    return {
        "dense_us": float(dense["measured_us"]),
        "fastest": min(taken) / float(dense["measured_us"]),
        "slowest": max(taken) / float(dense["measured_us"]),
        "mape": float(shape.mean()),
        "worst": float(shape.max()),
        "relative": float(np.mean(np.abs([float(row["ratio_error"]) for row in plans]))),
        "in_us": float(np.mean(np.abs([float(row["error"]) for row in plans]))),
        "scatter": float(np.mean([float(row["scatter"]) for row in plans if row["scatter"]] or [np.nan])),
        "rank": float(spearmanr(predicted, taken).statistic),
        "additivity": float(dense["additivity"]),
    }


def show(rows: Sequence[Row]) -> None:
    """Print one line for one model and number of threads."""
    dense, found = rows[0], judged(rows)
    noise = "" if np.isnan(found["scatter"]) else f", repeats within {found['scatter']:.1%}"
    own = f"{float(dense['table_error']):.1%}" if dense["table_error"] not in ("", None) else "-"
    print(
        f"{dense['model']:<20}{dense['threads']}t dense {found['dense_us']:>7.0f} us, down to {found['fastest']:>4.0%}  "
        f"MAPE {found['mape']:.1%} after one factor (worst {found['worst']:.1%}; relative to dense {found['relative']:.1%}, "
        f"in us {found['in_us']:.1%}, table says {own}{noise})  "
        f"rank {found['rank']:.3f}  additivity {found['additivity']:.3f}  load {float(dense['foreign_load'] or 0):.0%}  "
        f"profiled in {float(dense['profile_s']):.0f} s ({dense['kernels_new']} of {dense['kernels']} kernels)",
        flush=True,
    )


def by_model(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each model and number of threads, in the order of the file."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], str(row["threads"])), []).append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(ALL))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where kernel measurements are kept (default: a new folder for each model)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file already")
    parser.add_argument("--out", type=Path, help="file to write (default: in benchmarks/results)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    target = load_target(options.target)
    path = options.out or RESULTS / (
        "latency.csv" if options.target == DEFAULT_TARGET else f"latency-{target.build.backend}.csv"
    )
    facts, (before, rows) = facts_of(target), read(path)
    others = [name for name in SAME if before and before.get(name) != facts.get(name)]
    if options.models and others:
        parser.error(f"{path} holds rows of another machine or version ({', '.join(others)}): name another file with --out")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder), options, target, path, facts, rows)
    if not options.models:
        for one in by_model(rows).values():
            show(one)


def run(name: str, folder: Path, options: Any, target: Target, path: Path, facts: dict[str, str], rows: list[Row]) -> None:
    """Measure a model with each number of threads that is missing, and put its rows into the file."""
    known = set() if options.fresh else {str(row["threads"]) for row in rows if row["model"] == name}
    missing = [threads for threads in options.threads if str(threads) not in known]
    for threads in sorted(known):
        show([row for row in rows if (row["model"], str(row["threads"])) == (name, threads)])
    subject = Subject(name, folder) if missing else None
    for threads in missing:
        assert subject is not None
        found = check(subject, target.replace(threads=threads), options.plans, options.seed, options.cache)
        rows[:] = [row for row in rows if (row["model"], str(row["threads"])) != (name, str(threads))] + found
        write(path, facts, rows)
        show(found)


if __name__ == "__main__":
    main()
