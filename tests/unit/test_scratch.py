"""Rethinking the value of pruning (Liu et al., ICLR 2019): its falsifiable tests."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.scratch import epochs_b
from deploypipe.compact import compact
from deploypipe.count import macs
from deploypipe.errors import UsageError
from deploypipe.plan import KeepPlan
from deploypipe.reports.render_training import arms_section, gain_text
from deploypipe.reports.report import Arm
from deploypipe.training.fresh import fresh
from deploypipe.training.settings import TrainSettings
from tests.toy_task import net, pictures, problem_of, trained_net


def test_equal_computation_is_more_epochs_of_the_smaller_model() -> None:
    assert epochs_b(100, 100, 40) == 250
    assert epochs_b(90, 100, 40, cap=2) == 180
    problem = problem_of(net(), 0.4)
    plan = make("scratch-b").plan(problem)
    settings = make("scratch-b", {"train_epochs": 10}).schedule(TrainSettings(epochs=3), problem, plan)
    assert settings.epochs == round(10 * macs(problem.graph) / macs(problem.graph, plan)) > 20
    assert make("scratch-e").schedule(TrainSettings(epochs=3), problem, plan).epochs == 3


def test_fresh_weights_know_nothing_of_their_parents_and_keep_what_is_fixed() -> None:
    model = nn.Sequential(copy.deepcopy(trained_net()), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    model.register_parameter("scale", nn.Parameter(torch.arange(50.0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = fresh(model, 3)
    for name, value in new.state_dict().items():
        if value.dim() > 1 and not name.startswith("1."):
            correlation = np.corrcoef(value.flatten(), before[name].flatten())[0, 1]
            assert abs(correlation) < max(0.05, 4 / value.numel() ** 0.5)
    assert torch.equal(new[1].weight, before["1.weight"])
    assert sorted(new.scale.tolist()) == before["scale"].tolist()
    assert not torch.equal(new.scale, before["scale"])
    assert torch.equal(new[0][0][1].running_mean, torch.zeros(16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again, other = fresh(model, 3), fresh(model, 4)
    assert torch.equal(again[0][0][0].weight, new[0][0][0].weight)
    assert not torch.equal(other[0][0][0].weight, new[0][0][0].weight)


@pytest.mark.parametrize("name", ["scratch-e", "scratch-b"])
def test_the_run_itself_starts_from_weights_that_know_nothing_of_their_parents(name: str) -> None:
    problem = problem_of(copy.deepcopy(trained_net()), 0.4, seed=3)
    method = make(name)
    plan = method.plan(problem)
    small = compact(problem.model, problem.graph, plan)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    start = method.repair(small, problem, plan)
    for key, value in start.state_dict().items():
        assert value.shape == before[key].shape
        if value.dim() > 1:
            correlation = np.corrcoef(value.flatten(), before[key].flatten())[0, 1]
            assert abs(correlation) < max(0.05, 4 / value.numel() ** 0.5), key
    for norm in (start[0][1], start[1][1], start[2][1]):
        assert not norm.running_mean.any()
        assert (norm.weight == 1).all()
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    other = method.repair(small, replace(problem, seed=4), plan)
    assert not torch.equal(other[0][0].weight, start[0][0].weight)


def test_the_epochs_of_equal_computation_are_capped_in_the_run_and_beside_another_way() -> None:
    problem = problem_of(net(), 0.4)
    options = {"train_epochs": 10, "cap": 1.5}
    plan = make("l2").plan(problem)
    assert make("scratch-b", options).schedule(TrainSettings(epochs=3), problem, plan).epochs == 15
    rivals = make("scratch-e", options).rivals(TrainSettings(epochs=3), problem, plan)
    assert {rival.name: rival.settings.epochs for rival in rivals} == {"scratch-b": 15, "inherited": 3}


def test_inherited_weights_are_those_that_the_inner_method_would_tune() -> None:
    """Judged without its own repair, another method would look worse beside fresh weights than it is."""
    problem = replace(problem_of(copy.deepcopy(trained_net()), 0.4), data=pictures(64))
    method, inner = make("scratch-e", {"inner": "thinet"}), make("thinet")
    plan = KeepPlan({"0.0": tuple(range(8))})
    rivals = {rival.name: rival.start for rival in method.rivals(TrainSettings(epochs=1), problem, plan)}
    small = compact(problem.model, problem.graph, plan)
    for name, value in inner.repair(small, problem, plan).state_dict().items():
        torch.testing.assert_close(rivals["inherited"].state_dict()[name], value)
    assert not torch.allclose(rivals["inherited"][1][0].weight, small[1][0].weight)
    assert not torch.allclose(rivals["inherited"][1][0].weight, rivals["scratch-b"][1][0].weight)


def test_the_plan_is_that_of_the_inner_method() -> None:
    problem = problem_of(copy.deepcopy(trained_net()), 0.4)
    for inner in ("l2", "fpgm"):
        plan = make("scratch-e", {"inner": inner}).plan(problem)
        assert plan.keep == make(inner).plan(problem).keep
        assert (plan.algorithm, plan.options["inner"]) == ("scratch-e", inner)
    with pytest.raises(UsageError, match="option 'inner' cannot be 'scratch-b'"):
        make("scratch-e", {"inner": "scratch-b"})


@pytest.mark.parametrize("seeds", [1, 2])
def test_all_ways_train_the_same_architecture_with_the_full_learning_rate(seeds: int) -> None:
    problem, settings = problem_of(copy.deepcopy(trained_net()), 0.4), TrainSettings(epochs=4, lr=0.07, seed=5)
    method = make("scratch-e", {"seeds": seeds})
    plan = method.plan(problem)
    own = method.schedule(settings, problem, plan)
    rivals = method.rivals(settings, problem, plan)
    assert [(r.name, r.settings.seed) for r in rivals] == [
        (name, seed)
        for name in ("scratch-e", "scratch-b", "inherited")
        for seed in range(5, 5 + seeds)
        if (name, seed) != ("scratch-e", 5)
    ]
    small = compact(problem.model, problem.graph, plan)
    sizes = {sum(p.numel() for p in model.parameters()) for model in (small, *(rival.start for rival in rivals))}
    assert len(sizes) == 1
    assert {own.lr, *(rival.settings.lr for rival in rivals)} == {0.07}
    assert own.distill == 0
    by_name = {rival.name: rival for rival in rivals}
    assert by_name["inherited"].settings == replace(settings, seed=4 + seeds)
    assert torch.equal(by_name["inherited"].start[0][0].weight, small[0][0].weight)
    assert not torch.equal(by_name["scratch-b"].start[0][0].weight, small[0][0].weight)
    assert not make("scratch-e", {"compare": False}).rivals(settings, problem, plan)


def test_no_gain_is_named_without_two_seeds() -> None:
    one = [Arm("scratch-e", 0, 10, 100, 0.91), Arm("inherited", 0, 10, 100, 0.90)]
    assert "One seed says nothing" in gain_text(one)
    assert "Gain" not in arms_section(one, 1000)
    two = [*one, Arm("scratch-e", 1, 10, 100, 0.93), Arm("inherited", 1, 10, 100, 0.90)]
    assert gain_text(two) == "Gain of scratch-e: +2.00 points over inherited."
    assert "92.00 % ± 1.41 (standard deviation of seeds)" in arms_section(two, 1000)
    assert "One seed" in gain_text([*two, Arm("scratch-b", 0, 25, 100, 0.95)])
