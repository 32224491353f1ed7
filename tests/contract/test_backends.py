"""What every backend must do, whatever it compiles for; rows that are not installed here are skipped with their reason."""

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends import BACKENDS, load_backend
from deploypipe.errors import TargetError
from deploypipe.export import export_onnx
from deploypipe.profiler.bench import opened
from deploypipe.runners import load_runner
from deploypipe.targets import load_target

INPUT = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def target(request):
    target = load_target("cpu").replace(backend=request.param, runs=10, warmup=1)
    ready, missing = load_backend(target).available()
    if not ready:
        pytest.skip(f"the optional runtime is not installed: {missing}")
    return target


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)).eval()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return export_onnx(model, INPUT, tmp_path_factory.mktemp("model") / "model.onnx").path


def carried_out(target, job, folder):
    return load_runner(target).run(job, folder)


def test_the_built_artefact_computes_what_torch_computes(target, model, path, tmp_path):
    backend = load_backend(target)
    built = carried_out(target, backend.build_job(path, target), tmp_path).pulled["artifact" + backend.suffix]
    inputs = {"input": np.stack([INPUT.numpy(), -INPUT.numpy()])}
    found = backend.read_run(carried_out(target, backend.run_job(built, inputs, target), tmp_path))
    wanted = np.stack([model(x).detach().numpy() for x in (INPUT, -INPUT)])
    np.testing.assert_allclose(found["output"], wanted, atol=1e-4)


def test_measurements_are_positive_ordered_and_counted(target, path, tmp_path):
    backend = load_backend(target)
    timing = backend.read_bench(carried_out(target, backend.bench_job({"m": path}, target), tmp_path))["m"]
    assert 0 < timing.p10_us <= timing.median_us <= timing.p90_us
    assert timing.runs >= 10


def test_profiles_name_each_layer_once(target, path, tmp_path):
    backend = load_backend(target)
    models = {"m": path}
    profile = backend.read_profile(carried_out(target, backend.profile_job(models, target), tmp_path), models)["m"]
    assert sorted(kernel.weight for kernel in profile.kernels if kernel.weight) == ["0.weight", "2.weight", "4.weight"]


def test_what_measuring_costs_can_be_told(target):
    backend = load_backend(target)
    with opened(backend, load_runner(target), target) as bench:
        timer_us, node_us, session_us = bench.cost_of_measuring()
    assert timer_us >= 0
    assert 0 < node_us < 100
    assert session_us > 0


def test_facts_name_the_runtime_and_its_version(target, tmp_path):
    backend = load_backend(target)
    facts = backend.read_description(carried_out(target, backend.describe_job(target), tmp_path))
    assert facts["runtime"]
    assert facts["version"]


def test_jobs_are_plain_descriptions(target, path):
    backend = load_backend(target)
    for job in (backend.describe_job(target), backend.build_job(path, target), backend.bench_job({"m": path}, target)):
        assert all(isinstance(part, str) for part in job.argv)
        assert all("/" not in name for name in (*job.push, *job.pull)), "everything lies in the job's own folder"
        assert job.timeout_s > 0


def test_unknown_backends_and_runners_suggest_the_nearest():
    target = load_target("cpu")
    with pytest.raises(TargetError, match="did you mean 'onnxruntime'"):
        load_backend(target.replace(backend="onnxruntme"))
    with pytest.raises(TargetError, match="did you mean 'local'"):
        load_runner(target.replace(via="locl"))
