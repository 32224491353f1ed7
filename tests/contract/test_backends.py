"""What every backend must do, whatever it compiles for; rows that are not installed here are skipped with their reason.

For runtimes that are programs of a device, stand-ins take their place: their times and their arithmetic prove nothing, but
jobs, files and answers do.
"""

import os

import perf_standin
import pytest
import trtexec_standin

from deploypipe.backends import BACKENDS, load_backend
from deploypipe.errors import TargetError
from deploypipe.runners import load_runner
from deploypipe.targets import load_target
from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase

CONVERTERS = {"coreml", "executorch", "ort-mobile"}  # they take seconds for the smallest model
ROWS = [pytest.param(name, marks=[pytest.mark.slow] if name in CONVERTERS else []) for name in sorted(BACKENDS)]


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory):
    """TensorRT is 'installed': the version that takes least."""
    folder = tmp_path_factory.mktemp("tensorrt")
    trtexec_standin.install(folder, (8, 6, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("HOME", str(folder))
        yield


@pytest.fixture(scope="module", params=ROWS)
def case(request, tmp_path_factory, tensorrt):
    target = load_target("cpu").replace(backend=request.param)
    if request.param == "onnxruntime-binary":  # the runtime is a program that the user names
        target = target.replace(binary=str(perf_standin.install(tmp_path_factory.mktemp("program"))))
    if request.param == "tensorrt":
        target = target.replace(precision="fp16")
    ready, missing = load_backend(target).available()
    if not ready:
        pytest.skip(f"the optional runtime is not installed: {missing}")
    return BackendCase(target, tmp_path_factory.mktemp("backend"))


@pytest.mark.parametrize("name", BACKEND_CONTRACTS)
def test_backend(case, name):
    BACKEND_CONTRACTS[name](case)


def test_unknown_backends_and_runners_suggest_the_nearest():
    target = load_target("cpu")
    with pytest.raises(TargetError, match="did you mean 'onnxruntime'"):
        load_backend(target.replace(backend="onnxruntme"))
    with pytest.raises(TargetError, match="did you mean 'local'"):
        load_runner(target.replace(via="locl"))
