"""Greedy selection by gradients: planted channels, brute force, and what is allowed to change."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from deploypipe.graph import trace
from deploypipe.ingredients.heads import AuxiliaryLoss, Head, Listening, evenly, fitted, n_classes
from deploypipe.ingredients.selection import JointLoss, select
from deploypipe.ingredients.stacks import Stack
from deploypipe.types import Member
from tests.toy_task import EVEN, accuracy, toy_data, trained_net, trainer
from tests.toys import TOYS, Fn, conv, head


def inputs_of(weight: str, n: int) -> Stack:
    return Stack(weight, (Member(weight, 1, "consumes", np.arange(n)),))


def linear(n: int = 6, outputs: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(n, outputs, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def planted(n: int = 600) -> tuple[nn.Module, Tensor, Tensor]:
    """Channels 0-2 tell two classes apart and are faint, 3-5 are loud and say nothing, 6 and 7 are faint noise."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    x = torch.randn(n, 8, 2, 2, generator=rng) * torch.tensor([0.1] * 3 + [3.0] * 3 + [0.1] * 2)[:, None, None]
    x[:, :3] += 0.6 * (2 * labels[:, None, None, None] - 1)
    model = linear(8, 2)
    with torch.no_grad():
        model[0].weight.copy_(0.5 * torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 8, 1, 1))
    return model, x, labels


@pytest.mark.parametrize(("weight", "expected"), [(0.0, {3, 4, 5}), (1e4, {0, 1, 2})])
def test_the_error_selects_the_loud_channels_and_the_classifier_the_telling_ones(weight: float, expected: set[int]) -> None:
    model, x, labels = planted()
    loss = JointLoss(model, ["0.weight"], x, labels, weight, None)
    lr = 0.003
    found = select(model, inputs_of("0.weight", 8), 8, 3, loss, per_pass=1, lr=lr)
    assert set(found.order.tolist()) == expected


def test_with_growing_lambda_the_selection_crosses_over() -> None:
    model, x, labels = planted()
    telling = []
    for weight in (0.0, 1.0, 10.0, 100.0, 1e4):
        loss = JointLoss(model, ["0.weight"], x, labels, weight, None)
        found = select(model, inputs_of("0.weight", 8), 8, 3, loss, per_pass=1, lr=0.003)
        telling.append(len(set(found.order.tolist()) & {0, 1, 2}))
    assert telling == sorted(telling)
    assert (telling[0], telling[-1]) == (0, 3)


def test_the_first_choice_is_that_of_brute_force_for_channels_of_one_variance() -> None:
    """For independent channels of one variance the largest gradient and the largest fall of the error are one channel."""
    right = 0
    for seed in range(30):
        model = linear(6, 4, seed)
        x = torch.randn(400, 6, 2, 2, generator=torch.Generator().manual_seed(seed))
        loss = JointLoss(model, ["0.weight"], x, torch.zeros(400).long(), 0.0, None)
        found = select(model, inputs_of("0.weight", 6), 6, 1, loss, per_pass=1, lr=0.0)
        wanted, errors = model[0](x).detach(), []
        for channel in range(6):
            weight = torch.zeros_like(model[0].weight).detach()
            weight[:, channel] = model[0].weight[:, channel].detach()
            errors.append(float((F.conv2d(x, weight) - wanted).square().mean()) / 2)
        right += int(found.order[0]) == int(np.argmin(errors))
        assert found.losses[1] == pytest.approx(errors[int(found.order[0])], rel=1e-4)
        assert found.losses[1] <= 1.06 * min(errors)
    assert right >= 24  # five by chance; the others are near ties


