"""The published contracts catch backends that are wrong in ways that would go unnoticed."""

from dataclasses import replace

import pytest

from deploypipe.backends.base import Profile
from deploypipe.backends.onnxruntime import OnnxRuntime
from deploypipe.targets import load_target
from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase


class Imprecise(OnnxRuntime):
    """Off by half a percent."""

    def read_run(self, result):
        return {name: 1.005 * value for name, value in super().read_run(result).items()}


class Nameless(OnnxRuntime):
    """Does not say which version it measured."""

    def read_description(self, result):
        return {**super().read_description(result), "version": ""}


class Confused(OnnxRuntime):
    """Takes kernels for layers in an order of its own."""

    def read_profile(self, result, models):
        found = super().read_profile(result, models)["m"]
        order = iter(["stem.weight", "heavy.weight", "first.weight", "shortcut.weight", "head.weight"])
        kernels = [replace(kernel, weight=next(order)) if kernel.weight else kernel for kernel in found.kernels]
        return {"m": Profile(tuple(kernels), found.foreign_load)}


class Credulous(OnnxRuntime):
    """Takes any precision for the one that it has."""

    def build_job(self, model, target):
        return super().build_job(model, target.replace(precision="fp32"))


@pytest.mark.parametrize(
    ("wrong", "contract"),
    [
        (Imprecise, "builds_what_torch_computes"),
        (Nameless, "names_runtime_and_version"),
        (Confused, "times_each_layer_once"),
        (Credulous, "refuses_other_precisions"),
    ],
)
def test_a_wrong_backend_is_caught(wrong, contract, tmp_path):
    case = BackendCase(load_target("cpu"), tmp_path)
    case.__dict__["backend"] = wrong()
    with pytest.raises(AssertionError):
        BACKEND_CONTRACTS[contract](case)
