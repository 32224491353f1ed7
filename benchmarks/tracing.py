"""What tracing costs: `dp.trace` against one forward pass and against Torch-Pruning's dependency graph.

    python benchmarks/tracing.py [MODEL ...]        (torchvision names; default: its classifiers)

One thread, 224x224, batch 1. Each model has a process of its own, as a user's has: what the memory allocator kept from larger
models would otherwise decide how dear a pass with gradients is. For each model the three are run in turns, and medians are
compared within the run, so a busy machine disturbs all alike. Writes benchmarks/results/tracing.csv. Needs torch-pruning
(`pip install torch-pruning`).
"""

import csv
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning
import torchvision
from machine import describe
from torch import nn

from deploypipe.graph import trace

TOO_LARGE = {"regnet_y_128gf", "vit_h_14"}  # over 600 million parameters: 2.5 GB each
ONE = "--one"  # measure one model in this process and answer in JSON
COLUMNS = ("model", "forward_s", "trace_s", "torch_pruning_s", "trace_over_torch_pruning", "limit_s", "within_limit", "note")
TURNS = 5
RESULT = Path(__file__).parent / "results" / "tracing.csv"


def seconds(call: Callable[[], object]) -> float:
    gc.collect()  # what the call before left behind is not this one's cost
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str) -> dict[str, object]:
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **extra).eval()
    example = torch.randn(1, 3, 224, 224)

    def forward() -> None:
        with torch.inference_mode():
            model(example)

    def peer() -> None:
        torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)

    calls: dict[str, Callable[[], object]] = {
        "forward_s": forward,
        "trace_s": lambda: trace(model, example),
        "torch_pruning_s": peer,
    }
    note, times = "", {key: [] for key in calls}
    for turn in range(TURNS + 1):  # the first turn warms up and is not counted
        for key, call in list(calls.items()):
            try:
                took = seconds(call)
            except Exception as error:
                note = f"{key}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
                del calls[key]
                continue
            if turn:
                times[key].append(took)
    row: dict[str, object] = {key: round(statistics.median(values), 4) if values else "" for key, values in times.items()}
    forward_s, trace_s = float(row["forward_s"]), float(row["trace_s"])
    limit = 1.5 * forward_s + 0.2
    ratio = round(trace_s / float(row["torch_pruning_s"]), 3) if row["torch_pruning_s"] else ""
    return {
        "model": name,
        **row,
        "trace_over_torch_pruning": ratio,
        "limit_s": round(limit, 4),
        "within_limit": trace_s <= limit,
        "note": note,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:2] == [ONE]:
        print(json.dumps(measure(sys.argv[2])))
        return
    rows = []
    for name in sys.argv[1:] or sorted(set(torchvision.models.list_models(torchvision.models)) - TOO_LARGE):
        answer = subprocess.run([sys.executable, __file__, ONE, name], check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(answer.splitlines()[-1]))
        print("  ".join(f"{rows[-1][column]}" for column in COLUMNS), flush=True)
    ratios = [float(row["trace_over_torch_pruning"]) for row in rows if row["trace_over_torch_pruning"] != ""]
    within = sum(bool(row["within_limit"]) for row in rows)
    print(f"within 1.5 forward passes + 0.2 s: {within} of {len(rows)}")
    print(f"median of trace / Torch-Pruning: {statistics.median(ratios):.2f}")
    facts = describe({"threads": 1, "torch_pruning": torch_pruning.__version__})
    with RESULT.open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
