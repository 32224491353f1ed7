"""Measured values from the command line: `build --value measured`, `sensitivity`, and what a second call does not measure."""

import csv
import json
from pathlib import Path

import onnx
import pytest
from command_line import FACTORY, arguments

from deploypipe.cli.main import run
from deploypipe.plan import KeepPlan
from deploypipe.saved import load
from deploypipe.targets import cache_folder
from deploypipe.worth import heldout

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
MEASURED = {"metric": "macs", "epochs": 0, "algo": "l2", "value": "measured", "value_rounds": 1}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(heldout.Effort.__init__, "__defaults__", (64, 96))


def n_measured() -> int:
    return sum(len(path.read_text().splitlines()) for path in (cache_folder() / "sensitivity").glob("*.csv"))


def test_a_build_by_measured_values_is_cut_off_resumes_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = heldout.evaluate, []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return evaluate(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(heldout, "evaluate", interrupted)
    out = tmp_path / "run"
    assert run(arguments(out, **MEASURED)) == 130
    assert n_measured() == 7
    assert "same command" in capsys.readouterr().err
    assert run(arguments(out, **MEASURED)) == 0
    err = capsys.readouterr().err
    assert "curves ..." in err
    assert len(calls) == 1 + n_measured(), "nothing is measured twice"
    report, values = (json.loads((out / name).read_text()) for name in ("report.json", "values.json"))
    assert any("held-out training images" in note for note in report["notes"])
    assert report["budget_met"]
    kept = values["trials"][values["chosen"]]["kept"]
    plan = KeepPlan.load(out / "plan.json")
    assert {name: len(channels) for name, channels in plan.keep.items()} == {name: kept[name] for name in plan.keep}
    assert values["trials"][values["chosen"]]["loss"] == min(trial["loss"] for trial in values["trials"])
    assert [trial["origin"] for trial in values["trials"]][:2] == ["scores", "curves"]
    assert run(arguments(out, **MEASURED)) == 0
    assert "plan reused" in capsys.readouterr().err
    before = len(calls)
    assert run(arguments(tmp_path / "other", **MEASURED | {"budget": "0.001%"})) == 6
    assert "curves" not in capsys.readouterr().err, "a budget out of reach is found before anything is measured"
    assert run(["sensitivity", "--model", f"{FACTORY}:net", "--data", f"{FACTORY}:data", "--algo", "l2"]) == 0
    assert "curves reused" in capsys.readouterr().err
    assert len(calls) == before


def test_finalists_are_trained_and_the_best_of_them_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(arguments(out, **MEASURED | {"value_finalists": 2})) == 0
    report, values = (json.loads((out / name).read_text()) for name in ("report.json", "values.json"))
    trained = {i: trial["trained"] for i, trial in enumerate(values["trials"]) if "trained" in trial}
    assert 1 <= len(trained) <= 2
    assert values["chosen"] == min(trained, key=lambda i: trained[i])
    assert any("finalists were trained for one epoch" in note for note in report["notes"])
    capsys.readouterr()
    assert run(arguments(tmp_path / "again", **MEASURED | {"value_finalists": 2})) == 0
    assert "finetune" not in capsys.readouterr().err.partition("finetune")[0], "what was trained once is known"
    assert json.loads((tmp_path / "again" / "values.json").read_text()) == values


def test_a_whole_block_goes_when_the_budget_is_small(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(arguments(out, **MEASURED | {"budget": "3%", "epochs": 1, "keep": "stem.0"})) == 0
    assert KeepPlan.load(out / "plan.json").keep["block.a"] == ()
    report = json.loads((out / "report.json").read_text())
    assert any("block.a, block.b are gone" in note for note in report["notes"])
    assert [check["stage"] for check in report["checks"]] == ["compacted", "onnx", "simplified", "built"]
    convolutions = [node for node in onnx.load(str(out / "pruned-simplified.onnx")).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 1
    assert sum(p.numel() for p in load(out).parameters()) == report["pruned"]["n_parameters"]


def test_sensitivity_shows_loss_accuracy_and_saving_of_every_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sensitivity", "--model", f"{FACTORY}:net", "--data", f"{FACTORY}:data", "--algo", "l2"]
    assert run([*line, "--out", str(tmp_path / "curves.csv")]) == 0
    shown, measured = capsys.readouterr(), n_measured()
    assert shown.out.startswith("group")
    assert "MACs" in shown.out
    assert "96 held-out training images" in shown.out
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["group", "size", "width", "loss", "rise", "accuracy", "saves_macs"]
    assert [row["group"] for row in rows] == sorted(
        (row["group"] for row in rows), key=["block.a", "stem.0"].index
    )  # the block can go
    assert measured == len({(row["group"], row["width"]) for row in rows if row["width"] != row["size"]}) + 1
    assert run([*line, "--json"]) == 0
    again = capsys.readouterr()
    assert "curves reused" in again.err
    assert n_measured() == measured
    found = json.loads(again.out)
    assert [str(point["loss"]) for point in found["points"]] == [row["loss"] for row in rows]
    assert (found["unit"], found["dense"]["n"]) == ("MACs", 96)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": "measurd"}, "did you mean 'measured'"),
        ({"value_rounds": -1}, "--value-rounds"),
        ({"value_finalists": 0}, "--value-finalists"),
    ],
)
def test_mistakes_have_three_parts(
    changes: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(tmp_path / "run", **MEASURED | changes)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "  fix: " in err
