"""Compaction: what it changes, what it refuses, and how it explains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import TOYS, Fn, cbr, head, image

from deploypipe.compact import compact, difference, mask
from deploypipe.errors import BackendError, ModelError
from deploypipe.graph import trace
from deploypipe.pipeline.stages import check_compaction
from deploypipe.plan import KeepPlan


def test_parameters_are_slices_and_attributes_follow() -> None:
    model, example = TOYS["norm_zoo"]()
    graph = trace(model, example)
    small = compact(model, graph, KeepPlan({"0": (1, 3), "3": (0, 2, 5)}))
    assert (small[0].out_channels, small[1].num_groups, small[1].num_channels, small[3].in_channels) == (6, 2, 6, 6)
    assert (small[3].out_channels, small[4].num_features, small[6].in_channels) == (3, 3, 3)
    assert torch.equal(small[0].weight, model[0].weight[[3, 4, 5, 9, 10, 11]])
    assert isinstance(small[0].weight, nn.Parameter)


def test_normalized_shape_and_shared_parameters_follow() -> None:
    model, example = TOYS["layer_norm"]()
    assert compact(model, trace(model, example), KeepPlan({"stem": (0, 1, 2)})).norm.normalized_shape == (3,)
    model, example = TOYS["shared_parameter"]()
    small = compact(model, trace(model, example), KeepPlan({"0.0": (0, 4)}))
    assert small[1].weight is small[3].weight


def test_requires_grad_and_dtype_survive() -> None:
    model, example = TOYS["plain"]()
    model.double()
    example = tuple(x.double() for x in example)
    model[1][0].weight.requires_grad_(False)
    small = compact(model, trace(model, example), KeepPlan({"0.0": (0, 1)}))
    assert not small[1][0].weight.requires_grad
    assert small[1][0].weight.dtype is torch.float64


def test_masked_model_is_not_the_original() -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    with torch.no_grad():
        assert not torch.allclose(mask(model, graph, KeepPlan({"0.0": (0,)}))(*example), model(*example))


def refuses_other_widths() -> tuple[nn.Module, tuple[Any, ...]]:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 8:
                raise ValueError(f"expected 8 channels, got {x.shape[1]}")
            return x * 2

    return nn.Sequential(cbr(3, 8), Picky(), head(8)), (image(),)


def test_literal_size_names_module_operation_and_groups() -> None:
    model, example = refuses_other_widths()
    with pytest.raises(ModelError) as caught:
        compact(model, trace(model, example), KeepPlan({"0.0": (0, 1, 2)}))
    text = str(caught.value)
    assert "expected 8 channels, got 3" in text
    assert "module '1' (Picky), after relu_" in text
    assert "--keep" in text
    assert "0.0" in text


def test_an_assertion_without_words_is_explained_too() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 8:
                raise AssertionError  # what `assert x.shape[1] == 8` does outside of tests
            return x

    model = nn.Sequential(cbr(3, 8), Strict(), head(8))
    with pytest.raises(ModelError, match="AssertionError") as caught:
        compact(model, trace(model, (image(),)), KeepPlan({"0.0": (0, 1, 2)}))
    assert "module '1' (Strict)" in caught.value.at


def test_silent_dependence_on_a_width_is_found_and_blamed() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return m.head(y * (2.0 if y.shape[1] == 8 else 1.0))

    model = Fn(f, a=cbr(3, 8), b=cbr(8, 8), head=head(8)).eval()
    example = (image(),)
    graph = trace(model, example)
    compact(model, graph, KeepPlan({"a.0": (0, 1, 2)}))
    with pytest.raises(ModelError, match="something else") as caught:
        compact(model, graph, KeepPlan({"a.0": (0, 1, 2), "b.0": (0, 1, 2)}))
    assert caught.value.at == "groups b.0"


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"0.9": (0,)}, "unknown group '0.9'"),
        ({"0.0": (0, 8)}, "out of range"),
        ({"4.2": (0,)}, "cannot be pruned: output of the model"),
        ({"0.0": ()}, "cannot be left without channels: it carries all of '4.2', which is fixed"),
    ],
)
def test_plans_that_do_not_fit_are_refused(keep: dict[str, tuple[int, ...]], words: str) -> None:
    model, example = TOYS["plain"]()
    with pytest.raises(ModelError, match=words):
        compact(model, trace(model, example), KeepPlan(keep))


@pytest.mark.parametrize("channels", [(1, 0), (0, 0), (-1, 2)])
def test_impossible_plans_cannot_be_made(channels: tuple[int, ...]) -> None:
    with pytest.raises(ModelError):
        KeepPlan({"g": channels})


def test_plan_of_another_graph_is_refused(tmp_path: Path) -> None:
    model, example = TOYS["plain"]()
    graph = trace(model, example)
    path = tmp_path / "plan.json"
    KeepPlan({"0.0": (0, 1)}, fingerprint="0123456789abcdef").save(path)
    with pytest.raises(ModelError, match="another graph"):
        compact(model, graph, KeepPlan.load(path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 99}', '{"schema": 1, "keep": {"a": "x"}}'])
def test_broken_plan_files_are_the_users_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ModelError):
        KeepPlan.load(path)
    with pytest.raises(ModelError):
        KeepPlan.load(tmp_path / "none.json")


def test_a_model_in_training_mode_stays_there() -> None:
    model, example = TOYS["residual"]()
    model.train()
    small = compact(model, trace(model, example), KeepPlan({"stem.0": (0, 1)}))
    assert all(module.training for module in small.modules())
    assert all(module.training for module in model.modules())


class Literal(nn.Module):
    """A shortcut that is only taken where widths happen to agree, before a norm across the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, m, 3, padding=1) for n, m in ((3, 8), (8, 12), (12, 6)))
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).relu()
        y = self.b(x).relu()
        y = y + x if list(y.shape) == list(x.shape) else y
        return self.fc(self.norm(self.c(y).mean((2, 3))))


