"""A program that stands in for `adb`: it behaves as adb's documentation and source say, and its devices are folders.

    install(folder, PHONE="device")      # writes folder/adb, and the devices; the folder goes onto PATH

`devices.json` beside it says what is attached: {serial: state}. A device's files are this machine's; what runs there runs here.
A file called `unplugged` beside it takes all devices away, as pulling the cable does.

From the manual page adb(1) 1.0.41: commands and options, `-s SERIAL`, `push LOCAL... REMOTE`, `pull REMOTE... LOCAL`, the list
of `devices`. From the source, client/commandline.cpp: `shell` returns the remote exit code, and 255 when the device goes away.
client/file_sync_client.cpp: messages of push and pull. adbd runs a command in a session of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(sys.argv[0]).resolve().parent


def install(folder: Path, **states: str) -> None:
    """Write the program, and which devices are attached in which state."""
    (folder / "adb").write_text(f"#!{sys.executable} -IS\n{Path(__file__).read_text()}")
    (folder / "adb").chmod(0o755)
    attach(folder, **states)


def attach(folder: Path, **states: str) -> None:
    """Change which devices are attached."""
    (folder / "devices.json").write_text(json.dumps(states))


def fail(text: str, code: int = 1) -> None:
    print(text, file=sys.stderr)
    sys.exit(code)


def attached() -> dict[str, str]:
    return {} if (HERE / "unplugged").exists() else json.loads((HERE / "devices.json").read_text())


def transport(serial: str | None) -> None:
    found = attached()
    if serial is None and len(found) > 1:
        fail("adb: more than one device/emulator")
    if not found and serial is None:
        fail("adb: no devices/emulators found")
    name = serial or next(iter(found))
    if name not in found:
        fail(f"adb: device '{name}' not found")
    if found[name] != "device":
        fail(f"adb: device {found[name]}")


def shell(command: str) -> None:
    process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, start_new_session=True)

    def forward() -> None:
        try:
            while part := os.read(0, 4096):
                process.stdin.write(part)
                process.stdin.flush()
            process.stdin.close()
        except OSError:
            pass

    threading.Thread(target=forward, daemon=True).start()
    while (code := process.poll()) is None:
        if not attached():  # adbd closes what it holds of the process, and hangs up
            process.stdin.close()
            process.send_signal(signal.SIGHUP)
            os._exit(255)
        time.sleep(0.01)
    sys.stdout.flush()
    if not attached():  # what ended it meanwhile, nobody hears of
        os._exit(255)
    os._exit(code if code >= 0 else 128 - code)


def push(*paths: str) -> None:
    *sources, target = paths
    if len(sources) > 1 and not Path(target).is_dir():
        fail(f"adb: error: target '{target}' is not a directory")
    for source in sources:
        if not Path(source).exists():
            fail(f"adb: error: cannot stat '{source}': No such file or directory")
        place = Path(target) / Path(source).name if target.endswith("/") or Path(target).is_dir() else Path(target)
        try:
            shutil.copy(source, place)
        except OSError as error:
            fail(f"adb: error: failed to copy '{source}' to '{place}': remote couldn't create file: {error.strerror}")
    print(f"{len(sources)} files pushed, 0 skipped.")


def pull(source: str, target: str) -> None:
    if not Path(source).exists():
        fail(f"adb: error: failed to stat remote object '{source}': No such file or directory")
    shutil.copy(source, target)
    print(f"{source}: 1 file pulled, 0 skipped.")


def main(arguments: list[str]) -> None:
    serial = None
    if arguments[:1] == ["-s"]:
        serial, arguments = arguments[1], arguments[2:]
    command, *rest = arguments
    if command == "devices":
        print("List of devices attached")
        print("".join(f"{name}\t{state}\n" for name, state in attached().items()))
        return
    known = {"shell": lambda *words: shell(" ".join(words)), "push": push, "pull": pull}
    if command not in known:
        fail(f"adb: unknown command {command}")
    transport(serial)
    known[command](*rest)


if __name__ == "__main__":
    main(sys.argv[1:])
