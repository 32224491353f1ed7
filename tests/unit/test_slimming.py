"""Network Slimming (Liu et al., ICCV 2017): its falsifiable tests."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.slimming import ScalePenalty, scale_sums
from deploypipe.errors import NotApplicable
from deploypipe.graph import trace
from deploypipe.ingredients.gates import norms_of
from deploypipe.training.evaluate import evaluate
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph
from tests.toy_task import net, problem_of, toy_data, trained_net
from tests.toys import TOYS, head

SETTINGS = TrainSettings(lr=0.05, batch_size=50, distill=0.0)


def scales(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def slimmed(reach: float, epochs: int = 5) -> tuple[nn.Module, float]:
    start = net()
    for gamma in scales(start):
        nn.init.constant_(gamma, 0.5)
    method = make("slimming", {"reach": reach, "train_epochs": epochs})
    model = method.train(problem_of(start), Trainer(toy_data(1200), SETTINGS))
    share = torch.cat([gamma.detach().abs() for gamma in scales(model)]).lt(0.05).float().mean()
    return model, float(share)


def test_the_mass_near_zero_grows_with_the_penalty_and_accuracy_stays() -> None:
    found = {reach: slimmed(reach) for reach in (0.0, 0.6, 0.8)}
    shares = [share for _, share in found.values()]
    assert shares[0] == 0
    assert 0.25 <= shares[1] < shares[2]
    accuracies = [evaluate(model, toy_data().test).top1 for model, _ in found.values()]
    assert min(accuracies) > accuracies[0] - 0.02


def test_one_step_moves_every_scale_by_lr_lambda_towards_zero_and_zero_stays() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    norms = [norm for group in graph.prunable for norm in norms_of(model, group)]
    with torch.no_grad():
        for gamma in scales(model):
            gamma.normal_()
            gamma[0] = 0.0
    before = [gamma.detach().clone() for gamma in scales(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ScalePenalty(norms, 0.02).on_batch_backward(model, 0)
    optimizer.step()
    for old, new in zip(before, scales(model), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * 0.02 * old.sign())
        assert new[0] == 0
    others = [p for n, p in model.named_parameters() if p.dim() > 1 or n.endswith("bias")]
    assert all(not p.grad.any() for p in others if p.grad is not None), "neither weights nor shifts"


def test_reach_is_how_far_the_penalty_alone_moves_a_scale() -> None:
    settings, n = TrainSettings(lr=0.05, warmup=0.1), 200
    weight = 1.5 / settings.travel(n)
    gamma = nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([gamma], lr=1.0, momentum=settings.momentum, nesterov=True)
    for step in range(n):
        optimizer.param_groups[0]["lr"] = settings.lr_at(step, n)
        gamma.grad = weight * gamma.detach().sign()
        optimizer.step()
    assert float(10 - gamma.detach()) == pytest.approx(1.5, rel=0.1)
    assert 1.5 / replace(settings, lr=0.1).travel(n) == pytest.approx(weight / 2)


def test_one_threshold_gives_uneven_widths_and_never_empties_a_group() -> None:
    model, rng = net(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gamma, level in zip(scales(model), (0.2, 0.5, 0.8), strict=True):
            gamma.copy_(level * torch.rand(len(gamma), generator=rng))
    problem = problem_of(model, 0.3)
    plans = {how: make("slimming", {"widths": how}).plan(problem).keep for how in ("threshold", "uniform")}
    shares = {how: [len(plan[g.name]) / g.size for g in problem.graph.prunable] for how, plan in plans.items()}
    assert np.ptp(shares["threshold"]) > 0.2
    assert np.ptp(shares["uniform"]) < 0.05
    with torch.no_grad():
        scales(model)[1].mul_(1e-9)  # a plain threshold keeps nothing of this layer
    kept = make("slimming", {"widths": "threshold"}).plan(problem_of(model, 0.3)).keep
    assert len(kept["1.0"]) >= 1


def test_layers_with_low_scales_keep_their_channels_unless_one_threshold_is_asked_for() -> None:
    """Levels of layers differ in any network that is not trained to the end: they say nothing of channels."""
    model = copy.deepcopy(trained_net())
    before = make("slimming").plan(problem_of(model)).keep
    with torch.no_grad():
        scales(model)[1].mul_(0.2)
    problem = problem_of(model)
    assert make("slimming").plan(problem).keep == before
    cut = make("slimming", {"widths": "threshold"}).plan(problem).keep
    whole = {group.name: group.size for group in problem.graph.prunable}
    assert [len(cut[name]) == whole[name] for name in ("0.0", "1.0", "2.0")] == [True, False, True]
    assert len(before["2.0"]) < whole["2.0"]


def test_coupled_channels_count_every_norm_and_groups_without_one_stay_whole() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    with torch.no_grad():
        for gamma in scales(model):
            gamma.normal_()
    trunk = scale_sums(model, graph.group("stem.0"))
    torch.testing.assert_close(trunk.float(), model.stem[1].weight.detach().abs() + model.b2[1].weight.detach().abs())
    bare = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 2))
    group = trace(bare, (torch.zeros(2, 3, 8, 8),)).group("0")
    with pytest.raises(NotApplicable, match="no batch norm"):
        scale_sums(bare, group)


def test_only_scales_that_may_go_are_penalised() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example).keeping(["1.0"], "kept")
    seen = []

    class Spy(Trainer):
        def fit(self, model, epochs, hooks=(), **changes):  # type: ignore[no-untyped-def]
            seen.extend(hooks)
            return model

    problem = replace(problem_of(net()), model=model, graph=graph)
    make("slimming", {"lambda": 1e-4}).train(problem, Spy(toy_data(64), SETTINGS))
    assert "lambda=0.0001" in seen[0].key
    assert "1.1" not in seen[0].key.split(" on ")[1].split(",")
    assert "0.1" in seen[0].key


def penalised(model: nn.Module, graph: Graph) -> dict[str, torch.Tensor]:
    """Return what the penalty alone adds to the gradient of every norm's scale, by name."""
    seen: list[TrainHook] = []
    own = Trainer(toy_data(64), SETTINGS)
    own.fit = lambda model, epochs, hooks=(), *args, **changes: seen.extend(hooks) or model  # type: ignore[method-assign]
    make("slimming", {"lambda": 0.5}).train(replace(problem_of(net()), model=model, graph=graph), own)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.weight.grad = torch.zeros_like(norm.weight)
    seen[0].on_batch_backward(model, 0)
    return {name: norm.weight.grad.clone() for name, norm in norms.items()}


def test_every_norm_that_a_coupled_channel_passes_is_penalised() -> None:
    model, example = TOYS["residual"]()
    found = penalised(model, trace(model, example))
    assert set(found) == {"stem.1", "b1.1", "b2.1", "d1.1", "d2.1"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, 0.5 * model.get_submodule(name).weight.detach().sign())


def test_in_a_norm_behind_a_concat_only_the_slots_that_may_go_are_penalised() -> None:
    """The trap: the other slots belong to a group that stays whole, and their scales would shrink for nothing."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(9), head(9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(torch.cat([self.a(x), self.b(x)], 1)).relu())

    model = Behind().eval()
    graph = trace(model, (torch.zeros(2, 3, 8, 8),)).keeping(["a"], "kept")
    assert [group.name for group in graph.prunable] == ["b"]
    assert penalised(model, graph)["norm"].tolist() == [0.0] * 5 + [0.5] * 4
