"""A phone without Python, by the real command line: stand-ins for `adb` and for ONNX Runtime's benchmark program."""

import json
import os

import adb_standin
import perf_standin
import pytest
from command_line import FACTORY

from deploypipe.cli.main import run
from deploypipe.errors import BackendError, TargetError, UsageError

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Options that name the phone and the program; the phone is this machine, so its processor is not the target's."""
    for name in ("bin", "phone"):
        (tmp_path / name).mkdir()
    adb_standin.install(tmp_path / "bin", PHONE="device")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    reach = f'[reach]\nvia = "adb"\nworkdir = "{tmp_path / "phone"}"\npython = "/no/python3"\n'
    (tmp_path / "here.toml").write_text(
        f'name = "here"\nlike = "android-arm64"\n[device]\narch = "native"\n{reach}[measure]\nruns = 4\nwarmup = 1\n'
    )
    program = perf_standin.install(tmp_path / "bin")
    return ["--target", str(tmp_path / "here.toml"), "--host", "PHONE", "--benchmark-binary", str(program)]


def test_built_measured_and_examined_without_python_there(asked, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--metric", "macs", "--epochs", "0", "--algo", "l1", "--budget", "60%", "--out", str(out), "--json"]
    code = run(["build", "--model", f"{FACTORY}:net", "--data", f"{FACTORY}:data", *asked, *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert not list((tmp_path / "phone").iterdir()), "nothing is left there, though this process lives on"
    report = json.loads(captured.out)
    assert report["machine"]["reached"] == "adb PHONE"
    assert report["machine"]["runtime"] == "onnxruntime_perf_test"
    assert 0 < report["pruned"]["latency"]["median_us"] < report["dense"]["latency"]["median_us"]
    assert [check["stage"] for check in report["checks"]] == ["compacted", "onnx", "simplified", "built"]
    assert any("outputs were compared on this machine" in n for n in report["notes"] if n.startswith("UNVERIFIED"))
    assert any(note.startswith("not run on hardware") for note in report["notes"])
    assert run(["bench", str(out / "pruned-built.onnx"), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["median_us"] > 0
    assert run(["doctor", *asked]) == 0
    assert "runtime onnxruntime-binary" in capsys.readouterr().out
    assert not list((tmp_path / "phone").iterdir()), "nothing is left there"


def test_without_the_program_it_says_what_the_phone_lacks(asked, capsys):
    assert run(["doctor", *asked[:4]]) == BackendError.exit_code
    assert "not usable yet: python" in capsys.readouterr().out
    assert run(["doctor", *asked[:4], "--benchmark-binary", "/no/program"]) == UsageError.exit_code
    assert "there is no such file" in capsys.readouterr().err
    assert run(["profile", "--target", "ncnn", *asked[-2:]]) == TargetError.exit_code
    assert "has no such program" in capsys.readouterr().err
