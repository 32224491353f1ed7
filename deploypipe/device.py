"""What a target is like now: the facts that decide whether two measurements may be compared."""

import os
import platform
import shutil
from pathlib import Path

from deploypipe.backends import load_backend
from deploypipe.backends.base import Backend, Facts
from deploypipe.errors import TargetError
from deploypipe.runners.base import Runner
from deploypipe.targets import Device, Reach, Target

_ANY_ARCH, _NO_ACCELERATOR = Device.arch, Device.accelerator
_SAME = {"arm64": "aarch64", "amd64": "x86_64"}  # other names for the same processors


def facts_of(backend: Backend, runner: Runner, target: Target, folder: Path) -> Facts:
    """Return what the runtime says of itself, and the device of itself; what the runtime could not find out hides nothing.

    Raises:
        TargetError: The device is another kind of machine than the target says, or has fewer cores than threads were asked for.
        BackendError: It cannot be reached, or the runtime is missing there.
    """
    machine = runner.describe()
    if backend.pricing != "never":  # else this machine only converts for that one
        require_arch(target, machine.arch)
        _require_cores(target, machine.cores)
    answer = backend.read_description(runner.run(backend.describe_job(target), folder))
    lasting = machine.lasting
    return {**lasting, **{name: value for name, value in answer.items() if value or name not in lasting}}


def installed(backend: Backend, target: Target) -> tuple[bool, str]:
    """Return whether the target's runtime is on this machine, as such or as the program that the target names; else the fix.

    Of an interpreter that the target names in place of our own, only a job can tell: it counts as having the runtime.
    """
    tool = target.build.tool
    if tool and shutil.which(os.path.expanduser(tool)):  # noqa: PTH111 - Path.expanduser raises where there is no such user
        return True, ""
    if target.reach.via == Reach.via and target.reach.python:
        return True, ""
    return backend.available()


def at_home(target: Target) -> Target:
    """Return the target without the connection to it, if this machine is such a device and no other was named.

    It is taken for one if it has the processor that the target states, and the runtime of its accelerator. Where there is no
    accelerator, that would be no evidence: the processor is that of many boards, and the runtime comes with this program.
    """
    stated, reach = target.device, target.reach
    if reach.via != "ssh" or reach.host or stated.arch == _ANY_ARCH or stated.accelerator == _NO_ACCELERATOR:
        return target
    such = _same_arch(stated.arch, platform.machine()) and installed(load_backend(target), target)[0]
    return target.replace(via=Reach.via) if such else target


def require_arch(target: Target, arch: str, fix: str = "check --host") -> None:
    """Compare the processor that the target states with the device's.

    Raises:
        TargetError: They differ; `fix` is what to do unless the target file is wrong.
    """
    stated = target.device.arch
    if stated != _ANY_ARCH and not _same_arch(stated, arch):
        raise TargetError(
            f"the target is a device with {stated}, the one that answered has {arch}",
            at=f"{target.path or target.name}: device.arch",
            fix=f"{fix}, or correct [device] arch in the target file",
        )


def _require_cores(target: Target, cores: int | None) -> None:
    threads = target.measure.threads
    if cores and threads > cores:
        message, at = (
            f"{threads} threads were asked for, the device has {cores} cores",
            f"target {target.name}: measure.threads",
        )
        raise TargetError(message, at=at, fix=f"use {cores} or fewer: threads that wait for each other measure nothing")


def _same_arch(one: str, other: str) -> bool:
    return _SAME.get(one, one) == _SAME.get(other, other)
