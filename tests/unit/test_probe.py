import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from deploypipe.latency.estimate import macs
from deploypipe.latency.files import Shape
from deploypipe.precision import typed
from deploypipe.profiler.probe import IDLE_OPS, Probe, chain
from deploypipe.two_four import holds

ONE, THREE = (1, 1), (3, 3)
CONV = Shape("conv", THREE, ONE, ONE, ONE, (0, 0), (8, 8), (8, 8), 1, 0)
SHAPES = {
    "conv": CONV,
    "stride": Shape("conv", THREE, (2, 2), ONE, ONE, (0, 0), (8, 8), (4, 4), 2, 0),
    "depthwise": Shape("depthwise", THREE, ONE, ONE, ONE, (1, 1), (8, 8), (8, 8), 1, 0),
    "grouped": Shape("grouped", THREE, ONE, ONE, ONE, (4, 4), (8, 8), (8, 8), 1, 0),
    "transposed": Shape("transposed", (4, 4), (2, 2), ONE, ONE, (0, 0), (8, 8), (16, 16), 1, 0),
    "transposed, depthwise": Shape("depthwise", (4, 4), (2, 2), ONE, ONE, (1, 1), (8, 8), (16, 16), 1, 0),
    "transposed, grouped": Shape("grouped", (4, 4), (2, 2), ONE, ONE, (4, 4), (8, 8), (16, 16), 1, 0),
    "transposed, from one place": Shape("depthwise", (4, 4), (2, 2), (0, 0), ONE, (1, 1), ONE, (4, 4), 1, 0),
    "padded to the same size": Shape("conv", (4, 4), ONE, (1, 1, 2, 2), ONE, (0, 0), (8, 8), (8, 8), 1, 0),
    "one axis": Shape("conv", (3,), (1,), (1,), (1,), (0, 0), (20,), (20,), 1, 0),
    "linear": Shape("linear", (), (), (), (), (0, 0), (), (), 0, 7),
}


def optimised(model, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    output = session.run(None, feed)[0]
    return onnx.load(options.optimized_model_filepath).graph.node, output


@pytest.mark.parametrize("name", SHAPES)
def test_a_longer_probe_only_holds_more_copies_of_the_kernel(name, tmp_path):
    shape = SHAPES[name]
    probe = Probe(shape, 16, 16)
    counts = []
    for model in probe.models():
        nodes, output = optimised(model, tmp_path)
        kernels = [node.op_type for node in nodes]
        counts.append({op: kernels.count(op) for op in set(kernels)})
        assert "ConstantOfShape" not in kernels, "weights are constants by then"
        assert np.isfinite(output).all()
        wanted = (shape.rows, 16) if shape.rows else (shape.batch, 16, *shape.out_size)
        assert output.shape == wanted
    short, long = counts
    more = {op: long[op] - short.get(op, 0) for op in long if long[op] != short.get(op, 0)}
    kernel = [op for op in more if "Conv" in op or "Gemm" in op]
    assert sum(more[op] for op in kernel) == probe.repeats
    transposed = name.startswith("transposed")
    assert shape.transposed == transposed == ("ConvTranspose" in kernel)
    assert set(more) - set(kernel) <= ({"Add", "Relu"} if transposed or name == "one axis" else set()), (
        "the sum is fused into it"
    )


def test_a_transposed_convolution_works_at_the_places_of_its_input():
    assert macs(SHAPES["transposed"], 16, 16) == 8 * 8 * 16 * 16 * 16
    assert macs(SHAPES["transposed, depthwise"], 16, 16) == 8 * 8 * 16 * 16
    assert macs(SHAPES["transposed, grouped"], 16, 16) == 8 * 8 * 16 * 4 * 16


@pytest.mark.parametrize("name", ["conv", "stride", "one axis", "linear"])
def test_a_sparse_probe_is_the_same_model_with_the_pattern_in_the_kernel_s_weights_alone(name, tmp_path):
    probe = Probe(SHAPES[name], 32, 16, sparsity="2:4")
    axis = 0 if SHAPES[name].rows else 1
    for model, plain in zip(probe.models(), Probe(SHAPES[name], 32, 16).models(), strict=True):
        assert len(model) < 20_000
        _, output = optimised(model, tmp_path)
        assert np.isfinite(output).all()
        stated, dense = (typed(onnx.load_from_string(each), "fp32").graph for each in (model, plain))
        assert [node.op_type for node in stated.node] == [node.op_type for node in dense.node]
        weights, others = ({t.name: numpy_helper.to_array(t) for t in g.initializer} for g in (stated, dense))
        assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in others.items()}
        for tensor, weight in weights.items():
            own = tensor.startswith("w")
            assert (weight.ndim > 1 and weight.shape[axis] % 4 == 0 and holds(weight, axis)) == own, tensor
            assert not holds(others[tensor], axis) if own else True
        kernels = [weight for tensor, weight in weights.items() if tensor.startswith("w")]
        assert all(np.count_nonzero(kernel) == kernel.size // 2 for kernel in kernels)
        assert len({float(kernel.max()) for kernel in kernels}) == len(kernels), "equal kernels would be computed once"


def test_models_are_small_however_large_the_weights():
    assert all(len(model) < 20_000 for model in Probe(CONV, 2048, 2048).models())


def test_long_kernels_are_not_repeated_much():
    assert Probe(CONV, 512, 512).repeats == 1
    assert Probe(SHAPES["linear"], 16, 16).repeats == 8


@pytest.mark.parametrize(
    ("name", "macs"), [("conv", 8 * 8 * 9 * 32 * 16), ("depthwise", 8 * 8 * 9 * 16), ("grouped", 8 * 8 * 9 * 64)]
)
def test_multiply_adds(name, macs):
    n_in = 32 if name == "conv" else 16
    assert Probe(SHAPES[name], n_in, 16).macs == macs


def test_a_relayed_probe_makes_its_input_anew_for_each_copy(tmp_path):
    models = Probe(CONV, 8, 16, relay=True).models()
    assert len(models) == 4
    counts = [sum("Conv" in node.op_type for node in optimised(model, tmp_path)[0]) for model in models]
    repeats = Probe(CONV, 8, 16).repeats
    assert counts == [2, 2 + 2 * repeats, 1, 1 + repeats]


def test_a_chain_keeps_all_its_kernels(tmp_path):
    nodes, _ = optimised(chain(12, IDLE_OPS[0]), tmp_path)
    assert len(nodes) == 12
