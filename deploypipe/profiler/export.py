"""A model as the file that the runtime is given: what its backend compiles from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.backends import load_backend
from deploypipe.export import export_onnx, export_program, simplify_onnx
from deploypipe.targets import Target

Export = Callable[[nn.Module, Any, Target, Path], Path]


def exported(model: nn.Module, example: Any, target: Target, folder: Path) -> Path:
    """Export and, if it is ONNX and the target wants it, simplify `model`; return the file in `folder`."""
    if load_backend(target).source == "program":
        return export_program(model, example, folder / "model.pt2")
    path = export_onnx(model, example, folder / "model.onnx", target.build.opset).path
    return simplify_onnx(path, folder / "simple.onnx").path if target.build.simplify else path
