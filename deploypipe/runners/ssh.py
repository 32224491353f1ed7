"""Run jobs on a device over SSH, by the system's OpenSSH client.

The user's keys, configuration, jump hosts and host-key checking apply as they are. `BatchMode` is on: a password is never
asked for, so nothing waits for one. The environment variable DEPLOYPIPE_SSH_CONFIG names another configuration file, as
`ssh -F` takes it. All jobs go over one connection, whose control socket lies in a private folder.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import IO

from deploypipe.errors import BackendError, TargetError
from deploypipe.runners.archive import after_mark, pack, unpack
from deploypipe.runners.ending import last_lines, missing
from deploypipe.runners.keeper import Keeper, keep
from deploypipe.runners.process import Ended, finish
from deploypipe.runners.remote import Link, Lost, Remote
from deploypipe.targets import Reach

CONNECT_S = 15  # to reach the server; the rest of the handshake may take as long again, twice
_SSH_FAILED = 255  # exit code of ssh itself, but a program may end with it, too
_LONGEST_SOCKET = 80  # bytes of the control socket's path: the system allows about 104, of which ssh wants 17 for itself
_OPTIONS = (
    "BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=10", "ServerAliveCountMax=3", "LogLevel=ERROR",
    "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "PermitLocalCommand=no", "RemoteCommand=none",
    "RequestTTY=no", "ControlPersist=no",
)  # fmt: skip
_USER = re.compile(r"[\w.+][\w.+@-]*", re.ASCII)
_ADDRESS = r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%\w+)?"
_PLACE = re.compile(
    rf"(?:\[(?P<bracketed>{_ADDRESS})\]|(?P<name>[\w.][\w.-]*))(?::(?P<port>\d{{1,5}}))?|(?P<bare>{_ADDRESS})", re.ASCII
)
_REASONS = {  # what ssh says -> what it means, and how to fix it
    "mktemp|write error|cannot create": (
        "no folder can be made on the device",
        "set [reach] workdir in the target file to a folder that exists there, is yours and has space",
    ),
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "the device's host key is not the one you know: another device, or one that was set up anew",
        "find out which; if it was set up anew: ssh-keygen -R {name}, then connect once by hand: {by_hand}",
    ),
    "Host key verification failed": (
        "the device's host key is not known yet",
        "connect once by hand and compare the fingerprint: {by_hand}",
    ),
    "Permission denied": (
        "the device accepts none of your keys, and a password is never asked for",
        "install your key: ssh-copy-id {destination}; if it has a passphrase, load it: ssh-add; then try: {by_hand}",
    ),
    "Could not resolve hostname": ("there is no host of this name", "check the name, or give its address"),
    "Connection refused": (
        "no SSH server answers there",
        "start it on the device (Debian, Ubuntu: sudo apt install openssh-server), or check the port",
    ),
    "timed out|No route to host|Network is unreachable|Host is down": (
        "the device does not answer",
        "check that it is on and in the same network; try: {by_hand}",
    ),
}


@dataclass(frozen=True)
class Host:
    """Where to: what is empty, the user's configuration decides."""

    name: str
    user: str = ""
    port: str = ""

    @classmethod
    def parse(cls, text: str) -> "Host":
        """Read `[user@]host[:port]`; an IPv6 address with a port stands in brackets.

        Raises:
            TargetError: It is something else. Names that a shell could misread, as in a `ProxyCommand`, are refused.
        """
        user, at, place = text.rpartition("@")
        found = _PLACE.fullmatch(place)
        if not found or not (_USER.fullmatch(user) if at else True):
            fix = "write [user@]host[:port], for example pi@raspberrypi.local or root@[fe80::1]:2222"
            raise TargetError(f"'{text}' is no host", at="reach.host", fix=fix)
        return cls(found["bracketed"] or found["bare"] or found["name"], user, found["port"] or "")

    @property
    def arguments(self) -> list[str]:
        """For `ssh`, with the host itself last."""
        user, port = ["-l", self.user] if self.user else [], ["-p", self.port] if self.port else []
        return [*user, *port, "--", self.name]


