"""Predicted against measured latency of whole models under random plans: how far the latency table may be trusted.

    python benchmarks/latency.py --models resnet20 resnet18 mobilenet_v2 demo --plans 12
    python benchmarks/latency.py --target cpu-openvino      # another target's table goes to latency-BACKEND.csv

Widths are drawn from the table's own candidates, so most pairs of widths of a plan were never measured as such. All plans of
a model are exported and timed in one job, in turns, together with the dense model. `ratio_error` compares predicted and
measured latency relative to the dense model in that same job, so that a machine that became slower between profiling and
checking does not count; `error` compares the plain microseconds.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
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
from deploypipe.latency.table import LatencyTable
from deploypipe.models.load import load_model
from deploypipe.plan import KeepPlan
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.export import exported
from deploypipe.profiler.measure import profile
from deploypipe.runners import load_runner
from deploypipe.targets import Target, load_target
from deploypipe.types import Graph

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


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"resnet20": resnet20, "resnet56": resnet56, "demo": demo}


def measured(model: nn.Module, graph: Graph, plans: list[KeepPlan], target: Target) -> list[Timing]:
    """Time the dense model and every plan in one job."""
    backend, runner = load_backend(target), load_runner(target)
    with tempfile.TemporaryDirectory() as name:
        folder, paths = Path(name), {}
        for index, plan in enumerate([None, *plans]):
            small = compact(model, graph, plan) if plan else model
            paths[str(index)] = exported(small, graph.example, target, folder / str(index))
        timings = backend.read_bench(runner.run(backend.bench_job(paths, target), folder))
        return list(timings.values())


def check(name: str, target: Target, n_plans: int, seed: int, cache: Path | None) -> tuple[list[Row], Row]:
    """Return one row per plan and the summary of a model."""
    model, example = MODELS.get(name, zoo(name))()
    model.eval()
    graph = trace(model, (example,))
    start = time.perf_counter()
    table = profile(model, example, target, graph=graph, cache_dir=cache)
    seconds = time.perf_counter() - start
    plans = random_plans(graph, table.candidates(graph), n_plans, seed)
    dense, *timings = measured(model, graph, plans, target)
    dense_us = table.predict(graph)
    rows = []
    for index, (plan, timing) in enumerate(zip(plans, timings, strict=True)):
        predicted = table.predict(graph, plan)
        ratio = (predicted / dense_us) / (timing.quiet_us / dense.quiet_us) - 1
        times = {"p10_us": timing.p10_us, "p90_us": timing.p90_us, "runs": timing.runs, "foreign_load": timing.foreign_load}
        judged = {"predicted_us": predicted, "measured_us": timing.quiet_us, "wall_us": timing.median_us}
        errors = {"error": predicted / timing.quiet_us - 1, "ratio_error": ratio}
        rows.append({"model": name, "plan": index, **judged, **times, **errors})
    return rows, summary(name, rows, table, graph, dense, seconds)


def summary(name: str, rows: list[Row], table: LatencyTable, graph: Graph, dense: Timing, seconds: float) -> Row:
    ratios = np.abs([row["ratio_error"] for row in rows])
    plain = np.abs([row["error"] for row in rows])
    rank = spearmanr([row["predicted_us"] for row in rows], [row["measured_us"] for row in rows]).statistic
    context = table.context(graph)
    return {
        "model": name, "dense_us": dense.quiet_us, "fastest": min(row["measured_us"] for row in rows) / dense.quiet_us,
        "median": np.median(ratios), "mape": ratios.mean(), "worst": ratios.max(), "plain_median": np.median(plain),
        "rank": rank, "factor": context.factor, "additivity": context.additivity, "load": dense.foreign_load,
        "profile_s": seconds,
    }  # fmt: skip


def write(rows: list[Row], facts: Mapping[str, Any], target: Target) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    backend = "" if target.name == DEFAULT_TARGET else f"-{target.build.backend}"
    threads = "" if target.measure.threads == 1 else f"-{target.measure.threads}threads"
    name = f"latency{backend}{threads}.csv"
    with (RESULTS / name).open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def show(row: Row) -> None:
    errors = (
        f"error: median {row['median']:.1%}  mean {row['mape']:.1%}  worst {row['worst']:.1%}  plain {row['plain_median']:.1%}"
    )
    quality = f"rank {row['rank']:.3f}  factor {row['factor']:.3f}  additivity {row['additivity']:.3f}  load {row['load']}"
    range_us = f"dense {row['dense_us']:>8.0f} us  down to {row['fastest']:>4.0%}"
    print(f"{row['model']:<22} {range_us}  {errors}  {quality}  profiled in {row['profile_s']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet18", "mobilenet_v2", "demo"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default=DEFAULT_TARGET)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where kernel measurements are kept (default: the user's cache)")
    parser.add_argument("--dry", action="store_true", help="do not write into benchmarks/results")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    target = load_target(options.target).replace(threads=options.threads)
    all_rows: list[Row] = []
    for name in options.models:
        rows, summed = check(name, target, options.plans, options.seed, options.cache)
        show(summed)
        all_rows += rows
    with tempfile.TemporaryDirectory() as folder:
        backend = load_backend(target)
        facts = backend.read_description(load_runner(target).run(backend.describe_job(target), Path(folder)))
    facts = {**facts, "torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    facts["command"] = "python benchmarks/latency.py " + " ".join("DIR" if "/" in arg else arg for arg in sys.argv[1:])
    if not options.dry:
        write(all_rows, facts, target)


if __name__ == "__main__":
    main()
