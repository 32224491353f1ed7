import importlib.util
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends import stopwatch
from deploypipe.backends.ncnn import Ncnn, shapes
from deploypipe.errors import BackendError
from deploypipe.export import export_onnx
from deploypipe.runners.local import Local
from deploypipe.targets import Reach, load_target

BACKEND, TARGET = Ncnn(), load_target("ncnn")
PARAM = (
    "7767517\n2 2\nInput                    in0                      0 1 in0\nReLU                     relu_0 1 1 in0 out0\n"
)


@pytest.fixture
def script(monkeypatch):
    """The measuring script, as it is imported on a target."""
    pytest.importorskip("ncnn")
    monkeypatch.setitem(sys.modules, "stopwatch", stopwatch)
    spec = importlib.util.spec_from_file_location("ncnn_measure", Path(stopwatch.__file__).with_name(BACKEND.script))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(net, shape, folder):
    return export_onnx(net.eval(), torch.zeros(shape), folder / "model.onnx").path


def packed(path, param, weights=b""):
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model.param", param)
        made.writestr("model.bin", weights)
    return str(path)


@pytest.mark.parametrize("shape", [[1, 7], [1, 5, 7], [1, 3, 5, 7], [1, 3, 2, 5, 7]])
def test_a_built_file_states_its_inputs_as_the_runtime_reads_them(script, shape, tmp_path):
    """Whatever we write there must also be what ncnn computes on: an identity of that shape runs, and keeps the values."""
    param = script.stated(PARAM, [shape])
    assert script.shapes_of(param) == [shape[1:]]
    network = script.Network(packed(tmp_path / "m.zip", param), {"threads": 1})
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (output,) = network.run(network.mats([values]))
    np.testing.assert_array_equal(np.array(output), values[0])


@pytest.mark.parametrize(
    ("param", "said"),
    [
        ("nonsense", r"return codes \(-1"),
        (PARAM.replace("ReLU ", "pnnx.Odd "), r"return codes \(-1[\s\S]*no layer for pnnx\.Odd"),
    ],
)
def test_every_return_code_is_looked_at(script, tmp_path, param, said):
    with pytest.raises(SystemExit, match=said):
        script.Network(packed(tmp_path / "m.zip", param), {"threads": 1})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("input_names", r"does not take input 'nowhere' \(return code -1\)"),
        ("output_names", r"cannot compute output 'nowhere' \(return code -1\)"),
    ],
)
def test_return_codes_of_a_run_are_looked_at_too(script, tmp_path, names, said):
    """ncnn itself is asked for a tensor that the model does not have; it says so by a code, and goes on."""
    network = script.Network(packed(tmp_path / "m.zip", script.stated(PARAM, [[1, 3, 4, 4]])), {"threads": 1})
    net = {name: getattr(network.net, name) for name in ("input_names", "output_names", "create_extractor")}
    network.net = SimpleNamespace(**{**net, names: lambda: ["nowhere"]})
    with pytest.raises(SystemExit, match=said):
        network.run(network.sample())


def test_a_converter_that_fails_is_not_believed_though_its_files_are_there(script, tmp_path, monkeypatch):
    def run(argv, cwd, **options):
        for name in script.CONVERTED:
            (Path(cwd) / name).write_text(PARAM)
        return subprocess.CompletedProcess(argv, 1, "", "an operator is left out")

    pytest.importorskip("pnnx")
    monkeypatch.setattr(script.subprocess, "run", run)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"pnnx cannot convert the model \(return code 1\): an operator is left out"):
        script.converted(str(tmp_path / "model.onnx"), [[1, 3, 4, 4]])


def test_a_missing_input_is_an_error_before_anything_is_computed(script, tmp_path):
    network = script.Network(packed(tmp_path / "m.zip", script.stated(PARAM, [[1, 3, 4, 4]])), {"threads": 1})
    with pytest.raises(SystemExit, match="the model has 1 inputs, 0 were given"):
        network.run([])


def test_batches_are_refused_before_any_job(tmp_path):
    model = exported(nn.Conv2d(3, 4, 3), (2, 3, 8, 8), tmp_path)
    with pytest.raises(BackendError, match=r"one image[\s\S]*2x3x8x8"):
        BACKEND.build_job(model, TARGET)


def test_shapes_are_read_from_exported_models_only(tmp_path):
    model = exported(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), tmp_path)
    built = Path(packed(tmp_path / "m.zip", PARAM))
    assert shapes({"a.onnx": model, "b.onnx": built, "c.onnx": model.read_bytes()}) == {
        "a.onnx": [[1, 3, 8, 8]],
        "c.onnx": [[1, 3, 8, 8]],
    }


def test_layers_are_not_timed():
    with pytest.raises(BackendError, match="--no-layers"):
        BACKEND.profile_job({}, TARGET)


@pytest.mark.skipif(not BACKEND.available()[0], reason="an optional runtime: pip install ncnn pnnx")
def test_weights_stay_in_full_precision(tmp_path):
    """The converter halves them unless told otherwise; then this sum would be off by some 5e-4."""
    net = nn.Conv2d(3, 16, 3)
    model = exported(net, (1, 3, 8, 8), tmp_path)
    built = Local(Reach()).run(BACKEND.build_job(model, TARGET), tmp_path / "built").pulled["artifact.zip"]
    x = torch.randn(1, 1, 3, 8, 8)
    job = BACKEND.run_job(built, {"input": x.numpy()}, TARGET)
    found = BACKEND.read_run(Local(Reach()).run(job, tmp_path / "run"))["output"]
    assert np.abs(found - net(x[0]).detach().numpy()[None]).max() < 2e-5


def test_outputs_come_in_the_model_s_order_however_the_runtime_lists_them(script, tmp_path):
    network = script.Network(packed(tmp_path / "m.zip", script.stated(PARAM, [[1, 3, 4, 4]])), {"threads": 1})
    asked = []

    class Extractor(nullcontext):
        def input(self, name, mat):
            return 0

        def extract(self, name):
            asked.append(name)
            return 0, name

    names = ["out2", "out10", "out0", "out1"]  # ncnn goes by the order of computation
    network.net = SimpleNamespace(
        input_names=network.net.input_names, output_names=lambda: names, create_extractor=lambda: Extractor(Extractor())
    )
    assert network.run(network.sample()) == ["out0", "out1", "out2", "out10"]
