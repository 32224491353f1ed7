"""The keeper by itself, with programs on its PATH that take their time."""

import os
import signal
import subprocess
import time

import pytest
from jobs import soon

from deploypipe.runners.keeper import keep

HANGS_UP = [signal.SIGHUP, signal.SIGTERM]


def slow(bin_, program, where, started, seconds=0.5):
    """Put a program before the usual one that is slow for files of this name: it says so, and takes so many seconds more."""
    wait = f': > "{started}"; sleep {seconds}'
    (bin_ / program).write_text(f'#!/bin/sh\ncase "$1" in *{where}) {wait};; esac\nPATH={os.defpath} exec {program} "$@"\n')
    (bin_ / program).chmod(0o755)


@pytest.mark.parametrize("also", HANGS_UP)
def test_a_signal_while_it_tidies_up_does_not_leave_the_folder_behind(tmp_path, also):
    bin_, work, started = tmp_path / "bin", tmp_path / "work", tmp_path / "started"
    bin_.mkdir()
    work.mkdir()
    slow(bin_, "cat", ".pid", started)
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    keeper = subprocess.Popen(
        keep(str(work), "/tmp"), shell=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        lines = [keeper.stdout.readline().decode().strip() for _ in range(3)]
        folder = work / lines[1].rpartition("/")[2]
        (folder / "1.pid").write_text("999999999")  # of a job: read before the folder is removed
        keeper.stdin.close()  # the connection breaks: its input ends ...
        assert soon(started.exists)
        time.sleep(0.1)
        keeper.send_signal(also)  # ... and whoever served it ends it, too
        keeper.wait(20)
    finally:
        keeper.kill()
        keeper.stdout.close()
    assert list(work.iterdir()) == []


def kept_alive(work):
    keeper = subprocess.Popen(keep(str(work), "/tmp"), shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    lines = [keeper.stdout.readline().decode().strip() for _ in range(3)]
    return keeper, work / lines[1].rpartition("/")[2]


@pytest.mark.parametrize("same_boot", [True, False])
def test_what_a_dead_keeper_left_is_removed_and_its_numbers_are_believed_until_the_device_is_started_anew(tmp_path, same_boot):
    first, folder = kept_alive(tmp_path)
    first.kill()
    first.wait()
    first.stdin.close()
    first.stdout.close()
    number, boot = (folder / "keeper").read_text().split("\n")[:2]
    (folder / "keeper").write_text(f"{number}\n{boot if same_boot else 'another'}\n")
    job = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        (folder / "1.pid").write_text(f"{job.pid}\n")
        second, own = kept_alive(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [own.name]
        assert soon(lambda: job.poll() is not None, 1.0) == same_boot
        second.communicate(timeout=20)
    finally:
        job.kill()
        job.wait()
    assert list(tmp_path.iterdir()) == []
