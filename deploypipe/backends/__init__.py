"""Runtimes: one file each, registered here by name."""

from pathlib import Path

from deploypipe.backends.base import Backend
from deploypipe.errors import TargetError, UsageError
from deploypipe.plugins import resolve
from deploypipe.targets import Target

BACKENDS: dict[str, str] = {
    "coreml": "deploypipe.backends.coreml:CoreMl",
    "executorch": "deploypipe.backends.executorch:ExecuTorch",
    "ncnn": "deploypipe.backends.ncnn:Ncnn",
    "onnxruntime": "deploypipe.backends.onnxruntime:OnnxRuntime",
    "onnxruntime-binary": "deploypipe.backends.ort_binary:OrtBinary",
    "openvino": "deploypipe.backends.openvino:OpenVino",
    "ort-mobile": "deploypipe.backends.ort_mobile:OrtMobile",
    "tensorrt": "deploypipe.backends.tensorrt:TensorRt",
}
ENTRY_POINTS = "deploypipe.backends"
BY_BINARY = {"onnxruntime": "onnxruntime-binary"}  # backend -> the one that measures the same runtime by a program of its own

ONLY_OF = {"tool": "tensorrt", "binary": "onnxruntime-binary"}  # key of [build] -> the one of ours that reads it


def load_backend(target: Target) -> Backend:
    """Return the backend that `target` names.

    Raises:
        TargetError: There is none of this name, or it is ours and does not know what the target states for it.
    """
    name = target.build.backend
    for key, user in ONLY_OF.items():
        stated = getattr(target.build, key)
        if stated and name in BACKENDS and name != user:
            fix = f'leave it out, or write backend = "{user}"'
            raise TargetError(f"{key} is '{stated}', and {name} uses none", at=f"target {target.name}: build.{key}", fix=fix)
    backend: Backend = resolve(target.build.backend, BACKENDS, ENTRY_POINTS, what="backend", error=TargetError)()
    return backend


def by_binary(target: Target, program: str | Path) -> Target:
    """Return the target as it is measured by a benchmark program of its runtime, pushed there, instead of by Python.

    Raises:
        UsageError: There is no such file.
        TargetError: There is no such way for the target's runtime.
    """
    at = f"--benchmark-binary {program}"
    backend = target.build.backend
    if backend not in {*BY_BINARY, *BY_BINARY.values()}:
        fix = f"leave it out, or name a target whose backend is {' or '.join(BY_BINARY)}, such as android-arm64"
        raise TargetError(f"target {target.name} is measured by {backend}, which has no such program", at=at, fix=fix)
    if not Path(program).expanduser().is_file():
        raise UsageError("there is no such file", at=at, fix="name a build of onnxruntime_perf_test for the device")
    return target.replace(backend=BY_BINARY.get(backend, backend), binary=str(program))
