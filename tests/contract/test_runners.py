"""The published contract of runners, over every row of the table."""

import os
import sys
from pathlib import Path

import pytest

from deploypipe.runners import RUNNERS, load_runner
from deploypipe.targets import load_target
from deploypipe.testing.runners import RunnerContract

STANDIN = Path(__file__).parents[1] / "adb_standin.py"


def attached_phone(folder, monkeypatch):
    (folder / "adb").write_text(f"#!{sys.executable} -IS\n{STANDIN.read_text()}")
    (folder / "adb").chmod(0o755)
    (folder / "devices.json").write_text('{"PHONE": "device"}')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("via", sorted(RUNNERS))
class TestRunner(RunnerContract):
    @pytest.fixture
    def runner(self, via, tmp_path_factory, request, monkeypatch):
        reach = {"via": via, "workdir": str(tmp_path_factory.mktemp("device"))}
        if via == "ssh":
            reach["host"] = request.getfixturevalue("ssh_server").host
        if via == "adb":
            attached_phone(tmp_path_factory.mktemp("bin"), monkeypatch)
        made = load_runner(load_target("cpu").replace(**reach))
        yield made
        made.close()
        assert not list(Path(reach["workdir"]).iterdir()), "nothing is left on the device"
