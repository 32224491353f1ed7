"""ONNX Runtime by its own benchmark program: by stand-ins for adb and for onnxruntime_perf_test; the latter times for real.

Nothing here has met a phone, nor the real program.
"""

import os
import shutil
import subprocess
from pathlib import Path

import adb_standin
import numpy as np
import perf_standin
import pytest
import torch
from torch import nn

import deploypipe
from deploypipe.backends import by_binary
from deploypipe.backends.ort_binary import OrtBinary, timing
from deploypipe.checkup import examine
from deploypipe.errors import BackendError, TargetError, UsageError
from deploypipe.export import export_onnx
from deploypipe.job import JobResult
from deploypipe.pipeline.stages import Device
from deploypipe.precision import tiny
from deploypipe.profiler.measure import device_key
from deploypipe.targets import load_target

BACKEND = OrtBinary()
SCRIPT = Path(deploypipe.__file__).parent / "backends" / "perf_measure.sh"
FOREIGN = b"\x7fELF\x02\x01\x01" + bytes(11) + (243).to_bytes(2, "little") + bytes(44)  # for riscv64, which no machine here is


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """The folder of the only phone that is attached."""
    for name in ("bin", "data local tmp"):
        (tmp_path / name).mkdir()
    adb_standin.install(tmp_path / "bin", PHONE="device")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "data local tmp"


@pytest.fixture
def program(tmp_path):
    (tmp_path / "built").mkdir()
    return perf_standin.install(tmp_path / "built")


@pytest.fixture
def target(phone, program):
    made = by_binary(load_target("android-arm64"), program)
    return made.replace(arch="native", workdir=str(phone), runs=3, warmup=2)


@pytest.mark.slow
def test_a_phone_without_python_describes_builds_and_times(target, phone, tmp_path):
    torch.manual_seed(0)
    nets = {n: nn.Sequential(nn.Conv2d(3, n, 3), nn.ReLU(), nn.Conv2d(n, n, 3)).eval() for n in (8, 96)}
    x = torch.randn(1, 3, 24, 24)
    models = {str(n): export_onnx(net, (x,), tmp_path / f"{n}.onnx").path for n, net in nets.items()}
    device = Device(target.replace(python="/no/python3"))
    assert device.facts["runtime"] == "onnxruntime_perf_test"
    assert device.facts["version"].startswith("sha256 ")
    assert device.facts["threads"] == 1
    assert device.facts["arch"]
    assert BACKEND.channel_multiple(device.facts) in {4, 8, 16}
    (note,) = device.build(models["8"], tmp_path / "built.onnx")
    assert note.startswith("UNVERIFIED: onnxruntime_perf_test ran the model on the device")
    assert (tmp_path / "built.onnx").read_bytes() == models["8"].read_bytes()
    found = device.bench(models)
    assert [row["n_runs"] for row in found.values()] == [3, 3], "three turns of one; the warm-up does not count"
    assert 0 < found["8"]["p10_us"] <= found["8"]["median_us"] <= found["8"]["p90_us"]
    assert found["96"]["median_us"] > 2 * found["8"]["median_us"], "it is the model that is timed"
    (outputs,) = device.run(models["8"], {"input": x.numpy()[None]})
    np.testing.assert_allclose(outputs[0], nets[8](x).detach().numpy(), atol=1e-5, err_msg="computed on this machine")
    device.runner.close()
    assert not list(phone.iterdir()), "nothing is left on the device"


def test_the_doctor_needs_no_python_there(target):
    found = examine(target.replace(python="/no/python3"))
    states = {step.name: (step.state, step.found) for step in found.steps}
    assert found.usable, states
    assert states["python"] == ("ok", "not needed")
    assert states["runtime onnxruntime-binary"][1].startswith("onnxruntime_perf_test sha256 ")


def test_shared_libraries_beside_the_program_go_with_it(target, program):
    (program.parent / "libonnxruntime.so").write_bytes(b"library")
    (program.parent / "libother.so").write_bytes(b"of something else")
    job = BACKEND.bench_job({"m": tiny()}, target)
    assert {"libonnxruntime.so", "onnxruntime_perf_test"} <= set(job.push)
    assert "libother.so" not in job.push
    assert job.env == {"LD_LIBRARY_PATH": "."}


