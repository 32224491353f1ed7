"""Convert exported programs to Core ML: runs alone, with only Python, NumPy, torch and coremltools.

    python3 ct_convert.py request.json      # writes answer.json beside it

It is pushed to the target with `stopwatch.py` beside it, so it imports nothing of deploypipe. Core ML itself runs on Apple's
systems only, so what is converted here is read back, and not run.
"""

import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import stopwatch
import torch

PACKAGE = "model.mlpackage"


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Convert, and read the result back: its interface must be that of the program."""
    # Core ML's converter knows the operations that are left after decomposition only.
    program = torch.export.load(request["model"]).run_decompositions({})
    import coremltools as ct  # noqa: PLC0415 - takes seconds; other tasks, and a damaged file, do not need it

    precision = {"fp16": ct.precision.FLOAT16, "fp32": ct.precision.FLOAT32}[request["precision"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ct.convert(
            program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS16, compute_precision=precision,
        )  # fmt: skip
    made.save(PACKAGE)
    described = ct.models.MLModel(PACKAGE, skip_model_load=True).get_spec().description
    shapes = [list(value.type.multiArrayType.shape) for value in described.input]
    users = program.graph_signature.user_inputs
    wanted = [list(node.meta["val"].shape) for node in program.graph.nodes if node.name in users]
    if shapes != wanted or len(described.output) != len(program.graph_signature.user_outputs):
        raise SystemExit(f"the converted model takes {shapes}, the program {wanted}")
    pack(Path(PACKAGE), request["artifact"])
    shutil.rmtree(PACKAGE)
    return {
        "bytes": Path(request["artifact"]).stat().st_size,
        "notes": ["UNVERIFIED: the Core ML package was converted and read back, but not run; that needs macOS or iOS"],
    }


def pack(folder: Path, artifact: str) -> None:
    """Write a folder into a zip; fixed dates, so that the same files make the same zip."""
    with zipfile.ZipFile(artifact, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            packed.writestr(zipfile.ZipInfo(path.as_posix()), path.read_bytes())


def run(request: dict[str, Any]) -> Any:
    """Run an exported program by torch."""
    loaded: Any = torch.export.load(request["model"])
    call = loaded.module()

    def compute(inputs: dict[str, Any]) -> list[Any]:
        result: list[Any] = torch.utils._pytree.tree_leaves(
            call(*(torch.from_numpy(inputs[name]) for name in stopwatch.in_order(inputs)))
        )
        return [value.detach().numpy() for value in result]

    n = len(loaded.graph_signature.user_outputs)
    names = ["output"] if n == 1 else [f"output_{i}" for i in range(n)]  # as they are called in the exported model
    return stopwatch.run_all(names, compute, request)


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Say which converter this is, and where it runs."""
    from importlib.metadata import version  # noqa: PLC0415 - beside its only use

    return {"runtime": "coreml", "version": f"coremltools {version('coremltools')}", **stopwatch.device(request)}


if __name__ == "__main__":
    stopwatch.answer({"build": build, "run": run, "describe": describe})
