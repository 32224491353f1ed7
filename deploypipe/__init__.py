"""Prune a trained PyTorch CNN to a measured latency on a device, and prove every step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploypipe.types import Graph as Graph

__version__ = "0.1.0"


_EXPORTS: dict[str, str] = {
    "Graph": "deploypipe.types",
}

__all__ = ["Graph", "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'deploypipe' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)
