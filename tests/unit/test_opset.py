"""Graphs of newer operator sets, written in the one that every TensorRT reads."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from deploypipe.backends.trt_opset import IR, OPSET, lowered
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.latency.files import Shape
from deploypipe.profiler.probe import IDLE_OPS, Probe, chain, small_layers

X = np.random.default_rng(0).standard_normal((1, 6, 8, 8), np.float32)


def parsed(body, opset=18, result="float[N, C, H, W] y", constants="int64[2] axes = {2, 3}"):
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[1, 6, 8, 8] x) => ({result}) <{constants}> {{ {body} }}'
    )


def opset(model):
    return next(entry.version for entry in model.opset_import if not entry.domain)


def outputs(model):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {model.graph.input[0].name: X})


class Pooled(nn.Module):
    """Means over positions, written in the ways that networks write them, and what else set 18 changed."""

    def forward(self, x):
        means = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1) + x.mean((2, 3)) + x.mean((-2, -1), keepdim=True)[..., 0, 0]
        largest, left = x.amax(1, keepdim=True), torch.chunk(x, 2, 1)[0]
        grown = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        return means, largest, left, grown, nn.functional.pad(x, (1, 1, 1, 1))


@pytest.mark.parametrize("written", [18, 20])
def test_what_torch_exports_computes_the_same_in_the_older_set(written, tmp_path):
    path = export_onnx(Pooled(), torch.from_numpy(X), tmp_path / "m.onnx", written).path
    for file in (path, simplify_onnx(path, tmp_path / "s.onnx").path):
        model = onnx.load(str(file))
        before = model.SerializeToString()
        made = lowered(model)
        assert model.SerializeToString() == before
        if written == 18:  # later sets changed resizing and padding once more
            assert (opset(made), made.ir_version) == (OPSET, IR)
            reductions = [node for node in made.graph.node if node.op_type.startswith("Reduce")]
            assert reductions
            assert {len(node.input) for node in reductions} == {1}
        for one, other in zip(outputs(model), outputs(made), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "body",
    [
        "y = ReduceMean <keepdims = 1> (x, axes)",
        "axes_ = Constant <value = int64[2] {2, 3}> ()  y = ReduceL2 <noop_with_empty_axes = 0> (x, axes_)",
        "y = ReduceMax (x)",
        "y, z = Split <axis = 1, num_outputs = 2> (x)",
        's = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()  y = Resize <antialias = 0, mode = "linear"> (x, , s)',
    ],
)
def test_what_the_set_changed_is_undone_where_it_says_the_same(body):
    model = parsed(body)
    made = lowered(model)
    assert opset(made) == OPSET
    np.testing.assert_array_equal(outputs(made)[0], outputs(model)[0])


@pytest.mark.parametrize(
    ("body", "newer"),
    [
        ("y = Mish (x)", 18),
        ("y, z, w, v = Split <axis = 1, num_outputs = 4> (x)", 18),  # 2, 2, 2, 0: not equal parts
        ('s = Constant <value = float[4] {1.0, 1.0, 0.5, 0.5}> ()  y = Resize <antialias = 1, mode = "linear"> (x, , s)', 18),
        ("a = Shape (x)  b = Gather (a, axes)  y = ReduceMean (x, b)", 18),  # axes that are computed
        ('p = Constant <value = int64[8] {0, 0, 1, 1, 0, 0, 1, 1}> ()  y = Pad <mode = "wrap"> (x, p)', 19),
        ("y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)", 19),
        ("y = Nonsense (x)", 18),
    ],
)
def test_what_the_older_set_cannot_say_is_left_as_it_is(body, newer):
    model = parsed(body, newer)
    assert lowered(model) is model


@pytest.mark.parametrize("sparsity", ["dense", "2:4"])
def test_what_the_profiler_times_can_be_said_in_the_older_set(sparsity):
    conv = Shape("conv", (3, 3), (1, 1), (1, 1), (1, 1), (0, 0), (14, 14), (14, 14), 1, 0)
    linear = Shape("linear", (), (), (), (), (0, 0), (), (), 0, 4)
    probes = [model for shape in (conv, linear) for model in Probe(shape, 16, 16, sparsity=sparsity).models()]
    for model in (*probes, *(chain(3, op) for op in IDLE_OPS), small_layers(2)):
        assert opset(lowered(onnx.load_from_string(model))) == OPSET


def test_an_older_graph_and_other_domains_are_left_as_they_are():
    model = parsed("y = ReduceMean <axes = [2, 3]> (x)", 13)
    assert lowered(model) is model
    model = parsed("y = Relu (x)")
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 3))
    assert [(entry.domain, entry.version) for entry in lowered(model).opset_import] == [("", OPSET), ("com.example", 3)]
