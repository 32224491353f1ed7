"""Counters against independent ones, and against the published integers."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deploypipe.compact import compact
from deploypipe.count import MacTable, ParamTable, even_widths, macs, params
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph
from tests.toys import TOYS

COUNTED = [
    "plain",
    "residual",
    "depthwise",
    "depthwise_multiplier",
    "grouped",
    "concat",
    "concat_of_concat",
    "flatten_after_concat",
    "transposed",
    "se_block",
    "conv_1d_and_3d",
    "norm_zoo",
    "convnext_block",
    "buffers",
    "shared_module",
    "option_a_shortcut",
    "matmul_parameter",
    "matmul_of_views",
]


class Block(nn.Module):
    """A basic block with an option-A shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.pad, self.stride = (n_out - n_in) // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


def cifar_resnet(n: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for n_in, width in ((16, 16), (16, 32), (32, 64)):
        blocks.append(Block(n_in, width, 1 + (n_in != width)))
        blocks += [Block(width, width, 1) for _ in range(n - 1)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


def plan_a_b(n: int, ratios: Sequence[float], skipped: Sequence[int]) -> KeepPlan:
    """The published plans: the first conv of each block loses `ratio` of its filters, except the layers named."""
    keep = {}
    for i in range(3 * n):
        stage, layer = divmod(i, n)[0], 2 * i + 2  # layers are counted from the stem, which is 1
        if layer not in skipped:
            width = 16 * 2**stage
            keep[f"{3 + i}.conv1"] = tuple(range(int(width * (1 - ratios[stage]))))
    return KeepPlan(keep)


@pytest.mark.parametrize(
    ("n", "ratios", "skipped", "n_macs", "n_params"),
    [
        (9, (0, 0, 0), (), 125_485_696, 853_018),
        (9, (0.1, 0.1, 0.1), (16, 20, 38, 54), 112_435_840, 773_336),
        (9, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), 90_907_264, 735_712),
        (18, (0, 0, 0), (), 252_887_680, 1_727_962),
        (18, (0.5, 0, 0), (36,), 212_779_648, 1_688_522),
        (18, (0.5, 0.4, 0.3), (36, 38, 74), 155_124_352, 1_168_424),
    ],
)
def test_published_resnets(n: int, ratios: Sequence[float], skipped: Sequence[int], n_macs: int, n_params: int) -> None:
    """Li et al., ICLR 2017: ResNet-56 and -110, dense, A and B."""
    graph = trace(cifar_resnet(n), (torch.zeros(1, 3, 32, 32),))
    plan = plan_a_b(n, ratios, skipped)
    plan.check(graph)
    assert macs(graph, plan) == n_macs
    assert params(graph, plan) == n_params


def independent(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[int, int]:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*example)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def random_plan(graph: Graph, seed: int) -> KeepPlan:
    rng = np.random.default_rng(seed)
    keep = {}
    for group in graph.prunable:
        some = rng.choice(group.size, size=int(rng.integers(1, group.size + 1)), replace=False)
        keep[group.name] = tuple(sorted(some.tolist()))
    return KeepPlan(keep)


@pytest.mark.parametrize("name", COUNTED)
def test_agrees_with_torch_before_and_after_compaction(name: str) -> None:
    model, example = TOYS[name]()
    model.eval()
    graph = trace(model, example)
    assert (macs(graph), params(graph)) == independent(model, example)
    for seed in range(3):
        plan = random_plan(graph, seed)
        assert (macs(graph, plan), params(graph, plan)) == independent(compact(model, graph, plan), example)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("table", [MacTable(), ParamTable()], ids=["macs", "params"])
def test_terms_add_up_to_the_prediction(name: str, table: MacTable | ParamTable) -> None:
    model, example = TOYS[name]()
    graph = trace(model.eval(), example)
    for seed in range(5):
        plan = random_plan(graph, seed) if seed else None
        kept = graph.kept(plan)
        total = sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in table.terms(graph))
        assert total == table.predict(graph, plan)
    assert set(table.candidates(graph)) == {group.name for group in graph.prunable}


def test_units() -> None:
    assert (MacTable().unit, ParamTable().unit) == ("MACs", "params")


def test_even_widths() -> None:
    for size, multiple in itertools.product(range(1, 200), (None, 1, 3, 8, 64)):
        widths = even_widths(size, multiple)
        assert widths[-1] == size
        assert list(widths) == sorted(set(widths))
        assert widths[0] >= 1
        if multiple is None:
            assert len(widths) <= 17
        else:
            assert all(width % multiple == 0 for width in widths[:-1])
            assert set(range(multiple, size + 1, multiple)) <= set(widths)