def test_a_latency_table_can_be_kept_for_a_device_without_a_readable_governor(tmp_path):
    (tmp_path / "request.json").write_text('{"version": "abc", "threads": 1}')
    pulled = {name: tmp_path / name for name in ("request.json", "facts.txt")}

    def key(more):
        (tmp_path / "facts.txt").write_text(f"arch\taarch64\ncpu\tCortex\n{more}")
        return device_key({**BACKEND.read_description(JobResult(0, "", "", pulled, 1.0)), "precision": "fp32"})

    assert key("") != key("governor\tschedutil\n")


@pytest.mark.parametrize("where", ["onnxruntime_perf_test", "libonnxruntime.so"])
def test_a_program_or_library_for_another_processor_is_refused_before_anything_runs(target, program, where):
    (program.parent / where).write_bytes(FOREIGN)
    with pytest.raises(BackendError, match=f"the device cannot execute '{where}': it was built for riscv64, the device is"):
        Device(target).facts  # noqa: B018


def test_another_program_is_another_version(target, program):
    before = Device(target).facts["version"]
    program.write_text(program.read_text() + "# newer\n")
    assert Device(target).facts["version"] != before


def test_what_the_program_says_is_shown(target, tmp_path):
    (tmp_path / "damaged.onnx").write_bytes(tiny()[:20])
    with pytest.raises(BackendError, match=r"failed with exit code 1: .*INVALID_PROTOBUF"):
        Device(target).build(tmp_path / "damaged.onnx", tmp_path / "built.onnx")
    assert not (tmp_path / "built.onnx").exists()


def test_a_result_file_without_times_is_no_measurement(tmp_path):
    (tmp_path / "a.csv").write_text("folder, with a comma,0.0025,9,50,0\nm,0.001,9,50,1\nm,0.003,9,50,2\n")
    assert timing(tmp_path / "a.csv", 1).median_us == pytest.approx(2000)
    assert timing(tmp_path / "a.csv", 0).median_us == pytest.approx(2500)
    for text in ("", "m,soon,9,50,0\n", "m,0.001,9,50,0\n", "nothing of the kind\n"):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(BackendError, match="left no times"):
            timing(tmp_path / "a.csv", 1)


def test_which_program_for_which_target(program, tmp_path):
    with pytest.raises(TargetError, match="target ncnn is measured by ncnn, which has no such program") as caught:
        by_binary(load_target("ncnn"), program)
    assert "android-arm64" in caught.value.fix
    with pytest.raises(UsageError, match="there is no such file"):
        by_binary(load_target("android-arm64"), tmp_path / "nothing")
    with pytest.raises(TargetError, match="no benchmark program is named"):
        BACKEND.bench_job({"m": tiny()}, load_target("cpu").replace(backend="onnxruntime-binary"))
    with pytest.raises(BackendError, match="does not hand out what a model computes"):
        BACKEND.run_job(tmp_path / "m.onnx", {}, load_target("cpu"))


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_every_shell_reads_the_script(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    program = tmp_path / "onnxruntime_perf_test"
    program.write_text('#!/bin/sh\nfor last do :; done\necho "$*" >> "$last"\n')
    program.chmod(0o755)
    argv = [shell, *(["sh"] if shell == "busybox" else []), str(SCRIPT), "2", "9", "3", "a.onnx", "b.onnx"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path)
    assert done.stderr == ""
    said = "-e cpu -I -S 1 -m times -r 9 -x 3 -y 1 -o 99 a.onnx times-a.onnx.csv\n"
    assert (tmp_path / "times-a.onnx.csv").read_text() == 2 * said
    assert (tmp_path / "times-b.onnx.csv").exists()
    assert {"arch", "cpu"} <= {line.partition("\t")[0] for line in (tmp_path / "facts.txt").read_text().splitlines()}
    program.write_text("#!/bin/sh\nexit 255\n")
    assert subprocess.run(argv, check=False, cwd=tmp_path).returncode == 1, "255 is what a lost connection looks like"
