import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploypipe.backends import stopwatch
from deploypipe.backends.base import Timing
from deploypipe.backends.onnxruntime import OnnxRuntime
from deploypipe.errors import BackendError, TargetError
from deploypipe.export import export_onnx
from deploypipe.job import JobResult
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND = OnnxRuntime()


class Net(nn.Module):
    """A residual block whose skip comes first in the sum, squeeze and excitation, a pool, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.skip = nn.Conv2d(16, 32, 1)
        self.main = nn.Conv2d(16, 32, 3, padding=1)
        self.wise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze = nn.Conv2d(32, 16, 1)
        self.excite = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.skip(x) + self.main(x))
        x = torch.nn.functional.hardswish(self.wise(x))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.nn.functional.max_pool2d(x, 2).mean((2, 3)))


@pytest.fixture(scope="module")
def target():
    return load_target("cpu").replace(runs=20, warmup=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return export_onnx(Net(), torch.randn(1, 3, 16, 16), tmp_path_factory.mktemp("net") / "net.onnx").path


def run(job, folder):
    return Local(Reach()).run(job, folder)


def test_every_layer_is_found_in_the_profile_and_the_rest_knows_what_feeds_it(path, target, tmp_path):
    models = {"net": path}
    profile = BACKEND.read_profile(run(BACKEND.profile_job(models, target), tmp_path), models)["net"]
    weights = [kernel.weight for kernel in profile.kernels if kernel.weight]
    names = ("stem", "skip", "main", "wise", "squeeze", "excite", "head")
    assert sorted(weights) == sorted(f"{name}.weight" for name in names), "each once"
    rest = {kernel.op: kernel for kernel in profile.kernels if not kernel.weight}
    assert set(rest["Mul"].feeds) == {"wise.weight", "excite.weight"}
    pools = [kernel for kernel in profile.kernels if kernel.op == "ReduceMean"]
    assert pools[0].feeds == ("wise.weight",)
    assert all(kernel.feeds for kernel in profile.kernels if not kernel.weight)
    for kernel in profile.kernels:
        assert 0 < kernel.p10_us <= kernel.p90_us
        assert kernel.runs >= 20
    assert profile.sum_us == pytest.approx(sum(kernel.median_us for kernel in profile.kernels))


def test_bench_interleaves_models_and_a_larger_one_takes_longer(path, target, tmp_path):
    big = export_onnx(nn.Conv2d(3, 64, 9), torch.randn(1, 3, 64, 64), tmp_path / "big.onnx").path
    job = BACKEND.bench_job({"net": path, "big": big}, target)
    timings = BACKEND.read_bench(run(job, tmp_path))
    assert timings["big"].median_us > timings["net"].median_us > 0
    for timing in timings.values():
        assert timing.p10_us <= timing.median_us <= timing.p90_us
        assert timing.runs >= 20
        assert timing.cpu_us
        assert timing.foreign_load is None or timing.foreign_load >= 0


def test_a_built_artefact_computes_what_the_model_computes(path, target, tmp_path):
    built = run(BACKEND.build_job(path, target), tmp_path / "built").pulled["artifact.onnx"]
    inputs = {"input": np.random.default_rng(0).standard_normal((4, 1, 3, 16, 16)).astype(np.float32)}
    found = [
        BACKEND.read_run(run(BACKEND.run_job(model, inputs, target), tmp_path / name))
        for name, model in (("plain", path), ("built", built))
    ]
    assert list(found[0]) == ["output"]
    assert found[0]["output"].shape == (4, 1, 5)
    np.testing.assert_allclose(found[0]["output"], found[1]["output"], atol=1e-5)
    assert any(node.domain == "com.microsoft.nchwc" for node in onnx.load(str(built)).graph.node)


def test_description_holds_what_tells_measurements_apart(target, tmp_path):
    facts = BACKEND.read_description(run(BACKEND.describe_job(target.replace(threads=2)), tmp_path))
    assert facts["runtime"] == "onnxruntime"
    assert facts["threads"] == 2
    assert facts["version"].count(".") == 2
    assert {"cpu", "cpu_flags", "cores", "governor", "python", "providers"} <= set(facts)


def test_an_input_without_fixed_shape_is_refused(target, tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }'
    )
    with pytest.raises(BackendError, match="input 'x' has no fixed shape"):
        run(BACKEND.bench_job({"m": model.SerializeToString()}, target), tmp_path)


def test_a_provider_that_is_not_there_is_no_silent_fallback(path, target, tmp_path):
    job = BACKEND.bench_job({"net": path}, target)
    request = json.loads(job.push["request.json"])
    job.push["request.json"] = json.dumps({**request, "provider": "CUDAExecutionProvider"}).encode()
    with pytest.raises(BackendError, match="asked for CUDAExecutionProvider, ONNX Runtime gave CPUExecutionProvider"):
        run(job, tmp_path)


def test_an_unknown_precision_is_refused_before_any_job(path, target):
    with pytest.raises(TargetError, match=r"no precision 'fp23'[\s\S]*fp32"):
        BACKEND.build_job(path, target.replace(precision="fp23"))


def test_a_damaged_answer_is_an_error(tmp_path):
    (tmp_path / "answer.json").write_text("{")
    result = JobResult(0, "", "", {"answer.json": tmp_path / "answer.json"}, 0.1)
    with pytest.raises(BackendError, match="answered nonsense"):
        BACKEND.read_bench(result)


def test_on_a_busy_machine_processor_time_stands_in_for_latency():
    assert Timing(30.0, 20, 60, 10, 0.4, 21.0).quiet_us == 21.0
    assert Timing(30.0, 20, 60, 10, 0.01, 21.0).quiet_us == 30.0
    assert Timing(30.0, 20, 60, 10, 0.4, None).quiet_us == 30.0
    assert Timing(30.0, 20, 60, 10, None, 21.0).quiet_us == 30.0


def test_the_measuring_script_stands_alone():
    script = Path(BACKEND.describe_job(load_target("cpu")).argv[1])
    text = BACKEND.describe_job(load_target("cpu")).push[script.name].decode()
    assert "import deploypipe" not in text
    assert "from deploypipe" not in text
    assert "import onnx\n" not in text


def test_a_profile_that_was_cut_short_is_refused(tmp_path, monkeypatch):
    """The runtime stops to record after a million kernels; the runs that are missing would count as no time at all."""
    monkeypatch.setitem(sys.modules, "stopwatch", stopwatch)
    spec = importlib.util.spec_from_file_location("ort_measure", Path(stopwatch.__file__).with_name(BACKEND.script))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    node = {"cat": "Node", "name": "a_kernel_time", "args": {"op_name": "Conv"}, "dur": 100}
    for n in (8, 4):
        (tmp_path / f"{n}.json").write_text(json.dumps([part for _ in range(n) for part in ({"name": "model_run"}, node)]))
    assert script.kernels(str(tmp_path / "8.json"), [*range(8)])[0][2] == pytest.approx(100.5, abs=0.6)
    with pytest.raises(SystemExit, match=r"recorded 4 runs only, of 8: lower \[measure\] warmup"):
        script.kernels(str(tmp_path / "4.json"), [*range(8)])
