"""The SSH runner against a real OpenSSH server on the loopback address."""

import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from jobs import shell, soon
from ssh_server import small_disk

import deploypipe
from deploypipe.errors import BackendError, TargetError
from deploypipe.job import PYTHON, Job
from deploypipe.runners import remote
from deploypipe.runners.ssh import Host, Ssh, unreachable
from deploypipe.targets import Reach

HOSTILE = [
    "a b",
    "-rf",
    "$(touch pwned)",
    "`touch pwned`",
    "it's",
    'say "hi"',
    "back\\slash",
    "new\nline",
    "ünï",
    "*",
    "~",
    "~root",
    "a;b&c|d",
    "!x",
]


@pytest.fixture
def device(tmp_path):
    """The folder on the 'device' in which jobs' folders are made; its name is hostile, too."""
    folder = tmp_path / 'it\'s "the" $HOME;'
    folder.mkdir()
    return folder


@pytest.fixture
def ssh(ssh_server, device, monkeypatch):
    runner = Ssh(Reach("ssh", ssh_server.host, str(device)))
    yield runner
    runner.close()


def test_files_go_there_and_back_and_nothing_stays(ssh, device, tmp_path):
    (tmp_path / "in.txt").write_text("abc")
    code = 'cat a b > out.txt; printf %s "$C" >> out.txt; pwd; ls -A'
    result = ssh.run(
        shell(code, push={"a": tmp_path / "in.txt", "b": b"def"}, pull=("out.txt",), env={"C": "ghi"}), tmp_path / "i"
    )
    assert result.pulled["out.txt"].read_text() == "abcdefghi"
    place, *files = result.stdout.splitlines()
    assert Path(place).parent.parent == device
    assert files == ["a", "b", "out.txt"], "a job's folder holds what it brought along, and no more"
    assert not Path(place).exists()
    [session] = device.iterdir()
    assert [path.name for path in session.iterdir()] == ["keeper"]
    ssh.close()
    assert not list(device.iterdir())


def test_hostile_names_and_arguments_arrive_as_they_are(ssh, tmp_path):
    code = (
        "import sys, os, shutil; [shutil.copy(n, 'back ' + n) for n in sys.argv[1:]]; "
        "print(sys.argv[1:], dict(os.environ)['E'])"
    )
    job = Job(
        (PYTHON, "-c", code, *HOSTILE),
        {n: n.encode() for n in HOSTILE},
        tuple(f"back {n}" for n in HOSTILE),
        {"E": "".join(HOSTILE)},
    )
    result = ssh.run(job, tmp_path / "into")
    assert result.stdout == f"{HOSTILE} {''.join(HOSTILE)}\n"
    assert {name: path.read_bytes() for name, path in result.pulled.items()} == {f"back {n}": n.encode() for n in HOSTILE}
    assert sorted(path.name for path in (tmp_path / "into").iterdir()) == sorted(f"back {n}" for n in HOSTILE)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b"])
def test_a_job_stays_in_its_folder(name):
    with pytest.raises(ValueError, match="no plain file name"):
        Job(("true",), {name: b""})
    with pytest.raises(ValueError, match="no plain file name"):
        Job(("true",), pull=(name,))


@pytest.mark.parametrize("name", ["", "A B", "1A", "A=B", "A;reboot"])
def test_an_environment_variable_has_a_name(name):
    with pytest.raises(ValueError, match="environment"):
        Job(("true",), env={name: "x"})


def test_a_pushed_program_is_executable_and_the_output_is_the_programs_own(ssh, tmp_path):
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\necho out; echo err >&2; exit 4\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(BackendError, match="failed with exit code 4: err"):
        ssh.run(Job(("./tool",), {"tool": program}), tmp_path)
    result = ssh.run(shell("echo out; echo err >&2"), tmp_path)
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)


@pytest.mark.parametrize(
    ("job", "message", "fix"),
    [
        (Job(("no-such-program", "x")), "cannot start 'no-such-program': there is no such program on the device", "PATH"),
        (Job((PYTHON, "-c", "import not_a_module")), "No module named 'not_a_module'", "python3 -m pip install not_a_module"),
        (shell("exit 255"), "failed with exit code 255", "see the message above"),
        (shell("kill -9 $$"), "was ended by signal 9: .*", "memory"),
        (shell("echo 'OSError: [Errno 28] No space left on device' >&2; exit 1"), "the disk is full", "[reach] workdir"),
        (shell("", pull=("x",)), "the job left no 'x'", "fault of the backend"),
        (Job(("./x",), {"x": Path("/no/such/file")}), "there is no file '/no/such/file'", "check the path"),
    ],
)
def test_every_failure_says_what_where_and_how_to_fix_it(ssh, ssh_server, device, tmp_path, job, message, fix):
    with pytest.raises(BackendError, match=message) as caught:
        ssh.run(job, tmp_path / "into")
    assert fix in caught.value.fix
    assert caught.value.at.startswith((f"ssh {ssh_server.host}", "local"))
    assert ssh.run(shell("echo on"), tmp_path).stdout == "on\n"
    [session] = device.iterdir()
    assert [path.name for path in session.iterdir()] == ["keeper"]


