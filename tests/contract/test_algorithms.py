"""What every algorithm owes the pipeline, over every row of the table: contracts C1 to C8 and C10."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from deploypipe.algorithms import ALGORITHMS, INFO, algorithms, make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.catalogue_learners import LEARNERS
from deploypipe.algorithms.options import options_of
from deploypipe.compact import compact, mask
from deploypipe.count import MacTable, ParamTable, macs, params
from deploypipe.data.load import Data
from deploypipe.errors import BudgetError, UsageError
from deploypipe.export import export_onnx
from deploypipe.graph import trace
from deploypipe.pipeline.training import trained
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainSettings
from tests.toys import TOYS

NETS = ["plain", "residual", "depthwise", "concat"]
EVERY = pytest.mark.parametrize("name", sorted(ALGORITHMS))
LEARNS = pytest.mark.parametrize("name", sorted(LEARNERS))
SPARSE = sorted(name for name in ALGORITHMS if getattr(make(name), "sparse", False))
CUTTING = pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(SPARSE)))
EVERYWHERE = pytest.mark.parametrize("net", NETS)
FAST = {
    "admm": {"train_epochs": 2, "rho": 0.3},
    "autocompress": {"rounds": 2, "train_epochs": 2, "evaluations": 4, "images": 16, "norm_images": 16},
    "autoslim": {"train_epochs": 1, "images": 16, "norm_images": 16},
    "dcff": {"train_epochs": 2},
    "dcp": {"train_epochs": 1, "heads": 1, "images": 48, "parts": 2},
    "dkp": {"train_epochs": 1, "heads": 1, "images": 48, "parts": 2},
    "lth": {"rounds": 2, "train_epochs": 1},
    "depgraph": {"train_epochs": 1, "steps": 2},
    "fpgm": {"train_epochs": 1},
    "random-search": {"n": 3, "tolerance": 0.2, "images": 16, "norm_images": 16},
    "scp": {"train_epochs": 1},
    "smcp": {"train_epochs": 1, "every": 1},
    "slimming": {"train_epochs": 1},
    "taylor": {"steps": 2, "interval": 2, "batch": 16},
    "halp": {"steps": 2, "interval": 2, "batch": 16},
    "netadapt": {"reduction": 0.1, "images": 16, "norm_images": 16},
    "thinet": {"images": 48, "locations": 5},
}


SHARE = {("dcff", "se_block"): 0.995}  # all but two thin layers make their channels together with others: they stay whole


class Selection(Dataset[Any]):
    """Selection data that remembers what was read."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs, self.read = inputs, set[int]()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.add(index)
        return self.inputs[index], index % 2


def inputs_like(example: Tensor, n: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, *example.shape[1:], generator=torch.Generator().manual_seed(seed))


def task(net: str, share: float = 0.5, seed: int = 0, table: MacTable | ParamTable | None = None) -> Problem:
    torch.manual_seed(0)
    model, example = TOYS[net]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # beta and running mean that a forgotten entry would betray
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.3, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    graph, table = trace(model.eval(), example), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), Selection(inputs_like(example[0])), seed)


def algorithm(name: str) -> Any:
    return make(name, FAST.get(name, {}))


def learned(name: str, problem: Problem, precision: str = "fp32") -> Problem:
    """What planning starts from: the model after one epoch, if the method trains before it plans."""
    method = algorithm(name)
    if not hasattr(method, "train"):
        return problem
    assert problem.data is not None
    data = Data(problem.data, problem.data, ("a", "b"), "toy", None, "toy")
    settings = TrainSettings(lr=0.01, batch_size=32, seed=problem.seed, precision=precision)
    return dataclasses.replace(problem, model=trained(method, problem, data, settings)[0])


@functools.cache
def solved(name: str, net: str) -> tuple[Problem, KeepPlan]:
    """The problem as planning meets it, and the plan: made once for all tests, which leave both alone."""
    problem = learned(name, task(net, SHARE.get((name, net), 0.5)))
    return problem, algorithm(name).plan(problem)


def finished(name: str, problem: Problem, plan: KeepPlan) -> nn.Module:
    """Compacted, and repaired where the method does."""
    method, small = algorithm(name), compact(problem.model, problem.graph, plan)
    return method.repair(small, problem, plan) if hasattr(method, "repair") else small


@EVERY
def test_no_option_is_called_like_what_the_pipeline_looks_for(name: str) -> None:
    options = {field.name for field in dataclasses.fields(make(name))}
    assert not options & {"plan", "train", "repair", "schedule", "hooks", "rivals", "sparse"}


@CUTTING
@EVERYWHERE
def test_c1_masked_equals_sliced(name: str, net: str) -> None:
    problem, plan = solved(name, net)
    x = inputs_like(problem.graph.example[0], 64, seed=1)
    with torch.no_grad():
        masked = mask(problem.model, problem.graph, plan)(x)
        sliced = compact(problem.model, problem.graph, plan)(x)
        dense = task(net).model(x)
    assert (masked - sliced).abs().max() <= 1e-5 * dense.abs().max()
    assert macs(problem.graph, plan) < macs(problem.graph)
    if not hasattr(algorithm(name), "train"):  # training may have left the channels dead that are cut
        assert (dense - sliced).abs().max() > 1e-3 * dense.abs().max()


