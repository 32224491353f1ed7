"""Groups without channels: whole branches go, the function stays that of the masked model, and nothing of them is exported."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import TOYS, Fn, Toy, cbr, conv, head, image

from deploypipe.allocation.allocate import allocate, allocate_widths, vanishing
from deploypipe.branch import branch_of
from deploypipe.compact import compact, difference, mask, run
from deploypipe.count import MacTable, ParamTable, macs, params
from deploypipe.errors import ModelError
from deploypipe.export import export_onnx, simplify_onnx
from deploypipe.graph import trace
from deploypipe.ingredients.removal import removable
from deploypipe.plan import KeepPlan
from deploypipe.testing.toys import NETS


class Inverted(nn.Module):
    """Expand, filter, weigh and project, with a sum around it: what MobileNetV3 is made of."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.expand, self.filter = cbr(width, wide, 1), cbr(wide, wide, groups=wide)
        self.fc1, self.fc2 = conv(wide, 4, 1), conv(4, wide, 1)
        self.project, self.norm = conv(wide, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(self.expand(x))
        y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))))
        return x + self.norm(self.project(y))


class Bottleneck(nn.Module):
    """The block of ResNet-50, as torchvision writes it."""

    def __init__(self, width: int, inner: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, groups=groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, width, 1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += x
        return self.relu(y)


def inverted() -> Toy:
    return nn.Sequential(cbr(3, 8), Inverted(8, 12), Inverted(8, 16), cbr(8, 8), head(8)), (image(),)


def bottleneck() -> Toy:
    return nn.Sequential(cbr(3, 8), Bottleneck(8, 4), Bottleneck(8, 6), head(8)), (image(),)


def aggregated() -> Toy:
    return nn.Sequential(cbr(3, 8), Bottleneck(8, 8, groups=4), head(8)), (image(),)


def linear() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).mean((2, 3))
        return m.out(x + m.fc2(F.relu(m.fc1(x))))

    return Fn(f, stem=cbr(3, 8), fc1=nn.Linear(8, 6), fc2=nn.Linear(6, 8), out=nn.Linear(8, 5)), (image(),)


