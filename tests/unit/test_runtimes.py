from dataclasses import replace

import pytest
import torch
from sample_report import REPORT

from deploypipe.errors import BackendError, TargetError, UsageError
from deploypipe.measurement import Latency
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.several import Elsewhere
from deploypipe.profiler.measure import profile
from deploypipe.progress import Recorder, Silent
from deploypipe.reports.render import markdown
from deploypipe.reports.report import Report
from deploypipe.reports.runtimes import RuntimeOutcome, by_speed, rows, section, verdict
from deploypipe.runners import load_runner


def took(us):
    return Latency(us, 0.9 * us, 1.1 * us, 100)


SLOW = RuntimeOutcome("cpu", "onnxruntime 1.32.0", took(200), took(100), "a.onnx", 4000, 2e-7, 1e-3)
FAST = RuntimeOutcome("quick", "quick 2", took(120), took(80), "on-quick/a.q", 4100, 1e-6, 1e-4)
BLIND = RuntimeOutcome("phone", "phone 3", None, None, "on-phone/a.p", 2000, None, 1e-3, ("UNVERIFIED: not run",))
ALL = (SLOW, BLIND, FAST)


def test_the_fastest_stands_first_and_what_was_not_measured_last():
    assert [row[0] for row in rows(ALL)] == ["quick", "cpu", "phone"]
    assert [outcome.target for outcome in by_speed(ALL)] == ["quick", "cpu"]


def test_the_verdict_compares_pruned_models():
    assert verdict(ALL) == "quick is fastest here: 80.0 us, 25 % ahead of cpu"
    assert "nothing to compare" in verdict((SLOW, BLIND))


def test_what_was_not_run_is_said_to_be_unverified():
    row = next(row for row in rows(ALL) if row[0] == "phone")
    assert row[2:] == ("not measured", "not measured", "", "2.00 kB", "not verified")
    assert "- phone: UNVERIFIED: not run" in section(ALL)


def test_a_report_keeps_them_and_shows_them():
    report = replace(REPORT, runtimes=ALL)
    assert Report.from_json(report.to_json()) == report
    assert "## Runtimes" in markdown(report)
    assert "## Runtimes" not in markdown(REPORT)


def test_the_first_target_is_planned_for():
    request = Request(target="cpu-openvino, cpu", threads=2)
    assert request.resolved_target().name == "cpu-openvino"
    assert [(target.name, target.measure.threads) for target in request.resolved_targets()] == [("cpu-openvino", 2), ("cpu", 2)]


def test_a_runtime_that_is_missing_is_found_before_anything_slow(monkeypatch):
    monkeypatch.setattr("deploypipe.backends.openvino.OpenVino.available", lambda self: (False, "pip install openvino"))
    with pytest.raises(BackendError, match=r"openvino is not installed[\s\S]*pip install openvino"):
        Elsewhere(Request(target="cpu,cpu-openvino"))
    assert Elsewhere(Request(target="cpu-openvino")).devices == []


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setattr("deploypipe.backends.tensorrt.TensorRt.available", lambda self: (False, "install TensorRT"))


@pytest.mark.usefixtures("no_tensorrt")
def test_the_runtime_of_a_device_elsewhere_is_not_looked_for_here():
    (device,) = Elsewhere(Request(target="raspberry-pi-5,jetson-orin", host="nano")).devices
    assert (device.present, device.runner.place) == (True, "ssh nano")
    with pytest.raises(BackendError, match="tensorrt is not installed"):
        Elsewhere(Request(target="jetson-orin,nvidia-gpu", host="nano"))


def test_a_device_elsewhere_is_reached_before_anything_slow(monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("deploypipe.pipeline.stages.facts_of", lambda backend, runner, *rest: asked.append(runner.place) or {})
        Elsewhere(Request(target="cpu,cpu-ort-mobile,jetson", host="nano")).reach(Silent())
    assert asked == ["ssh nano"]
    with pytest.raises(TargetError, match=r"reached by ssh, but names no device[\s\S]*--host"):
        Elsewhere(Request(target="cpu,raspberry-pi-5")).reach(Silent())


@pytest.mark.usefixtures("no_tensorrt")
def test_a_target_with_no_device_at_hand_is_told_of():
    heard = Recorder()
    others = Elsewhere(Request(target="cpu,jetson"))
    others.reach(heard)
    assert [device.present for device in others.devices] == [False]
    assert [note for note in heard.notes if "target jetson: no device is at hand" in note and "--host" in note]


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ("cpu,jetson", ["local", "ssh box"]),
        ("jetson,cpu,raspberry-pi-5", ["ssh box", "local", "ssh box"]),
        ("cpu,cpu-openvino", ["ssh box", "ssh box"]),
        ("cpu", ["ssh box"]),
    ],
)
def test_a_host_is_for_the_targets_that_are_reached_over_a_connection(names, places):
    targets = Request(target=names, host="box").resolved_targets()
    assert [load_runner(target).place for target in targets] == places


def test_a_target_cannot_be_named_twice():
    with pytest.raises(UsageError, match="twice"):
        Request(target="cpu,cpu").check()


def test_a_model_that_became_slower_is_called_so():
    (row,) = rows((replace(SLOW, pruned=took(400)),))
    assert row[4] == "2.00x slower"
    assert rows((SLOW,))[0][4] == "2.00x faster"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"budget": 0.5}, 'the budget is 0.5, a float[\\s\\S]*"50%"'),
        ({"keep": "c1"}, r"the groups to keep are 'c1'[\s\S]*\(\"c1\",\)"),
        ({"accuracy_floor": 80}, "accuracy_floor is 80"),
        ({"accuracy_floor": float("nan")}, "accuracy_floor is nan"),
    ],
)
def test_what_python_callers_get_wrong_is_found_at_once(asked, said):
    with pytest.raises(UsageError, match=said):
        Request.of(**asked).check()


def test_no_threads_are_too_few():
    with pytest.raises(TargetError, match="threads is 0"):
        Request(threads=0).check()


def test_nothing_is_measured_for_a_target_that_is_only_converted_for(tmp_path):
    model = torch.nn.Conv2d(1, 4, 3)
    with pytest.raises(TargetError, match="no latency to measure"):
        profile(model, torch.zeros(1, 1, 8, 8), "ios", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
