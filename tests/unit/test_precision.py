from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

from deploypipe.errors import ModelError, UsageError
from deploypipe.export import export_onnx
from deploypipe.precision import typed, write_typed
from deploypipe.profiler.probe import chain

INPUT = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.body(x) + x).sigmoid()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    return export_onnx(Residual(), INPUT, tmp_path_factory.mktemp("model") / "model.onnx").path


def outputs(model):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": INPUT.numpy()})[0]


def test_half_precision_is_in_the_graph_and_computes_nearly_the_same(path):
    whole, half = onnx.load(str(path)), typed(onnx.load(str(path)), "fp16")
    onnx.checker.check_model(half, full_check=True)
    floating = [tensor for tensor in half.graph.initializer if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)]
    assert {tensor.data_type for tensor in floating} == {TensorProto.FLOAT16}
    reference, found = outputs(whole), outputs(half)
    error = np.abs(reference - found).max() / np.abs(reference).max()
    assert 0 < error < 2e-3, "eleven bits of mantissa: not equal, but near"


def test_inputs_outputs_and_weights_keep_their_names_and_callers_see_float32(path):
    whole, half = onnx.load(str(path)), typed(onnx.load(str(path)), "fp16")
    for one, other in zip((*whole.graph.input, *whole.graph.output), (*half.graph.input, *half.graph.output), strict=True):
        assert one == other
    assert {tensor.name for tensor in whole.graph.initializer} == {tensor.name for tensor in half.graph.initializer}


def test_it_is_done_once_and_leaves_the_given_model_alone(path):
    whole = onnx.load(str(path))
    before = whole.SerializeToString()
    half = typed(whole, "fp16")
    assert whole.SerializeToString() == before
    assert typed(half, "fp16") == half
    np.testing.assert_array_equal(outputs(typed(whole, "fp32")), outputs(whole))


def test_weights_that_half_precision_cannot_hold_are_refused_not_cut_off(path):
    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight")
    big = onnx.numpy_helper.to_array(tensor).copy()
    big[0, 0, 0, 0] = 7e4
    tensor.CopyFrom(onnx.numpy_helper.from_array(big, "stem.weight"))
    with pytest.raises(ModelError, match=r"'stem.weight' reaches 70000, float16 ends at 65504"):
        typed(model, "fp16")


def test_weights_filled_by_shape_become_constants(path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[1, 4] x) => (float[1, 4] y) <int64[2] s = {4, 4}>'
        "{ w = ConstantOfShape <value: tensor = float[1] {0.5}> (s)  y = MatMul (x, w) }"
    )
    made = typed(model, "fp32")
    assert [node.op_type for node in made.graph.node] == ["MatMul"]
    assert [(t.name, list(t.dims)) for t in made.graph.initializer] == [("w", [4, 4])]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(made.graph.initializer[0]), np.full((4, 4), 0.5, np.float32))


def test_names_of_nodes_are_safe_to_write_into_json_and_unique():
    model = onnx.load_from_string(chain(3, "Neg"))
    for node, name in zip(model.graph.node, ('say "a"', "say\\_a_", 'say "a"'), strict=True):
        node.name = name
    names = [node.name for node in typed(model, "fp32").graph.node]
    assert names == ["say__a_", "say__a__2", "say__a__3"]


def test_an_unknown_precision_suggests_the_nearest(path):
    with pytest.raises(UsageError, match="did you mean 'fp16'"):
        typed(onnx.load(str(path)), "f16")


def test_the_file_is_written_whole(path, tmp_path: Path):
    written = write_typed(path, tmp_path / "half.onnx", "fp16")
    assert onnx.load(str(written)) == typed(onnx.load(str(path)), "fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["half.onnx"]


def test_weights_that_only_a_branch_reads_stay():
    one = onnx.helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    value = partial(onnx.helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[1])

    def branch(op):
        return onnx.helper.make_graph([onnx.helper.make_node(op, ["x", "w"], [op])], op, [], [value(op)])

    choice = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch("Mul"), else_branch=branch("Add"))
    condition = onnx.helper.make_tensor_value_info("c", TensorProto.BOOL, [1])
    graph = onnx.helper.make_graph([choice], "g", [value("x"), condition], [value("y")], [one])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(typed(model, "fp32").SerializeToString())
    for c, wanted in ((True, 6.0), (False, 5.0)):
        assert session.run(None, {"x": np.full(1, 3, np.float32), "c": np.array([c])})[0] == wanted
