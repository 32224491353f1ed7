"""`deploypipe build`, for real: what it leaves, that it resumes after any kill, and what a changed option recomputes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from command_line import Start, arguments

import deploypipe as dp
from deploypipe.count import macs, params
from deploypipe.graph import trace
from deploypipe.models.load import load_model
from deploypipe.store import finished

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
PLANNING = ["profile", "export-dense", "simplify-dense", "build-dense", "plan-1", "measure-plan-1", "plan"]
STAGES = ["profile", "plan-1", "measure-plan-1", "plan", "compact", "finetune"]
STAGES += [f"{step}-{side}" for side in ("dense", "pruned") for step in ("export", "simplify", "build")]
STAGES += ["verify", "bench", "accuracy"]


def test_report_tells_the_truth(reference: Path) -> None:
    report = json.loads((reference / "report.json").read_text())
    small, dense = dp.load(reference), load_model(report["model"]).model
    graph, plan = trace(dense, torch.zeros(1, 2, 12, 12)), dp.KeepPlan.load(reference / "plan.json")
    assert report["pruned"]["n_parameters"] == sum(p.numel() for p in small.parameters()) == params(graph, plan)
    assert report["dense"]["n_parameters"] == sum(p.numel() for p in dense.parameters())
    assert report["pruned"]["n_macs"] == macs(graph, plan) < report["dense"]["n_macs"]
    proof, budget = report["certificate"], report["budget"]
    assert budget["predicted"] == pytest.approx(proof["predicted"])
    assert proof["predicted"] <= proof["budget"] * (1 + 1e-9)
    assert budget["limit"] == pytest.approx(0.7 * report["dense"]["latency"]["median_us"]), (
        "a share of what was measured beside it"
    )
    assert budget["reached"] == report["pruned"]["latency"]["median_us"]
    assert report["budget_met"] == (budget["reached"] <= budget["limit"])
    assert report["pruned"]["accuracy"] > 0.9, "five epochs learn stripes"
    assert 0 < report["pruned"]["latency"]["p10_us"] <= report["pruned"]["latency"]["median_us"]
    assert [c["stage"] for c in report["checks"]] == ["compacted", "onnx", "simplified", "built"]
    assert all(c["error"] <= c["tolerance"] for c in report["checks"])
    assert {g["name"]: g["fixed"] for g in report["groups"]}["head"] == "output of the model"
    assert report["threads"] == 1
    assert report["pruned"]["artifact_bytes"] == (reference / report["artifacts"]["artifact"]).stat().st_size
    assert "deploypipe build" in (reference / "report.md").read_text()


def test_artifact_computes_what_the_loaded_model_computes(reference: Path) -> None:
    small = dp.load(reference)
    x = torch.randn(1, 2, 12, 12)
    with torch.inference_mode():
        expected = small(x)
    for name in ("pruned.onnx", "pruned-simplified.onnx", "pruned-built.onnx"):
        session = onnxruntime.InferenceSession(str(reference / name), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        assert torch.allclose(found, expected, atol=1e-4)
    kinds = {node.op_type for node in onnx.load(str(reference / "pruned.onnx")).graph.node}
    assert not kinds & {"Where", "Gather", "GatherND", "ScatterND"}, "no mask and no index survives in the graph"


@pytest.mark.parametrize(("name", "weights"), [("pruned.onnx", {"stem.0.weight", "head.weight"}), ("pruned-built.onnx", set())])
def test_bench_times_every_kernel_of_a_file(reference: Path, start: Start, name: str, weights: set[str]) -> None:
    shown = start("bench", str(reference / name), "--json").wait()
    assert shown.code == 0, shown.err
    times = json.loads(shown.out)
    layers = [kernel for kernel in times["kernels"] if kernel["weight"]]
    assert len(layers) == len(
        [part for part in dp.load(reference).modules() if hasattr(part, "weight") and part.weight.dim() > 1]
    )
    assert weights <= {kernel["weight"] for kernel in layers}
    for kernel in times["kernels"]:
        assert 0 < kernel["p10_us"] <= kernel["p90_us"]
        assert kernel["n_runs"] > 0
    assert times["kernels_sum_us"] == pytest.approx(sum(kernel["median_us"] for kernel in times["kernels"]))
    assert 0 < times["p10_us"] <= times["median_us"] <= times["p90_us"]


def recorded(start: Start, out: Path) -> list[dict[str, object]]:
    """Return the rows of the ledger that a run wrote."""
    shown = start("ledger", "--json").wait()
    assert shown.code == 0, shown.err
    return [entry for entry in json.loads(shown.out)["entries"] if entry["run"] == str(out)]


def test_a_build_stands_in_the_ledger_once(reference: Path, start: Start) -> None:
    (entry,) = recorded(start, reference)
    report, table = json.loads((reference / "report.json").read_text()), dp.LatencyTable.load(reference / "table")
    first = report["budget"]["rounds"][0]
    for side in ("dense", "pruned"):
        assert [entry[f"{side}_{part}us"] for part in ("p10_", "p90_")] == [first[side]["p10_us"], first[side]["p90_us"]]
        assert entry[f"{side}_us"] == first[side]["median_us"]
    assert (entry["predicted_dense_us"], entry["predicted_pruned_us"]) == (
        report["dense"]["predicted_us"],
        first["predicted_us"],
    )
    assert (entry["table"], entry["limit_us"]) == (table.id, first["limit_us"])
    assert (entry["runtime"], entry["runtime_version"]) == ("onnxruntime", onnxruntime.__version__)
    again(start, reference)
    assert recorded(start, reference) == [entry], "a reused report is no new measurement"


def done(out: Path) -> list[str]:
    return [stage for stage in STAGES if finished(out, stage)] if out.is_dir() else []


def begun(out: Path) -> int:
    """Return how many stages have written a key: cheap to ask for while they run, but not whether they are whole."""
    return len(list(out.glob("*.key")))


def undisturbed(start: Start, killed: Path, out: Path) -> None:
    """Let one undisturbed run go on from the plan of `killed`: the plan rests on measurements, which never repeat exactly."""
    out.mkdir()
    for key in [path for path in killed.glob("*.key") if path.stem in PLANNING or path.stem.startswith(("plan-", "measure-"))]:
        for file in [key.name, *json.loads(key.read_text())["files"]]:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes((killed / file).read_bytes())
    command = start(*arguments(out)).wait()
    assert command.code == 0, command.err


def test_killed_at_every_stage_it_ends_as_if_it_had_not_been(reference: Path, start: Start, tmp_path: Path) -> None:
    out, kills, seen = tmp_path / "run", 0, 0
    while True:
        command = start(*arguments(out))
        while command.running() and (begun(out) <= seen or len(done(out)) <= seen):
            time.sleep(0.01)
        if not command.running():
            break
        time.sleep(0.05 * (kills % 4))  # somewhere inside the next stage
        command.signal(signal.SIGKILL)
        command.wait()
        kills, seen = kills + 1, len(done(out))
        assert kills < 40, "no progress"
    finished_run = command.wait()
    assert finished_run.code == 0, finished_run.err
    assert kills >= 6
    assert "reused" in finished_run.err
    name = "plan-1/plan.json"
    assert (out / name).read_bytes() == (reference / name).read_bytes(), "the same table gives the same first plan"
    whole = tmp_path / "whole"
    undisturbed(start, out, whole)
    for name in ("plan.json", "tuned.safetensors", "compact.safetensors", "pruned.onnx", "accuracy.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / ".partial").exists()
    assert len(recorded(start, out)) == 1
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (out, whole))
    assert ours["pruned"]["accuracy"] == theirs["pruned"]["accuracy"]
    assert ours["groups"] == theirs["groups"]


def again(start: Start, out: Path, **changes: object) -> tuple[set[str], set[str]]:
    """Run the command again; return which stages were computed (their key files were written) and which were reused."""
    before = {stage: (out / f"{stage}.key").stat().st_mtime_ns for stage in STAGES}
    finished_run = start(*arguments(out, **changes)).wait()
    assert finished_run.code == 0, finished_run.err
    computed = {stage for stage in STAGES if (out / f"{stage}.key").stat().st_mtime_ns != before[stage]}
    return computed, set(STAGES) - computed


def test_the_same_command_computes_nothing_and_a_changed_option_what_depends_on_it(
    reference: Path, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", str(reference), str(out)], check=True)
    computed, reused = again(start, out)
    assert computed == set()
    assert reused == set(STAGES)
    assert recorded(start, out) == [], "a copy's report is put together anew from the same measurement"
    computed, reused = again(start, out, epochs=1)
    assert reused == {*PLANNING, "compact"}
    assert computed == set(STAGES) - reused


def test_interrupt_says_how_to_go_on(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = start(*arguments(out, epochs=200))
    while command.running() and not (out / "compact.key").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    command.signal(signal.SIGINT)
    stopped = command.wait()
    assert stopped.code == 130, stopped.err
    assert "same command" in stopped.err
    assert "Traceback" not in stopped.err
    assert {"profile", "plan", "compact"} <= set(done(out))
