"""Torch to ONNX in one file, and its simplification; nothing half-written ever appears under the final name."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deploypipe.errors import ModelError, UsageError
from deploypipe.exporter import functions_read_once, quiet, root_cause, telling_lines
from deploypipe.graph.outputs import copied

OLDEST_OPSET = 18  # below it the exporter logs a failed down-conversion and silently writes 18


@dataclass(frozen=True)
class Exported:
    """A written ONNX file: its inputs and outputs in the order of the model's own."""

    path: Path
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    n_nodes: int


@dataclass(frozen=True)
class Simplified:
    """What simplification did; if not `ok`, `path` holds the unchanged model and `reason` says why."""

    path: Path
    ok: bool
    reason: str
    n_nodes_before: int
    n_nodes_after: int


def export_onnx(model: nn.Module, example: Any, path: str | Path, opset: int = 20) -> Exported:
    """Write `model` in evaluation mode as one self-contained ONNX file with a fixed batch size.

    Weights keep their torch parameter names as initializer names, also where ONNX needs them transposed. Inputs are called
    `input` (or `input_0`, `input_1`, ...), outputs `output` (or `output_0`, ... in the order in which the model's result
    flattens).

    Args:
        model: Its mode and parameters are left as they were.
        example: A tensor, or the tuple of the model's positional arguments.
        path: Where the file goes; replaced at once when it is complete.
        opset: ONNX operator set, 18 or later.

    Raises:
        UsageError: The operator set is too old, or one that is not known yet.
        ModelError: The model cannot be exported; names the cause.
    """
    path = Path(path)
    check_opset(opset, f"export of {path.name}")
    args = tuple(example) if isinstance(example, tuple | list) else (example,)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _evaluating(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        temporary = Path(folder) / "model.onnx"
        with torch.no_grad():
            outputs = _numbered("output", _n_tensors(model(*copied(args))))
        inputs = _numbered("input", _n_tensors(args))
        _export(model, copied(args), temporary, opset, inputs, outputs)
        written = _read_back(temporary, opset)
        if _name_weights(written, dict(model.named_parameters())):
            onnx.save(written, str(temporary))
        temporary.replace(path)
    graph = written.graph
    return Exported(path, opset, tuple(i.name for i in graph.input), tuple(o.name for o in graph.output), len(graph.node))


def check_opset(opset: int, at: str) -> None:
    """Refuse an operator set that cannot be exported; `at` says where it was asked for.

    Raises:
        UsageError: It is too old, or one that the installed ONNX does not know yet.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        fix = f"use opset {OLDEST_OPSET} or later, up to {newest}"
        raise UsageError(f"torch cannot export operator set {opset}", at=at, fix=fix)


def export_program(model: nn.Module, example: Any, path: str | Path) -> Path:
    """Write `model` in evaluation mode as what `torch.export` makes of it, with a fixed batch size.

    The file (.pt2) holds the program as JSON and the weights as they are.

    Raises:
        ModelError: The model cannot be exported; names the cause.
    """
    path = Path(path)
    args = tuple(example) if isinstance(example, tuple | list) else (example,)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _evaluating(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, quiet():
        temporary = Path(folder) / "model.pt2"
        try:
            with torch.no_grad():
                torch.export.save(torch.export.export(model, copied(args)), temporary)
        except Exception as error:
            raise _refused("as a program", f"torch.export of {type(model).__name__}", error) from error
        return temporary.replace(path)


def simplify_onnx(src: str | Path, dst: str | Path) -> Simplified:
    """Simplify an ONNX file; if that fails, `dst` is a copy of `src` and the reason is returned.

    Raises:
        ModelError: `src` is no ONNX file.
    """
    src, dst = Path(src), Path(dst)
    model = load_onnx(src)
    before = len(model.graph.node)
    temporary = dst.with_name(dst.name + ".tmp")
    try:
        simplified = _simplified(model)
    except Exception as error:  # noqa: BLE001, RUF100 - the simplifier is optional: whatever stops it is reported, not raised
        shutil.copyfile(src, temporary)
        temporary.replace(dst)
        reason = error.message if isinstance(error, ModelError) else telling_lines(str(error)) or type(error).__name__
        return Simplified(dst, False, reason, before, before)
    onnx.save(simplified, str(temporary))
    temporary.replace(dst)
    return Simplified(dst, True, "", before, len(simplified.graph.node))


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        return onnx.load(str(path))
    except Exception as error:
        raise ModelError(f"cannot read ONNX model: {error}", at=str(path), fix="export the model again") from error


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim  # noqa: PLC0415 - a native module that may be absent: then simplification is skipped with that reason

    with quiet():
        simplified, same = onnxsim.simplify(model, check_n=0)
    names = [[value.name for value in part] for part in (model.graph.input, model.graph.output)]
    if names != [[value.name for value in part] for part in (simplified.graph.input, simplified.graph.output)]:
        raise ModelError("the simplifier changed the model's inputs or outputs")
    if not same:
        raise ModelError("the simplifier's own check failed")
    onnx.checker.check_model(simplified)
    result: onnx.ModelProto = simplified
    return result


def _export(model: nn.Module, args: tuple[Any, ...], path: Path, opset: int, inputs: list[str], outputs: list[str]) -> None:
    said = io.StringIO()
    try:
        with quiet(said), functions_read_once():
            torch.onnx.export(
                model, args, str(path), dynamo=True, external_data=False, opset_version=opset, verbose=False,
                input_names=inputs, output_names=outputs,
            )  # fmt: skip
    except Exception as error:
        raise _refused("to ONNX", f"torch.onnx.export of {type(model).__name__}, operator set {opset}", error) from error
    if not path.is_file():
        raise ModelError(f"the exporter wrote nothing: {telling_lines(said.getvalue())}", at=type(model).__name__)


def _refused(how: str, at: str, error: Exception) -> ModelError:
    cause = root_cause(error)
    return ModelError(
        f"the model cannot be exported {how}: {telling_lines(str(cause) or type(cause).__name__)}",
        at=at,
        fix="rewrite that part of forward with operations that torch.export follows (no branch on tensor values)",
    )


def _read_back(path: Path, opset: int) -> onnx.ModelProto:
    """Load what was written and refuse another operator set than the one asked for."""
    model = load_onnx(path)
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if written != opset:
        raise ModelError(
            f"asked for operator set {opset}, the exporter wrote {written}",
            at="torch.onnx.export",
            fix=f"set opset = {written} in the target, or use another torch version",
        )
    return model


def _name_weights(model: onnx.ModelProto, parameters: dict[str, Tensor]) -> int:
    """Give transposed weights of matrix products their parameters' names back; return how many there were.

    The exporter folds the transposition of a linear layer on more than two axes into a nameless constant.
    """
    nameless = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in parameters}
    used = {tensor.name for tensor in model.graph.initializer} - set(nameless)
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        tensor = nameless.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None or tensor.name in renamed or len(tensor.dims) != 2:
            continue
        free = {
            name: value for name, value in parameters.items() if name not in used and value.shape == tuple(tensor.dims)[::-1]
        }
        value = numpy_helper.to_array(tensor).T
        found = next((name for name, weight in free.items() if np.array_equal(weight.detach().cpu().numpy(), value)), None)
        if found:
            renamed[tensor.name] = found
            used.add(found)
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    return len(renamed)


def _n_tensors(value: Any) -> int:
    return sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _numbered(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