def test_a_full_disk_is_told_wherever_it_fills(ssh_server, tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        ssh = Ssh(Reach("ssh", ssh_server.host, str(disk)))
        for job in (shell("true", push={"big": bytes(2_000_000)}), shell("head -c 2000000 /dev/zero > big")):
            with pytest.raises(BackendError, match="the disk is full") as caught:
                ssh.run(job, tmp_path / "into")
            assert "[reach] workdir" in caught.value.fix
        assert ssh.run(shell("echo on"), tmp_path).stdout == "on\n", "the space was given back"
        ssh.close()
        assert not list(disk.iterdir())


def test_a_missing_interpreter_is_told_from_other_programs(ssh_server, device, tmp_path, monkeypatch):
    ssh = Ssh(Reach("ssh", ssh_server.host, str(device), "~/no venv/bin/python"))
    with pytest.raises(BackendError, match="the device has no '~/no venv/bin/python'") as caught:
        ssh.run(Job((PYTHON, "-c", "")), tmp_path)
    assert "[reach] python" in caught.value.fix
    (ssh_server.home / "no venv" / "bin").mkdir(parents=True)
    (ssh_server.home / "no venv" / "bin" / "python").symlink_to("/bin/echo")
    assert ssh.run(Job((PYTHON, "~/x")), tmp_path).stdout == "~/x\n", "~/ is the home folder on the device"
    ssh.close()


def test_a_program_for_another_processor_is_refused_before_it_runs(ssh, tmp_path):
    foreign = {"x86_64": 183}.get(os.uname().machine, 62)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, foreign) + bytes(44)
    with pytest.raises(BackendError, match="cannot execute 'tool': it was built for") as caught:
        ssh.run(Job(("./tool",), {"tool": header}), tmp_path)
    assert "uname -m" in caught.value.fix


def test_a_timeout_ends_the_program_and_its_children_there(ssh, device, tmp_path):
    mark = tmp_path / "pid"
    with pytest.raises(BackendError, match=r"did not end within 0\.5 s"):
        ssh.run(Job(("sh", "-c", 'sleep 60 & echo $! > "$1"; wait', "sh", str(mark)), timeout_s=0.5), tmp_path)
    assert soon(lambda: not psutil.pid_exists(int(mark.read_text())))
    [session] = device.iterdir()
    assert [path.name for path in session.iterdir()] == ["keeper"]


def test_a_connection_that_breaks_is_opened_again_and_the_job_done_again(ssh, ssh_server, device, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.1,))
    marks = tmp_path / "marks"
    marks.mkdir()

    def cut():
        assert soon(lambda: len(list(marks.iterdir())) == 1)
        ssh_server.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    code = 'touch "$1/$$"; [ $(ls "$1" | wc -l) -gt 1 ] || sleep 60; echo done > out'
    result = ssh.run(Job(("sh", "-c", code, "sh", str(marks)), pull=("out",)), tmp_path / "into")
    thread.join()
    assert result.pulled["out"].read_text() == "done\n"
    first = min((int(path.name) for path in marks.iterdir()), key=lambda pid: (marks / str(pid)).stat().st_mtime)
    assert soon(lambda: not psutil.pid_exists(first)), "the keeper ended what was left of the first attempt"
    assert soon(lambda: len(list(device.iterdir())) == 1), "and removed its folder"


def test_a_device_that_is_gone_is_named_and_nothing_half_written_is_left(ssh_server, device, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.05, 0.05))
    ssh = Ssh(Reach("ssh", ssh_server.host, str(device)))
    assert ssh.run(shell("echo on"), tmp_path).stdout == "on\n"
    ssh_server.stop()
    try:
        with pytest.raises(
            BackendError, match="the connection broke, and the device cannot be reached again: no SSH server"
        ) as caught:
            ssh.run(shell("echo x > out", pull=("out",)), tmp_path / "into")
    finally:
        ssh_server.start()
    assert "what has been measured is kept" in caught.value.fix
    assert not (tmp_path / "into").exists()
    assert soon(lambda: not list(device.iterdir()))
    assert ssh.run(shell("echo back"), tmp_path).stdout == "back\n"
    ssh.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_on_the_device_whatever_ends_this_program(ssh_server, device, tmp_path, number):
    code = (
        "import sys; from pathlib import Path; from deploypipe.job import Job; from deploypipe.runners.ssh import Ssh; "
        "from deploypipe.targets import Reach; host, workdir, pid = sys.argv[1:]; "
        "job = Job(('sh', '-c', 'echo $$ > \"$1.new\"; mv \"$1.new\" \"$1\"; sleep 60', 'sh', pid)); "
        "Ssh(Reach('ssh', host, workdir)).run(job, Path(pid).parent)"
    )
    pid = tmp_path / "pid"
    root = str(Path(deploypipe.__file__).parents[1])
    program = subprocess.Popen(
        [sys.executable, "-c", code, ssh_server.host, str(device), str(pid)], cwd=root, stderr=subprocess.DEVNULL
    )
    assert soon(pid.exists)
    program.send_signal(number)
    assert program.wait(30) != 0
    assert soon(lambda: not psutil.pid_exists(int(pid.read_text())))
    assert soon(lambda: not list(device.iterdir()))


