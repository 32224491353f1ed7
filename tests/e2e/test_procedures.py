"""Methods with a training procedure of their own, from the command line: a supernet, and tickets."""

import json
from pathlib import Path

import pytest
from command_line import arguments

import deploypipe as dp
from deploypipe.cli.main import run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
QUICK = {
    "autoslim": ["train_epochs=1", "images=20", "norm_images=16"],
    "lth": ["rounds=2", "train_epochs=1", "rewind=1"],
}


@pytest.mark.parametrize("name", sorted(QUICK))
def test_from_a_trained_model_to_a_measured_artifact(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [part for each in QUICK[name] for part in ("--set", each)]
    assert run([*arguments(out, algo=name, metric="macs", epochs=1, budget="75%"), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["checks_passed"]
    assert 0 < report["budget"]["reached"] <= report["budget"]["limit"]
    small = dp.load(out)
    zeros = sum(int((p == 0).sum()) for p in small.parameters() if p.dim() >= 2)
    sparse = name == "lth"
    assert bool(report["sparsity"]) == sparse
    assert (zeros > 0.1 * sum(p.numel() for p in small.parameters())) == sparse
    assert (report["pruned"]["n_parameters"] < report["dense"]["n_parameters"]) == (not sparse)
