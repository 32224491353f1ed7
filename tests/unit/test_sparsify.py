"""2:4 weights from the compacted model to the engine: found by the stand-in for trtexec, which looks for them one by one."""

import json
from functools import partial

import onnx
import pytest
import torch
import trtexec_standin
from torch import nn

from deploypipe.algorithms.base import Problem
from deploypipe.backends.tensorrt import TensorRt
from deploypipe.backends.trt_hand import n_two_four, sparsity_verdict
from deploypipe.compact import compact, mask
from deploypipe.count import MacTable
from deploypipe.errors import BackendError, ModelError, UsageError
from deploypipe.export import export_onnx
from deploypipe.graph import trace
from deploypipe.pipeline import sparsify
from deploypipe.pipeline.hinting import hinted
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.sparsify import FOUND, ORDER, choice, named, patterned, proven, sparse_hooks, sparsified
from deploypipe.pipeline.valuing import choose
from deploypipe.plan import KeepPlan
from deploypipe.runners.local import Local
from deploypipe.saved import save_weights
from deploypipe.targets import Rates, Reach, load_target
from deploypipe.training.settings import TrainSettings
from deploypipe.two_four import holds

INPUTS = [(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
UNKNOWN = partial(choice, rates=Rates())  # whatever is eligible


def net(width=32):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 16, 3, padding=1), nn.Conv2d(16, 8, 1)]
    body = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(512, 8)).eval()


def test_eligible_weights_hold_the_pattern_and_the_given_model_is_left_alone():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse, found = sparsified(model, INPUTS, UNKNOWN)
    reasons = {row["layer"]: row["reason"] for row in found["layers"]}
    assert [name for name, reason in reasons.items() if not reason] == ["3", "6", "10"]
    assert "3 input channels" in reasons["0"]
    for name in ("3.weight", "6.weight", "10.weight"):
        assert holds(sparse.get_parameter(name).detach().numpy())
    assert not holds(sparse.get_parameter("0.weight").detach().numpy())
    assert found["kept_magnitude"] <= found["kept_magnitude_permuted"] < 1
    assert found["permutation_error"] < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_zeros_stay_while_the_model_is_trained():
    sparse, _ = sparsified(net(), INPUTS, UNKNOWN)
    zeros = {name: p == 0 for name, p in sparse.named_parameters() if p.dim() >= 2}
    (hook,) = sparse_hooks("2:4", KeepPlan({}), sparse)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    sparse.train()
    for step in range(5):
        optimizer.zero_grad()
        sparse(INPUTS[0][0]).square().sum().backward()
        hook.on_batch_backward(sparse, step)
        optimizer.step()
        hook.on_step_end(sparse, step)
    for name, parameter in sparse.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name])
    assert sum(int(z.sum()) for z in zeros.values()) > 0
    assert sparse_hooks("", KeepPlan({}), sparse) == sparse_hooks("auto", KeepPlan({}), sparse) == ()
    assert len(sparse_hooks("auto", KeepPlan({}, two_four=("3",)), sparse)) == 1


def test_only_weights_in_the_pattern_are_frozen():
    sparse, _ = sparsified(net(), INPUTS, UNKNOWN)
    sparse.register_parameter("gate", nn.Parameter(torch.zeros(1, 8, 1, 1)))
    with torch.no_grad():
        sparse.get_parameter("0.weight")[0, 0, 0, 0] = 0
    (hook,) = sparse_hooks("2:4", KeepPlan({}), sparse)
    assert set(hook.masks) == {"3.weight", "6.weight", "10.weight"}


def test_with_known_rates_a_layer_stays_dense_where_the_pattern_saves_nothing():
    graph = trace(net(), INPUTS[0])
    slow = Rates("fp16", 0.01, "", 1000.0, "", 8, "", 0.0, "", 2.0)
    assert [found.layer for found in choice(graph, slow) if found.eligible] == ["3", "6", "10"]
    fast = Rates("fp16", 1000.0, "", 1.0, "", 8, "", 1e4, "", 2.0)
    kept = {found.layer: found.reason for found in choice(graph, fast)}
    assert kept["3"] == "estimated to save nothing"
    with pytest.raises(ModelError, match="no layer can hold the 2:4 pattern"):
        sparsified(net(), INPUTS, partial(choice, rates=fast))


def test_with_a_choice_exactly_the_layers_of_the_plan_get_the_pattern():
    model = net()
    sparse, found = sparsified(model, INPUTS, partial(named, layers=("6",)))
    held = [name for name, p in sparse.named_parameters() if p.dim() >= 2 and holds(p.detach().numpy())]
    assert held == ["6.weight"]
    reasons = {row["layer"]: row["reason"] for row in found["layers"]}
    assert reasons["6"] == ""
    assert "better choice" in reasons["3"]
    assert "3 input channels" in reasons["0"]