@CUTTING
@EVERYWHERE
def test_c2_no_group_is_emptied_under_the_hardest_budget(name: str, net: str) -> None:
    problem, _ = solved(name, net)
    with pytest.raises(BudgetError) as caught:
        algorithm(name).plan(dataclasses.replace(problem, budget=1.0))
    smallest = float(caught.value.message.split("cost is ")[1].split(" ")[0].replace(",", ""))
    plan = algorithm(name).plan(dataclasses.replace(problem, budget=smallest))
    assert min(len(channels) for channels in plan.keep.values()) >= 1
    out = compact(problem.model, problem.graph, plan)(problem.graph.example[0])
    assert torch.isfinite(out).all()


@CUTTING
@EVERYWHERE
def test_c3_members_are_cut_alike_and_parameters_are_slices(name: str, net: str) -> None:
    problem, plan = solved(name, net)
    small = compact(problem.model, problem.graph, plan).state_dict()
    for param, tensor in problem.model.state_dict().items():
        expected = tensor
        for axis in range(tensor.dim()):
            stays = np.ones(tensor.shape[axis], bool)
            for group, member in problem.graph.cuts(param, axis):
                stays &= (member.owner < 0) | np.isin(member.owner, plan.keep.get(group.name, range(group.size)))
            expected = expected.index_select(axis, torch.from_numpy(np.flatnonzero(stays)))
        assert torch.equal(small[param], expected)


@CUTTING
@pytest.mark.parametrize(
    ("net", "table"),
    [*((net, MacTable(multiple=1)) for net in NETS), ("residual", ParamTable(multiple=1))],
    ids=[*NETS, "residual-params"],
)
def test_c4_c10_counted_cost_is_within_the_budget(name: str, net: str, table: MacTable | ParamTable) -> None:
    problem = learned(name, task(net, 0.6, table=table))
    plan = algorithm(name).plan(problem)
    small = finished(name, problem, plan)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        small(*problem.graph.example)
    n_macs, n_params = counter.get_total_flops() // 2, sum(p.numel() for p in small.parameters())
    assert (macs(problem.graph, plan), params(problem.graph, plan)) == (n_macs, n_params)
    assert (n_macs if table.unit == "MACs" else n_params) <= problem.budget
    assert plan.certificate is not None
    assert plan.certificate.predicted == table.predict(problem.graph, plan)


