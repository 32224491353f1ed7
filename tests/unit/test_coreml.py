"""Core ML: what is converted and what is refused, and that no conversion is believed unread; mostly without coremltools."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends import stopwatch
from deploypipe.backends.coreml import CoreMl
from deploypipe.errors import BackendError, TargetError
from deploypipe.export import export_program
from deploypipe.job import JobResult
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND, TARGET = CoreMl(), load_target("ios")
NOTHING = JobResult(0, "", "", {}, 0.0)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The converting script as a target imports it, in an empty folder."""
    monkeypatch.setitem(sys.modules, "stopwatch", stopwatch)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("ct_convert", Path(stopwatch.__file__).with_name(BACKEND.script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """An exported program with one input and one output."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    return export_program(model, (torch.zeros(1, 3, 8, 8),), tmp_path_factory.mktemp("coreml") / "m.pt2")


def converter(asked, inputs=((1, 3, 8, 8),), n_outputs=1):
    """A stand-in for coremltools: it writes a package, and says of it what the test wants."""
    made = ModuleType("coremltools")
    made.precision = SimpleNamespace(FLOAT16="half", FLOAT32="single")
    made.target = SimpleNamespace(iOS16="iOS16")

    def save(folder):
        Path(folder).mkdir()
        (Path(folder) / "Manifest.json").write_text("{}")

    def convert(program, **options):
        asked.append(options)
        return SimpleNamespace(save=save)

    shaped = [SimpleNamespace(type=SimpleNamespace(multiArrayType=SimpleNamespace(shape=shape))) for shape in inputs]
    spec = SimpleNamespace(description=SimpleNamespace(input=shaped, output=[None] * n_outputs))
    made.convert = convert
    made.models = SimpleNamespace(MLModel=lambda path, skip_model_load: SimpleNamespace(get_spec=lambda: spec))
    return made


# ---- jobs


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_job_states_the_precision_and_pulls_a_zip(precision):
    job = BACKEND.build_job(Path("m.pt2"), TARGET.replace(precision=precision))
    request = json.loads(job.push["request.json"])
    assert (request["task"], request["precision"], request["artifact"]) == ("build", precision, "artifact.mlpackage.zip")
    assert job.pull == ("answer.json", "artifact.mlpackage.zip")
    assert job.push[request["model"]] == Path("m.pt2")


def test_nothing_is_timed_and_whoever_asks_hears_why():
    assert (BACKEND.source, BACKEND.pricing, BACKEND.times_layers) == ("program", "never", False)
    for job in (BACKEND.bench_job, BACKEND.profile_job):
        with pytest.raises(BackendError, match=r"converted here, not run[\s\S]*--metric macs"):
            job({"m": Path("m.pt2")}, TARGET)
    assert BACKEND.read_bench(NOTHING) == {}
    assert BACKEND.read_profile(NOTHING, {}) == {}
    with pytest.raises(TargetError, match="backend coreml has no precision 'int8'"):
        BACKEND.build_job(Path("m.pt2"), TARGET.replace(precision="int8"))


def test_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BACKEND.available() == (False, "pip install coremltools")


# ---- the script


def request(program, artifact, precision="fp16"):
    return {"model": str(program), "artifact": str(artifact), "precision": precision}


@pytest.mark.parametrize(("precision", "stated"), [("fp16", "half"), ("fp32", "single")])
def test_a_conversion_is_packed_and_marked_unverified(script, monkeypatch, tmp_path, program, precision, stated):
    asked = []
    monkeypatch.setitem(sys.modules, "coremltools", converter(asked))
    found = script.build(request(program, tmp_path / "a.zip", precision))
    (options,) = asked
    assert options == {"convert_to": "mlprogram", "minimum_deployment_target": "iOS16", "compute_precision": stated}
    assert found["bytes"] == (tmp_path / "a.zip").stat().st_size
    assert found["notes"][0].startswith("UNVERIFIED")
    assert zipfile.ZipFile(tmp_path / "a.zip").namelist() == ["model.mlpackage/Manifest.json"]
    assert not (tmp_path / script.PACKAGE).exists(), "nothing is left beside the artifact"


@pytest.mark.parametrize("changes", [{"inputs": ((1, 3, 9, 9),)}, {"inputs": ()}, {"n_outputs": 2}])
def test_a_package_with_another_interface_is_refused(script, monkeypatch, tmp_path, program, changes):
    monkeypatch.setitem(sys.modules, "coremltools", converter([], **changes))
    with pytest.raises(SystemExit, match=r"the converted model takes .*, the program \[\[1, 3, 8, 8\]\]"):
        script.build(request(program, tmp_path / "a.zip"))
    assert not (tmp_path / "a.zip").exists()


def test_equal_packages_make_equal_zips(script, tmp_path):
    for name in ("one", "two"):
        package = tmp_path / name / "p"
        (package / "sub").mkdir(parents=True)
        for file in sorted(("b.bin", "a.bin", "sub/c.bin"), reverse=name == "two"):
            (package / file).write_bytes(file.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / name)
            script.pack(Path("p"), str(tmp_path / f"{name}.zip"))
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_an_exported_program_is_run_by_torch(script, tmp_path, program):
    x = np.random.default_rng(0).standard_normal((2, 1, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", input=x)
    asked = {"model": str(program), "inputs": "inputs.npz", "outputs": "outputs.npz"}
    assert script.run(asked)["outputs"] == ["output"]
    with np.load("outputs.npz") as found:
        wanted = torch.export.load(str(program)).module()(torch.from_numpy(x[1])).detach().numpy()
        np.testing.assert_allclose(found["output"][1], wanted, atol=1e-6)


# ---- for real


@pytest.mark.slow
@pytest.mark.skipif(not BACKEND.available()[0], reason="an optional converter: pip install coremltools")
def test_a_small_model_is_converted_and_its_package_read_back(program, tmp_path):
    result = Local(Reach()).run(BACKEND.build_job(program, TARGET), tmp_path / "built")
    assert BACKEND.read_build(result)[0].startswith("UNVERIFIED")
    names = zipfile.ZipFile(result.pulled["artifact.mlpackage.zip"]).namelist()
    assert "model.mlpackage/Manifest.json" in names
    assert any(name.endswith(".mlmodel") for name in names)
