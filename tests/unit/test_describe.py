"""What a device says of itself, read; and what the doctor makes of it."""

import os
import struct
from importlib.metadata import version
from pathlib import Path

import pytest

from deploypipe import checkup
from deploypipe.backends import load_backend
from deploypipe.device import facts_of, require_arch
from deploypipe.errors import BackendError, TargetError
from deploypipe.runners.describe import Machine, read
from deploypipe.runners.elf import built_for, surely_foreign
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

# In the form of describe.sh; the values are what L4T's tools print: `nvpmodel -q`, `jetson_clocks --show`.
ORIN = """arch\taarch64
kernel\tLinux 5.15.136-tegra
os\tUbuntu 22.04.4 LTS
model\tNVIDIA Jetson AGX Orin Developer Kit
soc\tnvidia,tegra234
cpu\t0x41 0xd42
cpu_flags\tfp asimd evtstrm aes
cores\t12
memory_kib\t64349516
free_kib\t20000000
governor\tschedutil
temperature_milli_c\t-256000
temperature_milli_c\t48500
temperature_milli_c\t47250
power_mode\tMAXN
clocks\tSOC family:tegra234  Machine:NVIDIA Jetson AGX Orin Developer Kit
clocks\tGPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000
package\tlibnvinfer-bin\t10.3.0.30-1+cuda12.5
interpreter\t3.10.12\t/usr/bin/python3
package\tnumpy\t1.26.4
"""


def test_a_jetson_is_read():
    machine = read(ORIN)
    assert (machine.model, machine.soc, machine.power_mode) == (
        "NVIDIA Jetson AGX Orin Developer Kit",
        "nvidia,tegra234",
        "MAXN",
    )
    assert (machine.cores, machine.memory_bytes, machine.temperature_c) == (12, 64349516 * 1024, 48.5)
    assert machine.python == ("3.10.12", "/usr/bin/python3")
    assert machine.packages == {"libnvinfer-bin": "10.3.0.30-1+cuda12.5", "numpy": "1.26.4"}
    assert len(machine.clocks) == 2


def test_what_a_jetson_has_is_asked_for_and_what_needs_root_is_left_out(tmp_path, monkeypatch):
    """By the script itself; the two programs print what L4T's print, to exactly the question that they are known to take."""
    lines = "SOC family:tegra234  Machine:Jetson AGX Orin\nGPU MinFreq=306000000 MaxFreq=1300500000 CurrentFreq=306000000"
    answers = {"nvpmodel": ("-q", "NV Power Mode: MODE_30W\n2"), "jetson_clocks": ("--show", lines)}
    for name, (question, answer) in answers.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$*" = "{question}" ] || exit 1\ncat << "E"\n{answer}\nE\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    machine = Local(Reach()).describe()
    assert machine.power_mode == "MODE_30W"
    assert machine.clocks == tuple(lines.splitlines())
    (tmp_path / "jetson_clocks").write_text("#!/bin/sh\necho Error: run as root\nexit 1\n")
    assert Local(Reach()).describe().clocks == ()


def test_what_changes_from_minute_to_minute_is_no_condition_of_a_measurement():
    machine = read(ORIN)
    assert machine.lasting.keys() == {"model", "soc", "os", "power_mode", "memory_gib"}
    assert machine.passing == {"clocks": list(machine.clocks), "temperature_c": 48.5}


def test_a_device_that_says_nothing_is_no_failure():
    assert read("") == Machine()
    assert read("").lasting == read("").passing == {}
    assert read("cores\tmany\ntemperature_milli_c\t?\n") == Machine()


def test_another_processor_than_the_target_says_is_refused():
    target = load_target("raspberry-pi-5")
    require_arch(target, "aarch64")
    require_arch(target, "arm64")
    require_arch(load_target("cpu"), "whatever")
    with pytest.raises(TargetError, match="a device with aarch64, the one that answered has x86_64") as caught:
        require_arch(target, "x86_64")
    assert "--host" in caught.value.fix


@pytest.mark.parametrize(
    ("machine", "order", "name"),
    [(62, "<", "x86_64"), (183, "<", "aarch64"), (40, "<", "arm"), (243, "<", "riscv64"), (21, ">", ""), (183, ">", "aarch64")],
)
def test_for_which_processor_a_program_was_built(tmp_path, machine, order, name):
    header = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + bytes(10) + struct.pack(f"{order}HH", 2, machine)
    (tmp_path / "program").write_bytes(header + bytes(40))
    assert built_for(header + bytes(40)) == built_for(tmp_path / "program") == name


