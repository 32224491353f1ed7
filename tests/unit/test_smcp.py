"""SMCP (Humble et al., ECCV 2022): its falsifiable tests."""

import copy
import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.smcp import Smcp, SoftMasking, input_importance, schedule
from deploypipe.compact import masked_slots
from deploypipe.count import MacTable
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.training.masked import MaskedWeights
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph
from tests.toy_task import net, pictures, problem_of, toy_data, trained_net

SETTINGS = TrainSettings(lr=0.05, batch_size=50, distill=0.0)
KEPT = KeepPlan({"0.0": tuple(range(0, 16, 2))})


def masked_gradient(soft: bool) -> tuple[nn.Module, nn.Module]:
    """A model after one backward pass under a mask, and one whose weights really are zero there."""
    model = copy.deepcopy(trained_net()).eval()
    problem = problem_of(model)
    zeroed = copy.deepcopy(model)
    named = dict(zeroed.named_parameters())
    with torch.no_grad():
        for name, axis, slots in masked_slots(problem.graph, KEPT):
            named[name].index_fill_(axis, slots, 0.0)
    x, y = pictures(100).tensors
    F.cross_entropy(zeroed(x), y).backward()
    if soft:
        hook = SoftMasking(make("smcp", {"decay": 0}), problem, [])
        hook.plan = KEPT
        hook.on_train_begin(model)
        F.cross_entropy(model(x), y).backward()
        hook.on_batch_backward(model, 0)
    else:
        hard = MaskedWeights.of_zeros(zeroed)
        hard.apply(model)
        F.cross_entropy(model(x), y).backward()
        hard.on_batch_backward(model, 0)
    return model, zeroed


def test_the_gradient_goes_straight_through_the_soft_mask_and_not_through_a_hard_one() -> None:
    model, zeroed = masked_gradient(soft=True)
    odd = slice(1, None, 2)
    torch.testing.assert_close(model[1][0].weight.grad, zeroed[1][0].weight.grad)
    assert model[1][0].weight.grad[:, odd].abs().max() > 0
    torch.testing.assert_close(model[1][0].weight, trained_net()[1][0].weight), "and the full weights are back"
    hard, _ = masked_gradient(soft=False)
    assert not hard[1][0].weight.grad[:, odd].any()


