# ruff: noqa: E501
"""TensorRT without TensorRT: flags by version, formats, and every job carried out by the stand-in for trtexec."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_standin
import torch
import trtexec_standin
from ssh_server import SSHD, SshServer
from torch import nn

from deploypipe.backends import trt_answers, trt_flags
from deploypipe.backends.base import Timing
from deploypipe.backends.tensorrt import TensorRt, joined
from deploypipe.backends.trt_layers import kernels
from deploypipe.checkup import examine, verdict
from deploypipe.device import facts_of
from deploypipe.errors import BackendError, TargetError
from deploypipe.export import export_onnx
from deploypipe.job import JobResult
from deploypipe.latency.files import Shape
from deploypipe.profiler.bench import opened
from deploypipe.profiler.probe import Probe
from deploypipe.runners import load_runner
from deploypipe.runners.describe import Machine
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND = TensorRt()
VERSIONS = [(8, 6, 1), (10, 3, 0), (11, 1, 0)]
INPUT = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

# From tools/experimental/trt-engine-explorer/.../resnet/A100/fp16/resnet.onnx.engine.profile.json (NVIDIA/TensorRT), abridged.
PROFILE = """[
  { "count" : 1 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to Conv_0 + Relu_1", "timeMs" : 0.080896, "averageMs" : 0.080896, "medianMs" : 0.080896, "percentage" : 7.95569 }
, { "name" : "Conv_0 + Relu_1", "timeMs" : 0.111616, "averageMs" : 0.111616, "medianMs" : 0.111616, "percentage" : 10.9768 }
, { "name" : "MaxPool_2", "timeMs" : 0.062464, "averageMs" : 0.062464, "medianMs" : 0.062464, "percentage" : 6.143 }
, { "name" : "Conv_5 + Add_6 + Relu_7", "timeMs" : 0.053248, "averageMs" : 0.053248, "medianMs" : 0.053248, "percentage" : 5.23666 }
, { "name" : "Reformatting CopyNode for Output Tensor 0 to reshape_after_Gemm_48", "timeMs" : 0.007168, "averageMs" : 0.007168, "medianMs" : 0.007168, "percentage" : 0.704934 }
]
"""
# From resnet.onnx.engine.graph.json of the same folder, abridged; "Metadata" as TensorRT 8.6 and later add it (two ONNX nodes, the
# separator is the control character 0x1e: NVIDIA's developer guide, "Layer metadata").
LAYERS = """{"Layers": [{
  "Name": "Conv_0 + Relu_1",
  "LayerType": "CaskConvolution",
  "Inputs": [{"Name": "input.1", "Location": "Device", "Dimensions": [32,3,224,224], "Format/Datatype": "Row major linear FP32"}],
  "Outputs": [],
  "ParameterType": "Convolution",
  "HasSparseWeights": 0,
  "TacticName": "trt_turing_cutlass_image_network_first_layer_hmma_fprop_f16f16f32_nhwc_nhwc_k64r7s7c4_stride2x2",
  "Metadata": "[ONNX Layer: Conv_0]\\u001e[ONNX Layer: Relu_1]"
},
"a name alone, without detailed verbosity"],
"Bindings": ["input.1"]
}
"""
# From a report on a Jetson Orin (verbose builder), with an earlier pass in front.
SPARSITY = """[V] [TRT] (Sparsity) Found 12 layer(s) eligible to use sparse tactics
[V] [TRT] (Sparsity) Chose 3 layer(s) using sparse tactics
[V] [TRT] (Sparsity) Found 39 layer(s) eligible to use sparse tactics
[V] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics
"""
# As printed by printEpilog and the device section of trtexec 8.6 and 10.3.
DEVICE = """&&&& RUNNING TensorRT.trtexec [TensorRT v8603] # /usr/src/tensorrt/bin/trtexec --onnx=model.onnx
[03/28/2024-07:10:12] [I] === Device Information ===
[03/28/2024-07:10:12] [I] Selected Device: NVIDIA GeForce RTX 2080
[03/28/2024-07:10:12] [I] Compute Capability: 7.5
[03/28/2024-07:10:12] [I] SMs: 46
"""


# ---- flags


@pytest.mark.parametrize(
    ("banner", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help", (8, 5, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8603] # trtexec", (8, 6, 3)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b30] # trtexec", (10, 3, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101600] # trtexec", (10, 16, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110401] # trtexec", (11, 4, 1)),
        ("[I] TensorRT version: 10.13.3", (10, 13, 3)),
    ],
)
def test_the_version_is_read_from_what_trtexec_says(banner, version):
    assert trt_flags.version_of(banner) == version


def test_a_program_that_is_no_trtexec_is_refused():
    with pytest.raises(SystemExit, match="does not say its version: usage: something else"):
        trt_flags.version_of("usage: something else")


def asked(version, precision="fp16"):
    return trt_flags.build(version, "m.onnx", "m.plan", precision, sparse=True, cache="t.cache")


def test_arguments_of_a_build_by_version():
    always = ["--onnx=m.onnx", "--saveEngine=m.plan"]
    kept = ["--sparsity=enable", "--profilingVerbosity=detailed", "--timingCacheFile=t.cache"]
    assert asked((8, 5, 2)) == [*always, "--fp16", *kept, "--buildOnly", "--verbose"]
    assert asked((8, 6, 1)) == [*always, "--fp16", *kept, "--skipInference", "--verbose"]
    assert asked((10, 3, 0)) == [*always, "--stronglyTyped", *kept, "--skipInference", "--verbose"]
    assert asked((11, 1, 0)) == [*always, *kept, "--skipInference", "--verbose"]
    assert "--fp16" not in asked((8, 6, 1), "fp32")


def test_arguments_of_a_measurement_are_alike_in_effect():
    old, new = (trt_flags.measure(version, "m.plan", 100, 500, "t.json") for version in ((10, 3, 0), (11, 1, 0)))
    assert set(old) - set(new) == {"--useSpinWait", "--noDataTransfers", "--useCudaGraph"}, "what 11 does without being asked"
    assert set(new) < set(old)
    assert "--useCudaGraph" not in trt_flags.profile((10, 3, 0), "m.plan", 9, 9, "p", "l"), "a graph would hide the layers"
    assert "--includeDataTransfers" in trt_flags.run((11, 1, 0), "m.plan", {"x": "x.bin"}, "o.json")


def test_no_version_is_given_a_flag_that_it_refuses():
    for version in VERSIONS:
        for arguments in (
            asked(version), asked(version, "fp32"), trt_flags.measure(version, "m", 1, 1, "t"),
            trt_flags.profile(version, "m", 1, 1, "p", "l"), trt_flags.run(version, "m", {"x": "f"}, "o"),
        ):  # fmt: skip
            trtexec_standin.parsed(arguments, version)
    with pytest.raises(trtexec_standin.Refused, match="Unknown option: --fp16"):
        trtexec_standin.parsed(asked((8, 6, 1)), (11, 1, 0))
    with pytest.raises(trtexec_standin.Refused, match="Unknown option: --stronglyTyped"):
        trtexec_standin.parsed(asked((10, 3, 0)), (8, 6, 1))


def test_the_commands_for_people_are_those_that_each_version_takes(path, tmp_path, monkeypatch):
    """As typed: accepted by the stand-in of each version, and by one of them carried out."""
    monkeypatch.chdir(tmp_path)
    Path("dense.onnx").write_bytes(BACKEND.stated(path, load_target("jetson")))
    text = BACKEND.by_hand({"dense": "dense.onnx"}, load_target("jetson"))
    blocks = dict(re.findall(r"^TensorRT ([\d.]+)[^\n]*:\n\n```\n(.*?)^```", text, re.M | re.S))
    versions = {"8.4": (8, 5, 2), "8.6": (8, 6, 2), "10": (10, 3, 0), "11": (11, 1, 0)}
    assert blocks.keys() == versions.keys()
    for name, version in versions.items():
        lines = [shlex.split(line) for line in blocks[name].splitlines()]
        assert [line[0] for line in lines] == ["trtexec"] * 3
        for _, *arguments in lines:
            trtexec_standin.parsed(arguments, version)
    program = trtexec_standin.install(tmp_path / "bin", versions["8.4"])
    for _, *arguments in (shlex.split(line) for line in blocks["8.4"].splitlines()):
        assert subprocess.run([program, *arguments], check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert trt_answers.run_times("dense-times.json", 200)
    assert trt_answers.layer_times("dense-profile.json")
    assert trt_answers.layer_nodes(json.loads(Path("dense-layers.json").read_text()))


# ---- formats


def test_a_profile_is_read_by_medians(tmp_path: Path):
    (tmp_path / "p.json").write_text(PROFILE)
    rows = trt_answers.layer_times(str(tmp_path / "p.json"))
    assert rows[1] == ["Conv_0 + Relu_1", pytest.approx(111.616), 1]
    assert len(rows) == 5
    (tmp_path / "old.json").write_text(
        '[\n  { "count" : 625 }\n, { "name" : "Conv_8", "timeMs" : 0, "averageMs" : 0.0627963, "percentage" : 2.2 }\n]'
    )
    assert trt_answers.layer_times(str(tmp_path / "old.json")) == [["Conv_8", pytest.approx(62.7963), 625]], "8.2 has no median"


def test_the_engine_s_own_description_names_onnx_nodes():
    assert trt_answers.layer_nodes(json.loads(LAYERS)) == {"Conv_0 + Relu_1": ["Conv_0", "Relu_1"]}


def test_the_last_word_on_sparsity_counts():
    assert trt_answers.sparsity_of(SPARSITY) == {"sparse_found": 39, "sparse_chose": 0}
    assert trt_answers.sparsity_of("nothing of the kind") == {}
    older = """[V] [TRT] (Sparsity) Layers eligible for sparse math: Conv_0 + Relu_1, Conv_2, Gemm_9
[V] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: """
    assert trt_answers.sparsity_of(older) == {"sparse_found": 3, "sparse_chose": 0}


@pytest.mark.parametrize("tool", ["/opt/TensorRT/bin/trtexec", "~/no/trtexec"])
def test_a_program_that_the_target_names_and_that_is_not_there_is_replaced_by_no_other(tmp_path: Path, tool: str):
    trtexec_standin.install(tmp_path, (10, 3, 0))
    code = f"import trt_measure; trt_measure.way_of({{'tool': {tool!r}}})"
    folder = Path(trt_answers.__file__).parent
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no program" in done.stderr
    assert "[build] tool" in done.stderr


def test_outputs_are_in_the_model_s_order_whatever_the_program_s(tmp_path: Path):
    names = ["output_10", "output_2", "output_0"]
    rows = [{name: {"shape": [1], "values": [float(name[7:])]} for name in names}]
    (tmp_path / "answer.json").write_text(json.dumps({"outputs": rows}))
    found = TensorRt().read_run(JobResult(0, "", "", {"answer.json": tmp_path / "answer.json"}, 0.0))
    assert [*found] == ["output_0", "output_2", "output_10"]


def test_the_device_is_read_from_the_log():
    assert trt_answers.device_of(DEVICE) == {"gpu": "NVIDIA GeForce RTX 2080", "capability": "7.5"}


def test_warm_up_runs_in_front_do_not_count(tmp_path: Path):
    trtexec_standin.export_times(tmp_path / "t.json", [9.9, 9.9, 0.5, 0.25])
    assert trt_answers.run_times(str(tmp_path / "t.json"), 2) == [500.0, 250.0]


def test_what_went_wrong_is_told_by_the_lines_that_say_error():
    assert trt_answers.last("a\n[E] Unknown option: --fp16\nusage ...\n&&&& FAILED x") == "[E] Unknown option: --fp16"


def test_layers_side_by_side_in_one_engine_are_told_apart():
    rows = [
        ["m0__a + m0__b", 2.0, 1.0, 3.0, 9],
        ["PWN(m1__c)", 4.0, 4.0, 4.0, 9],
        ["__myl_x", 6.0, 6.0, 6.0, 9],
        ["copy", 9.0, 9, 9, 9],
    ]
    found = trt_answers.by_part(rows, {"__myl_x": ["m0__d", "m1__d"]}, 2)
    assert found == [[5.0, 4.0, 6.0], [7.0, 7.0, 7.0]]


# ---- which layer is which

EXPORTED = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1, 3, 8, 8] x) => (float[1, 4] output)
<float[8, 3, 3, 3] stem_weight = {0}, float[8, 8, 1, 1] left_weight = {0}, float[24, 8, 1, 1] right_weight = {0},
 float[4, 32] head_weight = {0}, float[4] head_bias = {0}, int64[2] axes = {2, 3}>
{
  [stem] a = Conv <pads = [1, 1, 1, 1]> (x, stem_weight)
  [relu] b = Relu (a)
  [left] c = Conv (b, left_weight)
  [right] d = Conv (b, right_weight)
  [cat] e = Concat <axis = 1> (c, d)
  [sigmoid] f = Sigmoid (e)
  [mul] h = Mul (e, f)
  [mean] i = ReduceMean <keepdims = 0> (h, axes)
  [head] output = Gemm <transB = 1> (i, head_weight, head_bias)
}
"""


def attributed(*names, nodes=None):
    rows = [[name, 8.0, 7.0, 9.0, 30] for name in names]
    return kernels({"rows": rows, "nodes": nodes or {}}, onnx.parser.parse_model(EXPORTED))


def test_a_fused_layer_is_called_after_the_weight_in_it():
    found = attributed("stem + relu", "head")
    assert [(kernel.weight, kernel.op, kernel.median_us) for kernel in found] == [
        ("stem_weight", "Conv", 8.0),
        ("head_weight", "Gemm", 8.0),
    ]


def test_layers_merged_side_by_side_share_their_time_by_weights():
    found = attributed("left || right")
    assert [(kernel.weight, kernel.median_us) for kernel in found] == [("left_weight", 2.0), ("right_weight", 6.0)]


def test_copies_and_pointwise_layers_are_overhead_that_follows_the_layers_before_them():
    copy, point, mean = attributed(
        "Reformatting CopyNode for Input Tensor 0 to left || right", "PWN(PWN(sigmoid), mul)", "mean"
    )
    assert (copy.weight, copy.op, copy.feeds) == ("", "Reformat", ("stem_weight",))
    assert (point.weight, set(point.feeds)) == ("", {"left_weight", "right_weight"})
    assert set(mean.feeds) == {"left_weight", "right_weight"}


def test_a_region_without_telling_name_is_told_by_the_engine_s_description():
    (found,) = attributed("{ForeignNode[x...y]}", nodes={"{ForeignNode[x...y]}": ["mean", "head"]})
    assert found.weight == "head_weight"


def test_an_engine_without_its_model_is_not_attributed():
    (found,) = kernels({"rows": [["stem + relu", 1.0, 1.0, 1.0, 1]], "nodes": {}}, None)
    assert (found.name, found.weight) == ("stem + relu", "")


# ---- jobs, carried out by the stand-in


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)).eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return export_onnx(model, INPUT, tmp_path_factory.mktemp("model") / "model.onnx").path


