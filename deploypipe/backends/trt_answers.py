"""Read what `trtexec` printed and wrote. Pushed to the device, so it needs only Python's own library.

Formats: NVIDIA/TensorRT, samples/common/sampleReporting.cpp (times, profile, outputs), the engine inspector's JSON (layers),
the builder's verbose log (sparsity). They are written by joining strings: names with quotes would break them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SPARSITY = re.compile(r"\(Sparsity\) (Found|Chose) (\d+) layer\(s\)")
OLDER = {  # what versions before 8.5 or so say instead, followed by the layers
    "found": "(Sparsity) Layers eligible for sparse math:",
    "chose": "(Sparsity) TRT inference plan picked sparse implementation for layers:",
}
PART = re.compile(r"\bm(\d+)__")  # how the nodes of one of several models in one engine begin


def last(log: str, count: int = 3) -> str:
    """Return the lines that say what went wrong, else the last ones."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("&&&&")]
    return " | ".join(([line for line in lines if "[E]" in line] or lines)[-count:])[-600:]


def device_of(log: str) -> dict[str, str]:
    """Read the device from what trtexec said when it opened it."""
    found = {name: re.search(rf"\] {name}: (.+)", log) for name in ("Selected Device", "Compute Capability")}
    gpu, capability = (match[1].strip() if match else "" for match in found.values())
    return {"gpu": gpu, "capability": capability}


def sparsity_of(log: str) -> dict[str, int]:
    """Read how many layers could have used 2:4 sparse kernels, and how many did: the last word of the builder on it."""
    found = {}
    for word, says in OLDER.items():
        for listed in re.findall(re.escape(says) + "(.*)", log):
            found[word] = len([name for name in listed.split(", ") if name.strip()])
    found |= {word.lower(): int(number) for word, number in SPARSITY.findall(log)}
    return {f"sparse_{word}": found[word] for word in ("found", "chose") if word in found}


def layer_times(path: str) -> list[list[Any]]:
    """Read `--exportProfile`: [layer, median microseconds, runs] in the order of execution."""
    rows = json.loads(Path(path).read_text())
    runs = rows[0]["count"]
    return [[row["name"], 1000 * row.get("medianMs", row["averageMs"]), runs] for row in rows[1:]]


def layer_nodes(found: dict[str, Any]) -> dict[str, list[str]]:
    """Read `--exportLayerInfo`: layer -> the model's nodes that its metadata names (TensorRT 8.6 and later)."""
    rows = [row for row in found["Layers"] if isinstance(row, dict)]  # plain names, if built without detailed verbosity
    return {row["Name"]: re.findall(r"\[ONNX Layer: ([^\]]+)\]", row.get("Metadata", "")) for row in rows}


def run_times(path: str, runs: int) -> list[float]:
    """Read `--exportTimes`: microseconds of the GPU, of the last `runs` runs: some versions write the warm-up in front."""
    rows = json.loads(Path(path).read_text())
    return [1000 * row["computeMs"] for row in rows[-runs:]]


def outputs(path: str) -> dict[str, dict[str, Any]]:
    """Read `--exportOutput`: output -> its shape and values."""
    rows = json.loads(Path(path).read_text())
    return {row["name"]: {"shape": [int(n) for n in row["dimensions"].split("x")], "values": row["values"]} for row in rows}


def by_part(rows: list[list[Any]], nodes: dict[str, list[str]], count: int) -> list[list[float]]:
    """Sum up layers by the model that they belong to, where several models lie side by side in one engine.

    Args:
        rows: [layer, median, p10, p90, runs].
        nodes: Layer -> names of the nodes in it.
        count: Number of models; the nodes of model 3 are called `m3__...`.
    """
    sums = [[0.0, 0.0, 0.0] for _ in range(count)]
    for name, *times, _ in rows:
        owners = {int(part) for part in PART.findall(" ".join([name, *nodes.get(name, ())]))}
        for owner in owners:
            sums[owner] = [total + us / len(owners) for total, us in zip(sums[owner], times)]
    return sums


def spread(values: list[float]) -> list[float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return [at(0.5), at(0.1), at(0.9)]
