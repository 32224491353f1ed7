"""An algorithm, a backend and a runner from a package of one's own: CONTRIBUTING's promises, tried with one not ours."""

import json
import re
from pathlib import Path

import pytest

import deploypipe
from deploypipe.algorithms import algorithms, make
from deploypipe.backends import load_backend
from deploypipe.cli.main import run
from deploypipe.reports.report import Report
from deploypipe.runners import load_runner
from deploypipe.targets import load_target
from deploypipe.testing.algorithms import contracts_of
from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase
from deploypipe.testing.problems import AlgorithmCase

RECIPES = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
ALGORITHM = re.search(r"## Add an algorithm.*?```python\n(.*?)```", RECIPES, re.DOTALL)[1]

BACKEND = """from deploypipe.backends.onnxruntime import OnnxRuntime


class Mine(OnnxRuntime):
    name = "mine"
    script = "mine_measure.py"
"""
RUNNER = """from deploypipe.runners.local import Local


class Near(Local):
    place = "near"
"""
ENTRY_POINTS = """[deploypipe.algorithms]
myscore = myscore:MyScore
[deploypipe.backends]
mine = mine:Mine
[deploypipe.runners]
near = near:Near
"""
TARGET = """name = "board"
run_on_hardware = false
[reach]
via = "near"
[build]
backend = "mine"
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A target of a package with an algorithm, a backend (and its script) and a runner, a file each, installed beside ours."""
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (site / "myscore.py").write_text(ALGORITHM)
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


@pytest.mark.usefixtures("target")
def test_an_algorithm_of_another_package_keeps_the_contracts(capsys):
    case = AlgorithmCase(make("myscore"))
    assert type(case.method).__module__ == "myscore"
    for contract in contracts_of(case).values():
        contract(case)
    assert algorithms()["myscore"] == {"name": "myscore", "plugin": "myscore:MyScore"}
    assert run(["algos", "myscore", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["does"] == "Rank filters by their largest weight."


@pytest.mark.slow
def test_they_are_all_that_a_build_needs(target, tmp_path, capsys):
    options = ["--metric", "macs", "--epochs", "0", "--algo", "myscore", "--budget", "70%", "--out", str(tmp_path / "run")]
    factory = str(Path(__file__).parents[1] / "e2e" / "factory.py")
    code = run(["build", "--model", f"{factory}:net", "--data", f"{factory}:data", "--target", target.path, *options])
    assert code == 0, capsys.readouterr().err
    report = Report.load(tmp_path / "run")
    assert report.algorithm == "myscore"
    assert (report.machine["runtime"], report.machine["reached"]) == ("my runtime", "near")
    assert report.pruned.latency is not None
    assert [note for note in report.notes if note.startswith("not run on hardware")]