@pytest.fixture(params=VERSIONS, ids=lambda version: ".".join(map(str, version)))
def device(request, tmp_path, monkeypatch):
    """A target whose trtexec is the stand-in of one version, and a function that carries a job out."""
    trtexec_standin.install(tmp_path / "bin", request.param)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16", runs=2, warmup=1)
    return target, lambda job: Local(Reach()).run(job, tmp_path / "out")


@pytest.fixture
def ten(tmp_path, monkeypatch):
    trtexec_standin.install(tmp_path / "bin", (10, 3, 0))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16", runs=2, warmup=1)
    return target, lambda job: Local(Reach()).run(job, tmp_path / "out")


def test_the_device_says_who_it_is_and_that_it_can_build(device):
    target, run = device
    facts = BACKEND.read_description(run(BACKEND.describe_job(target)))
    assert (facts["runtime"], facts["gpu"]) == ("tensorrt", trtexec_standin.GPU)
    assert facts["version"] in {".".join(map(str, version)) for version in VERSIONS}


def test_every_version_builds_a_pooled_network(device, tmp_path):
    """As torch writes it: a reduction whose axes are an input, which versions before 10 do not look at."""
    target, run = device
    pooled = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    exported = export_onnx(pooled, INPUT, tmp_path / "pooled.onnx", 18).path
    assert {node.op_type: len(node.input) for node in onnx.load(str(exported)).graph.node}["ReduceMean"] == 2
    built = run(BACKEND.build_job(exported, target)).pulled["artifact.zip"]
    found = BACKEND.read_run(run(BACKEND.run_job(built, {"input": INPUT.numpy()[None]}, target)))["output"]
    np.testing.assert_allclose(found[0], pooled(INPUT).detach().numpy(), atol=1e-2)
    with pytest.raises(trtexec_standin.Refused, match="up to Opset 17"):
        trtexec_standin.built({"--onnx": str(exported)}, (8, 6, 1), trtexec_standin.GPU)


