"""No device at hand: an estimate, a bundle, its owner's answer and what becomes of it, by the real command line.

The owner is played by a plain Python and by the stand-in for trtexec; nothing here has met hardware.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trtexec_standin
from command_line import FACTORY, Start, arguments

import deploypipe as dp
from deploypipe.latency.estimate import estimated
from deploypipe.models.load import load_model
from deploypipe.pipeline import Request, profile_model
from deploypipe.reports.report import Report

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
WORDS = "estimated, not measured"


@pytest.fixture(scope="module")
def run(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("absent") / "run"
    done = start(*arguments(out, target="jetson", algo="thinet", budget="80%", epochs=0)).wait()
    assert done.code == 0, done.err
    assert done.out.count(WORDS) == 4, "dense, pruned, change, budget"
    return out


@pytest.fixture(scope="module")
def owner(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, carried to a 'device' and measured there by the command that its README names."""
    device = tmp_path_factory.mktemp("device")
    trtexec_standin.install(device / "bin", (10, 3, 0))
    (device / "bin" / "jetson_clocks").write_text("#!/bin/sh\necho GPU CurrentFreq=306000000\n")
    (device / "bin" / "jetson_clocks").chmod(0o755)
    bundle = device / "bundle"
    bundle.mkdir()
    for file in (run / "bundle").iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    assert "cd bundle && python3 trt_measure.py request.json" in (bundle / "README.md").read_text()
    path = f"{device / 'bin'}{os.pathsep}{os.environ['PATH']}"
    argv = [sys.executable, "trt_measure.py", "request.json"]
    subprocess.run(argv, cwd=bundle, env={"PATH": path, "HOME": str(device)}, check=True, timeout=120)
    answer = json.loads((bundle / "results.json").read_text())
    answer["facts"]["arch"] = "aarch64"  # as a Jetson says; whoever plays it here is another machine
    for folder in (bundle, run / "bundle"):
        (folder / "results.json").write_text(json.dumps(answer))
    return bundle


def test_every_latency_is_called_an_estimate(run: Path, start: Start) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["latency_source"] == WORDS
    assert report["table"] == "estimated"
    assert report["dense"]["latency"] is report["pruned"]["latency"] is None
    assert (run / "report.md").read_text().count(WORDS) >= 7
    table = dp.LatencyTable.load(run / "table")
    assert table.facts["source"] == "estimated"
    assert table.id.startswith("estimated-")
    assert f"({WORDS})" in start("compare", str(run), str(run)).wait().out
    assert any("not run on hardware" in note for note in report["notes"])


def test_files_are_checked_here_and_hold_the_target_s_precision(run: Path) -> None:
    checks = {check["stage"]: check for check in json.loads((run / "report.json").read_text())["checks"]}
    assert checks["onnx"]["tolerance"] == 1e-3
    assert 0 < checks["built"]["error"] < checks["built"]["tolerance"] == 1e-2


def test_what_comes_back_becomes_the_report_a_ledger_row_and_a_profile(run: Path, owner: Path, start: Start) -> None:
    done = start("profile", "--import", str(run / "bundle"), "--json").wait()
    assert done.code == 0, done.err
    found = json.loads(done.out)
    answer = json.loads((owner / "results.json").read_text())
    report = Report.load(run)
    assert report.pruned.latency.median_us == answer["bench"]["models"]["pruned"][0]
    assert found["dense_measured_us"] == pytest.approx(answer["bench"]["models"]["dense"][0], abs=0.1)
    assert report.machine["gpu"] == trtexec_standin.GPU
    assert report.machine["clocks"] == "GPU CurrentFreq=306000000"
    assert "clocks" not in answer["facts"], "these say for which device a profile holds"
    assert report.latency_source == "measured"
    assert report.table == "estimated", "what chose the plan stays said"
    entry = json.loads(start("ledger", "--json").wait().out)["entries"][-1]
    assert entry["table"].startswith("estimated-")
    assert entry["pruned_us"] == report.pruned.latency.median_us
    again = start("profile", "--import", str(run / "bundle")).wait()
    assert again.code == 0
    assert (run / "report.md").read_text().count("by its owner") == 1


def test_the_same_command_keeps_what_was_measured(run: Path, owner: Path, start: Start) -> None:
    """The profile that came of it would make another plan, of which nothing is measured."""
    assert start("profile", "--import", str(run / "bundle")).wait().code == 0
    files = {name: (run / name).read_bytes() for name in ("plan.json", "pruned-built.onnx", "compact.safetensors")}
    done = start(*arguments(run, target="jetson", algo="thinet", budget="80%", epochs=0)).wait()
    assert done.code == 0, done.err
    assert {name: (run / name).read_bytes() for name in files} == files
    report = Report.load(run)
    assert report.latency_source == "measured"
    assert report.machine["clocks"] == "GPU CurrentFreq=306000000"
    assert [note.count("by its owner") for note in report.notes if note.startswith("latencies: ")] == [1]
    assert not [note for note in report.notes if "not run on hardware" in note or "when its latency table was measured" in note]
    assert report.pruned.latency.median_us == json.loads((owner / "results.json").read_text())["bench"]["models"]["pruned"][0]


