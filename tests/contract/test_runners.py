"""The published contract of runners, over every row of the table."""

import os
from pathlib import Path

import adb_standin
import pytest

from deploypipe.runners import RUNNERS, load_runner
from deploypipe.targets import load_target
from deploypipe.testing.runners import RunnerContract


def attached_phone(folder, monkeypatch):
    adb_standin.install(folder, PHONE="device")
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
