"""An OpenSSH server on the loopback address, with keys, a home folder and a configuration of its own; and a device's Python."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@dataclass
class SshServer:
    """`config` is the client's configuration: it knows the host key, and checks it. `path` is the PATH of who logs in."""

    folder: Path
    path: str = os.defpath
    port: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    options: tuple[str, ...] = ()
    user: str = field(default_factory=lambda: psutil.Process().username())

    @property
    def host(self) -> str:
        return f"{self.user}@127.0.0.1:{self.port}"

    @property
    def config(self) -> Path:
        return self.folder / "client" / "config"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def jobs(self) -> Path:
        """Where jobs' folders are made."""
        return self.folder / "tmp"

    @property
    def n_connections(self) -> int:
        """How many have been accepted so far."""
        return self.log.count("Accepted publickey")

    @property
    def log(self) -> str:
        return (self.folder / "server" / "log").read_text()

    def prepare(self) -> None:
        """Make keys and both configurations; the port is a free one."""
        server, client = self.folder / "server", self.folder / "client"
        for path in (server, client, self.home, self.jobs):
            path.mkdir(parents=True)
        for key in (server / "host_key", client / "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=30)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        shutil.copy(client / "user_key.pub", server / "authorized_keys")
        public = (server / "host_key.pub").read_text()
        (client / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")
        self.config.write_text(
            f"Host *\nIdentityFile {client / 'user_key'}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {client / 'known_hosts'}\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n"
        )

    def start(self) -> None:
        """Listen."""
        server = self.folder / "server"
        lines = [
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {server / 'host_key'}", f"PidFile {server / 'pid'}",
            f"AuthorizedKeysFile {server / 'authorized_keys'}", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
            "KbdInteractiveAuthentication no", "PermitRootLogin prohibit-password", "LogLevel VERBOSE", "UseDNS no",
            f"SetEnv HOME={self.home} TMPDIR={self.jobs} PATH={self.path}", *self.options,
        ]  # fmt: skip
        (server / "config").write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where the server drops its privileges
        argv = [str(SSHD), "-D", "-f", str(server / "config"), "-E", str(server / "log")]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        raise AssertionError(f"sshd does not listen: {self.log}")

    def sessions(self) -> "list[psutil.Process]":
        """The server's processes, one or two for each open connection."""
        assert self.process is not None
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if "sshd" in child.name()]

    def cut(self) -> None:
        """Break every open connection, as a network that fails does; the server goes on."""
        for session in self.sessions():
            with contextlib.suppress(psutil.NoSuchProcess):
                session.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """Break every connection and stop listening."""
        if self.process:
            self.cut()
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a disk of this size; skip the test where that is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True, text=True, check=False, timeout=30
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=30)


def device_python(folder: Path, *packages: str) -> Path:
    """Make a virtual environment that has just these packages, of those installed here; return its folder of programs."""
    venv.EnvBuilder(symlinks=True).create(folder)
    [site] = folder.glob("lib/python*/site-packages")
    for name in packages:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin).parent
        for part in (source, source.with_name(f"{name}.libs")):  # shared libraries of a wheel lie beside it
            if part.exists():
                (site / name).parent.joinpath(part.name).symlink_to(part)
    return folder / "bin"