def test_what_changes_from_minute_to_minute_is_no_fact(ten, tmp_path):
    """Facts are part of the keys by which results are used again."""
    target, _ = ten
    programs = {"nvpmodel": "echo NV Power Mode: MODE_30W; echo 2", "jetson_clocks": "echo GPU CurrentFreq=$(date +%s%N)"}
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    states, found = [], []
    for _ in range(2):
        runner = Local(Reach())
        states.append(runner.describe().passing["clocks"])
        found.append(facts_of(BACKEND, runner, target, tmp_path / "out"))
    assert states[0] != states[1], "the clock moved"
    assert found[0] == found[1]
    assert found[0]["power_mode"] == "MODE_30W", "as the device's own description writes it"


def test_a_power_mode_that_only_the_device_s_description_knows_is_kept(ten, tmp_path, monkeypatch):
    """nvpmodel lies in /usr/sbin, which the PATH of a job may lack."""
    target, _ = ten
    monkeypatch.setattr(Local, "describe", lambda self: Machine(power_mode="MAXN"))
    assert facts_of(BACKEND, Local(Reach()), target, tmp_path / "out")["power_mode"] == "MAXN"


def test_an_engine_is_built_measured_and_run_where_it_will_be_used(device, model, path, tmp_path):
    target, run = device
    built = run(BACKEND.build_job(path, target)).pulled["artifact.zip"]
    with zipfile.ZipFile(built) as packed:
        about = json.loads(packed.read("engine.json"))
        said = packed.read("build.log").decode()
    assert about["gpu"] == trtexec_standin.GPU
    assert (about["sparse_found"], about["two_four"]) == (0, 0), "no weight holds the pattern"
    assert "(Sparsity) Found 0 layer(s)" in said, "what the builder said is kept whole"
    assert said.startswith("&&&& RUNNING TensorRT.trtexec")
    timing = BACKEND.read_bench(run(BACKEND.bench_job({"m": built}, target)))["m"]
    assert 0 < timing.p10_us <= timing.median_us <= timing.p90_us < 9000, "warm-up runs, which took 9.9 ms, do not count"
    inputs = {"input": np.stack([INPUT.numpy(), -INPUT.numpy()])}
    found = BACKEND.read_run(run(BACKEND.run_job(built, inputs, target)))
    wanted = np.stack([model(x).detach().numpy() for x in (INPUT, -INPUT)])
    assert found["output"].shape == wanted.shape
    error = np.abs(found["output"] - wanted).max()
    assert 0 < error < 1e-2, "half precision, so not equal"
    assert list((tmp_path / ".cache/deploypipe/tensorrt").glob("timing-*.cache")), "times of kernels are kept on the device"


