"""Channels that are dead already: planted, found, cut without a change of the outputs, and nothing else is taken for dead."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploypipe.compact import compact, difference, run
from deploypipe.graph import trace
from deploypipe.ingredients.purify import dead, silenced, unmade, unread
from deploypipe.plan import KeepPlan
from tests.toys import TOYS, Fn, conv, head


def without(gone: dict[str, tuple[int, ...]], graph: Any) -> KeepPlan:
    return KeepPlan(
        {name: tuple(c for c in range(graph.group(name).size) if c not in channels) for name, channels in gone.items()}
    )


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "channel_shuffle"])
def test_a_channel_that_nobody_reads_goes_without_a_trace(net: str) -> None:
    model, example = TOYS[net]()
    graph = trace(model, example)
    assert dead(model, graph) == {}
    group = graph.prunable[0]
    named = dict(model.named_parameters())
    with torch.no_grad():
        for member in group.members:
            if member.role == "consumes":
                for channel in (1, 3):
                    named[member.param].index_fill_(member.axis, torch.tensor(member.slots(channel)), 0.0)
    assert dead(model, graph) == {group.name: (1, 3)}
    small = compact(model, graph, without(dead(model, graph), graph))
    assert difference(run(model, example), run(small, example)) < 1e-6


def test_a_channel_that_nobody_makes_needs_its_norm_to_be_silent_too() -> None:
    """The trap: behind a batch norm a zero filter is the constant beta - gamma mu / sigma, not zero."""
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    with torch.no_grad():
        model[1][0].weight[[2, 5]] = 0
    assert dead(model, graph) == {}
    with torch.no_grad():
        model[1][1].weight[[2, 5]] = 0
        model[1][1].bias[[2, 5]] = 0
    assert unmade(model, graph, graph.group("1.0")).nonzero().flatten().tolist() == [2, 5]
    assert dead(model, graph) == {"1.0": (2, 5)}
    small = compact(model, graph, without(dead(model, graph), graph))
    assert difference(run(model, example), run(small, example)) < 1e-6


def test_an_activation_that_makes_something_of_zero_is_noticed() -> None:
    model = Fn(lambda m, x: m.head(m.b(torch.sigmoid(m.a(x)))), a=conv(3, 6), b=conv(6, 8), head=head(8)).eval()
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        model.a.bias[[1, 4]] = 0
    assert unmade(model, graph, graph.group("a")).sum() == 2
    assert dead(model, graph) == {}


def test_one_channel_stays_in_a_group_that_is_dead_altogether() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    with torch.no_grad():
        model[2].train()
        model[3][0].weight.zero_()
    gone = dead(model.eval(), graph)["1.0"]
    assert gone == tuple(range(11))
    assert compact(model, graph, without({"1.0": gone}, graph)) is not None


def test_silencing_goes_backwards_through_the_layers_and_keeps_the_outputs() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    with torch.no_grad():
        model[3][0].weight[:, 4] = 0  # nobody reads channel 4 of layer 1
        model[1][0].weight[:4, 2] = 0
        model[1][0].weight[5:, 2] = 0  # only filter 4 read channel 2 of layer 0
    before = [p.clone() for p in model.parameters()]
    new = silenced(model, graph)
    assert difference(run(model, example), run(new, example)) < 1e-6
    assert (new[1][0].weight[4] == 0).all()
    assert (new[0][0].weight[2] == 0).all()
    assert sum(int((p == 0).sum()) for p in new.parameters()) > sum(int((p == 0).sum()) for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert unread(model, graph.group("0.0")).sum() == 0
    assert unread(new, graph.group("0.0")).tolist() == [False, False, True] + 5 * [False]


def test_purification_never_adds_parameters() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    rng = torch.Generator().manual_seed(0)
    thin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in thin.parameters():
            if parameter.dim() > 1:
                parameter.mul_(
                    (torch.rand(parameter.shape[:2], generator=rng) < 0.15).view(
                        *parameter.shape[:2], *[1] * (parameter.dim() - 2)
                    )
                )
    small = compact(thin, graph, without(dead(thin, graph), graph))
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(small) < count(thin)
    assert difference(run(thin, example), run(small, example)) < 1e-6
    assert isinstance(small, nn.Module)
    assert isinstance(example[0], Tensor)


def test_a_channel_that_a_layer_norm_counts_is_neither_dead_nor_silenced() -> None:
    """Nobody reads it behind the norm, but the norm's mean and variance are also those of this channel."""
    model: Any = Fn(
        lambda m, x: m.head(torch.relu(m.b(m.norm(m.a(x).permute(0, 2, 3, 1)))).mean((1, 2))),
        a=conv(3, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 12), head=nn.Linear(12, 4),
    ).eval()  # fmt: skip
    graph = trace(model, (torch.randn(2, 3, 8, 8),))
    with torch.no_grad():
        model.b.weight[:, 3] = 0
    assert unread(model, graph.group("a")).nonzero().flatten().tolist() == [3]
    assert dead(model, graph) == {}
    assert difference(run(model, graph.example), run(silenced(model, graph), graph.example)) == 0


def test_a_channel_that_only_a_fixed_weight_reads_is_alive() -> None:
    """A shortcut of zeros and ones, in a buffer, reads what no trained weight reads any more."""
    model, example = TOYS["fixed_shortcut"]()
    graph = trace(model, example)
    fixed = [(g, m) for g in graph.prunable for m in g.members if m.role == "consumes" and m.param in graph.buffers]
    assert fixed
    group, named = fixed[0][0], dict(model.named_parameters())
    assert [m for m in group.members if m.role == "consumes" and m.param in named]
    with torch.no_grad():
        for member in group.members:
            if member.role == "consumes" and member.param in named:
                named[member.param].index_fill_(member.axis, torch.tensor(member.slots(1)), 0.0)
    before = run(model, example)
    assert dead(model, graph) == {}
    assert difference(before, run(silenced(model, graph), example)) < 1e-6
    small = compact(model, graph, without({group.name: (1,)}, graph), check=False)
    assert difference(before, run(small, example)) > 1e-3
