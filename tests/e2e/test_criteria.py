"""The comparison of criteria from the command line."""

import json

import pytest
from command_line import FACTORY

from deploypipe.cli.main import run

pytestmark = pytest.mark.e2e


def test_criteria_are_compared_and_one_of_each_cluster_is_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["criteria", "--model", f"{FACTORY}:net", "--data", f"{FACTORY}:data", "--images", "96"]
    assert run(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("criterion")
    assert "l1, l2" in out
    assert "rank alike" in out
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["pairs"]) == 45
    members = sorted(name for cluster in found["clusters"] for name in cluster)
    assert len(members) == len(set(members)) == 10
    assert set(found["recommended"]) <= set(members)
    assert {layer["weight"] for layer in found["layers"]} == {"stem.0", "block.a"}
    assert run([*line[:-1], "1"]) == 2
