"""ncnn on the CPU: builds its two files through pnnx and times whole models; the package has no times of single layers."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx

from deploypipe.backends.base import Pricing, Profile
from deploypipe.backends.scripted import Scripted
from deploypipe.errors import BackendError
from deploypipe.export import load_onnx
from deploypipe.job import Job, JobResult
from deploypipe.targets import Target


class Ncnn(Scripted):
    """The PyPI packages `ncnn` and `pnnx`, CPU, fp32, one image at a time.

    The artifact is a zip of `model.param` and `model.bin`; unpacked, any ncnn reads them. Latency is taken with the inputs in
    ncnn's own form and the outputs left in it. Run on x86-64 only: not on a phone.
    """

    name: ClassVar[str] = "ncnn"
    suffix: ClassVar[str] = ".zip"
    script: ClassVar[str] = "ncnn_measure.py"
    pricing: ClassVar[Pricing] = "models"
    times_layers: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("ncnn", "pnnx")

    def told(self, target: Target, push: Mapping[str, Path | bytes]) -> Mapping[str, Any]:
        """Return the shapes of the models' inputs.

        Raises:
            BackendError: A model takes more than one image, or has no fixed shape.
        """
        return {"shapes": shapes({name: source for name, source in push.items() if name.endswith(".onnx")})}

    def profile_job(self, models: Mapping[str, Path | bytes], target: Target) -> Job:
        """Refuse.

        Raises:
            BackendError: Always: the package is built without times of layers.
        """
        fix = "time whole models only: --no-layers"
        raise BackendError("the packages of ncnn give no times of single layers", at=f"target {target.name}", fix=fix)

    def read_profile(self, result: JobResult, models: Mapping[str, Path | bytes]) -> dict[str, Profile]:
        """Return nothing: there is no job whose answer this could be."""
        return {}


def shapes(files: Mapping[str, Path | bytes]) -> dict[str, list[list[int]]]:
    """Return the shapes of the inputs of each ONNX file, batch axis included; a built file states its own.

    Raises:
        BackendError: A model takes more than one image, or has no fixed shape.
        ModelError: A file is no ONNX model.
    """
    found: dict[str, list[list[int]]] = {}
    for name, source in files.items():
        if isinstance(source, bytes) or not zipfile.is_zipfile(source):
            model = onnx.load_from_string(source) if isinstance(source, bytes) else load_onnx(source)
            found[name] = [_shape(value) for value in model.graph.input]
    return found


def _shape(value: Any) -> list[int]:
    sizes = [int(size.dim_value) for size in value.type.tensor_type.shape.dim]
    if not all(sizes) or sizes[0] != 1:
        shown = "x".join(map(str, sizes))
        message = f"ncnn computes one image of a fixed size at a time; input '{value.name}' has the shape {shown}"
        raise BackendError(message, at="ONNX model", fix="let the factory give an example input with a batch of one")
    return sizes
