"""An OpenSSH server on the loopback address, with keys, a home folder and a configuration of its own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@dataclass
class SshServer:
    """`config` is the client's configuration: it knows the host key, and checks it."""

    folder: Path
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
    def log(self) -> str:
        return (self.folder / "server" / "log").read_text()

    def prepare(self) -> None:
        """Make keys and both configurations; the port is a free one."""
        server, client = self.folder / "server", self.folder / "client"
        for path in (server, client, self.home):
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

    def start(self, path: str = "") -> None:
        """Listen; `path` comes first on the PATH of whoever logs in."""
        server = self.folder / "server"
        lines = [
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {server / 'host_key'}", f"PidFile {server / 'pid'}",
            f"AuthorizedKeysFile {server / 'authorized_keys'}", "StrictModes no", "UsePAM no", "PasswordAuthentication no",
            "KbdInteractiveAuthentication no", "PermitRootLogin prohibit-password", "LogLevel VERBOSE", "UseDNS no",
            f"SetEnv HOME={self.home} PATH={path or os.defpath}", *self.options,
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
