"""ADMM pruning (Zhang et al., ECCV 2018): its falsifiable tests on a network that learns."""

import copy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.compact import compact
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.batches import Data
from deploypipe.errors import BudgetError, NotApplicable
from deploypipe.graph import trace
from deploypipe.ingredients.projections import two_in_four
from deploypipe.ingredients.proximal import AdmmHook
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.ingredients.stacks import Stack
from deploypipe.pipeline.training import tuning_hooks
from deploypipe.plan import KeepPlan
from deploypipe.testing.problems import problem_of as problem_with
from deploypipe.training.evaluate import recalibrate
from deploypipe.training.masked import MaskedWeights
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph
from tests.toy_task import EVEN, accuracy, problem_of, toy_data, trained_net, trainer
from tests.toys import TOYS, Fn, cbr, conv, head

STRONG = {"train_epochs": 8, "rho": 0.3}  # 12 steps an epoch: a tenth of the usual number needs a stronger pull


class Gaps:
    """Hears the notes of an algorithm."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None: ...

    def advance(self, done: int, note: str = "") -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def with_training(task: Problem, seed: int = 0, **options: Any) -> Problem:
    """The problem after the method's own training, at a low learning rate."""
    return replace(task, model=make("admm", options).train(task, trainer(seed=seed, lr=0.02)))


@pytest.mark.parametrize("seed", [0, 1])
def test_right_after_projection_it_knows_more_than_one_shot_magnitude(seed: int) -> None:
    task = problem_of(trained_net(seed, EVEN), 0.12, ParamTable())
    one_shot = with_training(task, seed, scheme="unstructured", train_epochs=0).model
    pulled = with_training(task, seed, scheme="unstructured", **STRONG).model
    assert accuracy(pulled) > accuracy(one_shot) + 0.3
    assert accuracy(recalibrate(pulled, task.data)) > accuracy(recalibrate(one_shot, task.data)) + 0.2
    for model in (one_shot, pulled):
        assert 0.115 < NONZERO["params"](model, task.graph) / task.table.predict(task.graph) <= 0.12


def test_the_gap_falls_to_less_than_half_and_a_weak_pull_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    task, heard, hooks = problem_of(trained_net(widths=EVEN), 0.12, ParamTable()), Gaps(), list[AdmmHook]()

    def hook(*args: Any) -> AdmmHook:
        hooks.append(AdmmHook(*args))
        return hooks[-1]

    monkeypatch.setattr(import_module("deploypipe.algorithms.admm"), "AdmmHook", hook)
    with_training(replace(task, reporter=heard), scheme="unstructured", **STRONG)
    assert heard.notes == []
    strong = hooks[-1].admm.gaps
    assert len(strong) == 8
    assert strong[-1] < 0.5 * strong[0]
    with_training(replace(task, reporter=heard), scheme="unstructured", train_epochs=6, rho=1e-3, growth=1)
    assert len(heard.notes) == 1
    assert "raise rho" in heard.notes[0]
    weak = hooks[-1].admm.gaps
    assert weak[-1] > weak[0], "the pull adds up, and the weights do not follow"


@pytest.mark.parametrize("seed", [0, 1])
def test_channels_are_near_zero_before_they_go(seed: int) -> None:
    """Without renewing batch norms: a channel that a norm blows up again would change everything behind it."""
    task = problem_of(trained_net(seed, EVEN), 0.3)
    models = {}
    for name, options in {"one-shot": {"train_epochs": 0}, "admm": STRONG}.items():
        after = with_training(task, seed, **options)
        models[name] = compact(after.model, task.graph, make("admm", options).plan(after))
    assert accuracy(models["admm"]) > 0.95
    assert accuracy(models["admm"]) > accuracy(models["one-shot"]) + 0.3


def test_the_widths_of_the_plan_are_those_that_training_was_told() -> None:
    """Another sparsity in the last projection than in training is the trap; a smaller budget later cuts further."""
    task, method = problem_of(trained_net(widths=EVEN), 0.3), make("admm", STRONG)
    asked = {c.stack.name: c.keep.n for c in method._of_groups(task)}
    after = with_training(task, **STRONG)
    plan = method.plan(after)
    assert {name: len(plan.keep[name]) for name in asked} == asked
    tighter = method.plan(replace(after, budget=0.9 * task.budget))
    assert tighter.certificate is not None
    assert tighter.certificate.predicted <= 0.9 * task.budget
    assert all(set(tighter.keep[name]) <= set(plan.keep[name]) for name in asked)


def test_a_filter_has_the_scale_and_shift_of_its_norm_beside_it() -> None:
    """The trap: a filter alone is pulled to zero for nothing, because the norm behind it takes every scale back."""
    task = problem_of(trained_net(widths=EVEN))
    stacks = {s: Stack.of_group(task.graph, task.graph.group("1.0"), s) for s in ("filter", "channel")}
    assert {m.param for m in stacks["filter"].members} == {"1.0.weight", "1.1.weight", "1.1.bias"}
    assert {m.param for m in stacks["channel"].members} == {"2.0.weight"}
    assert stacks["filter"].read(dict(task.model.named_parameters())).shape == (16, 16 * 9 + 2)


