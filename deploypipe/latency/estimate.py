"""An analytic latency table from a target's published rates, for where no device is at hand: a roofline, no measurement.

A kernel takes as long as its arithmetic at the peak rate or its memory traffic at the peak bandwidth, whichever is longer,
and a launch. Channels count in whole quanta for arithmetic. Real kernels reach neither peak, so that this is a lower bound:
what it is good for is which widths save anything at all.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from typing import Any

from deploypipe.errors import TargetError
from deploypipe.latency.context import Context, Overhead
from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import AllSteps, Steps, legal_widths, reachable, two_four_widths
from deploypipe.targets import Rates, Target
from deploypipe.types import Graph, Layer

ESTIMATED, CALIBRATED = "estimated", "calibrated"  # values of `facts["source"]`; a measured table has none
LEAST_US = 0.001  # tables are kept to three digits, and nothing takes no time
BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 1}
MOST = 14  # widths of each end of a layer
# Operations that run as kernels of their own even in runtimes that fuse; their work is not counted, only their launch.
APART = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sum", "cat", "softmax", "upsample_nearest2d", "layer_norm")


def estimated(graph: Graph, target: Target, *, sparse: bool = False) -> LatencyTable:
    """Return the table of a model on `target`, with an entry for every width that may be chosen.

    With `sparse`, kernels that may have 2:4 weights are priced with these too, if the target file states how much faster the
    device then computes, and from which document: nothing is taken for granted where it does not.

    Raises:
        TargetError: The target file states no rates, or only some of another precision.
    """
    rates = _rates(target)
    steps: AllSteps = {kind: Steps(rates.quantum) for kind in ("conv", "depthwise", "grouped", "transposed", "linear")}
    legal, dense = legal_widths(graph, steps), graph.kept()
    sparse = sparse and rates.sparse > 1.0
    entries: list[Entry] = []
    for layer in graph.layers:
        shape = Shape.of(layer)
        for n_in, n_out in _widths(layer, shape, legal, dense):
            us = kernel_us(shape, n_in, n_out, rates)
            entries.append(Entry(shape, n_in, n_out, us, us, us, 0))
        for n_in, n_out in two_four_widths(layer, legal, dense, MOST, MOST) if sparse else ():
            us = kernel_us(shape, n_in, n_out, rates, sparse=True)
            entries.append(Entry(shape, n_in, n_out, us, us, us, 0, "2:4"))
    facts: dict[str, Any] = {
        "source": ESTIMATED, "weights": "dense or 2:4" if sparse else "dense", "target": target.name,
        "runtime": target.build.backend, "precision": rates.precision, "rates": asdict(rates),
        "timer_us": 0.0, "session_us": 0.0, "node_us": rates.launch_us,
    }  # fmt: skip
    apart = sum(count for name, count in graph.ops.items() if name in APART)
    others = (Overhead("launch of kernels without weights", (), apart * rates.launch_us),)
    context = Context(structure_of(graph), {}, others, 1.0, 1.0, 1.0, None, 0)
    table = LatencyTable(facts, steps, tuple({entry.place: entry for entry in entries}.values()), (context,))
    return table.with_context(replace(context, whole_us=table.predict(graph)))


def launches_us(table: LatencyTable, graph: Graph) -> float:
    """Return what an estimate of the dense model takes for launches: of each layer, and of the other kernels."""
    apart = sum(kernel.fixed_us for kernel in table.context(graph).overhead)
    return float(table.facts["rates"]["launch_us"]) * len(graph.layers) + apart


def kernel_us(shape: Shape, n_in: int, n_out: int, rates: Rates, *, sparse: bool = False) -> float:
    """Return the microseconds of one kernel by the roofline; `sparse` if its weights hold the 2:4 pattern.

    Of a 2:4 weight half the values and two bits for the place of each are read.
    """
    size, q = BYTES[rates.precision], rates.quantum
    padded = (n_in, n_out) if shape.tied else (-(-n_in // q) * q, -(-n_out // q) * q)
    rate = rates.tflops * (rates.sparse if sparse else 1.0)
    arithmetic = 2 * macs(shape, *padded) / (rate * 1e6)
    reads = shape.per_group[0] if shape.tied else n_in
    weights = prod(shape.kernel) * reads * n_out * ((size + 0.25) / 2 if sparse else size)
    if shape.rows:
        moved = shape.rows * (n_in + n_out)
    else:
        moved = shape.batch * (prod(shape.in_size) * n_in + prod(shape.out_size) * n_out)
    memory = (weights + size * moved) / (rates.bandwidth_gb_s * 1e3)
    return max(arithmetic, memory, LEAST_US) + rates.launch_us


def macs(shape: Shape, n_in: int, n_out: int) -> int:
    """Return the multiply-adds of a kernel at two widths."""
    if shape.rows:
        return shape.rows * n_in * n_out
    positions = prod(shape.in_size if shape.transposed else shape.out_size)
    reads = shape.per_group[0] if shape.tied else n_in
    return shape.batch * positions * prod(shape.kernel) * reads * n_out


def _rates(target: Target) -> Rates:
    rates, at = target.rates, f"target {target.name}"
    if not rates.known:
        fix = "name a device with --host, or state [rates] with their sources in the target file"
        raise TargetError("there is no device at hand, and the target file states no rates to estimate with", at=at, fix=fix)
    if rates.precision != target.build.precision or rates.precision not in BYTES:
        raise TargetError(
            f"the rates are those of {rates.precision}, the target builds {target.build.precision}",
            at=at,
            fix="state [rates] of that precision in the target file",
        )
    return rates


def _widths(
    layer: Layer, shape: Shape, legal: Mapping[str, tuple[int, ...]], dense: Mapping[str, int]
) -> list[tuple[int, int]]:
    outs = reachable(layer.n_out, legal, dense, MOST)
    if shape.tied:
        first, second = shape.per_group
        return [(out // second * first, out) for out in outs]
    return [(n_in, n_out) for n_in in reachable(layer.n_in, legal, dense, MOST) for n_out in outs]
