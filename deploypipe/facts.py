"""What is installed, and where this user's files are kept."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "DEPLOYPIPE_CACHE"
_PACKAGES = (
    *("deploypipe", "torch", "torchvision", "numpy", "scipy", "onnx", "onnxscript", "onnxsim", "onnxruntime"),
    *("lightning-fabric", "scikit-learn", "safetensors"),
)
_OPTIONAL = {"timm": "--model timm:NAME"}


def cache_dir() -> Path:
    """Return the folder for what can be made again: profiles, decoded images, logs. It may not exist yet.

    The environment variable DEPLOYPIPE_CACHE overrides the system's place for it.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("deploypipe")


def versions() -> dict[str, str]:
    """Return package -> installed version, of ourselves and of what decides our results."""
    return {name: found for name in _PACKAGES if (found := _version(name))}


def optional() -> dict[str, tuple[str, str]]:
    """Return optional package -> (installed version or "", what it is for)."""
    return {name: (_version(name), purpose) for name, purpose in _OPTIONAL.items()}


def missing() -> tuple[str, ...]:
    """Return the required packages that are not installed."""
    return tuple(name for name in _PACKAGES if not _version(name))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
