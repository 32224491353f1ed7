"""DCP and DKP (Zhuang et al., NeurIPS 2018; Liu et al., TPAMI 2021): orders, allocation, kernels, repair."""

import copy
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms import make
from deploypipe.algorithms.stages import Stages
from deploypipe.compact import compact, difference, run
from deploypipe.count import MacTable, ParamTable
from deploypipe.errors import BudgetError, UsageError
from deploypipe.ingredients.density import prices
from deploypipe.ingredients.heads import AuxiliaryLoss, Listening
from deploypipe.ingredients.projections import project
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.plan import KeepPlan
from deploypipe.testing.problems import AlgorithmCase
from deploypipe.testing.problems import problem_of as problem_with
from deploypipe.training.evaluate import recalibrate
from deploypipe.training.masked import MaskedWeights
from tests.toy_task import EVEN, accuracy, net, problem_of, trained_net, trainer
from tests.toys import Fn, conv, head

QUICK: dict[str, Any] = {"train_epochs": 0, "images": 128, "heads": 1, "parts": 4}


def judged(task: Any, plan: KeepPlan) -> float:
    return accuracy(recalibrate(compact(task.model, task.graph, plan), task.data))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_channels_that_it_takes_first_know_more_than_others(seed: int) -> None:
    task, orders = problem_of(trained_net(seed, EVEN)), dict[str, Any]()
    taken = replace(task, allocator=lambda p, o, v: _whole(p, o, orders))
    make("dcp", {**QUICK, "images": 600, "parts": 8}).plan(taken)
    first, last = ({name: order[part].tolist() for name, order in orders.items()} for part in (slice(8), slice(-8, None)))
    rng = np.random.default_rng(0)
    others = [{name: rng.choice(16, 8, replace=False).tolist() for name in orders} for _ in range(5)]
    found, worst, *chance = (
        judged(task, KeepPlan({n: tuple(sorted(c)) for n, c in k.items()})) for k in (first, last, *others)
    )
    assert found > worst + 0.2
    assert found > np.mean(chance) + 0.1


def _whole(task: Any, found: Any, into: dict[str, Any]) -> Any:
    """An allocator that only remembers the orders."""
    from deploypipe.allocation.allocate import unproved  # noqa: PLC0415

    into.update(found)
    kept = task.graph.kept()
    return kept, unproved(task.graph, kept, task.table, 1e12, 0.0, "test")


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_allocator_gets_a_falling_loss_and_the_plan_is_within_the_budget(share: float) -> None:
    task, seen = problem_of(trained_net(widths=EVEN), share), {}

    def look(p: Any, orders: Any, values: Any) -> Any:
        seen.update(values)
        return problem_allocator(p, orders, values)

    problem_allocator = task.allocator
    plan = make("dcp", QUICK).plan(replace(task, allocator=look))
    assert plan.certificate is not None
    assert plan.certificate.predicted <= task.budget
    assert set(seen) == {"0.0", "1.0", "2.0"}
    for values in seen.values():
        assert len(values) == 17
        assert values[0] == pytest.approx(-1)
        assert (np.diff(values) >= 0).all()
        assert values[-1] > -0.9


def test_each_layer_is_judged_by_the_next_classifier() -> None:
    task = problem_of(trained_net(widths=EVEN))
    stages = Stages(task, 2, 64, 1.0)
    assert list(stages._heads) == ["0.0.weight", "1.0.weight"]
    losses = {weight: stages.loss(task.model, [weight]) for weight in ("0.0.weight", "1.0.weight", "2.0.weight")}
    assert [loss.head[0] if loss.head else None for loss in losses.values()] == ["0.0.weight", "1.0.weight", None]
    both = stages.loss(task.model, ["0.0.weight", "2.0.weight"])
    assert both.head is None
    value = sum(float(v.detach()) * share for v, share in losses["2.0.weight"].losses(task.model))
    inputs, labels = stages._inputs, stages._labels
    expected = torch.nn.functional.cross_entropy(task.model(inputs), labels)
    assert value == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-6)  # nothing cut: no error of outputs


