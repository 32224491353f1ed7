"""The estimate against closed forms computed by hand."""

import itertools
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trtexec_standin
from torch import nn

from deploypipe.allocation.allocate import allocate, allocate_widths, prefix_sums
from deploypipe.checkup import examine
from deploypipe.device import at_home
from deploypipe.errors import BackendError, BudgetError, TargetError
from deploypipe.graph import trace
from deploypipe.latency.estimate import estimated, kernel_us, launches_us
from deploypipe.latency.files import Shape
from deploypipe.latency.table import LatencyTable
from deploypipe.pipeline.absent import Absent, device_of, stored, stored_table
from deploypipe.pipeline.sparsify import priced, sparse_notes
from deploypipe.pipeline.stages import Device
from deploypipe.plan import KeepPlan
from deploypipe.reports.figures import UNVERIFIED
from deploypipe.targets import Rates, load_target

ONE, PADDED = (1, 1), (1, 1)
CONV = Shape("conv", (3, 3), ONE, PADDED, ONE, (0, 0), (56, 56), (56, 56), 1, 0)
LINEAR = Shape("linear", (), (), (), (), (0, 0), (), (), 0, 1)
DEPTHWISE = Shape("depthwise", (3, 3), ONE, PADDED, ONE, (1, 1), (56, 56), (56, 56), 1, 0)
RATES = Rates("fp16", 10.0, "", 100.0, "", 8, "", 0.5, "", 2.0)


def test_a_wide_convolution_is_bound_by_arithmetic():
    operations = 2 * 56 * 56 * 9 * 256 * 256
    assert kernel_us(CONV, 256, 256, RATES) == pytest.approx(operations / 10e12 * 1e6 + 0.5)


def test_a_linear_layer_on_one_row_is_bound_by_its_weights():
    bytes_moved = 2 * (1000 * 512 + 1000 + 512)
    assert kernel_us(LINEAR, 512, 1000, RATES) == pytest.approx(bytes_moved / 100e9 * 1e6 + 0.5)


def test_a_depthwise_convolution_reads_one_input_for_each_output():
    bytes_moved = 2 * (9 * 64 + 2 * 56 * 56 * 64)
    assert kernel_us(DEPTHWISE, 64, 64, RATES) == pytest.approx(bytes_moved / 100e9 * 1e6 + 0.5)


def test_arithmetic_comes_in_quanta():
    slow = Rates("fp16", 0.1, "", 100.0, "", 8, "", 0.0)
    assert kernel_us(CONV, 57, 57, slow) == kernel_us(CONV, 64, 64, slow)
    assert kernel_us(CONV, 56, 56, slow) == pytest.approx((56 / 64) ** 2 * kernel_us(CONV, 64, 64, slow))


def test_two_of_four_halve_arithmetic_but_not_traffic():
    assert kernel_us(CONV, 256, 256, RATES, sparse=True) - 0.5 == pytest.approx((kernel_us(CONV, 256, 256, RATES) - 0.5) / 2)
    dense, sparse = (kernel_us(LINEAR, 512, 1000, RATES, sparse=flag) - 0.5 for flag in (False, True))
    assert 0.5 < sparse / dense < 0.6, "half of the values, and two bits for the place of each"


@pytest.fixture(scope="module")
def graph():
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2304, 10)
    )
    return trace(model.eval(), torch.randn(1, 3, 16, 16))


def test_the_whole_model_is_the_sum_of_its_kernels_and_launches(graph):
    target = load_target("jetson-orin")
    table = estimated(graph, target)
    kept = graph.kept()
    layers = sum(kernel_us(Shape.of(y), y.n_in.at(kept), y.n_out.at(kept), target.rates) for y in graph.layers)
    assert graph.ops["max_pool2d"] == 1
    assert table.predict(graph) == pytest.approx(layers + target.rates.launch_us)
    assert table.context(graph).whole_us == pytest.approx(table.predict(graph))


def test_every_legal_width_has_an_entry_and_fewer_channels_never_cost_more(graph):
    table = estimated(graph, load_target("jetson-orin"))
    (name, widths), *_ = table.candidates(graph).items()
    times = [table.predict(graph, KeepPlan.of_widths({name: width})) for width in widths]
    assert widths == tuple(range(8, 65, 8))
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_it_is_called_an_estimate_wherever_it_goes(graph, tmp_path):
    table = estimated(graph, load_target("jetson"))
    table.save(tmp_path)
    read = LatencyTable.load(tmp_path)
    assert read.facts["source"] == read.source == "estimated"
    assert read.id == table.id
    assert read.id.startswith("estimated-")
    assert all(entry.runs == 0 for entry in read.kernels), "nothing was ever run"


