"""The command that this tool is for, whole: `build --host BOARD` for a Jetson, by a budget in latency.

The board is a real SSH server with a bare Python, the stand-in for trtexec, and what else a Jetson answers; nothing here has
met hardware.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trtexec_standin
from command_line import FACTORY
from ssh_server import SSHD, SshServer, device_python

import deploypipe as dp
from deploypipe.cli.main import run
from deploypipe.latency.table import LatencyTable
from deploypipe.latency.widths import Steps
from deploypipe.pipeline import stages
from deploypipe.profiler import bench, context
from deploypipe.profiler import measure as profiler

NO_SERVER = pytest.mark.skipif(SSHD is None, reason="no SSH server here: apt install openssh-server")
pytestmark = [pytest.mark.e2e, pytest.mark.slow, NO_SERVER]
NET = """import torch
from torch import nn


class Net(nn.Sequential):
    input_size = (2, 12, 12)


def net():
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()]
    return Net(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 3))
"""
TARGET = """name = "board"
like = "jetson-orin"
[measure]
runs = 2
warmup = 1
"""
PROGRAMS = {
    "uname": 'case "$1" in -m) echo aarch64 ;; *) exec /usr/bin/uname "$@" ;; esac',
    "nvpmodel": "echo NV Power Mode: MODE_30W; echo 2",
    "jetson_clocks": "echo GPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=$(date +%s%N)",
}


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    """A Jetson as far as it can be told from here. How a device is learned is tested elsewhere, and takes long."""
    programs = device_python(tmp_path / "device")
    server = SshServer(tmp_path / "ssh", f"{tmp_path / 'bin'}:{programs}:/usr/bin:/bin")
    server.prepare()
    for name, line in PROGRAMS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in {"SSH_CONFIG": server.config, "CACHE": tmp_path / "cache", "DATA": tmp_path / "data"}.items():
        monkeypatch.setenv(f"DEPLOYPIPE_{name}", str(value))
    monkeypatch.setattr(profiler, "learn_steps", lambda measure: {"conv": Steps(32), "linear": Steps(32)})
    monkeypatch.setattr(profiler, "unconfirmed", lambda *_: {})
    monkeypatch.setattr(bench.Bench, "cost_of_measuring", lambda self: (0.0, 2.0, 0.0))
    monkeypatch.setattr(bench, "_AGAIN", 0)
    monkeypatch.setattr(context, "_FEWEST", 2)
    monkeypatch.setattr(context, "_plans", lambda *_: {context.DENSE: dp.KeepPlan({})})
    monkeypatch.setattr(stages, "N_INPUTS", 1)
    server.start()
    yield server
    server.stop()


def build(board: SshServer, folder: Path) -> dict[str, Any]:
    (folder / "small.py").write_text(NET)
    (folder / "board.toml").write_text(TARGET)
    model = ["--model", f"{folder / 'small.py'}:net", "--data", f"{FACTORY}:data"]
    options = ["--algo", "l2", "--budget", "80%", "--epochs", "0", "--out", str(folder / "run"), "--json"]
    assert run(["build", *model, "--target", str(folder / "board.toml"), "--host", board.host, *options]) == 0
    found: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    return found


def test_a_build_for_a_jetson_over_ssh(board: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the version that takes least; single jobs over SSH with the others: `test_tensorrt.py`."""
    trtexec_standin.install(tmp_path / "bin", (8, 6, 1))
    report = build(board, tmp_path)
    machine = report["machine"]
    assert (machine["reached"], machine["version"], machine["gpu"]) == (f"ssh {board.host}", "8.6.1", trtexec_standin.GPU)
    assert (machine["power_mode"], len(machine["clocks"])) == ("MODE_30W", 1)
    assert report["latency_source"] == LatencyTable.load(tmp_path / "run" / "table").source == "measured"
    assert [check["stage"] for check in report["checks"]] == ["compacted", "onnx", "simplified", "built"]
    dense, pruned = (report[side]["latency"]["median_us"] for side in ("dense", "pruned"))
    assert report["budget"]["reached"] == pruned <= report["budget"]["limit"] == pytest.approx(0.8 * dense)
    with zipfile.ZipFile(tmp_path / "run" / "pruned-built.zip") as packed:
        assert json.loads(packed.read("engine.json"))["version"] == "8.6.1"
        assert b"PASSED TensorRT.trtexec" in packed.read("build.log")
    capsys.readouterr()
    again = build(board, tmp_path)
    stages_shown = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert not [line for line in stages_shown if line.endswith("...")], "nothing is done again, though the clocks have changed"
    assert again == report