@dataclass(frozen=True)
class Only(MacTable):
    """MACs, but one group alone may have one other width."""

    choice: tuple[str, int] = ("1.0", 18)

    def candidates(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        return {self.choice[0]: (self.choice[1],)}


def redecided(soft: bool, steps: int = 50) -> tuple[int, ...]:
    """The channels of the second layer that stay after training with one of them masked, and one new choice.

    Half of its 24 channels are dead and read by small weights; number 5, which the loss wants, starts with smaller ones yet.
    """
    model = copy.deepcopy(trained_net()).train()
    with torch.no_grad():
        model[1][1].weight[12:] = model[1][1].bias[12:] = 0.0
        model[2][0].weight[:, 12:] *= 0.01
        model[2][0].weight[:, 5] *= 1e-3
    task = problem_of(copy.deepcopy(model), 1.0, Only())
    problem = replace(task, budget=task.table.predict(task.graph, KeepPlan.of_widths({"1.0": 18})))
    method = make("smcp", {"decay": 0})
    first = method.plan(problem).keep["1.0"]
    assert 5 not in first, "at first it is masked"
    hook = SoftMasking(method, problem, [steps - 1])
    hook.plan = KeepPlan({"1.0": first})
    mask = {"2.0.weight": torch.ones(32, 24, 3, 3).index_fill(1, torch.tensor([c for c in range(24) if c not in first]), 0.0)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard: TrainHook = hook if soft else MaskedWeights(mask)
    guard.on_train_begin(model)
    for step in range(steps):
        x, y = pictures(100, seed=step).tensors
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        guard.on_batch_backward(model, step)
        optimizer.step()
        guard.on_step_end(model, step)
    return hook.plan.keep["1.0"] if soft else method.plan(replace(problem, model=model)).keep["1.0"]


def test_an_important_channel_that_was_masked_by_mistake_comes_back() -> None:
    """Nothing passes the masked channel, and yet the next choice takes it; behind a hard mask it stays lost."""
    assert 5 in redecided(soft=True)
    assert 5 not in redecided(soft=False)


def test_masked_weights_that_the_loss_does_not_want_decay_geometrically() -> None:
    model = copy.deepcopy(trained_net()).train()
    problem = problem_of(copy.deepcopy(trained_net()))
    hook = SoftMasking(make("smcp", {"decay": 0.5}), problem, [])
    hook.plan = KEPT
    weight = model[1][0].weight
    start = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in range(10):
        weight.grad = torch.zeros_like(weight)
        hook.on_batch_backward(model, step)
        optimizer.step()
    torch.testing.assert_close(weight.detach()[:, 1::2], start[:, 1::2] * 0.95**10)
    assert torch.equal(weight.detach()[:, ::2], start[:, ::2])


def test_importance_is_of_all_readers_signed_before_the_absolute_value() -> None:
    model = trained_net()
    group = problem_of(copy.deepcopy(model)).graph.group("0.0")
    worth = {"1.0.weight": torch.randn(24, 16, 3, 3, generator=torch.Generator().manual_seed(0))}
    expected = worth["1.0.weight"].sum((0, 2, 3)).abs().double()
    torch.testing.assert_close(input_importance(group, worth), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("importance", "kept"), [("magnitude", range(12, 24)), ("taylor", range(12))])
def test_channels_are_chosen_by_their_weights_or_by_what_the_loss_would_lose(importance: str, kept: range) -> None:
    """Large weights whose products with their gradients cancel lose nothing."""
    model = copy.deepcopy(trained_net())
    task = problem_of(copy.deepcopy(model), 1.0, Only(choice=("1.0", 12)))
    problem = replace(task, budget=task.table.predict(task.graph, KeepPlan.of_widths({"1.0": 12})))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model[2][0].weight
    with torch.no_grad():
        weight[:, :12], weight[:, 12:] = 0.01, 1.0
        weight.grad[:, :12], weight.grad[:16, 12:], weight.grad[16:, 12:] = 1.0, 5.0, -5.0
    hook = SoftMasking(make("smcp", {"importance": importance, "decay": 0}), problem, [0])
    hook.on_batch_backward(model, 0)
    assert hook.plan.keep["1.0"] == tuple(kept)


class Hundred(Trainer):
    """Goes through a hundred steps and learns nothing."""

    at = -1

    def n_steps(self, epochs: int) -> int:
        return 100

    def fit(self, model: nn.Module, epochs: int, hooks: Any = (), *args: Any, **changes: Any) -> nn.Module:
        model = copy.deepcopy(model)
        for self.at in range(100):
            for hook in hooks:
                hook.on_batch_backward(model, self.at)
        return model


@pytest.mark.parametrize(
    ("warmup", "cooldown", "every", "steps"),
    [(0.2, 0.3, 10, [20, 30, 40, 50, 60]), (0.0, 0.0, 25, [0, 25, 50, 75]), (0.5, 0.1, 20, [50, 70])],
)
def test_choices_begin_after_the_warm_up_and_end_before_the_cool_down(
    warmup: float, cooldown: float, every: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what separates their budgets from one to the next, each has the same share less than the one before."""
    problem, found = problem_of(net(), 0.5), list[tuple[int, float]]()
    trainer = Hundred(toy_data(), SETTINGS)

    def chosen(method: Smcp, asked: Problem, worth: object) -> KeepPlan:
        found.append((trainer.at, asked.budget))
        return KeepPlan({})

    monkeypatch.setattr(Smcp, "chosen", chosen)
    make("smcp", {"warmup": warmup, "cooldown": cooldown, "every": every}).train(problem, trainer)
    assert [step for step, _ in found] == steps
    dense = problem.table.predict(problem.graph)
    falls = -np.diff([dense, *(budget for _, budget in found)])
    assert falls.sum() == pytest.approx(dense - problem.budget)
    assert falls[1:] / falls[:-1] == pytest.approx(np.full(len(steps) - 1, np.exp(-0.05)))


def test_the_choice_is_the_best_knapsack_and_keeps_at_least_one_channel() -> None:
    problem = problem_of(net(widths=(4, 5, 3)), 0.45)
    worth = {name: weight.abs() for name, weight in weights(problem.model).items()}
    plan = make("smcp").chosen(problem, worth)
    curves = {}
    for group in problem.graph.prunable:
        ordered = np.sort(input_importance(group, worth).numpy())[::-1]
        curves[group.name] = np.concatenate([[0.0], np.cumsum(ordered)])
    best = max(
        sum(curves[name][w] for name, w in zip(curves, widths, strict=True))
        for widths in itertools.product(*(range(1, len(curve)) for curve in curves.values()))
        if problem.table.predict(problem.graph, KeepPlan.of_widths(dict(zip(curves, widths, strict=True)))) <= problem.budget
    )
    found = sum(curves[name][len(kept)] for name, kept in plan.keep.items())
    assert found == pytest.approx(best, rel=2e-3)


def test_the_budget_falls_to_the_one_asked_for_and_the_last_masks_are_the_plan() -> None:
    assert [schedule(t, 8) for t in range(9)] == sorted(schedule(t, 8) for t in range(9))
    assert (schedule(0, 8), schedule(8, 8)) == (0.0, 1.0)
    problem, costs = problem_of(net(), 0.5), []
    method = make("smcp", {"train_epochs": 3, "every": 10})
    trainer = Trainer(toy_data(), SETTINGS)
    fit = trainer.fit
    hooks: list[SoftMasking] = []

    def spied(model, epochs, given=(), **changes):  # type: ignore[no-untyped-def]
        hooks.extend(given)
        choose = given[0]._options.__class__.chosen

        def chosen(self, asked, worth):  # type: ignore[no-untyped-def]
            plan = choose(self, asked, worth)
            costs.append((asked.budget, asked.table.predict(asked.graph, plan)))
            return plan

        given[0]._options.__class__.chosen = chosen
        try:
            return fit(model, epochs, given, **changes)
        finally:
            given[0]._options.__class__.chosen = choose

    trainer.fit = spied  # type: ignore[method-assign]
    model = method.train(problem, trainer)
    budgets = [budget for budget, _ in costs]
    assert len(budgets) >= 3
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == pytest.approx(problem.budget)
    assert all(cost <= budget for budget, cost in costs)
    plan = method.plan(replace(problem, model=model))
    assert plan.keep == hooks[0].plan.keep
    for name, axis, slots in masked_slots(problem.graph, plan):
        assert not model.get_parameter(name).index_select(axis, slots).any()


@pytest.mark.parametrize(("warmup", "cooldown"), [(1.0, 0.3), (1.0, 0.0), (0.99, 1.0)])
def test_a_warm_up_that_fills_the_training_ends_with_a_choice(warmup: float, cooldown: float) -> None:
    """Else nothing is masked while training, and channels go that the others have never been without."""
    problem, trainer = problem_of(net(), 0.5), Trainer(toy_data(), SETTINGS)
    method = make("smcp", {"train_epochs": 1, "warmup": warmup, "cooldown": cooldown})
    model = method.train(problem, trainer)
    plan = method.plan(replace(problem, model=model))
    slots = masked_slots(problem.graph, plan)
    assert sum(len(at) for _, _, at in slots) > 0
    assert not any(model.get_parameter(name).index_select(axis, at).any() for name, axis, at in slots)