def test_every_rate_of_every_target_says_where_it_comes_from():
    for name in ("jetson", "jetson-orin", "jetson-orin-nano"):
        rates = load_target(name).rates
        for figure in ("tflops", "bandwidth", "quantum", "launch", "sparse"):
            assert len(getattr(rates, f"{figure}_source")) > 20, (name, figure)


def test_no_rates_no_estimate(graph):
    with pytest.raises(TargetError, match=r"no rates to estimate with[\s\S]*--host"):
        estimated(graph, load_target("nvidia-gpu"))
    with pytest.raises(TargetError, match="rates are those of fp16, the target builds fp32"):
        estimated(graph, load_target("jetson").replace(build=load_target("jetson").build.__class__("tensorrt", "fp32")))


def test_the_board_that_an_alias_stands_for_is_the_same(graph):
    one, other = load_target("jetson"), load_target("jetson-orin")
    assert (one.rates, one.build, one.measure, one.like) == (other.rates, other.build, other.measure, other.name)
    assert (one.name, one.title, one.note) != (other.name, other.title, other.note)


def test_a_device_that_was_named_is_never_replaced_by_an_estimate(tmp_path):
    target = load_target("jetson")
    assert isinstance(device_of(target), Absent)
    assert type(device_of(target.reached_at("nobody@192.0.2.1"))) is Device
    assert type(device_of(load_target("cpu"))) is Device


def machine(monkeypatch, arch, tensorrt=True):
    monkeypatch.setattr("platform.machine", lambda: arch)
    monkeypatch.setattr("deploypipe.backends.tensorrt.TensorRt.available", lambda self: (tensorrt, ""))


def test_the_device_itself_needs_no_host(monkeypatch):
    machine(monkeypatch, "aarch64")
    device = device_of(load_target("jetson-orin-nano"))
    assert type(device) is Device
    assert device.runner.here
    assert device.target.reach.via == "local"
    (note,) = device.notes
    assert "no host was named, and this machine has the processor (aarch64) and the runtime (tensorrt)" in note
    assert examine(load_target("jetson")).place == "local"
    named = device_of(load_target("jetson").reached_at("nobody@192.0.2.1"))
    assert (named.runner.here, named.notes) == (False, ())


def test_a_program_that_the_target_names_is_the_runtime(monkeypatch, tmp_path):
    machine(monkeypatch, "aarch64", tensorrt=False)
    monkeypatch.setattr("deploypipe.backends.tensorrt.TensorRt.available", lambda self: (False, "set [build] tool"))
    trtexec_standin.install(tmp_path / "tools", (10, 3, 0))
    device = device_of(load_target("jetson-orin-nano").replace(tool=str(tmp_path / "tools" / "trtexec")))
    assert type(device) is Device
    device.require_builder()
    gone = load_target("jetson-orin-nano").replace(via="local", tool=str(tmp_path / "trtexec"))
    with pytest.raises(BackendError, match="not installed"):
        Device(gone).require_builder()


def test_what_another_interpreter_has_only_it_can_tell(monkeypatch):
    monkeypatch.setattr(
        "deploypipe.backends.onnxruntime.OnnxRuntime.available", lambda self: (False, "pip install onnxruntime")
    )
    with pytest.raises(BackendError, match="not installed"):
        Device(load_target("cpu")).require_builder()
    other = load_target("cpu").replace(python=sys.executable)
    Device(other).require_builder()
    facts = examine(other).runtime
    assert facts
    assert facts["version"]
    board = load_target("jetson").replace(python="/opt/venv/bin/python")
    assert at_home(board) is board, "an interpreter on the device makes no machine that device"


@pytest.mark.parametrize(("arch", "tensorrt"), [("x86_64", True), ("aarch64", False)])
def test_a_machine_without_its_processor_or_runtime_is_not_taken_for_the_device(monkeypatch, arch, tensorrt):
    machine(monkeypatch, arch, tensorrt)
    assert isinstance(device_of(load_target("jetson")), Absent)


def test_a_processor_alone_makes_no_machine_a_board(monkeypatch):
    machine(monkeypatch, "aarch64")
    target = load_target("raspberry-pi-5")
    assert at_home(target) is target
    anywhere = load_target("jetson").replace(arch="native")
    assert at_home(anywhere) is anywhere, "a target that states no processor tells nothing"
    with pytest.raises(TargetError, match=r"names no device[\s\S]*on the device itself"):
        device_of(target).runner.describe()


