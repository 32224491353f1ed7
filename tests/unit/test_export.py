import warnings

import numpy as np
import onnx
import onnxruntime
import onnxsim
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

from deploypipe.errors import ModelError, UsageError
from deploypipe.export import export_onnx, load_onnx, simplify_onnx


class Net(nn.Module):
    def __init__(self, shape="tensor"):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.drop = nn.Dropout(0.9)
        self.shape = shape

    def forward(self, x, shift=None):
        y = torch.relu(self.norm(self.conv(x)))
        if shift is not None:
            y = y + shift
        logits = self.head(self.drop(y).mean((2, 3)))
        return {"tensor": logits, "dict": {"logits": logits, "features": y}, "tuple": (logits, [y, y * 2])}[self.shape]


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]


def run(path, *args):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})


@pytest.fixture(scope="module")
def example():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", ["tensor", "dict", "tuple"])
def test_every_kind_of_result_is_exported_with_equal_numbers(tmp_path, example, shape):
    model = Net(shape).eval()
    model.norm.running_mean.normal_()
    exported = export_onnx(model, example, tmp_path / "m.onnx")
    wanted = leaves(model(example))
    assert exported.inputs == ("input",)
    assert len(exported.outputs) == len(wanted)
    for got, want in zip(run(exported.path, example), wanted, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"], "one file, nothing temporary"


def test_several_inputs_are_numbered(tmp_path, example):
    model, shift = Net().eval(), torch.ones(2, 4, 1, 1)
    exported = export_onnx(model, (example, shift), tmp_path / "m.onnx")
    assert exported.inputs == ("input_0", "input_1")
    np.testing.assert_allclose(run(exported.path, example, shift)[0], model(example, shift).detach().numpy(), atol=1e-5)


def test_weights_keep_their_names_and_modes_stay(tmp_path, example, capfd):
    model = Net().train()
    model.norm.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = export_onnx(model, example, tmp_path / "m.onnx", opset=18)
    graph = onnx.load(str(exported.path)).graph
    weights = {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")}
    assert weights == {"conv.weight", "head.weight"}
    assert not any(node.op_type in ("BatchNormalization", "Dropout") for node in graph.node)
    assert (model.training, model.norm.training, exported.opset) == (True, False, 18)
    assert capfd.readouterr() == ("", "")


def test_transposed_weights_of_linear_layers_get_their_names_back(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.Linear(8, 8, bias=False)).eval()
    tokens = torch.randn(2, 5, 8)
    exported = export_onnx(model, tokens, tmp_path / "m.onnx")
    graph = onnx.load(str(exported.path)).graph
    assert [node.input[1] for node in graph.node if node.op_type == "MatMul"] == ["0.weight", "2.weight", "3.weight"]
    np.testing.assert_allclose(run(exported.path, tokens)[0], model(tokens).detach().numpy(), atol=1e-5)


def test_an_old_operator_set_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"operator set 17[\s\S]*use opset 18"):
        export_onnx(None, None, tmp_path / "m.onnx", opset=17)


def test_an_operator_set_that_was_not_honoured_is_an_error(tmp_path, example, monkeypatch):
    def writes_18(model, args, path, **options):
        torch_export(model, args, path, **{**options, "opset_version": 18})

    torch_export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", writes_18)
    with pytest.raises(ModelError, match="asked for operator set 20, the exporter wrote 18"):
        export_onnx(Net(), example, tmp_path / "m.onnx", opset=20)
    assert not any(tmp_path.iterdir())


def test_the_exporter_s_functions_are_read_once_and_what_it_writes_is_the_same(tmp_path, example, monkeypatch):
    apis, calls = _registration.onnxscript_apis, []
    read = apis.get_torchlib_ops
    counted = lambda: calls.append(1) or read()  # noqa: E731
    monkeypatch.setattr(apis, "get_torchlib_ops", counted)
    net = Net().eval()
    files = [export_onnx(net, example, tmp_path / f"{n}.onnx").path.read_bytes() for n in range(3)]
    assert calls == [1]
    assert apis.get_torchlib_ops is counted, "and torch is left as it was"
    assert files[0] == files[1] == files[2]


def test_a_model_that_cannot_be_exported_names_the_cause_and_leaves_nothing(tmp_path, example, capfd):
    with pytest.raises(ModelError, match=r"(?i)data-dependent") as caught:
        export_onnx(Branching(), example, tmp_path / "m.onnx")
    assert len(str(caught.value).splitlines()) == 3
    assert not any(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def path(tmp_path_factory, example):
    return export_onnx(Net(), example, tmp_path_factory.mktemp("export") / "m.onnx").path


def test_a_simplified_model_computes_the_same(tmp_path, example, path):
    found = simplify_onnx(path, tmp_path / "s.onnx")
    assert (found.ok, found.reason) == (True, "")
    assert found.n_nodes_after <= found.n_nodes_before == len(load_onnx(path).graph.node)
    np.testing.assert_allclose(run(found.path, example)[0], run(path, example)[0], atol=1e-6)


def test_a_failed_simplification_copies_its_input_and_says_why(tmp_path, path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel\nfor FancyOp")

    monkeypatch.setattr(onnxsim, "simplify", fails)
    found = simplify_onnx(path, tmp_path / "s.onnx")
    assert (found.ok, found.reason) == (False, "no kernel; for FancyOp")
    assert found.path.read_bytes() == path.read_bytes()
    monkeypatch.setattr(onnxsim, "simplify", lambda model, **_: (model, False))
    assert simplify_onnx(path, tmp_path / "s.onnx").reason == "the simplifier's own check failed"


def test_damaged_onnx_files_are_named(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    for path in (tmp_path / "m.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(ModelError, match=path.name):
            simplify_onnx(path, tmp_path / "s.onnx")