def test_a_classifier_on_a_shortcut_does_not_judge_the_branch_beside_it() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = F.relu(m.a(x))
        return m.head(m.end2(F.relu(m.end(F.relu(m.short(x) + m.b(y))))))

    torch.manual_seed(0)
    parts = {"stem": conv(3, 8), "a": conv(8, 8), "short": conv(8, 8), "b": conv(8, 8), "end": conv(8, 8), "end2": conv(8, 8)}
    stages = Stages(problem_of(Fn(f, **parts, head=head(8))), 1, 64, 1.0)
    assert list(stages._heads) == ["short.weight"]
    model = stages._problem.model
    judges = {name: stages.loss(model, [f"{name}.weight"]).head for name in ("stem", "a", "short", "b")}
    assert {name: found[0] if found else None for name, found in judges.items()} == {
        "stem": "short.weight",
        "a": None,  # the shortcut is called later, but sees nothing of it
        "short": "short.weight",
        "b": None,
    }


def test_a_layer_is_heard_before_a_relu_in_place_overwrites_its_output() -> None:
    """Without a norm between them: the error of outputs, its gradient and the classifiers are those of the layer itself."""
    x, labels, heard = torch.randn(8, 3, 6, 6), torch.arange(8) % 2, []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace), nn.Conv2d(5, 4, 3), nn.ReLU(inplace), nn.Flatten())
        listening, hook = Listening(model, ["0.weight", "2.weight"]), AuxiliaryLoss("2.weight", 4, 2, 0)
        with listening():
            listening.run(x)
        hook.on_train_begin(model)
        loss = hook.on_loss(model, model(x).square().mean(), labels)
        loss.backward()
        hook.on_train_end(model)
        heard.append([listening.outputs["0.weight"][0], listening.outputs["2.weight"][0], loss, model[0].weight.grad])
    assert (heard[1][0] < 0).any()
    for plain, overwritten in zip(*heard, strict=True):
        torch.testing.assert_close(overwritten, plain, rtol=0, atol=0)


def test_stages_train_the_model_in_parts_of_the_epochs() -> None:
    task, own = problem_of(trained_net(widths=EVEN)), trainer()
    model = make("dcp", {**QUICK, "train_epochs": 3, "heads": 2}).train(task, own)
    assert own.n_epochs == 3
    assert accuracy(model) > 0.95
    assert set(model.state_dict()) == set(task.model.state_dict())
    none = trainer()
    make("dcp", {**QUICK, "train_epochs": 2, "heads": 0}).train(task, none)
    assert none.n_epochs == 2


def test_repair_lowers_the_error_of_the_outputs() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.4)
    method = make("dcp", QUICK)
    plan = method.plan(task)
    small = compact(task.model, task.graph, plan)
    mended = method.repair(small, task, plan)
    x = task.data.tensors[0][:200]  # type: ignore[union-attr]
    with torch.no_grad():
        wanted, before, after = task.model(x), small(x), mended(x)
    assert (after - wanted).square().mean() < 0.7 * (before - wanted).square().mean()


def test_weights_without_a_module_get_no_classifier_and_stay_whole() -> None:
    torch.manual_seed(0)
    used = Fn(
        lambda m, x: m.head(F.relu(m.b(F.relu(F.conv2d(F.relu(m.a(x)), m.w))))),
        a=conv(3, 8), w=nn.Parameter(torch.randn(8, 8, 3, 3)), b=conv(8, 6), head=head(6),
    )  # fmt: skip
    task = problem_with(used, (torch.randn(2, 3, 8, 8),), 0.8)
    options = {"train_epochs": 1, "images": 32, "heads": 2, "parts": 2}
    plan = make("dcp", options).plan(AlgorithmCase(make("dcp", options)).learned(task))
    assert set(plan.keep) == {"w", "b"}
    assert plan.skipped == {"a": "w is read by no plain convolution or linear layer"}
    model = AlgorithmCase(make("dkp", options)).learned(task).model
    stays = (model.w != 0).flatten(1)
    assert (stays.all(1) | ~stays.any(1)).all(), "but for filters that nobody reads any more"
    assert (model.b.weight == 0).any()


def test_needs_data_and_a_budget_that_can_be_reached() -> None:
    task = problem_of(trained_net(widths=EVEN))
    with pytest.raises(UsageError, match="needs data"):
        make("dcp").plan(replace(task, data=None))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("dcp").plan(replace(task, budget=1.0))


# --- kernels


def kernels(model: Any, weight: str) -> int:
    return int((dict(model.named_parameters())[weight].detach().flatten(2) != 0).any(2).sum())


