"""Which flags a version of `trtexec` takes: a table by version. Pushed to the device, so it needs only Python's own library.

Sources: NVIDIA/TensorRT, samples/common/sampleOptions.cpp of releases 8.6, 10.3, 10.7, 10.16 and 11.1, and the migration guide
from 10 to 11. In short:

- 8.x: `--fp16` permits half precision; strong typing does not exist. `--buildOnly` is called `--skipInference` from 8.6 on.
- 10.x: `--stronglyTyped` takes every type from the model. Latency counts copies, spins and launches unless flags say otherwise.
- 11.x: strong typing and the quiet way of measuring are the only or the default way, and the flags of 10.x for them are left
  out; `--fp16`, `--int8` and `--best` end the program with "Unknown option".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Tuple

Version = Tuple[int, ...]
OLDEST = (8, 4)
INSTALL = (
    "on a Jetson install JetPack's own package there (sudo apt install tensorrt), elsewhere NVIDIA's deb or tar "
    "(https://developer.nvidia.com/tensorrt); a trtexec outside PATH is named in the target file: "
    '[build] tool = "/path/to/trtexec"'
)
GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"

Rows = Tuple[Tuple[Version, Tuple[str, ...]], ...]  # from this version on, these flags
BUILD_ONLY: Rows = (((0,), ("--buildOnly",)), ((8, 6), ("--skipInference",)))
TYPED: Mapping[str, Rows] = {
    "fp16": (((0,), ("--fp16",)), ((10, 0), ("--stronglyTyped",)), ((11, 0), ())),
    "fp32": (((0,), ()), ((10, 0), ("--stronglyTyped",)), ((11, 0), ())),
}
QUIET: Rows = (((0,), ("--useSpinWait", "--noDataTransfers", "--useCudaGraph")), ((11, 0), ()))
SEPARATE: Rows = (((0,), ("--useSpinWait", "--noDataTransfers", "--separateProfileRun")), ((11, 0), ()))
TRANSFERS: Rows = (((0,), ()), ((11, 0), ("--includeDataTransfers",)))


def since(rows: Rows, version: Version) -> tuple[str, ...]:
    """Return the flags of the last row that holds for `version`."""
    return [flags for least, flags in rows if least <= version][-1]


def version_of(said: str) -> Version:
    """Read the version from trtexec's banner, "[TensorRT v100300]", or from its line "TensorRT version: 10.3.0".

    The number is major * 1000 + minor * 100 + patch up to TensorRT 9, major * 10000 + minor * 100 + patch from 10 on.
    """
    plain = re.search(r"TensorRT version: (\d+)\.(\d+)\.(\d+)", said)
    if plain:
        return tuple(int(part) for part in plain.groups())
    banner = re.search(r"\[TensorRT v(\d+)\]", said)
    if not banner:
        raise SystemExit(f"trtexec does not say its version: {' '.join(said.split())[:200]}")
    number = int(banner[1])
    if number < 10000:
        return (number // 1000, number // 100 % 10, number % 100)
    return (number // 10000, number // 100 % 100, number % 100)


def shown(version: Version) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, version))


def build(version: Version, model: str, engine: str, precision: str, *, sparse: bool, cache: str) -> list[str]:
    """Return the arguments that build an engine from an ONNX file that states its precision.

    `sparse` permits sparse kernels for weights that hold the 2:4 pattern; it is no order (`--sparsity=force` would overwrite
    weights, and is never used).
    """
    return [
        f"--onnx={model}", f"--saveEngine={engine}", *since(TYPED[precision], version), *["--sparsity=enable"] * sparse,
        "--profilingVerbosity=detailed", f"--timingCacheFile={cache}", *since(BUILD_ONLY, version), "--verbose",
    ]  # fmt: skip


def measure(version: Version, engine: str, runs: int, warmup_ms: int, times: str) -> list[str]:
    """Return the arguments that time an engine as a whole, alike in all versions: no copies, spinning, as a CUDA graph."""
    return [*_timed(engine, runs, warmup_ms), *since(QUIET, version), f"--exportTimes={times}"]


def profile(version: Version, engine: str, runs: int, warmup_ms: int, profile: str, layers: str) -> list[str]:
    """Return the arguments that time an engine's layers; without a CUDA graph, which would hide them."""
    exports = [f"--exportProfile={profile}", f"--exportLayerInfo={layers}"]
    return [
        *_timed(engine, runs, warmup_ms),
        *since(SEPARATE, version),
        "--profilingVerbosity=detailed",
        "--dumpProfile",
        *exports,
    ]


def run(version: Version, engine: str, inputs: Mapping[str, str], outputs: str) -> list[str]:
    """Return the arguments that run an engine once on raw input files."""
    files = ",".join(f"{name}:{file}" for name, file in inputs.items())
    return [*_timed(engine, 1, 0), f"--loadInputs={files}", *since(TRANSFERS, version), f"--exportOutput={outputs}"]


def _timed(engine: str, runs: int, warmup_ms: int) -> list[str]:
    return [f"--loadEngine={engine}", f"--warmUp={warmup_ms}", f"--iterations={runs}", "--duration=0", "--avgRuns=1"]