def test_a_profile_is_scaled_to_the_plain_latency_and_says_by_how_much(ten, path):
    target, run = ten
    models = {"m": path}
    profile = BACKEND.read_profile(run(BACKEND.profile_job(models, target)), models)["m"]
    assert [kernel.weight for kernel in profile.kernels if kernel.weight] == ["0.weight", "2.weight", "4.weight"]
    whole = BACKEND.read_bench(run(BACKEND.bench_job(models, target)))["m"].median_us
    assert profile.sum_us == pytest.approx(whole, rel=0.02)
    assert profile.ratio > 1.2, "the stand-in's profile is slower by a fifth and a microsecond a layer"


@pytest.mark.parametrize(
    ("version", "gpu", "here"), [((10, 7, 0), trtexec_standin.GPU, r"TensorRT 10\.7\.0"), ((10, 3, 0), "Xavier", "Xavier")]
)
def test_an_engine_of_another_version_or_device_is_refused(ten, path, tmp_path, version, gpu, here):
    target, run = ten
    built = run(BACKEND.build_job(path, target)).pulled["artifact.zip"]
    trtexec_standin.install(tmp_path / "bin", version, gpu)
    with pytest.raises(
        BackendError, match=rf"built on Orin \(stand-in\) with TensorRT 10\.3\.0, this is {here}: build it here"
    ):
        run(BACKEND.bench_job({"m": built}, target))


