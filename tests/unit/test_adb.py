"""The adb runner, driven through a program that stands in for `adb`: see adb_standin.py for where its behaviour comes from."""

import os
import threading
from pathlib import Path

import adb_standin
import psutil
import pytest
from jobs import shell, soon

from deploypipe.errors import BackendError
from deploypipe.job import PYTHON, Job
from deploypipe.runners import remote
from deploypipe.runners.adb import Adb, devices
from deploypipe.targets import Reach

HOSTILE = ["a b", "-rf", "$(touch pwned)", "it's", 'say "hi"', "back\\slash", "new\nline", "ünï", "*"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The folder of the stand-in, which comes first on PATH; one phone is attached."""
    folder = tmp_path / "bin"
    folder.mkdir()
    adb_standin.install(folder, PHONE="device")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(remote, "PAUSES_S", (0.05, 0.05))
    return folder


@pytest.fixture
def phone(tmp_path):
    folder = tmp_path / "data local tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def adb(bench, phone):
    runner = Adb(Reach("adb", "PHONE", str(phone)))
    yield runner
    runner.close()


def test_files_go_there_and_back_and_nothing_stays(adb, phone, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\ncat a > out; pwd; ls -A; echo err >&2\n")
    tool.chmod(0o700)
    result = adb.run(Job(("./tool",), {"tool": tool, "a": b"abc"}, ("out",)), tmp_path / "into")
    place, *files = result.stdout.splitlines()
    assert (files, result.stderr) == (["a", "out", "tool"], "err\n")
    assert result.pulled["out"].read_text() == "abc"
    assert not Path(place).exists()
    adb.close()
    assert not list(phone.iterdir())


def test_hostile_names_and_arguments_arrive_as_they_are(adb, tmp_path):
    code = "import sys, os, shutil; [shutil.copy(n, 'back ' + n) for n in sys.argv[1:]]; print(sys.argv[1:], os.environ['E'])"
    pull = tuple(f"back {name}" for name in HOSTILE)
    job = Job((PYTHON, "-c", code, *HOSTILE), {name: name.encode() for name in HOSTILE}, pull, {"E": "".join(HOSTILE)})
    result = adb.run(job, tmp_path / "into")
    assert result.stdout == f"{HOSTILE} {''.join(HOSTILE)}\n"
    assert {name: path.read_bytes() for name, path in result.pulled.items()} == {f"back {n}": n.encode() for n in HOSTILE}


@pytest.mark.parametrize(
    ("job", "message", "fix"),
    [
        (Job(("no-such-program",)), "cannot start 'no-such-program'", "PATH"),
        (shell("echo last words >&2; exit 3"), "failed with exit code 3: last words", "see the message"),
        (shell("exit 255"), "failed with exit code 255", "see the message"),
        (shell("", pull=("x",)), "the job left no 'x'", "fault of the backend"),
        (shell("sleep 60", timeout_s=0.3), r"did not end within 0\.3 s", "fewer runs"),
    ],
)
def test_every_failure_says_what_where_and_how_to_fix_it(adb, phone, tmp_path, job, message, fix):
    with pytest.raises(BackendError, match=message) as caught:
        adb.run(job, tmp_path / "into")
    assert fix in caught.value.fix
    assert caught.value.at.startswith("adb PHONE: ")
    [session] = phone.iterdir()
    assert [path.name for path in session.iterdir()] == ["keeper"]


def test_a_missing_interpreter_is_said(bench, phone, tmp_path):
    adb = Adb(Reach("adb", "PHONE", str(phone), "/no/python3"))
    with pytest.raises(BackendError, match="the device has no '/no/python3'"):
        adb.run(Job((PYTHON, "-c", "")), tmp_path)
    adb.close()


def test_a_cable_that_is_pulled_during_a_job(adb, bench, phone, tmp_path):
    pid = tmp_path / "pid"

    def pull():
        assert soon(pid.exists)
        (bench / "unplugged").touch()

    thread = threading.Thread(target=pull)
    thread.start()
    with pytest.raises(
        BackendError, match="the connection broke, and the device cannot be reached again: no Android"
    ) as caught:
        adb.run(
            Job(("sh", "-c", 'echo $$ > "$1.new"; mv "$1.new" "$1"; sleep 60', "sh", str(pid)), pull=("x",)), tmp_path / "into"
        )
    thread.join()
    assert "what has been measured is kept" in caught.value.fix
    assert soon(lambda: not list(phone.iterdir())), "the keeper tidied up"
    assert soon(lambda: not psutil.pid_exists(int(pid.read_text())))
    (bench / "unplugged").unlink()
    assert adb.run(shell("echo back"), tmp_path).stdout == "back\n"


@pytest.mark.parametrize(
    ("states", "host", "message", "fix"),
    [
        ({}, "", "no Android device is attached", "USB debugging"),
        ({"A": "device", "B": "device"}, "", "2 devices are attached", "--host A or B"),
        ({"PIXEL8": "device"}, "PIXEL9", "no device 'PIXEL9' is attached", "did you mean 'PIXEL8'"),
        ({"A": "unauthorized"}, "", "does not trust this computer", "allow USB debugging"),
        ({"A": "offline"}, "A", "does not answer", "adb reconnect"),
        ({"A": "no permissions (user in plugdev group; are your udev rules wrong?)"}, "", "may not use the USB", "udev"),
        ({"A": "recovery"}, "", "not ready: recovery", "start Android"),
    ],
)
def test_which_device_and_whether_it_is_ready(bench, tmp_path, states, host, message, fix):
    adb_standin.attach(bench, **states)
    with pytest.raises(BackendError, match=message) as caught:
        Adb(Reach("adb", host)).run(shell("true"), tmp_path)
    assert fix in caught.value.fix


def test_the_only_device_need_not_be_named(bench, phone, tmp_path):
    adb = Adb(Reach("adb", "", str(phone)))
    assert adb.run(shell("echo on"), tmp_path).stdout == "on\n"
    adb.close()


def test_a_folder_that_cannot_be_made(bench, tmp_path):
    with pytest.raises(BackendError, match="no folder can be made on the device: mktemp") as caught:
        Adb(Reach("adb", "PHONE", str(tmp_path / "missing"))).run(shell("true"), tmp_path)
    assert "[reach] workdir" in caught.value.fix


def test_without_the_platform_tools_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="platform tools are not installed"):
        Adb(Reach("adb")).run(shell("true"), tmp_path)


def test_the_list_of_devices_is_read():
    text = "* daemon started successfully\nList of devices attached\nemulator-5554\tdevice\n10.0.0.9:5555\toffline\n\n"
    assert devices(text) == {"emulator-5554": "device", "10.0.0.9:5555": "offline"}
