"""Two made-up reports: one with everything in it, one with as little as possible; and a row of the ledger."""

from dataclasses import replace

from deploypipe.measurement import Latency, Round
from deploypipe.plan import Certificate
from deploypipe.reports.ledger import Entry
from deploypipe.reports.pattern import LayerPattern, TwoFour
from deploypipe.reports.report import BudgetOutcome, Check, GroupOutcome, Report, Side

ROUNDS = (
    Round(1.0, 59.5, 59.4, 60.1, Latency(61.0, 60.1, 64.0, 200), Latency(120.2, 118.1, 130.0, 200)),
    Round(1.026, 59.5, 59.1, 60.2, Latency(59.6, 58.8, 62.9, 200), Latency(120.4, 118.0, 131.2, 200)),
)
REPORT = Report(
    model="demo",
    data="demo",
    target="cpu",
    algorithm="thinet",
    options={"ridge": 1e-4, "images": 64},
    seed=0,
    epochs=3,
    dense=Side(0.9778, 41_290, 3_214_000, 181_234, Latency(120.4, 118.0, 131.9, 200), 119.0),
    pruned=Side(0.9722, 12_030, 1_090_400, 62_001, Latency(59.7, 58.8, 64.2, 200, 0.02), 60.0),
    compacted_accuracy=0.9361,
    n_test=360,
    budget=BudgetOutcome("50%", "latency", "us", 60.2, 60.0, 59.7, ROUNDS, 1),
    groups=(
        GroupOutcome("stem.conv", 16, 8, ("stem.conv.weight[0] produces", "a.conv1.weight[1] consumes"), ("add",)),
        GroupOutcome("a.gate", 8, 8, ("a.gate.weight[0] produces",), (), "", "no batch norm"),
        GroupOutcome("head", 10, 10, ("head.weight[0] produces",), (), "the network's output"),
    ),
    checks=(Check("compacted", "masked", 2.1e-7, 1e-5, 8), Check("onnx", "compacted", 4.0e-6, 1e-4, 8)),
    certificate=Certificate(12.5, 12.51, 0.0008, 60.0, 60.0, 60.2, "us", 310, "optimal", 0.21, ("a.conv1",)),
    threads=1,
    table="measured",
    table_error=0.021,
    table_additivity=0.987,
    seconds={"trace": 0.12, "profile": 11.4, "finetune": 20.0},
    artifacts={"engine": "model.ort.onnx"},
    versions={"torch": "2.14.1"},
    machine={"processor": "a | b", "cores": 2, "cpu_flags": ["avx2", "fma"]},
    command="deploypipe build --budget 50%",
    created="2026-11-24 08:00 UTC",
    two_four=TwoFour(
        "auto",
        (
            LayerPattern("a.conv1", "2:4", "", 20.1, 6.2),
            LayerPattern("a.conv2", "dense", "no quicker than dense by the latency table", 8.0, 0.0),
            LayerPattern("head", "dense", "10 output channels are no multiple of 8", None, None),
        ),
        "measured",
        ("TensorRT found 1 layer that could use sparse kernels and chose them for 1",),
        ("tuned.safetensors", "pruned.onnx"),
        0.9012,
    ),
    notes=("2 background processes were busy while measuring",),
)
BARE = replace(
    REPORT,
    dense=replace(REPORT.dense, accuracy=None, latency=None, predicted_us=None),
    pruned=replace(REPORT.pruned, accuracy=None, latency=None, predicted_us=None),
    compacted_accuracy=None,
    n_test=0,
    budget=BudgetOutcome("50%", "macs", "MACs", 1_607_000.0, 1_090_400.0, 1_090_400.0),
    checks=(),
    certificate=None,
    two_four=None,
    threads=4,
    table="",
    table_error=None,
    table_additivity=None,
    notes=(),
    artifacts={},
)
ENTRY = Entry(
    date="2026-11-24T08:00:00+00:00",
    target="cpu",
    threads=1,
    runtime="onnxruntime",
    runtime_version="1.32.0",
    processor="Some CPU, 2.9 GHz",
    model="demo",
    algorithm="thinet",
    budget="50%",
    limit_us=60.2,
    predicted_dense_us=119.0,
    predicted_pruned_us=60.0,
    dense_us=120.4,
    dense_p10_us=118.0,
    dense_p90_us=131.9,
    pruned_us=59.7,
    pruned_p10_us=58.8,
    pruned_p90_us=64.2,
    n_runs=200,
    foreign_load=None,
    n_corrections=1,
    version="0.1.0",
    run='/runs/"x", a',
    table="0123456789abcdef",
)
