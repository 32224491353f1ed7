"""A model as the file that the runtime is timed with: what a build would give it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.targets import Target

Export = Callable[[nn.Module, Any, Target, Path], Path]


def exported(model: nn.Module, example: Any, target: Target, folder: Path) -> Path:
    """Export and, if the target wants it, simplify `model`; return the ONNX file in `folder`."""
    path = export_onnx(model, example, folder / "model.onnx", target.build.opset).path
    return simplify_onnx(path, folder / "simple.onnx").path if target.build.simplify else path