def test_as_many_kernels_stay_as_were_asked_for_and_they_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem_of(trained_net(widths=EVEN), 0.4, ParamTable())
    method = make("dkp", QUICK)
    monkeypatch.setattr(sys.modules["deploypipe.algorithms.dkp"], "silenced", lambda model, graph: model)
    asked = method.kernels(task)
    assert list(asked) == ["0.0.weight", "1.0.weight", "2.0.weight"]
    model = method.train(task, trainer())
    assert {weight: kernels(model, weight) for weight in asked} == asked
    shares = [n / np.prod(task.graph.shapes[weight][:2]) for weight, n in asked.items()]
    assert max(shares) - min(shares) < 0.03
    assert 0.39 < NONZERO["params"](model, task.graph) / task.table.predict(task.graph) <= 0.4


def test_a_column_of_kernels_without_survivors_takes_its_filter_along() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.12, MacTable())
    model = make("dkp", {**QUICK, "lambda_": 0.0}).train(task, trainer())
    empty = (model[2][0].weight == 0).all(3).all(2).all(0)
    if not empty.any():
        pytest.fail("the budget was meant to be hard enough to empty a column")
    assert (model[1][0].weight[empty] == 0).all()
    assert NONZERO["MACs"](model, task.graph) <= task.budget


@pytest.mark.slow
def test_selected_kernels_know_more_than_the_largest_and_stay_zero_in_tuning() -> None:
    method, gains = make("dkp", {**QUICK, "images": 600, "parts": 8, "lambda_": 0.1}), []
    for seed in (1, 0):
        task = problem_of(trained_net(seed, EVEN), 0.3, ParamTable())
        selected, largest = method.train(task, trainer()), trainer().fit(task.model, 0)
        with torch.no_grad():
            for weight, n in method.kernels(task).items():
                parameter = dict(largest.named_parameters())[weight]
                parameter.copy_(project(parameter, "kernel", n))
        gains.append(accuracy(recalibrate(selected, task.data)) - accuracy(recalibrate(largest, task.data)))
    assert min(gains) > 0
    assert np.mean(gains) > 0.02
    tuned = trainer(lr=0.1).fit(selected, 1, [MaskedWeights.of_zeros(selected)])
    assert NONZERO["params"](tuned, task.graph) <= task.budget
    assert accuracy(tuned) > 0.9
    assert prices(task.model, task.graph, "params").dense == task.table.predict(task.graph)


def test_the_model_of_the_user_is_left_alone() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.4)
    before = run(task.model, task.graph.example)
    make("dkp", QUICK).train(task, trainer())
    make("dcp", QUICK).plan(task)
    assert difference(before, run(task.model, task.graph.example)) == 0
    assert all(p.requires_grad and p.grad is None for p in task.model.parameters())


def test_parameters_that_the_user_froze_stay_frozen() -> None:
    task = problem_of(copy.deepcopy(trained_net(widths=EVEN)), 0.4)
    task.model.get_parameter("0.0.weight").requires_grad_(False)
    model = make("dkp", QUICK).train(task, trainer())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.0.weight"]


# --- what decides


