"""For which processors a program was built: looked up before it is sent to a device that cannot run it."""

from pathlib import Path

_MAGIC = b"\x7fELF"
_LITTLE, _ORDER, _MACHINE = 1, 5, 18  # the byte order's mark, and where the header has the order and the machine
_MACHINES = {3: "x86", 62: "x86_64", 40: "arm", 183: "aarch64", 243: "riscv64"}
_FAMILIES = (("x86", ("x86", "i386", "i486", "i586", "i686", "amd64")), ("arm", ("arm", "aarch64")), ("riscv", ("riscv",)))


def built_for(program: Path | bytes) -> str:
    """Return the processor that an ELF file was built for; "" if it is no ELF file, or for a processor that we do not know."""
    if isinstance(program, bytes):
        head = program[:20]
    else:
        with program.open("rb") as file:
            head = file.read(20)
    if len(head) < 20 or not head.startswith(_MAGIC):
        return ""
    machine = int.from_bytes(head[_MACHINE : _MACHINE + 2], "little" if head[_ORDER] == _LITTLE else "big")
    return _MACHINES.get(machine, "")


def surely_foreign(built: str, arch: str) -> bool:
    """Return whether a program built for `built` cannot run where `uname -m` says `arch`: the families differ.

    Within a family we let the device decide: a 64-bit kernel may have 32-bit programs only, and the other way round.
    """
    ours, theirs = _family(built), _family(arch)
    return bool(ours and theirs and ours != theirs)


def _family(machine: str) -> str:
    return next((name for name, starts in _FAMILIES if machine.lower().startswith(starts)), "")
