"""Contracts that every pruning algorithm must keep, for the tests of whoever writes one: ours run them, and so can yours.

    import pytest
    from deploypipe.algorithms import make
    from deploypipe.testing.algorithms import AlgorithmCase, contracts_of

    CASE = AlgorithmCase(make("mine", {"train_epochs": 1}), needs=("data",))
    CONTRACTS = contracts_of(CASE)

    @pytest.mark.parametrize("name", CONTRACTS)
    def test_algorithm(name):
        CONTRACTS[name](CASE)

Each is tried on small networks of one kind or of each: plain, residual, depthwise, concat. One that is broken raises
AssertionError and says what was expected. Nothing here needs pytest.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from deploypipe.algorithms.options import options_of, parse_options
from deploypipe.compact import compact
from deploypipe.count import MacTable, ParamTable, macs, params
from deploypipe.errors import BudgetError, UsageError
from deploypipe.export import export_onnx
from deploypipe.plan import KeepPlan
from deploypipe.testing.problems import AlgorithmCase, equal_when_masked, inputs_like, only_plain, problem_on
from deploypipe.testing.toys import NETS

DENSE_OPS = {"Where", "Gather", "Mul", "ScatterND", "GatherND"}  # what masks and gates would leave in an exported model


def masked_equals_sliced(case: AlgorithmCase, net: str) -> None:
    """C1: the compacted model computes what the masked one does; something was removed, and the output shows it."""
    problem, plan = case.solved(net)
    equal_when_masked(problem, plan)
    assert macs(problem.graph, plan) < macs(problem.graph), "nothing was removed"
    if not case.trains:  # training may have left the channels dead that are cut
        x = inputs_like(problem.graph.example[0], 64, seed=1)
        with torch.no_grad():
            dense, sliced = problem.model(x), compact(problem.model, problem.graph, plan)(x)
        assert (dense - sliced).abs().max() > 1e-3 * dense.abs().max(), "what was removed had no part in the output"


def no_group_is_emptied(case: AlgorithmCase, net: str) -> None:
    """C2: out of reach is an error that names the smallest reachable cost; that can be had, with every group alive."""
    problem, _ = case.solved(net)
    try:
        plan = case.plan(dataclasses.replace(problem, budget=1.0))
    except BudgetError as error:
        message = error.message
    else:
        raise AssertionError(f"a budget of 1 {problem.table.unit} was accepted, with {dict(plan.keep)}")
    named = re.search(r"smallest reachable cost (?:found )?is ([\d,.e+]+) ", message)
    assert named, f"the smallest reachable cost is not named: {message}"
    plan = case.plan(dataclasses.replace(problem, budget=float(named[1].replace(",", ""))))
    assert min(len(channels) for channels in plan.keep.values()) >= 1, "a group has no channel left"
    assert torch.isfinite(compact(problem.model, problem.graph, plan)(problem.graph.example[0])).all()


def parameters_are_slices(case: AlgorithmCase, net: str) -> None:
    """C3: members of a group are cut alike, and what is left of each parameter is a slice of it."""
    problem, plan = case.solved(net)
    small = compact(problem.model, problem.graph, plan).state_dict()
    for param, tensor in problem.model.state_dict().items():
        expected = tensor
        for axis in range(tensor.dim()):
            stays = np.ones(tensor.shape[axis], bool)
            for group, member in problem.graph.cuts(param, axis):
                stays &= (member.owner < 0) | np.isin(member.owner, plan.keep.get(group.name, range(group.size)))
            expected = expected.index_select(axis, torch.from_numpy(np.flatnonzero(stays)))
        assert torch.equal(small[param], expected), f"{param} is no slice"


def macs_are_within_the_budget(case: AlgorithmCase, net: str) -> None:
    """C4, C10: multiply-adds of the finished model, counted on itself, are what the plan says, and within the budget."""
    _counted(case, net, MacTable(multiple=1))


def parameters_are_within_the_budget(case: AlgorithmCase, net: str) -> None:
    """C4, C10: the same of parameters."""
    _counted(case, net, ParamTable(multiple=1))


def _counted(case: AlgorithmCase, net: str, table: MacTable | ParamTable) -> None:
    problem = case.learned(problem_on(net, 0.6, table=table))
    plan = case.plan(problem)
    small = case.finished(problem, plan)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        small(*problem.graph.example)
    n_macs, n_params = counter.get_total_flops() // 2, sum(p.numel() for p in small.parameters())
    counted = n_macs if problem.table.unit == "MACs" else n_params
    assert (macs(problem.graph, plan), params(problem.graph, plan)) == (n_macs, n_params), "the plan says something else"
    assert counted <= problem.budget, f"{counted} {problem.table.unit} of {problem.budget}"
    assert plan.certificate is not None, "a plan has a certificate"
    assert plan.certificate.predicted == problem.table.predict(problem.graph, plan), "the certificate states another cost"


def same_seed_same_plan(case: AlgorithmCase, net: str) -> None:
    """C5: the same seed gives the same plan whatever was drawn before, and the global state of chance is left alone."""
    first = case.plan(case.learned(problem_on(net, seed=3)))
    problem = problem_on(net, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        state = torch.get_rng_state()
        second = case.plan(case.learned(problem))
        assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    timeless = [dataclasses.replace(plan.certificate, seconds=0) for plan in (first, second) if plan.certificate]
    assert timeless[0] == timeless[1], "certificates differ"
    assert first.replace(certificate=None).to_json() == second.replace(certificate=None).to_json(), "plans differ"


def training_leaves_plain_modules(case: AlgorithmCase, net: str) -> None:
    """Training before planning changes weights, and leaves the same modules without hooks; its length is an option."""
    problem = problem_on(net)
    after = case.learned(problem).model
    only_plain(after, problem.model)
    assert "training" in case.needs, "it says that it needs no training"
    assert "train_epochs" in {option.name for option in options_of(type(case.method))}, "how long it trains is no option"
    changed = [key for key, p in after.named_parameters() if not torch.equal(p, problem.model.get_parameter(key))]
    assert len(changed) > 4 or not case.method.train_epochs, "nothing was trained"


def renumbered_channels_are_declared(case: AlgorithmCase, net: str) -> None:
    """Before it has trained the channels are those of the given model, or the method says that they are not (`renumbered`)."""
    if case.cuts and {option.low for option in options_of(type(case.method)) if option.name == "train_epochs"} == {0}:
        problem = problem_on(net)
        after = AlgorithmCase(dataclasses.replace(case.method, train_epochs=0)).learned(problem).model
        weight = next(name for name, p in problem.model.named_parameters() if p.dim() == 4)
        now, before = after.get_parameter(weight).detach(), problem.model.get_parameter(weight).detach()
        left = now != 0  # a method may cut, and train a little in between, all the same
        kept = bool(torch.cosine_similarity(now[left], before[left], dim=0) > 0.9)
        assert kept != getattr(case.method, "renumbered", False), "say with `renumbered` whether channels stay what they were"


def half_precision_leaves_single_precision(case: AlgorithmCase, net: str) -> None:
    """Training with products in bfloat16 gives weights in single precision."""
    after = case.learned(problem_on(net), "bf16").model
    floats = [tensor for tensor in after.state_dict().values() if tensor.is_floating_point()]
    kinds = {tensor.dtype for tensor in floats}
    assert kinds == {torch.float32}, f"weights are {kinds}"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in floats), "weights are not finite"


def the_model_is_left_as_it_was(case: AlgorithmCase, net: str) -> None:
    """The user's model: weights, mode, gradients."""
    problem = problem_on(net)
    problem.model.train()
    before = {key: tensor.clone() for key, tensor in problem.model.state_dict().items()}
    after = case.learned(problem)
    case.finished(after, case.plan(after))
    changed = [key for key, tensor in problem.model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert not changed, f"these were changed: {changed}"
    assert all(module.training for module in problem.model.modules()), "its mode was changed"
    assert all(p.grad is None and p.requires_grad for p in problem.model.parameters()), "gradients were left in it"


def parameters_are_trainable_and_their_own(case: AlgorithmCase, net: str) -> None:
    """C6: the finished model can be trained, and shares no memory with the user's."""
    problem, plan = case.solved(net)
    small = case.finished(problem, plan).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    small(*problem.graph.example).square().sum().backward()
    optimizer.step()
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None, f"{key} cannot be trained"
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape, key
    theirs = {parameter.data_ptr() for parameter in problem.model.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in small.parameters()), "memory is shared"


def only_plain_modules_are_left(case: AlgorithmCase, net: str) -> None:
    """C7: the finished model consists of the same modules, without hooks."""
    problem, plan = case.solved(net)
    only_plain(case.finished(problem, plan), problem_on(net).model)


def exported_without_gates_and_equal(case: AlgorithmCase, net: str) -> None:
    """C7: exported, it computes the same, and nothing of masks or gates is in the file."""
    problem, plan = case.solved(net)
    exported_equal(case.finished(problem, plan).eval(), problem.graph.example)


def exported_equal(small: nn.Module, example: tuple[Any, ...]) -> None:
    """Assert that a model without masks and gates exports as such, to what computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.onnx"
        export_onnx(small, example, file)
        found = {node.op_type for node in onnx.load(file).graph.node} & DENSE_OPS
        assert not found, f"left in the exported model: {found}"
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        output = session.run(None, {session.get_inputs()[0].name: example[0].numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(output, small(*example).numpy(), atol=1e-4, rtol=1e-4)


def only_declared_data_is_read(case: AlgorithmCase, net: str) -> None:
    """C8: selection data is read if the method says that it needs it, and only then."""
    problem, reads = problem_on(net), "data" in case.needs
    plan = case.plan(case.learned(problem))
    read = problem.data.read  # type: ignore[union-attr]
    assert bool(read) == reads, f"{len(read)} samples were read, and it needs {case.needs or 'nothing'}"
    if not reads:
        assert case.plan(dataclasses.replace(problem, data=None)).keep == plan.keep, "without data the plan is another"


def only_declared_labels_are_read(case: AlgorithmCase, net: str) -> None:
    """C8: other labels, other plan, only if the method says that it needs labels."""
    problem, plans = problem_on(net), []
    inputs = inputs_like(problem.graph.example[0])
    for labels in (torch.zeros(len(inputs)).long(), torch.arange(len(inputs)) % 4):
        labelled = dataclasses.replace(problem, data=TensorDataset(inputs, labels))
        plans.append(case.plan(case.learned(labelled)).keep)
    assert "labels" in case.needs or plans[0] == plans[1], f"labels decide, and it needs {case.needs or 'nothing'}"


def plans_are_signed_and_survive_the_disk(case: AlgorithmCase, net: str) -> None:
    """A plan names the method, its options and the graph, and a reason for each group that it leaves whole."""
    problem, plan = case.solved(net)
    assert plan.algorithm == case.method.name, f"it is signed by '{plan.algorithm}'"
    assert plan.options == dataclasses.asdict(case.method), "it states other options"
    assert plan.fingerprint == problem.graph.fingerprint, "it was made for another graph"
    groups = {group.name for group in problem.graph.prunable}
    assert set(plan.keep) | set(plan.skipped) == groups, "a group is neither kept nor skipped"
    assert all(plan.skipped.values()), "a group is left whole without a reason"
    plan.check(problem.graph)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        loaded = KeepPlan.load(Path(folder) / "plan.json")
    assert (loaded.to_json(), loaded.keep) == (plan.to_json(), plan.keep), "the disk changes it"


def options_are_typed_and_bounded(case: AlgorithmCase) -> None:
    """Options are fields of a frozen dataclass with type, default and limits; anything else is refused, with the way out."""
    made = type(case.method)
    for option in options_of(made):
        assert made(**parse_options(made.name, {option.name: str(option.default)}, options_of(made))) == made()
        for text in ("maybe", "nan", *([str(option.low - 1)] if option.low is not None else [])):
            message, fix = _refusal(made, option.name, text)
            assert option.name in message, f"{option.name}={text} was accepted, or the message does not name it: {message}"
            assert str(option.default) in fix, f"what would be right is not shown: {fix}"


def _refusal(made: Any, option: str, text: str) -> tuple[str, str]:
    """Return how a value of an option is refused: message and fix, both empty if it is not."""
    try:
        made(**parse_options(made.name, {option: text}, options_of(made)))
    except UsageError as error:
        return error.message, error.fix
    return "", ""


Contract = Callable[[AlgorithmCase], None]


def _on(nets: Mapping[str, object] | tuple[str, ...], *contracts: Callable[..., None]) -> dict[str, Contract]:
    return {f"{contract.__name__}-{net}": partial(contract, net=net) for contract in contracts for net in nets}


ANY: Mapping[str, Contract] = {
    options_are_typed_and_bounded.__name__: options_are_typed_and_bounded,
    **_on(NETS, parameters_are_trainable_and_their_own, only_plain_modules_are_left),
    **_on(("residual", "depthwise"), same_seed_same_plan),
    **_on(("residual",), the_model_is_left_as_it_was),
    **_on(("plain",), only_declared_data_is_read, only_declared_labels_are_read),
}
CUTTING: Mapping[str, Contract] = {
    **_on(NETS, masked_equals_sliced, no_group_is_emptied, parameters_are_slices, macs_are_within_the_budget),
    **_on(
        ("residual",), parameters_are_within_the_budget, exported_without_gates_and_equal, plans_are_signed_and_survive_the_disk
    ),
}
TRAINING: Mapping[str, Contract] = {
    **_on(NETS, training_leaves_plain_modules),
    **_on(("residual",), half_precision_leaves_single_precision, renumbered_channels_are_declared),
}


def contracts_of(case: AlgorithmCase) -> dict[str, Contract]:
    """Return the contracts of an algorithm of its kind, by name: whether it cuts channels, whether it trains first."""
    return {**ANY, **(CUTTING if case.cuts else {}), **(TRAINING if case.trains else {})}
