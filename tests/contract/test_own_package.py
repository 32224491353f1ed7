"""Backends and runners from a package of one's own: what CONTRIBUTING promises, tried with a package that is not ours."""

from pathlib import Path

import pytest

import deploypipe
from deploypipe.backends import load_backend
from deploypipe.cli.main import run
from deploypipe.reports.report import Report
from deploypipe.runners import load_runner
from deploypipe.targets import load_target
from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase

BACKEND = """from deploypipe.backends.onnxruntime import OnnxRuntime


class Mine(OnnxRuntime):
    name = "mine"
    script = "mine_measure.py"
"""
RUNNER = """from deploypipe.runners.local import Local


class Near(Local):
    place = "near"
"""
ENTRY_POINTS = "[deploypipe.backends]\nmine = mine:Mine\n[deploypipe.runners]\nnear = near:Near\n"
TARGET = """name = "board"
run_on_hardware = false
[reach]
via = "near"
[build]
backend = "mine"
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A target of a package with a backend (one file and its script) and a runner (one file), installed beside ours."""
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "mine.py").write_text(BACKEND)
    (site / "near.py").write_text(RUNNER)
    script = (Path(deploypipe.__file__).parent / "backends" / "ort_measure.py").read_text()
    (site / "mine_measure.py").write_text(script.replace('else "onnxruntime", "version"', 'else "my runtime", "version"'))
    monkeypatch.syspath_prepend(str(site))
    (tmp_path / "board.toml").write_text(TARGET)
    return load_target(tmp_path / "board.toml")


def test_a_backend_and_a_runner_of_another_package_keep_the_contracts(target, tmp_path):
    assert type(load_backend(target)).__module__ == "mine"
    assert load_runner(target).place == "near"
    case = BackendCase(target, tmp_path)
    for name in ("says_what_it_is", "describes_jobs", "builds_what_torch_computes", "times_each_layer_once"):
        BACKEND_CONTRACTS[name](case)
    assert case.facts["runtime"] == "my runtime", "its own script was pushed"


def test_they_are_all_that_a_build_needs(target, tmp_path, capsys):
    options = ["--metric", "macs", "--epochs", "0", "--algo", "l1", "--budget", "70%", "--out", str(tmp_path / "run")]
    factory = str(Path(__file__).parents[1] / "e2e" / "factory.py")
    code = run(["build", "--model", f"{factory}:net", "--data", f"{factory}:data", "--target", target.path, *options])
    assert code == 0, capsys.readouterr().err
    report = Report.load(tmp_path / "run")
    assert (report.machine["runtime"], report.machine["reached"]) == ("my runtime", "near")
    assert report.pruned.latency is not None
    assert [note for note in report.notes if note.startswith("not run on hardware")]
