"""What a target is like now: the facts that decide whether two measurements may be compared."""

from pathlib import Path

from deploypipe.backends.base import Backend, Facts
from deploypipe.errors import TargetError
from deploypipe.runners.base import Runner
from deploypipe.targets import Target

_SAME = {"arm64": "aarch64", "amd64": "x86_64"}  # other names for the same processors


def facts_of(backend: Backend, runner: Runner, target: Target, folder: Path) -> Facts:
    """Return what the runtime says of itself, and the device of itself; what the runtime could not find out hides nothing.

    Raises:
        TargetError: The device is another kind of machine than the target says.
        BackendError: It cannot be reached, or the runtime is missing there.
    """
    machine = runner.describe()
    if backend.pricing != "never":  # else this machine only converts for that one
        require_arch(target, machine.arch)
    answer = backend.read_description(runner.run(backend.describe_job(target), folder))
    lasting = machine.lasting
    return {**lasting, **{name: value for name, value in answer.items() if value or name not in lasting}}


def require_arch(target: Target, arch: str) -> None:
    """Compare the processor that the target states with the device's.

    Raises:
        TargetError: They differ.
    """
    stated = target.device.arch
    if stated != "native" and _SAME.get(stated, stated) != _SAME.get(arch, arch):
        raise TargetError(
            f"the target is a device with {stated}, the one that answered has {arch}",
            at=f"{target.path or target.name}: device.arch",
            fix="check --host, or correct [device] arch in the target file",
        )
