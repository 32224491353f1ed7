"""Training before planning, zeros instead of channels, and ways of training side by side, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from command_line import FACTORY, arguments
from factory import data, net
from learners import Count

import deploypipe as dp
from deploypipe import saved
from deploypipe.algorithms import ALGORITHMS
from deploypipe.cli.main import run
from deploypipe.pipeline import training

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COUNTED = {"metric": "macs", "epochs": 1}


@pytest.fixture(autouse=True)
def _learners(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, attribute in (("warmed", "Warmed"), ("thinned", "Thinned"), ("compared", "Compared")):
        monkeypatch.setitem(ALGORITHMS, name, f"learners:{attribute}")
    monkeypatch.setattr(Count, "epochs", [])
    monkeypatch.setattr(Count, "fail_in", None)


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_training_before_planning_resumes_and_the_plan_is_of_the_trained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    Count.fail_in = 1
    assert run(arguments(out, algo="warmed", **COUNTED)) == 130
    Count.fail_in = None
    assert run(arguments(out, algo="warmed", **COUNTED)) == 0
    assert Count.epochs == [0, 1, 2], "no epoch is trained twice"
    report = report_of(out)
    assert (report["epochs_before"], report["epochs"]) == (3, 1)
    assert "3 epochs of training before pruning and 1 epochs of fine-tuning (4 in all)" in (out / "report.md").read_text()
    trained = saved.load_weights(net(), out / training.TRAINED)
    assert not torch.equal(trained.stem[0].weight, net().stem[0].weight)
    plan = dp.KeepPlan.load(out / "plan.json")
    kept = list(plan.keep["block.a"])
    for model, same in ((trained, True), (net(), False)):
        order = model.block.a.weight.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
        assert (sorted(order[: len(kept)].tolist()) == kept) is same
    Count.epochs.clear()
    capsys.readouterr()
    assert run(arguments(out, algo="warmed", **COUNTED | {"epochs": 2})) == 0
    assert "train reused" in capsys.readouterr().err
    assert not Count.epochs


def test_a_network_that_views_its_channels_is_pruned_and_trained(tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", model=f"{FACTORY}:viewed", **COUNTED)
    assert run([part for part in command if part != "--no-distill"]) == 0
    report = report_of(tmp_path / "run")
    assert report["pruned"]["n_macs"] <= 0.7 * report["dense"]["n_macs"]


def test_the_report_says_which_activations_were_learnt_too(tmp_path: Path) -> None:
    command = arguments(tmp_path / "run", algo="l1", **COUNTED)
    notes = {}
    for taught in (True, False):
        assert run([part for part in command if not taught or part != "--no-distill"]) == 0
        notes[taught] = [note for note in report_of(tmp_path / "run")["notes"] if "activations" in note]
    assert notes == {True: ["fine-tuning learnt from the dense model's outputs and from its activations at block"], False: []}
    assert not (tmp_path / "run" / "hint.json").exists()


@pytest.mark.parametrize(("algo", "taught"), [("autoslim", False), ("slimming", True)])
def test_channels_in_another_order_learn_no_activations_of_the_dense_model(tmp_path: Path, algo: str, taught: bool) -> None:
    """AutoSlim sorts the channels of every group: one by one they are not the dense model's any more."""
    command = arguments(tmp_path / "run", algo=algo, **{**COUNTED, "epochs": 1})
    command += ["--set", "train_epochs=0", "--set", "images=32"] if algo == "autoslim" else ["--set", "train_epochs=0"]
    assert run([part for part in command if part != "--no-distill"]) == 0
    (note,) = [note for note in report_of(tmp_path / "run")["notes"] if "activations" in note]
    assert ("outputs only" in note) != taught


def test_prune_trains_too() -> None:
    example = torch.zeros(2, 2, 12, 12)
    plans = [
        dp.prune(net().eval(), example, "warmed", budget="50%", data=data(), metric="macs", options={"train_epochs": n})
        for n in (0, 2)
    ]
    assert Count.epochs == [0, 1]
    assert plans[0].keep != plans[1].keep
    kept = dp.prune(net().eval(), example, "warmed", budget="50%", metric="macs", options={"train_epochs": 0}).keep
    assert kept == plans[0].keep, "no epochs, no data"
    with pytest.raises(dp.DeployPipeError, match="needs data"):
        dp.prune(net().eval(), example, "warmed", budget="50%", metric="macs")
    with pytest.raises(dp.DeployPipeError, match="cuts no channels"):
        dp.prune(net().eval(), example, "thinned", budget="50%", metric="macs", data=data())


def test_zeros_survive_and_are_what_the_budget_counts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(arguments(out, algo="thinned", **COUNTED | {"metric": "params", "budget": "40%"})) == 0
    report, small = report_of(out), dp.load(out)
    zeros = {name: int((p == 0).sum()) for name, p in small.named_parameters() if p.dim() >= 2}
    assert min(zeros.values()) > 0
    assert {layer["name"]: layer["n_zeros"] for layer in report["sparsity"]} == zeros
    dense, reached = report["dense"]["n_parameters"], report["budget"]["reached"]
    assert reached == dense - sum(zeros.values())
    assert 0.35 * dense < reached <= 0.4 * dense
    assert report["pruned"]["n_parameters"] == dense
    text = (out / "report.md").read_text()
    assert "no faster in a dense runtime" in text
    assert "Theoretical MACs" in text


def test_zeros_promise_no_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(tmp_path / "run", algo="thinned", metric="latency")) == 2
    err = capsys.readouterr().err
    assert "no dense runtime" in err
    assert "--metric macs" in err


def test_ways_to_train_are_shown_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(arguments(out, algo="compared", **COUNTED | {"epochs": 3})) == 0
    report = report_of(out)
    assert report["epochs"] == 1, "the algorithm's schedule, not the request's"
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["ours", "longer"]
    assert arms["longer"]["epochs"] == 2
    assert arms["ours"]["n_parameters"] == arms["longer"]["n_parameters"] == report["pruned"]["n_parameters"]
    assert arms["ours"]["accuracy"] == report["pruned"]["accuracy"]
    assert "One seed says nothing" in (out / "report.md").read_text()
