"""What a device is and how it is set just now, asked for by one shell script that runs wherever there is `sh`."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploypipe.job import PYTHON, Job, JobResult

SCRIPT = "describe.sh"
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "executorch", "ncnn", "numpy", "torch")
_COLDEST, _HOTTEST = 0.0, 150.0  # Celsius: a sensor that is off reads far below zero


@dataclass(frozen=True)
class Machine:
    """What a device says of itself; "" or None where it does not.

    Attributes:
        arch: As `uname -m` says.
        kernel: Name and release.
        os: The distribution.
        model: The board or computer.
        soc: The chip.
        cpu: Name of the processor; on ARM the numbers of maker and design of its cores.
        cpu_flags: Its extensions.
        cores: How many.
        memory_bytes: In total.
        free_bytes: On the disk where jobs run.
        governor: Of the clock, of all cores.
        power_mode: As `nvpmodel -q` says.
        clocks: As `jetson_clocks --show` says, line by line.
        temperature_c: Of the hottest sensor.
        python: Version of the interpreter, and its path.
        packages: Of runtimes, name -> version.
    """

    arch: str = ""
    kernel: str = ""
    os: str = ""
    model: str = ""
    soc: str = ""
    cpu: str = ""
    cpu_flags: tuple[str, ...] = ()
    cores: int | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    governor: str = ""
    power_mode: str = ""
    clocks: tuple[str, ...] = ()
    temperature_c: float | None = None
    python: tuple[str, str] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def lasting(self) -> dict[str, Any]:
        """What two measurements must have in common to be laid side by side, without what changes from minute to minute."""
        named = {"model": self.model, "soc": self.soc, "os": self.os, "power_mode": self.power_mode}
        known = {name: value for name, value in named.items() if value}
        # Rounded: what the kernel keeps for itself differs a little from boot to boot.
        return known if self.memory_bytes is None else {**known, "memory_gib": round(self.memory_bytes / 2**30, 1)}

    @property
    def passing(self) -> dict[str, Any]:
        """What changes from minute to minute."""
        clocks = {"clocks": list(self.clocks)} if self.clocks else {}
        return clocks | ({} if self.temperature_c is None else {"temperature_c": self.temperature_c})


def describe(run: Callable[[Job, Path], JobResult]) -> Machine:
    """Ask a device through a runner's `run`.

    Raises:
        BackendError: The device cannot be reached, or has no shell.
    """
    script = (Path(__file__).parent / SCRIPT).read_bytes()
    with tempfile.TemporaryDirectory(prefix="deploypipe-") as folder:
        return read(run(Job(("sh", SCRIPT, PYTHON, *PACKAGES), {SCRIPT: script}, timeout_s=60.0), Path(folder)).stdout)


def read(text: str) -> Machine:
    """Read what the script said."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, _, value = line.partition("\t")
        said.setdefault(name, []).append(value.strip())

    def first(name: str) -> str:
        return next((value for value in said.get(name, ()) if value), "")

    def number(name: str, unit: int = 1) -> int | None:
        return int(first(name)) * unit if first(name).isdigit() else None

    sensors = [int(value) / 1000 for value in said.get("temperature_milli_c", ()) if value.lstrip("-").isdigit()]
    warm = [celsius for celsius in sensors if _COLDEST < celsius < _HOTTEST]
    version, _, path = first("interpreter").partition("\t")
    pairs = (value.partition("\t") for value in said.get("package", ()))
    names = {name: first(name) for name in ("arch", "kernel", "os", "model", "soc", "cpu", "power_mode")}
    return Machine(
        **names, cpu_flags=tuple(first("cpu_flags").split()), cores=number("cores"), memory_bytes=number("memory_kib", 1024),
        free_bytes=number("free_kib", 1024), governor=",".join(said.get("governor", ())), clocks=tuple(said.get("clocks", ())),
        temperature_c=max(warm, default=None), python=(version, path) if version else None,
        packages={name: version for name, _, version in pairs},
    )  # fmt: skip