def test_probes_are_timed_side_by_side_in_one_engine(ten):
    target, run = ten
    shape = Shape("conv", (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), (14, 14), (14, 14), 1, 0)
    narrow, wide = Probe(shape, 16, 16), Probe(shape, 64, 64)
    names = {f"{probe.n_in}-{i}": model for probe in (narrow, wide) for i, model in enumerate(probe.models())}
    found = BACKEND.read_bench(run(BACKEND.bench_job(names, target)))
    assert list(found) == list(names)
    assert isinstance(found["16-0"], Timing)
    once = found["64-1"].median_us - found["64-0"].median_us
    assert once / wide.repeats > (found["16-1"].median_us - found["16-0"].median_us) / narrow.repeats > 0


def test_joined_models_share_nothing():
    parts = [model for n in (8, 16) for model in Probe(Shape("linear", (), (), (), (), (0, 0), (), (), 0, 4), n, n).models()]
    whole = joined(parts)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(whole, strict_mode=True))
    assert len(whole.graph.input) == len(parts)
    tensors = [name for node in whole.graph.node for name in node.output]
    assert len(tensors) == len(set(tensors))


def test_what_measuring_costs_can_be_told(ten):
    target, _ = ten
    with opened(BACKEND, Local(Reach()), target) as bench:
        timer, node, session = bench.cost_of_measuring()
    assert node > 0
    assert timer >= 0
    assert session >= 0