def told(task: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the orders and values that the allocator of DCP gets."""
    seen: list[dict[str, Any]] = []
    allocator = task.allocator

    def asked(p: Any, orders: Any, values: Any) -> Any:
        seen.extend([dict(orders), dict(values)])
        return allocator(p, orders, values)

    make("dcp", {"images": 32, "heads": 0, "parts": 2, **options}).plan(replace(task, allocator=asked))
    return seen[0], seen[1]


def mislabelled(task: Any) -> Any:
    images, labels = task.data.tensors
    return replace(task, data=TensorDataset(images, (labels + 1) % 4))


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_labels_matter_by_the_weight_of_the_classifiers_loss(lambda_: float) -> None:
    task = problem_of(net(widths=EVEN), 0.5)
    first, second = (told(each, lambda_=lambda_)[1] for each in (task, mislabelled(task)))
    for name, values in first.items():
        assert np.allclose(values, second[name], atol=1e-6) == (lambda_ == 0)


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_labels_matter_to_kernels_by_the_weight_of_the_classifiers_loss(lambda_: float) -> None:
    task = problem_of(net(widths=EVEN), 0.5, ParamTable())
    method = make("dkp", {"train_epochs": 0, "images": 32, "heads": 0, "parts": 2, "lambda_": lambda_})
    first, second = (method.train(each, trainer()).state_dict() for each in (task, mislabelled(task)))
    assert all(torch.equal(first[name], second[name]) for name in first) == (lambda_ == 0)


def test_channels_that_have_joined_adapt_and_make_up_for_those_that_have_not() -> None:
    """The first half is the same at every learning rate; what it loses of the outputs is not."""
    task = problem_of(net(widths=(8, 8, 8)), 0.5)
    still, adapted = (told(task, lr=lr, images=128, lambda_=0.0) for lr in (0.0, 0.01))
    gains = []
    for name, values in still[1].items():
        assert set(still[0][name][:4]) == set(adapted[0][name][:4])
        assert values[8] == pytest.approx(0.0, abs=1e-6)
        gains.append(adapted[1][name][4] - values[4])
    assert min(gains) > 0
    assert np.mean(gains) > 0.03


@pytest.mark.parametrize("silent", ["a", "b"])
def test_the_outputs_of_every_layer_that_reads_a_group_count(silent: str) -> None:
    """One of two readers has only a bias, so that nothing can be lost in its output."""
    torch.manual_seed(0)
    parts = {"stem": conv(3, 8), "a": conv(8, 6), "b": conv(8, 6)}
    model = Fn(lambda m, x: m.head(F.relu(m.a(y := F.relu(m.stem(x))) + m.b(y))), **parts, head=head(6))
    with torch.no_grad():
        model.get_submodule(silent).weight.zero_()
    _, values = told(problem_of(model, 0.8), lambda_=1e-6, lr=0.0, parts=8)
    assert values["stem"][0] == pytest.approx(-1.0)
    assert values["stem"][-1] == pytest.approx(0.0, abs=1e-3)


def test_kernels_are_selected_for_the_outputs_of_the_model_before_any_went(monkeypatch: pytest.MonkeyPatch) -> None:
    task, losses = problem_of(net(widths=EVEN), 0.4, ParamTable()), dict[str, Any]()
    loss = Stages.loss

    def spied(self: Stages, baseline: nn.Module, layers: Any) -> Any:
        losses[layers[0]] = loss(self, baseline, layers)
        return losses[layers[0]]

    monkeypatch.setattr(Stages, "loss", spied)
    make("dkp", {**QUICK, "heads": 0, "images": 32}).train(task, trainer())
    assert list(losses) == ["0.0.weight", "1.0.weight", "2.0.weight"]
    for weight, found in losses.items():
        met: list[Tensor] = []
        layer = copy.deepcopy(task.model).eval()
        layer.get_submodule(weight.removesuffix(".weight")).register_forward_hook(lambda m, args, out, met=met: met.append(out))
        with torch.no_grad():
            layer(found.inputs)
        torch.testing.assert_close(torch.cat([outputs[0] for outputs in found.wanted]), met[0].clone())


def test_kernels_are_those_of_the_model_that_was_trained_with_classifiers() -> None:
    task, own = problem_of(net(widths=EVEN), 0.5, ParamTable()), trainer(100)
    model = make("dkp", {**QUICK, "images": 32, "train_epochs": 2, "lr": 0.0}).train(task, own)
    assert own.n_epochs == 2
    for weight in ("0.0.weight", "1.0.weight", "2.0.weight"):
        left = model.get_parameter(weight) != 0
        assert left.any()
        assert (model.get_parameter(weight) != task.model.get_parameter(weight))[left].float().mean() > 0.9


def test_stages_run_from_the_first_classifier_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    task, own, heads = problem_of(net(widths=EVEN)), trainer(), list[tuple[str, int]]()

    def spied(model: nn.Module, epochs: int, hooks: Any = (), *args: Any, **changes: Any) -> nn.Module:
        heads.append((hooks[0].key, epochs))
        return model

    monkeypatch.setattr(own, "fit", spied)
    make("dcp", {"train_epochs": 5, "heads": 2}).train(task, own)
    assert [(key.split(",")[0], epochs) for key, epochs in heads] == [("head on 0.0.weight", 2), ("head on 1.0.weight", 3)]


def test_outputs_to_keep_are_those_in_evaluation_mode_whatever_mode_the_model_is_in() -> None:
    task = problem_of(net(widths=EVEN))
    busy = copy.deepcopy(task.model).train()
    before = {name: buffer.clone() for name, buffer in busy.named_buffers()}
    wanted = [Stages(replace(task, model=m), 1, 32, 1.0).loss(m, ["1.0.weight"]).wanted[0][0] for m in (task.model, busy)]
    torch.testing.assert_close(wanted[1], wanted[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in busy.named_buffers())
    assert busy.training