def test_a_bundle_of_a_run_that_was_built_again_is_refused(run: Path, owner: Path, start: Start, tmp_path: Path) -> None:
    for file in run.rglob("*"):
        if file.is_file() and file.parent != run / "bundle":
            (tmp_path / file.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.relative_to(run)).write_bytes(file.read_bytes())
    carried = tmp_path / "carried"
    carried.mkdir()
    for name in ("bundle.json", "results.json", "dense.onnx", "pruned.onnx"):
        (carried / name).write_bytes((owner / name).read_bytes())
    state = json.loads((carried / "bundle.json").read_text())
    (carried / "bundle.json").write_text(json.dumps(state | {"run": str(tmp_path)}))
    (tmp_path / "pruned-built.onnx").write_bytes((tmp_path / "dense-built.onnx").read_bytes())
    before = (tmp_path / "report.json").read_bytes()
    done = start("profile", "--import", str(carried)).wait()
    assert done.code == 2
    assert "the run's pruned model is not the one in this bundle" in done.err
    assert (tmp_path / "report.json").read_bytes() == before


def test_later_builds_find_the_calibrated_profile(run: Path, owner: Path, start: Start) -> None:
    assert start("profile", "--import", str(run / "bundle")).wait().code == 0
    summary = json.loads(start("profile", "--model", f"{FACTORY}:net", "--target", "jetson", "--json").wait().out)
    assert summary["table"] == "calibrated"
    measured = json.loads((owner / "results.json").read_text())["bench"]["models"]["dense"][0]
    assert summary["dense_predicted_us"] == pytest.approx(measured, abs=0.1)


def test_the_answer_of_another_bundle_is_refused(run: Path, owner: Path, start: Start, tmp_path: Path) -> None:
    for name in ("bundle.json", "results.json"):
        (tmp_path / name).write_bytes((owner / name).read_bytes())
    state = json.loads((tmp_path / "results.json").read_text())
    state["sha256"]["pruned"] = "0" * 64
    (tmp_path / "results.json").write_text(json.dumps(state))
    done = start("profile", "--import", str(tmp_path)).wait()
    assert done.code == 2
    assert "not those of this bundle" in done.err
    assert start("profile", "--import", str(tmp_path / "nothing")).wait().code == 2


def test_the_answer_of_another_kind_of_machine_is_refused(run: Path, owner: Path, start: Start, tmp_path: Path) -> None:
    def left() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}

    before = left()
    for name in ("bundle.json", "results.json"):
        (tmp_path / name).write_bytes((owner / name).read_bytes())
    state = json.loads((tmp_path / "results.json").read_text())
    state["facts"]["arch"] = "x86_64"
    (tmp_path / "results.json").write_text(json.dumps(state))
    done = start("profile", "--import", str(tmp_path)).wait()
    assert done.code == 4
    assert "the target is a device with aarch64, the one that answered has x86_64" in done.err
    assert "run the bundle's command on such a device" in done.err
    assert left() == before


def test_a_build_on_a_stored_profile_names_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile that was measured once, with a host; later builds without one rest on it."""
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path))
    loaded = load_model(f"{FACTORY}:net")
    table = estimated(dp.trace(loaded.model, loaded.example), dp.load_target("jetson"))
    about = {"source": "", "model": "Orin in the lab", "power_mode": "30W", "date": "2026-11-24T08:00:00+00:00"}
    dp.LatencyTable({**table.facts, **about}, table.steps, table.kernels, table.contexts).save(tmp_path / "profiles" / "orin")
    asked = {"model": f"{FACTORY}:net", "data": f"{FACTORY}:data", "target": "jetson", "algo": "l1", "budget": "80%"}
    report = dp.build(**asked, epochs=0, out=tmp_path / "run")
    words = "from a stored profile of Orin in the lab (power mode 30W, 2026-11-24 08:00), not measured in this run"
    assert (report.table, report.latency_source) == ("measured", words)
    for file in ("report.md", "bundle/README.md", "bundle/bundle.json"):
        text = (tmp_path / "run" / file).read_text()
        assert words in text, file
        assert "measured, not measured" not in text, file
    assert profile_model(Request(f"{FACTORY}:net", target="jetson"))["latencies"] == words


def test_a_budget_below_all_work_ends_as_by_a_measured_table(start: Start, tmp_path: Path) -> None:
    done = start(*arguments(tmp_path / "run", target="jetson", algo="l1", budget="1%", epochs=0)).wait()
    assert done.code == 6
    assert "the smallest reachable cost is" in done.err
    assert re.search("latencies are (estimated|calibrated), not measured", done.err), (
        "calibrated where a test before this did so"
    )


def test_a_choice_of_2_4_by_an_estimate_says_what_it_assumes(start: Start, tmp_path: Path) -> None:
    options = {"target": "jetson", "algo": "l1", "budget": "90%", "epochs": 0, "sparsity": "auto"}
    done = start(*arguments(tmp_path / "run", **options)).wait()
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["two_four"]["asked"] == "auto"
    assert report["two_four"]["source"] in {"estimated", "calibrated"}
    assert [
        note
        for note in report["notes"]
        if note.startswith("what 2:4 saves is assumed, not measured: 2 times the dense rate (NVIDIA")
    ]
    assert "by the latency table (" in done.out
    assert "not measured)" in done.out
