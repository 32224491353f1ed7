"""What is installed, which backends can work here, and where files are kept."""

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deploypipe.backends import BACKENDS, ENTRY_POINTS
from deploypipe.errors import TargetError
from deploypipe.plugins import known, resolve
from deploypipe.targets import cache_folder, data_folder

_PACKAGES = {
    "deploypipe": "this program",
    "torch": "models, tracing, training",
    "torchvision": "--model torchvision:NAME, images",
    "numpy": "tables, statistics",
    "scipy": "the allocator",
    "scikit-learn": "--data demo",
    "safetensors": "weights",
    "lightning-fabric": "fine-tuning",
    "onnx": "export",
    "onnxscript": "export",
    "onnxsim": "simplification",
    "onnxruntime": "target cpu",
    "openvino": "target cpu-openvino (optional)",
    "executorch": "target executorch (optional)",
    "torchao": "target executorch (optional)",
    "ncnn": "target ncnn (optional)",
    "pnnx": "target ncnn (optional)",
    "coremltools": "target ios (optional)",
    "timm": "--model timm:NAME (optional)",
}
MISSING = "missing"


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can work on this machine, and else what is missing."""

    name: str
    ready: bool
    reason: str


@dataclass(frozen=True)
class Diagnosis:
    """What `deploypipe doctor` shows; `packages` are (name, version or "missing", what it is for)."""

    packages: tuple[tuple[str, str, str], ...]
    backends: tuple[BackendState, ...]
    cache: str
    data: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Return package -> installed version, of ourselves and of what decides our results."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def diagnose() -> Diagnosis:
    """Look at this machine."""
    packages = tuple((name, _version(name) or MISSING, purpose) for name, purpose in _PACKAGES.items())
    states = tuple(_backend(name) for name in sorted(known(BACKENDS, ENTRY_POINTS)))
    return Diagnosis(packages, states, str(cache_folder()), str(data_folder()))


def _backend(name: str) -> BackendState:
    try:
        ready, reason = resolve(name, BACKENDS, ENTRY_POINTS, what="backend", error=TargetError)().available()
    except (ImportError, TargetError) as error:
        return BackendState(name, False, str(error))
    return BackendState(name, ready, reason)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
