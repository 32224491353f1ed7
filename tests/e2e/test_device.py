"""The command line on a device that is reached over SSH: a real server, whose Python has no deploypipe."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import FACTORY
from ssh_server import SshServer, device_python, small_disk

from deploypipe.cli.main import run
from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job
from deploypipe.latency.widths import Steps
from deploypipe.profiler import measure as profiler
from deploypipe.runners import load_runner, remote
from deploypipe.targets import cache_folder, load_target

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NET = """from torch import nn


class Net(nn.Sequential):
    input_size = (2, 12, 12)


def net():
    layers = [nn.Conv2d(2, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Net(*layers, nn.Linear(32, 3))
"""
STEPS = {"conv": Steps(16, 4, 1.4, (8,)), "depthwise": Steps(16, 4, 7.0), "linear": Steps(8)}


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of our own; how widths are learned is the work of test_learn, and takes seconds."""
    monkeypatch.setenv("DEPLOYPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiler, "learn_steps", lambda measure: STEPS)
    monkeypatch.setattr(profiler, "_PER_JOB", 4)
    monkeypatch.setattr(remote, "PAUSES_S", (0.1, 0.2))


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A network whose export takes half a second."""
    (tmp_path / "small.py").write_text(NET)
    return f"{tmp_path / 'small.py'}:net"


def kernels() -> list[str]:
    return [row for file in cache_folder().rglob("kernels.csv") for row in file.read_text().splitlines()[1:]]


def once_measuring(n_kernels: int, act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as so many kernels are stored."""

    def wait() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(kernels()) < n_kernels:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_the_device_has_no_deploypipe(ssh_server: SshServer, tmp_path: Path) -> None:
    runner = load_runner(load_target("cpu").reached_at(ssh_server.host))
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    job = Job((PYTHON, "-c", code, "deploypipe", "torch", "psutil", "onnx", "onnxruntime", "numpy"))
    assert runner.run(job, tmp_path).stdout == "['onnxruntime', 'numpy']\n"
    runner.close()


def test_a_build_on_a_device_and_a_benchmark_of_what_it_built(
    ssh_server: SshServer, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "run", ssh_server.n_connections
    options = ["--algo", "l2", "--budget", "70%", "--metric", "macs", "--epochs", "0", "--out", str(out), "--json"]
    code = run(["build", "--model", model, "--data", f"{FACTORY}:data", "--host", ssh_server.host, *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out)
    assert report["machine"]["reached"] == f"ssh {ssh_server.host}"
    assert report["machine"]["runtime"] == "onnxruntime"
    assert [check["stage"] for check in report["checks"]] == ["compacted", "onnx", "simplified", "built"]
    assert report["pruned"]["latency"]["median_us"] > 0
    assert ssh_server.n_connections == before + 1, "all jobs go over one connection"
    assert run(["bench", str(out / "pruned-built.onnx"), "--host", ssh_server.host, "--json"]) == 0
    times = json.loads(capsys.readouterr().out)
    assert times["target"] == f"cpu at {ssh_server.host}"
    assert times["median_us"] > 0
    assert len(times["kernels"]) > 3


def test_a_profile_goes_on_after_its_connection_broke_and_after_its_device_was_gone(
    ssh_server: SshServer, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["profile", "--model", model, "--host", ssh_server.host]
    gone = once_measuring(1, ssh_server.stop)
    try:
        assert run(command) == BackendError.exit_code
    finally:
        gone.join()
        ssh_server.start()
    err = capsys.readouterr().err
    assert "error: the connection broke, and the device cannot be reached again: no SSH server answers there" in err
    assert "then run the same command again: what has been measured is kept" in err
    kept = kernels()
    assert kept
    before = ssh_server.n_connections
    cut = once_measuring(len(kept) + 1, ssh_server.cut)
    assert run(command) == 0
    cut.join()
    assert set(kept) < set(kernels()), "what was measured is not measured again"
    assert ssh_server.n_connections == before + 2, "the one that broke was opened again"


def test_the_doctor_says_what_is_missing_on_a_device(
    ssh_server: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--host", ssh_server.host, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"]
    assert {step["state"] for step in found["steps"]} <= {"ok", "note"}
    assert found["machine"]["packages"].keys() == set()
    bare = device_target(tmp_path, ssh_server, python=str(device_python(tmp_path / "bare") / "python3"))
    assert run(["doctor", "--target", str(bare)]) == BackendError.exit_code
    out = capsys.readouterr().out
    assert "not usable yet: runtime onnxruntime" in out
    assert "-m pip install" in out
    missing = device_target(tmp_path, ssh_server, python="/no/python3")
    assert run(["doctor", "--target", str(missing)]) == BackendError.exit_code
    assert "not usable yet: python" in capsys.readouterr().out
    other = device_target(tmp_path, ssh_server, arch="riscv64")
    assert run(["doctor", "--target", str(other)]) == BackendError.exit_code
    assert "the target is a device with riscv64" in capsys.readouterr().out


def test_a_full_disk_ends_a_benchmark_with_the_way_out(
    ssh_server: SshServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "model.onnx"
    large.write_bytes(bytes(2_000_000))
    with small_disk(tmp_path / "disk", 512) as disk:
        target = device_target(tmp_path, ssh_server, workdir=str(disk))
        assert run(["bench", str(large), "--target", str(target)]) == BackendError.exit_code
    err = capsys.readouterr().err
    assert "error: the disk is full" in err
    assert "set [reach] workdir" in err


def device_target(folder: Path, server: SshServer, arch: str = "native", **reach: str) -> Path:
    lines = [f'{name} = "{value}"' for name, value in ({"via": "ssh", "host": server.host} | reach).items()]
    path = folder / "box.toml"
    text = f'name = "box"\n[device]\narch = "{arch}"\n[build]\nbackend = "onnxruntime"\n[reach]\n'
    path.write_text(text + "\n".join(lines) + "\n")
    return path