class Ssh(Remote):
    """A device that `[reach] host` or `--host` names as `[user@]host[:port]`."""

    def __init__(self, reach: Reach) -> None:
        super().__init__(reach)
        self.host = Host.parse(reach.host) if reach.host else None

    def connect(self) -> Link:
        """Open a connection.

        Raises:
            BackendError: It cannot be opened.
        """
        assert self.host is not None
        return _Connection(self.host, self.place, self.reach.workdir)


class _Connection:
    """One connection with a keeper at its far end."""

    def __init__(self, host: Host, place: str, workdir: str) -> None:
        private = tempfile.mkdtemp(prefix="deploypipe-ssh-")
        if len(private) > _LONGEST_SOCKET:
            shutil.rmtree(private)
            private = tempfile.mkdtemp(prefix="deploypipe-ssh-", dir="/tmp")
        self._private, self._host, self._place = Path(private), host, place
        usual = "/tmp"  # noqa: S108 - of the device
        try:
            self._keeper = Keeper(self._ssh("ControlMaster=yes", keep(workdir, usual)), self._private)
        except OSError as error:
            shutil.rmtree(private)
            raise missing("ssh", "there is no OpenSSH client here", place) from error
        ready = self._keeper.ready(3 * CONNECT_S)
        if ready is None:
            raise unreachable(host, self._keeper.give_up(), place)
        self.folder, self.arch = ready

    def put(self, number: str, files: Mapping[str, Path | bytes], timeout_s: float) -> Ended:
        """Write files below the folder."""
        with tempfile.TemporaryFile(dir=self._private) as packed:
            pack(number, files, packed)
            packed.seek(0)
            return self._call(f"exec tar -x -o -f - -C {quote(self.folder)}", timeout_s, stdin=packed)

    def call(self, command: str, timeout_s: float) -> Ended:
        """Run a command line."""
        return self._call(command, timeout_s)

    def get(self, number: str, names: Sequence[str], into: Path, timeout_s: float) -> dict[str, Path]:
        """Fetch files of a job."""
        into.mkdir(parents=True, exist_ok=True)
        if not names:
            return {}
        with tempfile.TemporaryFile(dir=self._private) as packed:
            done = self._call(f"exec sh {quote(f'{self.folder}/{number}.get')}", timeout_s, stdout=packed)
            if done.code:
                said = last_lines(done.stderr)
                raise BackendError(f"the results cannot be fetched: {said}", at=self._place, fix="`tar` has to work there")
            packed.seek(0)
            after_mark(packed)
            return unpack(packed, names, into)

    def close(self) -> None:
        """Let the keeper tidy up, and leave."""
        self._keeper.leave()

    def _ssh(self, *options: str) -> list[str]:
        *set_, command = options
        config = os.environ.get("DEPLOYPIPE_SSH_CONFIG")
        chosen = [part for option in (*_OPTIONS, *set_) for part in ("-o", option)]
        ours = ["ssh", *(["-F", config] if config else []), "-S", str(self._private / "s")]
        return [*ours, *chosen, *self._host.arguments, command]

    def _call(self, command: str, timeout_s: float, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> Ended:
        # Never a connection of its own when ours has broken: the folder would not be there.
        argv = self._ssh("ControlMaster=no", "ProxyCommand=false", command)
        ended = finish(argv, timeout_s, stdin=stdin, stdout=stdout)
        if ended.code == _SSH_FAILED and self._keeper.gone():
            raise Lost
        return ended


def unreachable(host: Host, said: str, place: str) -> BackendError:
    """Return the error for what ssh said when it could not connect."""
    destination = f"{host.user}@{host.name}" if host.user else host.name
    by_hand = f"ssh {f'-p {host.port} ' if host.port else ''}{destination}"
    for pattern, (meaning, fix) in _REASONS.items():
        if re.search(pattern, said):
            message = f"{meaning} ({last_lines(said, 1, 200)})"
            return BackendError(message, at=place, fix=fix.format(name=host.name, destination=destination, by_hand=by_hand))
    return BackendError(f"cannot connect to the device: {last_lines(said)}", at=place, fix=f"try: {by_hand}")
