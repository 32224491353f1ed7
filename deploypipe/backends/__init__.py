"""Runtimes: one file each, registered here by name."""

from deploypipe.backends.base import Backend
from deploypipe.errors import TargetError
from deploypipe.plugins import resolve
from deploypipe.targets import Target

BACKENDS: dict[str, str] = {
    "coreml": "deploypipe.backends.coreml:CoreMl",
    "executorch": "deploypipe.backends.executorch:ExecuTorch",
    "ncnn": "deploypipe.backends.ncnn:Ncnn",
    "onnxruntime": "deploypipe.backends.onnxruntime:OnnxRuntime",
    "openvino": "deploypipe.backends.openvino:OpenVino",
    "ort-mobile": "deploypipe.backends.ort_mobile:OrtMobile",
    "tensorrt": "deploypipe.backends.tensorrt:TensorRt",
}
ENTRY_POINTS = "deploypipe.backends"


def load_backend(target: Target) -> Backend:
    """Return the backend that `target` names.

    Raises:
        TargetError: There is none of this name.
    """
    backend: Backend = resolve(target.build.backend, BACKENDS, ENTRY_POINTS, what="backend", error=TargetError)()
    return backend
