import importlib.util
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploypipe.backends import stopwatch
from deploypipe.backends.openvino import OpenVino, kernels
from deploypipe.errors import BackendError, TargetError
from deploypipe.export import export_onnx
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND = OpenVino()
installed = pytest.mark.skipif(not BACKEND.available()[0], reason="an optional runtime: pip install openvino")

# Two convolutions that meet in a sum, squeeze and excitation behind it, a linear layer whose node has no name.
EXPORTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1, 3, 8, 8] x) => (float[1, 4] output)
<float[8, 3, 3, 3] stem_weight = {0}, float[8] bias = {0}, float[8, 3, 1, 1] skip_weight = {0},
 float[8, 8, 1, 1] excite_weight = {0}, int64[2] axes = {2, 3}, float[4, 8] head_weight = {0}, float[4] head_bias = {0}>
{
  [node_Conv_1] a = Conv <pads = [1, 1, 1, 1]> (x, stem_weight, bias)
  [node_conv2d_2] b = Conv (x, skip_weight)
  [node_add] c = Add (a, b)
  [node_relu] d = Relu (c)
  [node_mean] e = ReduceMean (d, axes)
  [node_conv2d_3] f = Conv (e, excite_weight)
  [node_mul] h = Mul (d, f)
  i = ReduceMean <keepdims = 0> (h, axes)
  output = Gemm <transB = 1> (i, head_weight, head_bias)
}
"""
# What OpenVINO 2026.4 makes of it.
FOUND = {
    "graph": {
        "x": [["x"], []],
        "x_abcd_acdb_node_Conv_1": [[], ["x"]],
        "stem_weight": [["stem_weight"], []],
        "node_Conv_1": [["node_Conv_1"], ["x_abcd_acdb_node_Conv_1", "stem_weight"]],
        "node_conv2d_2/WithoutBiases": [
            ["node_conv2d_2/WithoutBiases", "node_add", "node_relu"],
            ["x_abcd_acdb_node_Conv_1", "node_Conv_1"],
        ],
        "node_mean": [["node_mean"], ["node_conv2d_2/WithoutBiases"]],
        "node_conv2d_3/WithoutBiases": [["node_conv2d_3/WithoutBiases"], ["node_mean"]],
        "node_mul": [["node_mul"], ["node_conv2d_2/WithoutBiases", "node_conv2d_3/WithoutBiases"]],
        "i": [["i"], ["node_mul"]],
        "output": [["output"], ["i"]],
    },
    "kernels": [
        ["x_abcd_acdb_node_Conv_1", "Reorder", 1.0, 0.9, 1.1, 102],
        ["node_Conv_1", "Convolution", 9.0, 8.0, 10.0, 102],
        ["node_conv2d_2/WithoutBiases", "Convolution", 3.0, 2.0, 4.0, 102],
        ["node_mean", "ReduceMean", 1.0, 0.9, 1.1, 102],
        ["node_conv2d_3/WithoutBiases", "Convolution", 1.0, 0.9, 1.1, 102],
        ["node_mul", "Subgraph", 1.0, 0.9, 1.1, 102],
        ["i", "ReduceMean", 1.0, 0.9, 1.1, 102],
        ["output", "FullyConnected", 2.0, 1.0, 3.0, 102],
    ],
}


def test_kernels_are_called_after_the_layers_that_they_compute():
    found = {kernel.name: kernel.weight for kernel in kernels(FOUND, onnx.parser.parse_model(EXPORTED)) if kernel.weight}
    assert found == {
        "node_Conv_1": "stem_weight",
        "node_conv2d_2/WithoutBiases": "skip_weight",
        "node_conv2d_3/WithoutBiases": "excite_weight",
        "output": "head_weight",
    }


def test_other_kernels_know_the_nearest_layers_before_them():
    rest = {kernel.name: set(kernel.feeds) for kernel in kernels(FOUND, onnx.parser.parse_model(EXPORTED)) if not kernel.weight}
    assert rest == {
        "x_abcd_acdb_node_Conv_1": set(),
        "node_mean": {"skip_weight"},
        "node_mul": {"skip_weight", "excite_weight"},
        "i": {"skip_weight", "excite_weight"},
    }


def test_times_are_read_as_they_are():
    kernel = kernels(FOUND, onnx.parser.parse_model(EXPORTED))[1]
    assert (kernel.op, kernel.median_us, kernel.p10_us, kernel.p90_us, kernel.runs) == ("Convolution", 9.0, 8.0, 10.0, 102)


def test_an_unknown_precision_is_refused_before_any_job(tmp_path):
    with pytest.raises(TargetError, match=r"backend openvino has no precision 'fp23'[\s\S]*fp32"):
        BACKEND.build_job(tmp_path / "m.onnx", load_target("cpu-openvino").replace(precision="fp23"))


@pytest.fixture
def script(monkeypatch):
    """The measuring script, as it is imported on a target."""
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "stopwatch", stopwatch)
    spec = importlib.util.spec_from_file_location("ov_measure", Path(stopwatch.__file__).with_name(BACKEND.script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def averages(times):
    """What the runtime's counters say after each run: whole microseconds of a running average of whole microseconds."""
    sums = np.cumsum([int(time) for time in times])
    return [int(total // n) for n, total in enumerate(sums, start=1)]


@pytest.mark.parametrize("steady", [0.3, 1.4, 3.6, 12.5, 845.2])
@pytest.mark.parametrize("warm_up", [[], [160.0, 20.0], [9000.0, 900.0, 60.0]])
def test_a_steady_time_is_recovered_from_running_averages(script, steady, warm_up):
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, 30)
    times = [*warm_up, *np.maximum(0.0, steady + jitter)]
    assert script.steady(averages(times)) == pytest.approx(steady, abs=1.0)


def test_a_kernel_that_the_counters_never_saw_counts_half_a_microsecond(script):
    assert script.steady([0] * 20) == 0.5


def test_a_compilation_that_runs_slower_than_others_does_not_count(script):
    quick, alike, slow = ({("a", "Conv"): us, ("b", "Conv"): 100.0} for us in (100.0, 105.0, 220.0))
    assert script.alike([slow, quick, alike, slow]) == [quick, alike]


@pytest.fixture(scope="module")
def target():
    return load_target("cpu-openvino").replace(runs=20, warmup=2)


def run(job, folder):
    return Local(Reach()).run(job, folder)


@installed
def test_the_artefact_is_a_zip_of_the_intermediate_representation_in_fp32(target, tmp_path):
    model = export_onnx(nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx").path
    first, second = (
        run(BACKEND.build_job(model, target), tmp_path / name).pulled["artifact.zip"] for name in ("first", "second")
    )
    with zipfile.ZipFile(first) as packed:
        assert packed.namelist() == ["model.xml", "model.bin"]
        assert len(packed.read("model.bin")) >= 4 * (8 * 3 * 3 * 3 + 8), "four bytes a weight"
    assert first.read_bytes() == second.read_bytes()
    assert BACKEND.read_bench(run(BACKEND.bench_job({"built": first}, target), tmp_path))["built"].median_us > 0


@installed
def test_an_input_without_fixed_shape_is_refused(target, tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }'
    )
    with pytest.raises(BackendError, match="input 'x' has no fixed shape"):
        run(BACKEND.bench_job({"m": model.SerializeToString()}, target), tmp_path)


@installed
def test_a_model_that_it_cannot_read_is_explained(target, tmp_path):
    with pytest.raises(BackendError, match=r"OpenVINO cannot read 'model-0\.onnx'"):
        run(BACKEND.bench_job({"m": b"no model"}, target), tmp_path)


@installed
def test_description_holds_what_tells_measurements_apart(target, tmp_path):
    facts = BACKEND.read_description(run(BACKEND.describe_job(target.replace(threads=2)), tmp_path))
    assert facts["runtime"] == "openvino"
    assert facts["threads"] == 2
    assert facts["version"].count(".") == 2
    assert {"cpu", "cpu_flags", "arch", "cores", "governor", "python"} <= set(facts)