@pytest.mark.parametrize("named", [{}, {"c": range(6)}, {"c": range(4)}], ids=["without", "whole", "cut"])
def test_a_norm_across_channels_does_not_switch_the_proof_off_for_the_rest(named: dict[str, range]) -> None:
    torch.manual_seed(0)
    model = Literal().eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    plan = KeepPlan({name: tuple(kept) for name, kept in {"a": range(8), "b": range(8), **named}.items()})
    with pytest.raises(ModelError, match="computes something else"):
        compact(model, graph, plan)
    inputs = [(torch.randn(2, 3, 8, 8),)]
    if named != {"c": range(4)}:
        with pytest.raises(BackendError):
            check_compaction(model, compact(model, graph, plan, check=False), graph, plan, inputs)
    assert compact(model, graph, KeepPlan({"a": (0, 2), "b": (1, 3, 5), "c": (0, 1, 5)})).fc.in_features == 3


def test_what_is_not_a_number_is_a_difference() -> None:
    one, nan, inf = torch.ones(2), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -float("inf")])
    assert difference([one], [nan]) == difference([nan], [one]) == difference([nan], [nan]) == float("inf")
    assert difference([one, one], [nan, one]) == float("inf")
    assert difference([one], [inf]) == difference([inf], [one]) == float("inf")
    assert difference([inf], [inf]) == 0, "as padding of masked places, for one"
    assert difference([inf], [torch.tensor([1.5, -float("inf")])]) == 0.5


def test_a_compacted_model_that_computes_no_numbers_is_noticed() -> None:
    """A literal 8 in `forward`: the root of a negative number as soon as a channel is missing."""
    model = Fn(lambda m, x: m.head(m.a(x)) + torch.tensor(m.a.weight.shape[0] - 8.0).sqrt(), a=nn.Conv2d(3, 8, 3), head=head(8))
    graph = trace(model.eval(), (image(),))
    with pytest.raises(ModelError, match="something else"):
        compact(model, graph, KeepPlan({"a": (0, 1, 2)}))


def test_a_plan_whose_part_alone_would_not_run_is_taken() -> None:
    """Widths that `forward` compares may only agree once the channels under the norm are cut as well."""

    class Alike(Literal):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(self.a(x).relu()).relu()
            z = self.c(y)
            assert y.shape[1] == 2 * z.shape[1]
            return self.fc(self.norm(z.mean((2, 3))))

    torch.manual_seed(0)
    model = Alike().eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    small = compact(model, graph, KeepPlan({"b": tuple(range(8)), "c": (0, 1, 2, 5)}))
    assert (small.b.out_channels, small.fc.in_features) == (8, 4)
    with pytest.raises(ModelError, match="does not run"):
        compact(model, graph, KeepPlan({"b": tuple(range(8))}))
