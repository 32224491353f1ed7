"""Sub-networks on slices: equal to the network built from them, with gradients that arrive in the whole one."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deploypipe.compact import compact
from deploypipe.graph import trace
from deploypipe.graph.outputs import copied
from deploypipe.ingredients.supernet import Sandwich, Supernet, divergence
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph
from tests.toy_task import EVEN, net, trained_net, trainer
from tests.toys import INEXACT, TOYS


def half(graph: Graph, share: float = 0.5) -> dict[str, int]:
    return {group.name: max(1, int(share * group.size)) for group in graph.prunable}


# Training data has one input, and so have these.
SINGLE = sorted(name for name in set(TOYS) - INEXACT if len(TOYS[name]()[1]) == 1)


@pytest.mark.parametrize("net", SINGLE)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_sub_network_computes_what_the_network_of_its_first_channels_computes(net: str, training: bool) -> None:
    model, example = TOYS[net]()
    graph = trace(model, example)
    small = compact(model, graph, KeepPlan.of_widths(half(graph)), check=False).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net_of = Supernet(model.train(training), graph)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        found = net_of(half(graph), *copied(example))  # one toy writes into its input
        torch.manual_seed(0)
        expected = small(*copied(example))
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "no statistics left behind"


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def test_gradients_arrive_in_the_slices_and_nowhere_else() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    Supernet(model, graph)(half(graph), *example).square().sum().backward()
    small = compact(model, graph, KeepPlan.of_widths(half(graph)), check=False)
    small(*example).square().sum().backward()
    for name, parameter in model.named_parameters():
        ours, expected = parameter.grad, dict(small.named_parameters())[name].grad
        assert ours is not None
        assert expected is not None
        part = ours[tuple(slice(n) for n in expected.shape)]
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-4)
        assert int((ours != 0).sum()) <= expected.numel()


def one_step(hook: Sandwich, model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    hook.on_train_begin(model)
    model.train()
    loss = hook.on_loss(model, F.cross_entropy(model(inputs), labels), labels)
    loss.backward()
    hook.on_train_end(model)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_gradient_of_a_step_is_the_sum_over_its_networks() -> None:
    model, example = net(widths=EVEN), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, graph = torch.arange(16) % 4, trace(net(widths=EVEN), (torch.zeros(1, 3, 8, 8),))
    widths = {group.name: (4, 8, 12, 16) for group in graph.prunable}
    hook = Sandwich(graph, widths, 2, seed=0)
    drawn = hook.drawn(0)
    found = one_step(hook, copy.deepcopy(model), example, labels)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    largest = copy.deepcopy(model).train()
    out = largest(example)
    F.cross_entropy(out, labels).backward()
    for name, p in largest.named_parameters():
        expected[name] += p.grad
    for kept in drawn:
        small = compact(model, graph, KeepPlan.of_widths(kept), check=False).train()
        soft = torch.softmax(out.detach(), 1)
        (-(soft * torch.log_softmax(small(example), 1)).sum(1).mean()).backward()  # the entropy of z_max has no gradient
        for name, p in small.named_parameters():
            expected[name][tuple(slice(n) for n in p.shape)] += p.grad
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def test_the_largest_and_the_smallest_are_in_every_step_and_the_rest_is_not_uniform() -> None:
    graph = trace(net(widths=EVEN), (torch.zeros(1, 3, 8, 8),))
    widths = {group.name: (4, 8, 12, 16) for group in graph.prunable}
    hook = Sandwich(graph, widths, 3, seed=0)
    uneven, seen = 0, set()
    for step in range(50):
        smallest, *others = hook.drawn(step)
        assert set(smallest.values()) == {4}
        assert len(others) == 3
        uneven += sum(len(set(kept.values())) > 1 for kept in others)
        seen |= {tuple(kept.values()) for kept in others}
    assert uneven > 100, "every group draws its own width"
    assert len(seen) > 40
    assert hook.drawn(7) == Sandwich(graph, widths, 3, seed=0).drawn(7)
    assert hook.drawn(7) != Sandwich(graph, widths, 3, seed=1).drawn(7)


def test_the_teacher_is_detached() -> None:
    """The divergence moves nothing but the smaller networks: without it the largest learns from its pupils."""
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    expected = (torch.softmax(teacher, 1) * (torch.log_softmax(teacher, 1) - torch.log_softmax(student, 1))).sum(1).mean()
    torch.testing.assert_close(divergence(student, teacher), expected)
    model, graph = net(widths=EVEN), trace(net(widths=EVEN), (torch.zeros(1, 3, 8, 8),))
    hook = Sandwich(graph, {group.name: (4,) for group in graph.prunable}, 0, seed=0)
    inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    hook.on_train_begin(model)
    model.train()
    out = model(inputs)
    hook.on_loss(model, out.sum() * 0, torch.zeros(16).long()).backward()
    beyond = model[1][0].weight.grad[8:]  # filters that the smallest network does not have
    assert (beyond == 0).all()
    assert model[1][0].weight.grad[:4].abs().sum() > 0
    hook.on_train_end(model)
    assert not model._forward_hooks


def test_draws_go_on_after_an_interruption_and_training_keeps_the_architecture() -> None:
    graph = trace(net(widths=EVEN), (torch.zeros(1, 3, 8, 8),))
    widths = {group.name: (4, 16) for group in graph.prunable}
    hook = Sandwich(graph, widths, 1, seed=0)
    model = trainer(n=200).fit(trained_net(widths=EVEN), 2, [hook])
    assert int(hook.state()["step"]) == 8
    other = Sandwich(graph, widths, 1, seed=0)
    other.restore(hook.state())
    assert int(other.state()["step"]) == 8
    assert [type(m) for m in model.modules()] == [type(m) for m in trained_net(widths=EVEN).modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert np.isfinite([float(p.detach().sum()) for p in model.parameters()]).all()
