"""One pruned model on several targets, with the real command line."""

import json
import zipfile

import pytest
from command_line import arguments

from deploypipe.backends import load_backend
from deploypipe.targets import load_target

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
OTHERS = [name for name in ("cpu-ort-mobile", "ncnn") if load_backend(load_target(name)).available()[0]]
CONVERTED = [name for name in ("ios",) if load_backend(load_target(name)).available()[0]]
CHEAP = {"metric": "macs", "epochs": 0, "algo": "l1"}


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "several"
    line = arguments(out, target=",".join(["cpu", *OTHERS, *CONVERTED]), **CHEAP)
    finished = start(*line).wait()
    assert finished.code == 0, finished.err
    return out, finished, line


def test_each_target_has_a_file_a_check_and_two_latencies(run):
    out, _, _ = run
    report = json.loads((out / "report.json").read_text())
    assert [runtime["target"] for runtime in report["runtimes"]] == ["cpu", *OTHERS, *CONVERTED]
    for runtime in report["runtimes"][: 1 + len(OTHERS)]:
        assert (out / runtime["artifact"]).stat().st_size == runtime["artifact_bytes"] > 0
        assert runtime["error"] <= runtime["tolerance"]
        assert runtime["dense"]["median_us"] > 0
        assert runtime["pruned"]["median_us"] > 0


def test_a_target_that_is_only_converted_for_gets_its_file_and_says_that_nothing_ran(run):
    if not CONVERTED:
        pytest.skip("the optional runtime is not installed: pip install coremltools")
    out, finished, _ = run
    runtime = json.loads((out / "report.json").read_text())["runtimes"][-1]
    assert runtime["target"] == "ios"
    assert runtime["dense"] is runtime["pruned"] is runtime["error"] is None
    assert [note for note in runtime["notes"] if note.startswith("UNVERIFIED")]
    with zipfile.ZipFile(out / runtime["artifact"]) as packed:
        assert any(name.endswith("model.mlmodel") for name in packed.namelist())
    assert "not verified" in finished.out


def test_the_answer_says_which_is_fastest(run):
    out, finished, _ = run
    runtimes = json.loads((out / "report.json").read_text())["runtimes"]
    runtimes = [runtime for runtime in runtimes if runtime["pruned"]]
    best = min(runtimes, key=lambda runtime: runtime["pruned"]["median_us"])
    assert f"{best['target']} is fastest here" in finished.out
    assert f"{best['target']} is fastest here" in (out / "report.md").read_text()


def test_the_same_command_again_measures_nothing(run, start):
    out, _, line = run

    def written():
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}

    before = written()
    assert start(*line).wait().code == 0
    assert written() == before


def test_a_target_whose_device_is_not_at_hand_gets_its_file_and_the_way_on(start, tmp_path):
    finished = start(*arguments(tmp_path / "x", target="cpu,jetson", **CHEAP)).wait()
    assert finished.code == 0, finished.err
    assert "target jetson: no device is at hand" in finished.err
    runtime = json.loads((tmp_path / "x" / "report.json").read_text())["runtimes"][-1]
    assert (runtime["target"], runtime["dense"], runtime["pruned"]) == ("jetson", None, None)
    assert (tmp_path / "x" / runtime["artifact"]).suffix == ".onnx"
    assert 0 < runtime["error"] < runtime["tolerance"]
    assert "- jetson: no device is at hand" in (tmp_path / "x" / "report.md").read_text()


def test_a_target_that_runs_nothing_cannot_be_planned_by(start, tmp_path):
    finished = start(*arguments(tmp_path / "x", target="ios")).wait()
    assert finished.code == 4
    assert "--metric macs" in finished.err
