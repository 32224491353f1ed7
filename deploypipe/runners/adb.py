"""Run jobs on an Android device by `adb`, the debug bridge of Android's platform tools.

The device runs Android 7 or newer (older ones do not tell exit codes), with USB debugging allowed to this computer. Jobs run as
the user `shell` below /data/local/tmp. Written from adb's documentation and source, and tested against a stand-in for `adb`
that behaves as those say: not run on hardware.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import ClassVar

from deploypipe.errors import BackendError, nearest
from deploypipe.runners.ending import last_lines, missing
from deploypipe.runners.keeper import Keeper, keep
from deploypipe.runners.process import Ended, finish
from deploypipe.runners.remote import Link, Lost, Remote

CONNECT_S = 30.0
_DISCONNECTED = 255  # exit code of `adb shell` when the device goes away, but a program may end with it, too
_COMPLAINT = re.compile(r"^(adb|error|adb: error): ", re.MULTILINE)  # of adb itself
_ABSENT = re.compile(r"remote object .*(does not exist|No such file)", re.DOTALL)  # older versions, newer versions
_USUAL = "/data/local/tmp"
_STATES = {  # what `adb devices` says of a device -> what it means, and how to fix it
    "unauthorized": (
        "the device does not trust this computer",
        "unlock it and allow USB debugging in its dialog",
    ),
    "offline": ("the device does not answer", "plug it in again, or: adb reconnect"),
    "no permissions": ("this computer's user may not use the USB device", "add a udev rule for it, or: sudo adb start-server"),
}


class Adb(Remote):
    """The device whose serial number (or host:port) `[reach] host` or `--host` names; if there is only one, that one."""

    needs_host: ClassVar[bool] = False

    def connect(self) -> Link:
        """Find the device and start a keeper there.

        Raises:
            BackendError: It is not there, or not ready.
        """
        serial = chosen(self._listed(), self.reach.host, self.place)
        return _Connection(serial, self.place, self.reach.workdir)

    def _listed(self) -> dict[str, str]:
        try:
            ended = finish(["adb", "devices"], CONNECT_S)
        except TimeoutError as error:
            fix = "restart it: adb kill-server"
            raise BackendError("adb's server does not answer", at=self.place, fix=fix) from error
        except OSError as error:
            raise missing("adb", "Android's platform tools are not installed here", self.place) from error
        return devices(ended.stdout)


def devices(text: str) -> dict[str, str]:
    """Return serial number -> state from what `adb devices` says."""
    lines = text.partition("List of devices attached")[2].splitlines()
    return {serial: state.strip() for serial, _, state in (line.partition("\t") for line in lines) if state}


def chosen(found: Mapping[str, str], wanted: str, place: str) -> str:
    """Return the serial number of the device to use.

    Raises:
        BackendError: There is none, or more than one and none is named, or it is not ready.
    """
    if not found:
        fix = "plug one in and allow USB debugging (developer options), or over the network: adb connect HOST:PORT"
        raise BackendError("no Android device is attached", at=place, fix=fix)
    if wanted and wanted not in found:
        fix = f"{nearest(wanted, found)}; over the network: adb connect HOST:PORT"
        raise BackendError(f"no device '{wanted}' is attached", at=place, fix=fix)
    if not wanted and len(found) > 1:
        fix = f"say which: --host {' or '.join(sorted(found))}"
        raise BackendError(f"{len(found)} devices are attached", at=place, fix=fix)
    serial = wanted or next(iter(found))
    for state, (meaning, fix) in _STATES.items():
        if found[serial].startswith(state):
            raise BackendError(f"{meaning} ({found[serial]})", at=place, fix=fix)
    if found[serial] != "device":
        raise BackendError(f"the device is not ready: {found[serial]}", at=place, fix="start Android on it")
    return serial


class _Connection:
    """One device with a keeper on it."""

    def __init__(self, serial: str, place: str, workdir: str) -> None:
        self._private, self._serial, self._place = Path(tempfile.mkdtemp(prefix="deploypipe-adb-")), serial, place
        self._keeper = Keeper(self._adb("shell", keep(workdir or _USUAL, _USUAL)), self._private)
        ready = self._keeper.ready(CONNECT_S)
        if ready is None:
            said = last_lines(self._keeper.give_up())
            fix = "set [reach] workdir in the target file to a folder there that `adb shell` may write and execute in"
            raise BackendError(f"no folder can be made on the device: {said}", at=place, fix=fix)
        self.folder, self.arch = ready

    def put(self, number: str, files: Mapping[str, Path | bytes], timeout_s: float) -> Ended:
        """Write files below the folder: one push for each folder, from copies that have the files' names there."""
        made = self.call(f"exec mkdir {quote(f'{self.folder}/{number}')}", timeout_s)
        with tempfile.TemporaryDirectory(dir=self._private) as staging:
            folders: dict[str, list[str]] = {}
            for name, source in files.items():
                copy = Path(staging) / name
                copy.parent.mkdir(exist_ok=True)
                if isinstance(source, bytes):
                    copy.write_bytes(source)
                else:
                    shutil.copy(source, copy)
                folders.setdefault(name.rpartition("/")[0], []).append(str(copy))
            for below, copies in folders.items():
                if made.code == 0:
                    made = self._finish(timeout_s, "push", *copies, f"{self.folder}/{below}".rstrip("/") + "/")
        return made

    def call(self, command: str, timeout_s: float) -> Ended:
        """Run a command line."""
        return self._finish(timeout_s, "shell", command)

    def get(self, number: str, names: Sequence[str], into: Path, timeout_s: float) -> dict[str, Path]:
        """Fetch files of a job."""
        into.mkdir(parents=True, exist_ok=True)
        found = {}
        for name in names:
            temporary = self._private / "pulled"
            done = self._finish(timeout_s, "pull", f"{self.folder}/{number}/{name}", str(temporary))
            if _ABSENT.search(done.stderr):
                continue
            if done.code:
                said = last_lines(done.stderr or done.stdout)
                raise BackendError(f"the results cannot be fetched: {said}", at=self._place, fix="look at the device's cable")
            partial = into / f".{name}.tmp"
            shutil.move(temporary, partial)
            found[name] = partial.replace(into / name)
        return found

    def close(self) -> None:
        """Let the keeper tidy up, and leave."""
        self._keeper.leave()

    def _adb(self, *arguments: str) -> list[str]:
        return ["adb", "-s", self._serial, *arguments]

    def _finish(self, timeout_s: float, *arguments: str) -> Ended:
        ended = finish(self._adb(*arguments), timeout_s)
        failed = ended.code == _DISCONNECTED or (ended.code and _COMPLAINT.search(ended.stderr))
        if failed and self._keeper.gone():
            raise Lost
        return ended