def test_a_machine_that_is_the_device_measures_there(tmp_path, monkeypatch):
    trtexec_standin.install(tmp_path / "bin", (10, 3, 0))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / "own.toml"
    own.write_text(f'name = "own"\nlike = "jetson-orin"\n[device]\narch = "{platform.machine()}"\n')
    facts = device_of(load_target(own)).facts
    assert (facts["runtime"], facts["gpu"]) == ("tensorrt", trtexec_standin.GPU)


def figures(graph, target):
    """Return the table, and what the narrowest and the dense model take."""
    table = estimated(graph, target)
    narrowest = KeepPlan.of_widths({name: widths[0] for name, widths in table.candidates(graph).items()})
    return table, table.predict(graph, narrowest), table.predict(graph)


def test_a_budget_that_only_launches_exceed_is_aimed_at_by_its_share_with_a_warning(graph):
    device = device_of(load_target("jetson"))
    table, least, dense = figures(graph, load_target("jetson"))
    assert device.within_reach(0.9 * dense, table, graph, share=True) == 0.9 * dense
    assert not device.notes
    work = least - launches_us(table, graph)
    for limit, share in ((0.9 * least, True), (0.5 * (work + least), False)):
        taken = device.within_reach(limit, table, graph, share=share)
        assert taken == pytest.approx(least + limit / dense * (dense - least))
        assert device.notes[0].startswith(UNVERIFIED)
        assert "launches" in device.notes[0]


def test_launches_are_what_an_estimate_takes_without_any_work(graph):
    target = load_target("jetson")
    idle = replace(target.rates, launch_us=0.0)
    (table, least, dense), (_, work, whole) = figures(graph, target), figures(graph, target.replace(rates=idle))
    assert launches_us(table, graph) == pytest.approx(dense - whole) == pytest.approx(least - work)


def test_a_budget_below_all_work_is_out_of_reach_as_by_any_table(graph):
    device = device_of(load_target("jetson"))
    table, least, dense = figures(graph, load_target("jetson"))
    work, whole = least - launches_us(table, graph), dense - launches_us(table, graph)
    scores = {group.name: torch.arange(group.size) for group in graph.prunable}
    for limit, share in ((0.99 * work, False), (0.99 * dense * work / whole, True)):
        budget = device.within_reach(limit, table, graph, share=share)
        assert (budget, device.notes) == (limit, ())
        with pytest.raises(BudgetError, match=r"smallest reachable cost is [\s\S]*estimated, not measured"):
            allocate(graph, scores, table, budget)
    measured = LatencyTable({**table.facts, "source": ""}, table.steps, table.kernels, table.contexts)
    assert device.within_reach(0.9 * least, measured, graph, share=True) == 0.9 * least, "a measured table is no estimate"
    assert not device.notes