def test_three_of_six_channels_are_nearly_the_best_three_of_all_subsets() -> None:
    """Every subset is judged with the best weights that it can have, by least squares."""
    ratios = []
    for seed in range(20):
        model, x = linear(6, 4, seed), torch.randn(400, 6, 1, 1, generator=torch.Generator().manual_seed(seed))
        loss = JointLoss(model, ["0.weight"], x, torch.zeros(400).long(), 0.0, None)
        chosen = select(model, inputs_of("0.weight", 6), 6, 3, loss, per_pass=1, lr=0.05, passes=3).order.tolist()
        rows, wanted = x.flatten(1), model[0](x).detach().flatten(1)

        def least(subset: list[int], rows: Tensor = rows, wanted: Tensor = wanted) -> float:
            part = rows[:, subset]
            return float((part @ torch.linalg.lstsq(part, wanted).solution - wanted).square().sum())

        ratios.append(least(chosen) / min(least(list(subset)) for subset in itertools.combinations(range(6), 3)))
    assert np.mean(ratios) < 1.05
    assert max(ratios) < 1.3


def test_scores_are_the_gradient_norms_of_whole_slices() -> None:
    """The trap is the sum of per-kernel norms, which ranks otherwise."""
    model = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(64, 6, 5, 5, generator=torch.Generator().manual_seed(3))
    zero = torch.zeros_like(model[0].weight).requires_grad_(True)
    out = F.conv2d(x, zero, padding=1)
    (F.mse_loss(out, model[0](x).detach()) / 2).backward()
    slices = zero.grad.transpose(0, 1).flatten(1).norm(dim=1)
    loss = JointLoss(model, ["0.weight"], x, torch.zeros(64).long(), 0.0, None, batch=64)
    found = select(model, inputs_of("0.weight", 6), 6, 6, loss, per_pass=6, lr=0.0)
    assert found.order.tolist() == torch.argsort(slices, descending=True, stable=True).tolist()


def test_the_loss_falls_as_channels_join_and_vanishes_when_all_are_in() -> None:
    model, x = linear(6, 4), torch.randn(200, 6, 2, 2, generator=torch.Generator().manual_seed(1))
    loss = JointLoss(model, ["0.weight"], x, torch.zeros(200).long(), 0.0, None)
    found = select(model, inputs_of("0.weight", 6), 6, 6, loss, per_pass=1, lr=0.1, passes=20)
    assert all(later <= 1.01 * before for before, later in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < 1e-3 * found.losses[0]
    assert found.sizes == list(range(7))
    assert sorted(found.order.tolist()) == list(range(6))
    assert found.curve(6).tolist() == pytest.approx(np.minimum.accumulate(found.losses).tolist())


def test_adapting_is_what_makes_correlated_channels_stand_in_for_each_other() -> None:
    model = linear(4, 4)
    x = torch.randn(300, 4, 1, 1, generator=torch.Generator().manual_seed(2))
    x[:, 1] = x[:, 0] + 0.1 * x[:, 1]
    loss = JointLoss(model, ["0.weight"], x, torch.zeros(300).long(), 0.0, None)
    still, moving = (
        select(model, inputs_of("0.weight", 4), 4, 3, loss, per_pass=1, lr=lr, passes=10).losses[-1] for lr in (0.0, 0.1)
    )
    assert moving < 0.5 * still


def test_only_what_is_in_changes() -> None:
    model, x = trained_net(widths=EVEN), toy_data().train.tensors[0][:100]  # type: ignore[attr-defined]
    labels = toy_data().train.tensors[1][:100]  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = JointLoss(model, ["1.0.weight"], x, labels, 1.0, None)
    found = select(model, inputs_of("1.0.weight", 16), 16, 6, loss, per_pass=2, lr=0.05)
    chosen = found.order.tolist()
    after = found.model.state_dict()
    rest = [channel for channel in range(16) if channel not in chosen]
    assert (after["1.0.weight"][:, rest] == 0).all()
    assert (after["1.0.weight"][:, chosen] != before["1.0.weight"][:, chosen]).any()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "1.0.weight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(chosen) == 6


def test_several_layers_that_read_a_group_are_judged_together() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    members = tuple(m for m in graph.group("stem.0").members if m.role == "consumes")
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = JointLoss(model, [m.param for m in members], x, torch.zeros(40).long(), 0.0, None)
    found = select(model, Stack("stem.0", members), 8, 8, loss, per_pass=1, lr=0.0)
    gone = set(range(8)) - set(found.order[:3].tolist())
    small = select(model, Stack("stem.0", members), 8, 3, loss, per_pass=1, lr=0.0).model
    state = small.state_dict()
    assert all((state[m.param].index_select(m.axis, torch.tensor(sorted(gone))) == 0).all() for m in members)


# --- classifiers on inner layers


def test_a_head_reads_the_class_off_inner_features_and_leaves_no_trace() -> None:
    hook = AuxiliaryLoss("0.0.weight", 16, 4, seed=0)
    model = trainer().fit(trained_net(widths=EVEN), 1, [hook])
    assert [type(m) for m in model.modules()] == [type(m) for m in trained_net(widths=EVEN).modules()]
    assert set(model.state_dict()) == set(trained_net(widths=EVEN).state_dict())
    assert not any(m._forward_hooks for m in model.modules())
    assert accuracy(model) > 0.95
    inputs, labels = toy_data().train.tensors  # type: ignore[attr-defined]
    listening = Listening(model, ["0.0.weight"])
    with listening(), torch.no_grad():
        model(inputs)
    head = fitted(Head(16, 4, 0), listening.outputs["0.0.weight"][0], labels, steps=60, batch=64, seed=0)
    assert float((head(listening.outputs["0.0.weight"][0]).argmax(1) == labels).float().mean()) > 0.4  # chance is 0.25


def test_the_heads_loss_reaches_the_layers_before_it_and_none_behind() -> None:
    model, hook = trained_net(widths=EVEN), AuxiliaryLoss("1.0.weight", 16, 4, seed=0)
    model = trainer().fit(model, 0)
    hook.on_train_begin(model)
    model.train()
    inputs, labels = (part[:50] for part in toy_data().train.tensors)  # type: ignore[attr-defined]
    hook.on_loss(model, model(inputs).sum() * 0, labels).backward()
    assert model[0][0].weight.grad.abs().sum() > 0
    assert model[2][0].weight.grad.abs().sum() == 0
    assert any("auxiliary" in name for name, _ in model.named_parameters())
    hook.on_train_end(model)


def test_a_head_is_what_the_paper_writes() -> None:
    head, x = Head(3, 2, 0), torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 1.5)
    normal = F.batch_norm(x, None, None, head.norm.weight, head.norm.bias, training=True)
    expected = head.linear(F.relu(normal).mean((2, 3)))
    torch.testing.assert_close(head.train()(x), expected)


