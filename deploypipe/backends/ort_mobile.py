"""ONNX Runtime for phones and boards: builds `.ort` files, which its mobile and minimal builds read without an optimiser."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx

from deploypipe.backends.base import Profile
from deploypipe.backends.onnxruntime import OnnxRuntime, kernels
from deploypipe.backends.scripted import answer
from deploypipe.errors import TargetError, nearest
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target

# Architecture, as `device.arch` and operating systems call it -> what the converter calls it.
PLATFORMS = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "AMD64": "amd64",
    "aarch64": "arm",
    "arm64": "arm",
    "armv7l": "arm",
    "arm": "arm",
}


class OrtMobile(OnnxRuntime):
    """The PyPI package `onnxruntime` and its `.ort` format, CPU provider, fp32.

    Files are optimised for the architecture that the target states (`device.arch`); "native" is that of this machine. Measured
    with the runtime's whole build: its mobile builds have not been run.
    """

    name: ClassVar[str] = "ort-mobile"
    suffix: ClassVar[str] = ".ort"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def told(self, target: Target, push: Mapping[str, Path | bytes]) -> Mapping[str, Any]:
        """Return the platform.

        Raises:
            TargetError: There is no such architecture.
        """
        return {"platform": platform_of(target)}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Time kernels. The optimised graph cannot be asked for: it lies in the `.ort` file, which `onnx` does not read."""
        return self.timed_kernels(models, {}, target)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return name -> kernels; for a built file nothing says which layers they are."""
        found = answer(result)
        profiles = {}
        for name, source in models.items():
            content = source if isinstance(source, bytes) else source.read_bytes()
            model = onnx.ModelProto() if content[4:8] == b"ORTM" else onnx.load_from_string(content)
            profiles[name] = Profile(kernels(found["models"][name], model), found["foreign_load"])
        return profiles


def platform_of(target: Target) -> str:
    """Return the converter's word for the target's architecture.

    Raises:
        TargetError: It has none.
    """
    arch = platform.machine() if target.device.arch == "native" else target.device.arch
    if arch not in PLATFORMS:
        at = f"{target.path or target.name}: device.arch"
        raise TargetError(f"the .ort format knows no architecture '{arch}'", at=at, fix=nearest(arch, PLATFORMS))
    return PLATFORMS[arch]