def test_the_builder_s_reason_is_shown(ten):
    target, run = ten
    broken = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 3] x) => (float[1, 3] y) { y = Nonsense(x) }'
    )
    with pytest.raises(BackendError, match=r"trtexec failed with exit code 1: .*While parsing model-0\.onnx"):
        run(BACKEND._models_job("bench", {"m": broken.SerializeToString()}, target))


def test_without_tensorrt_the_job_says_what_is_missing_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16")
    with pytest.raises(BackendError, match=r"no trtexec on PATH, none at /usr/src/tensorrt/bin/trtexec") as caught:
        Local(Reach()).run(BACKEND.describe_job(target), tmp_path / "out")
    comes_from_nvidia(caught.value.fix)
    assert "fix:" not in caught.value.message
    comes_from_nvidia(BACKEND.available()[1])


def comes_from_nvidia(fix):
    """No package of PyPI brings TensorRT."""
    for way in ("sudo apt install tensorrt", "deb or tar", '[build] tool = "/path/to/trtexec"'):
        assert way in fix
    assert "pip" not in fix


def test_the_doctor_says_where_tensorrt_comes_from(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = examine(load_target("cpu").replace(backend="tensorrt", precision="fp16"))
    (failed,) = [step for step in found.steps if step.state == "failed"]
    assert failed.name == "runtime tensorrt"
    comes_from_nvidia(failed.fix)
    assert verdict(found) == [("result", "not usable yet: runtime tensorrt"), ("next", failed.fix)]


def test_what_python_s_interface_needs_besides_does_come_from_pypi(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("")
    (tmp_path / "polygraphy.py").write_text("raise ModuleNotFoundError(\"No module named 'polygraphy'\", name='polygraphy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16")
    with pytest.raises(BackendError) as caught:
        Local(Reach()).run(BACKEND.describe_job(target), tmp_path / "out")
    assert caught.value.fix == f"{sys.executable} -m pip install numpy polygraphy"


def test_another_program_can_be_named_in_the_target_file(tmp_path, monkeypatch):
    program = trtexec_standin.install(tmp_path / "elsewhere", (10, 3, 0))
    monkeypatch.setenv("HOME", str(tmp_path))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16", tool=str(program))
    facts = BACKEND.read_description(Local(Reach()).run(BACKEND.describe_job(target), tmp_path / "out"))
    assert facts["version"] == "10.3.0"


def test_a_version_from_before_this_was_written_for_is_refused(tmp_path, monkeypatch):
    program = trtexec_standin.install(tmp_path / "bin", (8, 2, 1))
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16", tool=str(program))
    with pytest.raises(BackendError, match=r"is TensorRT 8\.2\.1, this needs 8\.4 or newer"):
        Local(Reach()).run(BACKEND.describe_job(target), tmp_path / "out")


def test_an_unknown_precision_is_refused_before_any_job(path):
    with pytest.raises(TargetError, match=r"backend tensorrt has no precision 'int8'"):
        BACKEND.build_job(path, load_target("cpu").replace(backend="tensorrt", precision="int8"))


def test_the_python_way_calls_what_polygraphy_has():
    """TensorRT is not at hand, but the signatures of what would be called can be checked where Polygraphy is installed."""
    trt = pytest.importorskip("polygraphy.backend.trt")
    cuda = pytest.importorskip("polygraphy.cuda")
    assert {"sparse_weights", "profiling_verbosity", "load_timing_cache"} <= set(
        inspect.signature(trt.CreateConfig.__mro__[1].__init__).parameters
    )
    assert {"strongly_typed"} <= set(inspect.signature(trt.NetworkFromOnnxPath.__init__).parameters)
    assert {"save_timing_cache"} <= set(inspect.signature(trt.EngineFromNetwork.__init__).parameters)
    assert {"copy_outputs_to_host"} <= set(inspect.signature(trt.TrtRunner.infer_impl).parameters)
    assert {"shape", "dtype"} <= set(inspect.signature(cuda.DeviceArray.__init__).parameters)


@pytest.mark.parametrize("version", [pytest.param((8, 6, 1), marks=pytest.mark.slow), (10, 3, 0)], ids=["8.6.1", "10.3.0"])
def test_the_python_way_comes_to_the_same_result(version, model, path, tmp_path, monkeypatch):
    """Executed with stand-ins for `tensorrt` and `polygraphy`: jobs and answers are those of trtexec, at the same times."""
    monkeypatch.setenv("HOME", str(tmp_path))
    models, inputs = {"m": path}, {"input": np.stack([INPUT.numpy(), -INPUT.numpy()])}
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16", runs=2, warmup=1)
    found = {}
    for way, package in (("trtexec", trtexec_standin), ("python", tensorrt_standin)):
        package.install(tmp_path / way, version)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path / way}{os.pathsep}{os.environ['PATH']}")
            patch.setenv("PYTHONPATH", f"{tmp_path / way}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

            def run(job, way=way):
                return Local(Reach()).run(job, tmp_path / f"out-{way}")

            facts = BACKEND.read_description(run(BACKEND.describe_job(target)))
            profile = BACKEND.read_profile(run(BACKEND.profile_job(models, target)), models)["m"]
            built = run(BACKEND.build_job(path, target)).pulled["artifact.zip"]
            times = BACKEND.read_bench(run(BACKEND.bench_job({"m": built}, target)))["m"]
            outputs = BACKEND.read_run(run(BACKEND.run_job(built, inputs, target)))["output"]
            found[way] = facts, profile, times, outputs
    facts, profile, times, outputs = found["python"]
    assert (facts["version"], facts["gpu"], facts["capability"]) == (".".join(map(str, version)), "NVIDIA Orin", "8.7")
    assert facts.keys() == found["trtexec"][0].keys()
    assert [(k.name, k.weight, k.op) for k in profile.kernels] == [
        (k.name, k.weight, k.op) for k in found["trtexec"][1].kernels
    ]
    assert times.median_us == pytest.approx(found["trtexec"][2].median_us, rel=0.02)
    assert profile.ratio == pytest.approx(1.2, rel=0.02)
    np.testing.assert_array_equal(outputs, found["trtexec"][3])
    assert list((tmp_path / ".cache/deploypipe/tensorrt").glob("timing-*.cache"))


def test_bindings_without_a_gpu_are_told_in_a_sentence(tmp_path, monkeypatch):
    tensorrt_standin.install(tmp_path / "headless", (10, 3, 0), headless=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'headless'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    target = load_target("cpu").replace(backend="tensorrt", precision="fp16")
    with pytest.raises(BackendError, match=r"there is no TensorRT here: .*factory function returned nullptr") as caught:
        Local(Reach()).run(BACKEND.describe_job(target), tmp_path / "out")
    assert "driver" in caught.value.fix


# ---- the same jobs over SSH, to a server on the loopback address


@pytest.fixture(
    scope="module",
    params=[*(pytest.param(version, marks=pytest.mark.slow) for version in VERSIONS[:-1]), VERSIONS[-1]],
    ids=lambda version: ".".join(map(str, version)),
)
def board(request, tmp_path_factory):
    """A 'device' with the stand-in on its PATH."""
    folder = tmp_path_factory.mktemp("ssh")
    made = SshServer(folder, path=f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    made.prepare()
    trtexec_standin.install(made.folder / "bin", request.param)
    made.start()
    yield made, ".".join(map(str, request.param))
    made.stop()


@pytest.mark.skipif(SSHD is None, reason="no SSH server here: apt install openssh-server")
def test_engines_are_built_measured_and_run_over_ssh(board, model, path, tmp_path, monkeypatch):
    server, version = board
    monkeypatch.setenv("DEPLOYPIPE_SSH_CONFIG", str(server.config))
    target = load_target("jetson").reached_at(server.host).replace(runs=2, warmup=1)
    runner = load_runner(target)
    try:
        facts = BACKEND.read_description(runner.run(BACKEND.describe_job(target), tmp_path))
        assert (facts["version"], facts["gpu"]) == (version, trtexec_standin.GPU)
        built = runner.run(BACKEND.build_job(path, target), tmp_path).pulled["artifact.zip"]
        assert BACKEND.read_bench(runner.run(BACKEND.bench_job({"m": built}, target), tmp_path))["m"].median_us > 0
        profile = BACKEND.read_profile(runner.run(BACKEND.profile_job({"m": path}, target), tmp_path), {"m": path})["m"]
        assert [kernel.weight for kernel in profile.kernels if kernel.weight] == ["0.weight", "2.weight", "4.weight"]
        inputs = {"input": INPUT.numpy()[None]}
        found = BACKEND.read_run(runner.run(BACKEND.run_job(built, inputs, target), tmp_path))["output"]
        np.testing.assert_allclose(found[0], model(INPUT).detach().numpy(), atol=1e-2)
    finally:
        runner.close()
    assert list((server.home / ".cache/deploypipe/tensorrt").glob(f"timing-{version}.cache")), "kept on the device"