def test_a_profile_of_such_a_device_is_taken_before_an_estimate(graph, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    target = load_target("jetson")
    assert stored_table(target, graph) is None
    table = estimated(graph, target)
    for folder, changes in (
        ("calibrated", {"source": "calibrated"}),
        ("measured", {"source": ""}),
        ("other", {"target": "cpu"}),
    ):
        LatencyTable({**table.facts, **changes}, table.steps, table.kernels, table.contexts).save(
            tmp_path / "profiles" / folder
        )
    assert stored_table(target, graph).source == "measured"
    assert stored(table) == ""
    about = {"model": "Orin", "gpu": "ga10b", "power_mode": "NV Power Mode: MAXN 0", "date": "2026-11-24T08:00:09+00:00"}
    for source, kind in (("", "stored"), ("calibrated", "calibrated")):
        known = LatencyTable({**table.facts, **about, "source": source}, table.steps, table.kernels, table.contexts)
        assert stored(known) == f"a {kind} profile of Orin (power mode MAXN 0, 2026-11-24 08:00)"
    bare = LatencyTable({**table.facts, "gpu": "ga10b", "source": ""}, table.steps, table.kernels, table.contexts)
    assert stored(bare) == "a stored profile of ga10b (power mode unknown, date unknown)"
    assert device_of(target).known_table(graph, None).source == "measured"


def test_the_allocator_is_offered_two_four_where_it_is_cheaper_and_allowed(graph):
    target = load_target("jetson-orin").replace(rates=Rates("fp16", 0.1, "", 200.0, "", 8, "", 0.5, "", 2.0))
    dense, sparse = estimated(graph, target), estimated(graph, target, sparse=True)
    (layer,) = [layer for layer in graph.layers if layer.name == "2"]
    for n_in in (16, 64):
        assert sparse.kernel_us(layer, n_in, 64) == dense.kernel_us(layer, n_in, 64)
        assert sparse.kernel_us(layer, n_in, 64, "2:4") == kernel_us(Shape.of(layer), n_in, 64, target.rates, sparse=True)
    assert sparse.predict(graph) == dense.predict(graph), "a dense model has dense weights"
    full = KeepPlan.of_widths({"0": 64, "2": 64}, ["2"])
    limit = sparse.offering().predict(graph, full)
    assert limit < dense.predict(graph)
    values = {name: np.arange(65.0) for name in ("0", "2")}
    wide, proof = allocate_widths(graph, values, sparse.offering(), 1.001 * limit, masks={"2": 0.5})
    assert (wide["0"], wide["2"], proof.two_four) == (64, 64, ("2",)), "2:4 at full width fits the budget"
    narrow, _ = allocate_widths(graph, values, dense, 1.001 * limit)
    assert narrow["0"] + narrow["2"] < 128, "without it, channels have to go"


def test_where_the_target_does_not_say_what_two_four_gains_nothing_is_assumed(graph):
    target = load_target("jetson-orin")
    silent = target.replace(rates=replace(target.rates, sparse=1.0, sparse_source=""))
    table = estimated(graph, silent, sparse=True)
    assert not table.knows_two_four
    assert table.facts["weights"] == "dense"
    with pytest.raises(TargetError, match=r"does not state what 2:4 weights gain[\s\S]*sparse_source"):
        priced(table, "auto", silent)
    assert priced(table, "2:4", silent).predict(graph, KeepPlan({})) == table.predict(graph)
    (assumed,) = [
        note for note in sparse_notes(Path("none"), target, estimated(graph, target, sparse=True), "auto") if "assumed" in note
    ]
    assert "2 times the dense rate" in assumed
    assert target.rates.sparse_source in assumed


def test_a_stored_profile_without_two_four_is_no_answer_to_a_choice(graph, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    target = load_target("jetson")
    table = estimated(graph, target)
    LatencyTable({**table.facts, "source": ""}, table.steps, table.kernels, table.contexts).save(tmp_path / "profiles" / "m")
    assert device_of(target, None, "2:4").known_table(graph, None).source == "measured"
    assert device_of(target, None, "auto").known_table(graph, None).source == "estimated"


class Bottleneck(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            nn.Conv2d(width, inner, 1),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x):
        return torch.relu(x + self.c3(torch.relu(self.c2(torch.relu(self.c1(x))))))


@pytest.mark.parametrize("short", [0.0, 1.2e-16, 1e-12, 1e-10, 1e-9, 1e-6])
def test_a_budget_a_hair_below_a_plan_gives_the_best_plan_within_it(short):
    """The solver takes a plan that is over the budget by less than its tolerance, and must not be asked again at its edge."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), Bottleneck(64, 32), Bottleneck(64, 32)]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    graph = trace(net.eval(), torch.zeros(1, 3, 16, 16))
    table = estimated(graph, load_target("jetson"))
    values = {group.name: prefix_sums(np.arange(group.size, 0.0, -1.0)) for group in graph.prunable}
    budget = table.predict(graph) * (1 - short)
    offered, best = table.candidates(graph), -1.0
    for choice in itertools.product(*(offered[name] for name in values)):
        kept = dict(zip(values, choice, strict=True))
        if table.predict(graph, KeepPlan.of_widths(kept)) <= budget:
            best = max(best, sum(values[name][width] for name, width in kept.items()))
    _, certificate = allocate_widths(graph, values, table, budget)
    assert certificate.value == pytest.approx(best, rel=1e-3)
    assert certificate.predicted <= budget
    assert certificate.bound >= best - 1e-6 * best


def test_a_table_of_the_fastest_device_can_be_read_again(tmp_path):
    """Without a launch a small kernel takes less than the last digit that is kept, and nothing takes no time."""
    target = load_target("jetson")
    quick = replace(target.rates, tflops=900.0, bandwidth_gb_s=9000.0, launch_us=0.0)
    graph = trace(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)).eval(), torch.zeros(1, 3, 4, 4))
    table = estimated(graph, replace(target, rates=quick))
    table.save(tmp_path / "table")
    assert LatencyTable.load(tmp_path / "table").predict(graph) == pytest.approx(table.predict(graph), rel=0.5)