def test_while_planning_the_pattern_is_put_in_as_it_will_be_run():
    model, example = net(), INPUTS[0]
    assert patterned(model, example, "", KeepPlan({}), Rates()) is model
    assert patterned(model, example, "auto", KeepPlan({}), Rates()) is model
    for pattern, plan, names in (("2:4", KeepPlan({}), ["3", "6", "10"]), ("auto", KeepPlan({}, two_four=("3",)), ["3"])):
        made = patterned(model, example, pattern, plan, Rates())
        held = [name for name, p in made.named_parameters() if p.dim() >= 2 and holds(p.detach().numpy())]
        assert held == [f"{name}.weight" for name in names]
    assert not holds(model.get_parameter("3.weight").detach().numpy()), "the given model is left alone"


@pytest.mark.parametrize(("width", "verdict"), [(32, "chose them for 0: 2:4 gave nothing here"), (64, "chose them for 1")])
def test_the_builder_s_evidence_becomes_a_verdict(width, verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    program = trtexec_standin.install(tmp_path / "bin", (10, 3, 0))
    target = load_target("jetson").replace(via="local", tool=str(program))
    sparse, _ = sparsified(nn.Sequential(*list(net(width))[:9]).eval(), INPUTS, UNKNOWN)
    path = export_onnx(sparse, INPUTS[0], tmp_path / "model.onnx", 18).path
    backend = TensorRt()
    (sentence,) = backend.read_build(Local(Reach()).run(backend.build_job(path, target), tmp_path / "out"))
    assert sentence.startswith("TensorRT found 2 layers that could use sparse kernels")
    assert sentence.endswith(verdict)
    assert onnx.load(str(path)).graph.initializer


@pytest.mark.parametrize(
    ("version", "gpu", "verdict"),
    [
        ((10, 3, 0), "Xavier", "Xavier (compute capability 7.2) has no sparse tensor cores: 2:4 gives nothing on it"),
        ((8, 6, 1), trtexec_standin.GPU, "chose them for 0: 2:4 gave nothing here"),
    ],
)
def test_a_gpu_that_cannot_use_the_pattern_is_named(version, gpu, verdict, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    program = trtexec_standin.install(tmp_path / "bin", version, gpu)
    target = load_target("jetson").replace(via="local", tool=str(program))
    sparse, _ = sparsified(nn.Sequential(*list(net())[:9]).eval(), INPUTS, UNKNOWN)
    path = export_onnx(sparse, INPUTS[0], tmp_path / "model.onnx", 18).path
    backend = TensorRt()
    (sentence,) = backend.read_build(Local(Reach()).run(backend.build_job(path, target), tmp_path / "out"))
    assert sentence.endswith(verdict)


def test_weights_with_the_pattern_are_counted_along_their_inputs(tmp_path):
    dense, (sparse, _) = net(), sparsified(net(), INPUTS, UNKNOWN)
    counts = [n_two_four(onnx.load(str(export_onnx(m, INPUTS[0], tmp_path / "m.onnx", 18).path))) for m in (dense, sparse)]
    assert counts == [0, 3]


def test_without_the_pattern_there_is_nothing_to_say():
    assert sparsity_verdict({"sparse_found": 0, "sparse_chose": 0}) == sparsity_verdict({}) == ()
    assert sparsity_verdict({"gpu": "Xavier", "capability": "7.2", "sparse_found": 0}) == ()


def test_with_the_pattern_silence_is_no_answer():
    """An engine for which the builder found nothing, or said nothing, is not one that uses the pattern."""
    (none,) = sparsity_verdict({"two_four": 2, "sparse_found": 0, "capability": "8.7"})
    assert none == (
        "the 2:4 pattern is in 2 weights, and TensorRT found no layer that could use sparse kernels: 2:4 gave nothing here"
    )
    (silent,) = sparsity_verdict({"two_four": 1, "capability": ""})
    assert silent.startswith("the 2:4 pattern is in 1 weight, and TensorRT says nothing about sparse kernels")
    (old,) = sparsity_verdict({"two_four": 1, "gpu": "Xavier", "capability": "7.2", "sparse_found": 5, "sparse_chose": 0})
    assert "no sparse tensor cores" in old
    (chosen,) = sparsity_verdict({"two_four": 1, "gpu": "A", "capability": "10.0", "sparse_found": 1, "sparse_chose": 1})
    assert chosen == "TensorRT found 1 layer that could use sparse kernels and chose them for 1"


def test_a_method_that_chooses_widths_itself_cannot_weigh_a_choice(tmp_path):
    model = net()
    graph = trace(model, INPUTS[0])
    problem = Problem(model, graph, MacTable(), 0.6 * MacTable().predict(graph))
    with pytest.raises(UsageError, match=r"'erk' chooses widths itself[\s\S]*--set widths=shares"):
        choose(Request(algo="erk", sparsity="auto"), problem, None, tmp_path)
    assert choose(Request(algo="erk", sparsity="2:4"), problem, None, tmp_path).two_four == ()
    assert choose(Request(algo="l2", sparsity="auto"), problem, None, tmp_path).certificate.two_four == ()


def test_a_pattern_that_was_lost_on_the_way_is_never_reported(tmp_path):
    """In what fine-tuning left, and in the exported file: by exact zeros, however small what stands there instead."""
    sparse, found = sparsified(net(), INPUTS, UNKNOWN)
    (tmp_path / FOUND).write_text(json.dumps(found))
    weights = [row["weight"] for row in found["layers"] if not row["reason"]]
    save_weights(sparse, tmp_path / "tuned.safetensors")
    export_onnx(sparse, INPUTS[0], tmp_path / "pruned.onnx", 18)
    assert proven(tmp_path, weights) == ("tuned.safetensors", "pruned.onnx")
    assert proven(tmp_path, []) == ()
    weight = sparse.get_parameter(weights[1])
    place = tuple((weight == 0).nonzero()[0].tolist())
    with torch.no_grad():
        weight[place] = 1e-30
    export_onnx(sparse, INPUTS[0], tmp_path / "pruned.onnx", 18)
    with pytest.raises(BackendError, match=rf"error: {weights[1]} should hold the 2:4 pattern and does not") as caught:
        proven(tmp_path, weights)
    assert caught.value.at.endswith("pruned.onnx")
    save_weights(sparse, tmp_path / "tuned.safetensors")
    with pytest.raises(BackendError) as caught:
        proven(tmp_path, weights)
    assert caught.value.at.endswith("tuned.safetensors")


class Positions(nn.Module):
    """Linear layers on channels-last images: the exporter writes their weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 64), nn.Linear(64, 32)
        self.square, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        y = self.conv(x).permute(0, 2, 3, 1)
        return self.head(self.square(y + self.down(torch.relu(self.up(y)))).mean((1, 2)))


def test_the_pattern_is_found_in_weights_that_are_exported_the_other_way_round(tmp_path):
    torch.manual_seed(0)
    sparse, found = sparsified(Positions().eval(), INPUTS, UNKNOWN)
    weights = [row["weight"] for row in found["layers"] if not row["reason"]]
    assert {"up.weight", "down.weight", "square.weight"} <= set(weights)
    save_weights(sparse, tmp_path / "tuned.safetensors")
    export_onnx(sparse, INPUTS[0], tmp_path / "pruned.onnx", 18)
    assert proven(tmp_path, weights) == ("tuned.safetensors", "pruned.onnx")
    with torch.no_grad():
        sparse.square.weight.copy_(sparse.square.weight.T.clone())  # along the other axis
    export_onnx(sparse, INPUTS[0], tmp_path / "pruned.onnx", 18)
    with pytest.raises(BackendError, match=r"square\.weight should hold"):
        proven(tmp_path, weights)


def test_fine_tuning_learns_the_channels_that_were_put_into_another_order(monkeypatch, tmp_path):
    """Before the pattern is put in, each channel at the hint says what the masked model's says that it is compared with."""
    monkeypatch.setattr(sparsify, "_project", lambda model, weights: None)
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8)).eval()
    graph = trace(model, INPUTS[0])
    plan = KeepPlan({"0": tuple(range(0, 32, 2)), "2": tuple(range(16, 64))})
    small = compact(model, graph, plan)
    moved, found = sparsified(small, INPUTS, UNKNOWN)
    assert found[ORDER] != sorted(found[ORDER]), "nothing was moved: the test shows nothing"
    hint = hinted(None, model, graph, plan, TrainSettings(epochs=1), tmp_path, found[ORDER])
    said = []
    for network in (mask(model, graph, plan), moved):
        network.get_submodule(hint.module).register_forward_hook(lambda _module, _inputs, output: said.append(output.detach()))
        network(*INPUTS[0])
    torch.testing.assert_close(said[1], said[0][:, list(hint.channels)], rtol=1e-4, atol=1e-5)