def test_a_script_is_built_for_nothing():
    assert built_for(b"#!/bin/sh\n") == built_for(b"") == built_for(b"\x7fELF") == ""


def test_our_own_interpreter_is_built_for_this_machine():
    machine = Local(Reach()).describe()
    assert machine.python is not None
    assert {name: machine.packages[name] for name in ("numpy", "onnxruntime")} == {
        name: version(name) for name in ("numpy", "onnxruntime")
    }
    built = built_for(Path(machine.python[1]).resolve())
    assert not surely_foreign(built, machine.arch)


@pytest.mark.parametrize(
    ("built", "arch", "foreign"),
    [("aarch64", "x86_64", True), ("x86_64", "aarch64", True), ("arm", "aarch64", False), ("aarch64", "armv7l", False),
     ("x86", "x86_64", False), ("x86_64", "i686", False), ("", "x86_64", False), ("x86_64", "sparc", False)],
)  # fmt: skip
def test_only_another_family_is_surely_foreign(built, arch, foreign):
    assert surely_foreign(built, arch) is foreign


class Pretending(Local):
    """This machine with another description."""

    machine = Machine()

    def describe(self):
        return self.machine


@pytest.fixture
def looked(monkeypatch):
    def look(machine, target="cpu"):
        monkeypatch.setattr(Pretending, "machine", machine)
        monkeypatch.setattr(checkup, "load_runner", lambda target: Pretending(target.reach))
        found = checkup.examine(load_target(target))
        return found, {step.name: step for step in found.steps}

    return look


def test_the_doctor_stops_at_what_cannot_work_and_lists_the_rest(looked):
    found, steps = looked(read(ORIN.replace("free_kib\t20000000", "free_kib\t1000")))
    assert not found.usable
    assert (steps["reachable"].state, steps["space"].state, steps["measures"].state) == ("ok", "failed", "not tried")
    assert "only 1 MiB are free" in steps["space"].found
    assert checkup.verdict(found)[0] == ("result", "not usable yet: space")
    assert checkup.verdict(found)[1][1] == steps["space"].fix


@pytest.mark.parametrize(
    ("said", "message"), [("3.6.9", "Python 3.6.9 is too old"), ("", "there is no Python"), ("2.7.18", "too old")]
)
def test_the_doctor_wants_a_python_that_runs_the_scripts(looked, said, message):
    line = f"interpreter\t{said}\t/usr/bin/python3\n" if said else ""
    found, steps = looked(read(ORIN.replace("interpreter\t3.10.12\t/usr/bin/python3\n", line)))
    assert not found.usable
    assert message in steps["python"].found
    assert "[reach] python" in steps["python"].fix


def test_a_target_that_is_only_converted_for_needs_no_such_processor(looked, monkeypatch):
    monkeypatch.setattr(checkup._Examination, "_runtime", lambda self: "coremltools")
    found, steps = looked(Machine(arch="x86_64", python=("3.11.7", "/usr/bin/python3")), "ios")
    assert found.usable
    assert steps["processor"].found == "x86_64, which converts for arm64"
    assert steps["measures"].found == "nothing: what is built for this target cannot be run here"


def test_the_doctor_notes_what_makes_measurements_unsteady(looked):
    found, steps = looked(read(ORIN.replace("48500", "91000")))
    assert found.usable, [(step.name, step.found) for step in found.steps]
    assert "schedutil" in steps["clock"].found
    assert "MAXN" in steps["power"].found
    assert "91 degrees" in steps["heat"].found
    assert checkup.verdict(found) == [("result", "usable, with 3 notes on how to measure well")]


def test_a_target_on_this_machine_becomes_one_over_ssh():
    target = load_target("cpu").reached_at("pi@box")
    assert (target.reach.via, target.reach.host, target.shown) == ("ssh", "pi@box", "cpu at pi@box")
    phone = load_target("android-arm64").reached_at("SERIAL")
    assert (phone.reach.via, phone.reach.host) == ("adb", "SERIAL")


def test_a_full_disk_here_is_told(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BackendError, match="the disk is full"):
        Local(Reach()).describe()


def test_cores_are_counted_whatever_the_environment_says_of_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert Local(Reach()).describe().cores == os.cpu_count()


def test_more_threads_than_cores_are_refused(tmp_path):
    target = load_target("cpu").replace(threads=9)
    runner = Pretending(target.reach)
    runner.machine = Machine(cores=8)
    with pytest.raises(TargetError, match="9 threads were asked for, the device has 8 cores"):
        facts_of(load_backend(target), runner, target, tmp_path)
    assert facts_of(load_backend(target), runner, target.replace(threads=1), tmp_path)["runtime"] == "onnxruntime"