@EVERY
@pytest.mark.parametrize("net", ["residual", "depthwise"])
def test_c5_same_seed_same_plan_whatever_happened_before(name: str, net: str) -> None:
    first = algorithm(name).plan(learned(name, task(net, seed=3)))
    problem = task(net, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = algorithm(name).plan(learned(name, problem))
    assert torch.equal(torch.get_rng_state(), state)
    timeless = [dataclasses.replace(plan.certificate, seconds=0) for plan in (first, second) if plan.certificate]
    assert timeless[0] == timeless[1]
    assert first.replace(certificate=None).to_json() == second.replace(certificate=None).to_json()


@LEARNS
@EVERYWHERE
def test_training_changes_weights_and_leaves_plain_modules(name: str, net: str) -> None:
    problem = task(net)
    after = learned(name, problem).model
    assert [type(module) for module in after.modules()] == [type(module) for module in problem.model.modules()]
    assert not [m for m in after.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    changed = [key for key, p in after.named_parameters() if not torch.equal(p, problem.model.get_parameter(key))]
    assert len(changed) > 4
    assert make(name, {"train_epochs": 1}).train_epochs == 1
    assert "training" in INFO[name].needs


@pytest.mark.parametrize("name", sorted(name for name in ALGORITHMS if hasattr(make(name), "train")))
def test_training_in_half_precision_gives_single_precision_weights(name: str) -> None:
    after = learned(name, task("residual"), "bf16").model
    assert {tensor.dtype for tensor in after.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.state_dict().values())


@EVERY
def test_the_model_is_left_as_it_was(name: str) -> None:
    problem = task("residual")
    problem.model.train()
    before = {key: tensor.clone() for key, tensor in problem.model.state_dict().items()}
    after = learned(name, problem)
    plan = algorithm(name).plan(after)
    finished(name, after, plan)
    assert all(torch.equal(tensor, before[key]) for key, tensor in problem.model.state_dict().items())
    assert all(module.training for module in problem.model.modules())
    assert all(p.grad is None and p.requires_grad for p in problem.model.parameters())


@EVERY
@EVERYWHERE
def test_c6_parameters_are_trainable_tensors_of_their_own(name: str, net: str) -> None:
    problem, plan = solved(name, net)
    small = finished(name, problem, plan).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    small(*problem.graph.example).square().sum().backward()
    optimizer.step()
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None, key
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    theirs = {parameter.data_ptr() for parameter in problem.model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in small.parameters())


@EVERY
@EVERYWHERE
def test_c7_nothing_but_plain_modules_is_left(name: str, net: str) -> None:
    problem, plan = solved(name, net)
    small = finished(name, problem, plan)
    assert [type(module) for module in small.modules()] == [type(module) for module in task(net).model.modules()]
    assert not [m for m in small.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize(("name", "net"), [("scp", "residual"), ("thinet", "residual"), *(("l2", net) for net in NETS)])
def test_c7_exported_without_gates_and_equal(name: str, net: str, tmp_path: Path) -> None:
    """Plain modules (the test before) export alike, whatever method chose the widths: a few methods, one on every net."""
    problem, plan = solved(name, net)
    small = finished(name, problem, plan).eval()
    example = problem.graph.example
    export_onnx(small, example, tmp_path / "small.onnx")
    proto = onnx.load(tmp_path / "small.onnx")
    dense_ops = {"Where", "Gather", "Mul", "ScatterND", "GatherND"}
    assert not [node.op_type for node in proto.graph.node if node.op_type in dense_ops]
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    x = example[0]
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, small(x).numpy(), atol=1e-4, rtol=1e-4)


@EVERY
def test_c8_only_selection_data_is_read_and_only_if_declared(name: str) -> None:
    problem = task("plain")
    assert not hasattr(problem, "test")
    plan = algorithm(name).plan(learned(name, problem))
    read = problem.data.read  # type: ignore[union-attr]
    assert bool(read) == ("data" in INFO[name].needs)
    if not read:
        blind = algorithm(name).plan(dataclasses.replace(problem, data=None))
        assert blind.keep == plan.keep


@EVERY
def test_labels_are_read_only_if_declared(name: str) -> None:
    problem = task("plain")
    inputs = problem.data.inputs  # type: ignore[union-attr]
    plans = []
    for labels in (torch.zeros(len(inputs)).long(), torch.arange(len(inputs)) % 4):
        labelled = dataclasses.replace(problem, data=TensorDataset(inputs, labels))
        plans.append(algorithm(name).plan(learned(name, labelled)).keep)
    assert "labels" in INFO[name].needs or plans[0] == plans[1]


@CUTTING
def test_plans_are_signed_and_survive_the_disk(name: str, tmp_path: Path) -> None:
    problem, plan = solved(name, "residual")
    assert plan.algorithm == name
    assert plan.options == dataclasses.asdict(algorithm(name))
    assert plan.fingerprint == problem.graph.fingerprint
    assert set(plan.keep) | set(plan.skipped) == {group.name for group in problem.graph.prunable}
    plan.check(problem.graph)
    plan.save(tmp_path / "plan.json")
    loaded = KeepPlan.load(tmp_path / "plan.json")
    assert loaded.to_json() == plan.to_json()
    assert loaded.keep == plan.keep


@EVERY
def test_described_truthfully(name: str) -> None:
    method, info = make(name), INFO[name]
    assert info.name == method.name == name
    assert info.options == options_of(type(method))
    document = sys.modules[type(method).__module__].__doc__ or ""
    assert info.paper.split(",")[0] in document
    assert info.paper.rsplit("arXiv:", 1)[1] in document
    assert algorithms()[name]["year"] == info.year


@EVERY
def test_options_are_typed_and_bounded(name: str) -> None:
    for option in options_of(type(make(name))):
        assert make(name, {option.name: str(option.default)}) == make(name)
        wrong = ["maybe", "nan", *([str(option.low - 1)] if option.low is not None else [])]
        for text in wrong:
            with pytest.raises(UsageError, match=option.name) as caught:
                make(name, {option.name: text})
            assert str(option.default) in caught.value.fix
    with pytest.raises(UsageError, match="no option 'nonsense'"):
        make(name, {"nonsense": 1})


def test_nearest_names_are_offered() -> None:
    with pytest.raises(UsageError, match="did you mean 'thinet'"):
        make("thinnet")
    with pytest.raises(UsageError, match="did you mean 'images'"):
        make("thinet", {"image": 5})
    assert make("thinet", {"images": "100"}).images == 100


def test_listing_needs_no_torch() -> None:
    code = "import sys; from deploypipe.algorithms import algorithms; algorithms(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert set(INFO) == set(ALGORITHMS)


@CUTTING
@pytest.mark.parametrize("net", ["se_block", "fixed_shortcut"])
def test_squeeze_and_excitation_and_fixed_weights_are_pruned_or_told_why_not(name: str, net: str) -> None:
    problem, plan = solved(name, net)
    assert problem.table.predict(problem.graph, plan) <= problem.budget
    assert all(plan.skipped.values())
    assert dict(problem.model.named_buffers()).keys() == dict(task(net).model.named_buffers()).keys()
    fixed = [key for key in dict(problem.model.named_buffers()) if key.endswith("weight")]
    assert all(torch.equal(problem.model.get_buffer(key), task(net).model.get_buffer(key)) for key in fixed)
    x = inputs_like(problem.graph.example[0], 8, seed=1)
    with torch.no_grad():
        masked, sliced = mask(problem.model, problem.graph, plan)(x), compact(problem.model, problem.graph, plan)(x)
    assert (masked - sliced).abs().max() <= 1e-5 * masked.abs().max()