def test_heads_divide_the_pass_evenly() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    assert evenly(model, graph, 0) == []
    assert evenly(model, graph, 2) == ["0.0.weight", "1.0.weight"]
    assert evenly(model, graph, 1) in (["0.0.weight"], ["1.0.weight"])
    assert n_classes(model, example) == 4
    flat: Any = Fn(lambda m, x: m.fc(x), fc=nn.Linear(4, 2)).eval()
    assert evenly(flat, trace(flat, (torch.zeros(1, 4),)), 2) == []


def test_only_convolutions_carry_a_head() -> None:
    """A weight that a function uses, or that is made of others, belongs to no module whose output could be listened to."""
    made = nn.Sequential(conv(3, 8), weight_norm(conv(8, 8)), head(8)).eval()
    assert evenly(made, trace(made, (torch.randn(2, 3, 8, 8),)), 2) == ["0.weight"]
    used: Any = Fn(
        lambda m, x: m.head(F.relu(F.conv2d(F.relu(m.a(x)), m.w))),
        a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)), head=head(6),
    ).eval()  # fmt: skip
    assert evenly(used, trace(used, (torch.randn(2, 3, 8, 8),)), 2) == ["a.weight"]


def test_a_classifiers_loss_is_added_to_the_loss_of_the_model() -> None:
    model, hook, found = linear(3, 5), AuxiliaryLoss("0.weight", 5, 4, 0), list[Tensor]()
    labels = torch.arange(8) % 4
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    hook.on_train_begin(model)
    for loss in (0.0, 3.0):
        model(x)
        found.append(hook.on_loss(model, torch.tensor(loss), labels).detach())
    hook.on_train_end(model)
    assert float(found[0]) == pytest.approx(np.log(4), abs=0.7), "a classifier that has learned nothing"
    assert float(found[1] - found[0]) == pytest.approx(3.0)