def parallel() -> Toy:
    """Two branches without a shortcut: either may go, not both."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.a2(m.a1(x)) + m.b2(m.b1(x))))

    parts = {"a1": cbr(8, 4), "a2": cbr(4, 8), "b1": cbr(8, 6), "b2": cbr(6, 8)}
    return Fn(f, stem=cbr(3, 8), **parts, head=head(8)), (image(),)


BRANCHED: dict[str, tuple[Callable[[], Toy], set[str]]] = {
    "inverted": (inverted, {"1.expand.0", "1.fc1", "2.expand.0", "2.fc1"}),
    "bottleneck": (bottleneck, {"1.conv1", "1.conv2", "2.conv1", "2.conv2"}),
    "aggregated": (aggregated, {"1.conv1"}),
    "linear": (linear, {"fc1"}),
    "residual": (TOYS["residual"], {"b1.0", "d1.0"}),
    "se_block": (TOYS["se_block"], {"down", "fc1"}),
}


def trained(make: Callable[[], Toy]) -> Toy:
    """Give the norms statistics and shifts that matter."""
    torch.manual_seed(1)
    model, example = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval(), example


@pytest.mark.parametrize("name", BRANCHED)
def test_what_may_go(name: str) -> None:
    make, expected = BRANCHED[name]
    model, example = trained(make)
    assert set(removable(model, trace(model, example))) == expected


@pytest.mark.parametrize("name", BRANCHED)
@pytest.mark.parametrize("seed", range(4))
def test_without_branches_the_model_computes_what_the_masked_one_does(name: str, seed: int) -> None:
    make, names = BRANCHED[name]
    model, example = trained(make)
    graph, rng = trace(model, example), np.random.default_rng(seed)
    keep: dict[str, tuple[int, ...]] = {}
    for group in graph.prunable:
        width = int(rng.integers(1, group.size + 1))
        keep[group.name] = tuple(sorted(rng.choice(group.size, width, replace=False).tolist()))
    gone = sorted(names) if seed == 0 else [each for each in sorted(names) if rng.random() < 0.5]
    plan = KeepPlan(keep | dict.fromkeys(gone, ()))
    small = compact(model, graph, plan)
    assert difference(run(mask(model, graph, plan), example), run(small, example)) <= 1e-5
    assert params(graph, plan) == sum(p.numel() for p in small.parameters()) <= ParamTable().predict(graph, plan)
    assert KeepPlan.from_json(plan.to_json()).keep == plan.keep


def test_a_whole_branch_adds_exactly_nothing() -> None:
    """The block that is left out is the identity, to the last bit, whatever its norms were."""
    model, example = trained(bottleneck)
    small = compact(model, trace(model, example), KeepPlan({"1.conv1": (), "2.conv2": ()}))
    assert torch.equal(small[:3](example[0]), model[0](example[0]))
    assert not list(small[1].parameters())


@pytest.mark.parametrize("name", BRANCHED)
def test_macs_are_those_of_the_layers_that_run(name: str) -> None:
    make, names = BRANCHED[name]
    model, example = trained(make)
    graph = trace(model, example)
    plan = KeepPlan(dict.fromkeys(names, ()))
    small = compact(model, graph, plan)
    assert macs(graph, plan) == macs(trace(small, example)) == MacTable().predict(graph, plan)


def test_layers_further_down_an_empty_branch_do_not_count() -> None:
    """They keep their channels under the plan, but nothing arrives there, and they are left out as well."""
    model, example = trained(bottleneck)
    graph = trace(model, example)
    plan = KeepPlan({"1.conv1": ()})
    assert graph.kept(plan)["1.conv2"]
    small = compact(model, graph, plan)
    assert (
        macs(graph, plan) == macs(trace(small, example)) < sum(term.under(graph.kept(plan)) for term in MacTable().terms(graph))
    )


def test_the_exported_model_has_nothing_of_the_branch(tmp_path: Path) -> None:
    for make, gone, n_convs in ((bottleneck, ("1.conv1",), 4), (inverted, ("1.expand.0", "2.expand.0"), 2)):
        model, example = trained(make)
        small = compact(model, trace(model, example), KeepPlan(dict.fromkeys(gone, ())))
        export_onnx(small, example, tmp_path / "a.onnx")
        assert simplify_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx").ok
        ops = [node.op_type for node in onnx.load(str(tmp_path / "b.onnx")).graph.node]
        assert ops.count("Conv") == n_convs
        assert ops.count("Add") == (1 if make is bottleneck else 0)


def test_branches_that_only_together_are_needed() -> None:
    model, example = trained(parallel)
    graph = trace(model, example)
    assert removable(model, graph) == ("a1.0",)
    compact(model, graph, KeepPlan({"b1.0": ()}))
    with pytest.raises(ModelError, match="no longer depends on the input") as caught:
        compact(model, graph, KeepPlan({"a1.0": (), "b1.0": ()}))
    assert "a1.0" in str(caught.value)


def recurrent() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for _ in range(2):
            x = x + m.b2(m.b1(x))
        return m.head(x)

    return Fn(f, stem=cbr(3, 8), b1=cbr(8, 4), b2=conv(4, 8), head=head(8)), (image(),)


@pytest.mark.parametrize(
    ("make", "group", "why"),
    [
        (TOYS["plain"], "1.0", "it carries all of '4.2', which is fixed"),
        (TOYS["concat"], "a.0", "has other channels too"),
        (recurrent, "b1.0", "is called several times"),
    ],
)
def test_why_a_group_must_stay(make: Callable[[], Toy], group: str, why: str) -> None:
    model, example = make()
    with pytest.raises(ModelError, match=why):
        branch_of(trace(model, example), group)


def twice(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.norm(m.b2(F.relu(m.b1(x))))
    return m.head(x + m.norm(m.c2(F.relu(m.c1(x)))))


def test_a_norm_that_other_branches_pass_too_stays_when_one_goes() -> None:
    parts = {name: conv(*sizes) for name, sizes in {"b1": (8, 4), "b2": (4, 8), "c1": (8, 4), "c2": (4, 8)}.items()}
    model, example = trained(lambda: (Fn(twice, stem=cbr(3, 8), norm=nn.BatchNorm2d(8), **parts, head=head(8)), (image(),)))
    graph = trace(model, example)
    for gone in removable(model, graph):
        small = compact(model, graph, KeepPlan({gone: ()}))
        assert isinstance(small.norm, nn.BatchNorm2d)
        masked = mask(model, graph, KeepPlan({gone: ()}))
        assert difference(run(masked, example), run(small, example)) < 1e-6
        assert params(graph, KeepPlan({gone: ()})) == sum(p.numel() for p in small.parameters())


def test_branches_with_a_norm_that_adds_something_of_its_own_stay() -> None:
    class Loud(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid()

    class Quiet(nn.BatchNorm2d):
        pass

    model, example = trained(bottleneck)
    model[1].bn3, model[2].bn3 = Loud(8).eval(), Quiet(8).eval()
    assert set(removable(model, trace(model, example))) == {"2.conv1", "2.conv2"}


def test_a_parameter_of_the_whole_model_inside_a_branch_is_in_the_way() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.b2(F.relu(m.b1(x) + m.shift)))

    model = Fn(f, stem=cbr(3, 8), b1=conv(8, 4), b2=conv(4, 8), head=head(8), shift=nn.Parameter(torch.randn(4, 1, 1))).eval()
    graph = trace(model, image())
    with pytest.raises(ModelError, match="shift belongs to no layer or norm"):
        branch_of(graph, "b1")


def test_layers_of_a_class_of_their_own_stay() -> None:
    class Mine(nn.Conv2d):
        pass

    model, example = trained(bottleneck)
    model[1].conv3 = Mine(4, 8, 1)
    graph = trace(model, example)
    assert set(removable(model, graph)) == {"2.conv1", "2.conv2"}
    with pytest.raises(ModelError, match="of a class of their own"):
        compact(model, graph, KeepPlan({"1.conv2": ()}))


def test_the_allocator_drops_a_block_that_is_worth_little() -> None:
    model, example = trained(bottleneck)
    graph, table = trace(model, example), MacTable(multiple=1)
    scores = {group.name: np.full(group.size, 0.01 if group.name.startswith("1.") else 1.0) for group in graph.prunable}
    budget = table.predict(graph, KeepPlan({"1.conv1": (), "1.conv2": ()}))
    names = removable(model, graph)
    plan = allocate(graph, scores, table, budget, removable=names)
    assert plan.keep["1.conv1"] == plan.keep["1.conv2"] == ()
    assert all(len(channels) == graph.group(name).size for name, channels in plan.keep.items() if not name.startswith("1."))
    assert table.predict(graph, plan) <= budget
    without = allocate(graph, scores, table, budget)
    assert without.certificate is not None
    assert plan.certificate is not None
    assert plan.certificate.value > without.certificate.value


def test_the_bound_holds_where_a_branch_takes_biases_and_norms_along() -> None:
    """Their parameters do not depend on the width that becomes zero, so that the program prices them as if they stayed."""
    torch.manual_seed(0)
    model = NETS["residual"]().eval()
    graph, table = trace(model, (image(),)), ParamTable(multiple=3)
    offered = vanishing(table.candidates(graph), removable(model, graph))
    names = [group.name for group in graph.prunable]
    worth = dict(zip(names, (1.0, 0.1, 1.0, 0.1), strict=True))
    values = {name: np.linspace(0, worth[name], graph.group(name).size + 1) for name in names}
    widths = [sorted({*offered[name], graph.group(name).size}) for name in names]
    choices = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*widths)]
    priced = [
        (table.predict(graph, KeepPlan.of_widths(kept)), sum(values[name][kept[name]] for name in names)) for kept in choices
    ]
    for budget in sorted({cost for cost, _ in priced})[:25]:
        best = max(value for cost, value in priced if cost <= budget)
        _, found = allocate_widths(graph, values, table, budget, candidates=offered)
        assert found.status == "relaxed"
        assert found.predicted <= budget
        assert found.value == pytest.approx(best, rel=2e-3)
        assert found.bound is not None
        assert found.bound >= best - 1e-9
    assert allocate_widths(graph, values, table, 0.7 * table.predict(graph))[1].status == "optimal", "no branch may go"


def test_a_branch_may_go_before_a_transposed_convolution_at_the_end() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), nn.ConvTranspose2d(8, 3, 2, stride=2)).eval()
    graph = trace(net, image())
    assert removable(net, graph) == ("1.a",)
    small = compact(net, graph, KeepPlan({"1.a": ()}))
    assert [y.shape for y in run(small, (image(),))] == [y.shape for y in run(net, (image(),))]


class Listed(nn.Module):
    """A block that keeps its layers by name and in a list as well, as temporal convolutional networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1, self.c2 = cbr(3, 8), conv(8, 6), conv(6, 8)
        self.b1, self.b2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.body = nn.Sequential(self.c1, self.b1, nn.ReLU(), self.c2, self.b2)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.body(x)))


def test_a_branch_goes_wherever_its_layers_hang() -> None:
    torch.manual_seed(0)
    model, plan = Listed().eval(), KeepPlan({"c1": ()})
    nn.init.uniform_(model.b2.bias, 0.5, 1.0)
    example = (image(),)
    graph = trace(model, example)
    assert removable(model, graph) == ("c1",)
    small = compact(model, graph, plan)
    assert difference(run(mask(model, graph, plan), example), run(small, example)) < 1e-6
    assert sum(p.numel() for p in small.parameters()) == params(graph, plan)


def test_a_branch_whose_layer_other_code_reads_stays() -> None:
    """Torch's transformer layer hands its linear layers' weights to a fused function."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    graph = trace(encoder, (torch.randn(2, 5, 16),))
    assert "layers.0.linear1" in {group.name for group in graph.prunable}
    assert removable(encoder, graph) == ()
    peeking: Any = Fn(
        lambda m, x: m.head(m.stem(x).to(m.c1.weight.dtype) + m.c2(F.relu(m.c1(m.stem(x))))),
        stem=cbr(3, 8), c1=conv(8, 6), c2=conv(6, 8), head=head(8),
    ).eval()  # fmt: skip
    assert removable(peeking, trace(peeking, (image(),))) == ()