def test_a_folder_whose_keeper_was_killed_goes_at_the_next_contact(ssh, ssh_server, device, tmp_path):
    ssh.run(shell("true"), tmp_path)
    [session] = device.iterdir()
    os.kill(int((session / "keeper").read_text().split()[0]), signal.SIGKILL)
    ssh.close()
    assert session.exists()
    ssh.run(shell("true"), tmp_path)
    assert not session.exists()


def test_host_keys_are_checked(ssh_server, device, tmp_path, monkeypatch):
    known = ssh_server.config.parent / "known_hosts"
    config = tmp_path / "config"
    config.write_text(ssh_server.config.read_text().replace(str(known), str(tmp_path / "known")))
    monkeypatch.setenv("DEPLOYPIPE_SSH_CONFIG", str(config))
    ssh = Ssh(Reach("ssh", ssh_server.host, str(device)))
    with pytest.raises(BackendError, match="host key is not known yet") as caught:
        ssh.run(shell("true"), tmp_path)
    assert f"ssh -p {ssh_server.port} {ssh_server.user}@127.0.0.1" in caught.value.fix
    other = (ssh_server.folder / "client" / "user_key.pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{ssh_server.port} {other}")
    with pytest.raises(BackendError, match="not the one you know") as caught:
        ssh.run(shell("true"), tmp_path)
    assert "ssh-keygen -R" in caught.value.fix


def test_a_key_that_is_not_accepted_and_a_folder_that_cannot_be_made(ssh_server, tmp_path, monkeypatch):
    with pytest.raises(BackendError, match="no folder can be made") as caught:
        Ssh(Reach("ssh", ssh_server.host, str(tmp_path / "missing"))).run(shell("true"), tmp_path)
    assert "[reach] workdir" in caught.value.fix
    config = tmp_path / "config"
    config.write_text(ssh_server.config.read_text().replace("user_key", "no_key"))
    monkeypatch.setenv("DEPLOYPIPE_SSH_CONFIG", str(config))
    with pytest.raises(BackendError, match="accepts none of your keys") as caught:
        Ssh(Reach("ssh", ssh_server.host)).run(shell("true"), tmp_path)
    assert "ssh-copy-id" in caught.value.fix


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ssh: Could not resolve hostname nano: Name or service not known", "no host of this name"),
        ("ssh: connect to host 10.0.0.9 port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host 10.0.0.9 port 22: No route to host", "does not answer"),
        ("mktemp: failed to create directory via template '/opt/x': Permission denied", "no folder can be made"),
        ("/home/me/.ssh/config: line 3: Bad configuration option: hots", "Bad configuration option: hots"),
    ],
)
def test_what_ssh_says_is_explained(said, message):
    assert message in unreachable(Host("nano"), said, "ssh nano").message


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("box", Host("box")),
        ("pi@box.local:2222", Host("box.local", "pi", "2222")),
        ("me@corp@box", Host("box", "me@corp")),
        ("10.0.0.9:22", Host("10.0.0.9", "", "22")),
        ("[fe80::1%eth0]:22", Host("fe80::1%eth0", "", "22")),
        ("pi@fe80::1", Host("fe80::1", "pi")),
    ],
)
def test_hosts_are_read(text, host):
    assert Host.parse(text) == host


@pytest.mark.parametrize(
    "text",
    ["-oProxyCommand=x", "a b", "$(id)", "a;b", "pi@", "@box", "box:", "box:x", "-x@box", "box:123456", "`id`@box", "a\n"],
)
def test_what_is_no_host_is_refused(text):
    with pytest.raises(TargetError, match="is no host"):
        Ssh(Reach("ssh", text))


def test_a_target_without_a_device_says_how_to_name_one(tmp_path):
    with pytest.raises(TargetError, match="names no device") as caught:
        Ssh(Reach("ssh")).run(shell("true"), tmp_path)
    assert "--host" in caught.value.fix


def test_without_an_ssh_client_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="no OpenSSH client"):
        Ssh(Reach("ssh", "box")).run(shell("true"), tmp_path)