@dataclass(frozen=True)
class Lone(MacTable):
    """MACs, but one group alone may be narrower."""

    def candidates(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        return {"1.0": (8,)}


def split_task() -> Problem:
    """The second layer makes channels 0 to 7 by small filters, the others by large ones; the third reads it the other way."""
    model = copy.deepcopy(trained_net(widths=EVEN))
    with torch.no_grad():
        for part in (model[1][0].weight, model[1][1].weight, model[1][1].bias):
            part[:8] *= 1e-2
        model[2][0].weight[:, 8:] *= 1e-2
    task = problem_of(model, 1.0, Lone())
    return replace(task, budget=task.table.predict(task.graph, KeepPlan.of_widths({"1.0": 8})))


class Still(Trainer):
    """No loss and no step: what the hooks do alone."""

    hooks: Any = ()

    def fit(self, model: nn.Module, epochs: int, hooks: Any = (), *args: Any, **changes: Any) -> nn.Module:
        model, self.hooks = copy.deepcopy(model), hooks
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for epoch in range(epochs):
            for hook in hooks:
                hook.on_batch_backward(model, epoch)
                hook.on_epoch_end(model, epoch)
        return model


@pytest.mark.parametrize(("scheme", "kept"), [("filter", range(8, 16)), ("channel", range(8))])
def test_channels_stay_by_what_makes_them_or_by_what_reads_them(scheme: str, kept: range) -> None:
    assert make("admm", {"scheme": scheme}).plan(split_task()).keep["1.0"] == tuple(kept)


@pytest.mark.parametrize(
    ("scheme", "params"), [("filter", {"1.0.weight", "1.1.weight", "1.1.bias"}), ("channel", {"2.0.weight"})]
)
def test_filters_are_pulled_where_they_are_made_and_channels_where_they_are_read(scheme: str, params: set[str]) -> None:
    """At the start by rho times the weight, where it is to become zero; what stays is left alone."""
    task, method = split_task(), make("admm", {"scheme": scheme, "train_epochs": 1, "rho": 0.5})
    kept = torch.tensor(method.plan(task).keep["1.0"])
    for name, parameter in method.train(task, Still(toy_data(), trainer().settings)).named_parameters():
        pull = 0.5 * parameter.detach() if name in params else torch.zeros_like(parameter)
        if name in params:
            pull.index_fill_(1 if scheme == "channel" else 0, kept, 0.0)
        torch.testing.assert_close(parameter.grad, pull)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_projections_are_as_many_epochs_apart_as_was_asked_for(every: int) -> None:
    still = Still(toy_data(), trainer().settings)
    make("admm", {"train_epochs": 6, "every": every}).train(split_task(), still)
    assert len(still.hooks[0].admm.gaps) == 6 // every


@pytest.mark.parametrize("scheme", ["filter", "channel"])
def test_the_joint_norm_decides_in_coupled_groups(scheme: str) -> None:
    """In the residual toy one layer's large filter is not outvoted by counting layers: norms add as squares."""
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    group = graph.group("stem.0")
    members = [m for m in group.members if (m.role == "consumes") == (scheme == "channel") and m.param not in graph.buffers]
    named = {name: p.detach() for name, p in model.named_parameters()}
    parts = (named[m.param].movedim(m.axis, 0).reshape(8, -1).square().sum(1).double() for m in members)
    squares = sum(parts)
    assert len([m for m in members if named[m.param].dim() > 1]) == {"filter": 2, "channel": 3}[scheme]
    torch.testing.assert_close(
        Stack.of_group(graph, group, scheme).norms(named), torch.as_tensor(squares).sqrt(), atol=1e-6, rtol=1e-5
    )


def test_two_in_four_holds_in_every_block_and_through_training() -> None:
    task, heard = problem_of(trained_net(widths=EVEN), 0.6, ParamTable()), Gaps()
    sparse = with_training(replace(task, reporter=heard), scheme="2:4", train_epochs=3, rho=0.3).model
    tuned = trainer().fit(sparse, 2, [MaskedWeights.of_zeros(sparse)])
    for model in (sparse, tuned):
        for layer in (model[1][0], model[2][0]):
            blocks = (layer.weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1)
            assert (blocks == 2).all()
            assert torch.equal(two_in_four(layer.weight), layer.weight != 0)
    assert not torch.equal(sparse[1][0].weight, tuned[1][0].weight)
    assert [note.split()[0] for note in heard.notes] == ["0.0.weight", "3.2.weight"]
    with pytest.raises(BudgetError, match="smallest reachable"):
        with_training(replace(task, budget=0.3 * task.table.predict(task.graph)), scheme="2:4")


def test_only_layers_with_sparse_kernels_get_the_pattern() -> None:
    """The weight of a transposed convolution is (in, out, ...): blocks along its second axis are not of inputs."""
    layers = [conv(3, 16), nn.ReLU(), conv(16, 12), conv(12, 16), conv(16, 16, groups=4), nn.ConvTranspose2d(16, 32, 2, 2)]
    model, heard = nn.Sequential(*layers, conv(32, 8), head(8)), Gaps()
    task = problem_with(model, (torch.randn(2, 3, 8, 8),), 1.0, table=ParamTable())
    sparse = with_training(replace(task, reporter=heard), scheme="2:4", train_epochs=0).model
    assert [note.split()[0] for note in heard.notes] == [*(f"{i}.weight" for i in (0, 2, 3, 4, 5)), "7.2.weight"]
    assert all((sparse[i].weight != 0).all() for i in (0, 2, 3, 4, 5))
    assert (sparse[6].weight == 0).sum() == (sparse[6].weight != 0).sum()


@pytest.mark.parametrize("scheme", ["filter", "unstructured"])
def test_a_budget_that_asks_for_nothing_is_no_reason_to_raise_rho(scheme: str) -> None:
    task, heard = problem_of(trained_net(widths=EVEN), 1.0, ParamTable()), Gaps()
    with_training(replace(task, reporter=heard), scheme=scheme, train_epochs=2)
    assert heard.notes == []


@pytest.mark.parametrize("table", [MacTable(), ParamTable()], ids=["macs", "params"])
def test_zeros_stay_through_momentum_and_decay(table: Any) -> None:
    task = problem_of(trained_net(widths=EVEN), 0.2, table)
    sparse = with_training(task, scheme="unstructured", train_epochs=2).model
    zeros = {name: p == 0 for name, p in sparse.named_parameters() if p.dim() >= 2}
    tuned = trainer(lr=0.2).fit(sparse, 2, [MaskedWeights.of_zeros(sparse)])
    assert all((dict(tuned.named_parameters())[name][zero] == 0).all() for name, zero in zeros.items())
    freed = trainer(lr=0.2).fit(sparse, 2)
    assert any((dict(freed.named_parameters())[name][zero] != 0).any() for name, zero in zeros.items())


def test_parameters_that_began_at_zero_learn_in_tuning() -> None:
    """Of layers as many weights as may stay; a gate is no layer's weight, and nothing pruned it."""
    torch.manual_seed(0)
    model = Fn(
        lambda m, x: m.head(F.relu(m.a(x) + m.gate * m.b(m.a(x)) + m.z(m.a(x)))),
        a=cbr(3, 8), b=cbr(8, 8), z=conv(8, 8, bias=False), gate=nn.Parameter(torch.zeros(1, 8, 1, 1)), head=head(8),
    )  # fmt: skip
    nn.init.zeros_(model.z.weight)
    task = problem_with(model, (torch.randn(2, 3, 8, 8),), 0.6, table=ParamTable())
    method = make("admm", {"scheme": "unstructured", "train_epochs": 0})
    own = Trainer(Data(task.data, task.data, ("a", "b"), "toy", None, ""), TrainSettings(lr=0.05, batch_size=32, distill=0.0))
    found = method.train(task, own)
    plan, n = method.plan(replace(task, model=found)), int((found.z.weight != 0).sum())
    assert 0 < n < found.z.weight.numel()
    tuned = own.fit(found, 2, tuning_hooks(method, task, found, plan))
    assert tuned.gate.abs().sum() > 0
    assert tuned.z.weight.abs().max() > 1e-6
    assert int((tuned.z.weight != 0).sum()) == n
    assert plan.certificate.predicted <= task.budget  # type: ignore[union-attr]


def test_the_plan_of_zeros_keeps_every_channel_and_counts_what_is_left() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.2)
    method = make("admm", {"scheme": "unstructured", "train_epochs": 0})
    after = replace(task, model=method.train(task, trainer()))
    plan = method.plan(after)
    assert dict(plan.keep) == {}
    assert plan.certificate is not None
    assert plan.certificate.predicted == pytest.approx(NONZERO["MACs"](after.model, task.graph))
    assert plan.certificate.predicted <= task.budget
    with pytest.raises(BudgetError, match="let the method train first"):
        method.plan(task)


def test_a_group_that_no_weight_makes_is_skipped() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    group = replace(graph.group("0.0"), members=tuple(m for m in graph.group("0.0").members if m.role == "carries"))
    with pytest.raises(NotApplicable, match="no weight makes"):
        Stack.of_group(graph, group, "filter")


def test_the_users_model_is_left_alone() -> None:
    task = problem_of(trained_net(widths=EVEN))
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with_training(task, train_epochs=1)
    with_training(replace(task, table=ParamTable()), scheme="unstructured", train_epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert isinstance(task.model, nn.Module)
    assert len(toy_data().train) == 600  # type: ignore[arg-type]
    assert np.isfinite(accuracy(task.model))
