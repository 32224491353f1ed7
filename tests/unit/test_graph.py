"""The channel graph: which groups, which members, which reasons."""

import copy
import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import TOYS, Fn

from deploypipe.errors import ModelError
from deploypipe.graph import trace
from deploypipe.types import Graph


def graph_of(name: str) -> Graph:
    model, example = TOYS[name]()
    return trace(model, example)


def prunable(name: str) -> dict[str, int]:
    return {group.name: group.size for group in graph_of(name).prunable}


def test_chain_has_one_group_for_each_inner_layer() -> None:
    graph = graph_of("plain")
    assert prunable("plain") == {"0.0": 8, "1.0": 12, "3.0": 8}
    members = {(m.param, m.axis): m.role for m in graph.group("0.0").members}
    bn = {(f"0.1.{key}", 0): "carries" for key in ("weight", "bias", "running_mean", "running_var")}
    assert members == {("0.0.weight", 0): "produces", ("1.0.weight", 1): "consumes", **bn}
    assert graph.fixed == {"4.2": "output of the model"}


def test_residual_sum_joins_all_its_producers_and_says_so() -> None:
    graph = graph_of("residual")
    trunk = graph.group("stem.0")
    produced = {m.param for m in trunk.members if m.role == "produces"}
    assert produced == {"stem.0.weight", "b2.0.weight"}
    assert trunk.coupled_by == ("add in the model",)
    assert {m.param for m in trunk.members if m.role == "consumes"} == {"b1.0.weight", "short.weight", "d1.0.weight"}


def test_depthwise_passes_channels_through() -> None:
    group = graph_of("depthwise").group("0.0")
    assert ("1.0.weight", 0, "carries") in {(m.param, m.axis, m.role) for m in group.members}
    assert prunable("depthwise") == {"0.0": 8, "2.0": 12}


def test_depthwise_multiplier_owns_several_slots() -> None:
    member = next(m for m in graph_of("depthwise_multiplier").group("0.0").members if m.param == "1.0.weight")
    assert member.slots(2) == (6, 7, 8)


def test_grouped_convolution_is_cut_by_whole_groups() -> None:
    graph = graph_of("grouped")
    group = graph.group("0.0")
    assert group.size == 4
    assert next(m for m in group.members if m.param == "1.0.weight").slots(1) == (4, 5, 6, 7)
    assert next(m for m in group.members if m.param == "0.0.weight").slots(1) == (2, 3)


def test_concat_offsets_and_flatten_spans() -> None:
    graph = graph_of("flatten_after_concat")
    member = next(m for m in graph.group("b.0").members if m.param == "fc1.weight")
    assert member.slots(0) == tuple(range(4 * 16, 5 * 16))


def test_option_a_keeps_the_channels_that_meet_padding() -> None:
    graph = graph_of("option_a_shortcut")
    assert prunable("option_a_shortcut") == {"stem.0": 8, "a.0": 6}
    assert "padding" in graph.group("b.0").fixed
    assert next(m for m in graph.group("stem.0").members if m.param == "b.0.weight").slots(0) == (4,)


@pytest.mark.parametrize(
    ("toy", "group", "words"),
    [
        ("lenet_view", "b.0", "written in forward"),
        ("slice_literal", "stem.0", "picked by position"),
        ("split_literal", "stem.0", "picked by position"),
        ("slice_by_share", "stem.0", "multiplied by a float"),
        ("cropped_channels", "stem.0", "cut off by position"),
        ("scaled_by_a_share_of_a_literal", "a.0", "divided by"),
        ("scaled_by_a_ratio", "a.0", "combined with another width"),
        ("scaled_by_a_ratio", "b.0", "divided by"),
        ("scaled_by_a_product", "a.0", "combined with another width"),
        ("scaled_by_a_product", "b.0", "combined with another width"),
        ("shaped_like_another", "a.0", "taken from another tensor"),
        ("shaped_like_another", "b.0", "taken from another tensor"),
        ("stacked_vertically", "stem.0", "takes a list of tensors"),
        ("width_in_arithmetic", "mid.0", "raised to a power"),
        ("reduces_channels", "mid.0", "reduces over the channels"),
        ("rolls_channels", "mid.0", "picked by position"),
        ("residual_with_input", "b.0", "fixed size"),
        ("writes_by_position", "a", "written in place"),
        ("functional_grouped_conv", "stem.0", "number of groups is written in forward"),
        ("option_a_computed", "stem.0", "subtracted"),
        ("fused_attention", "q", "attention"),
        ("multi_head_attention", "stem.0", "embedding size is fixed"),
        ("recurrent", "stem.0", "no rule for"),
        ("data_dependent", "mid.0", "reduces over the channels"),
        ("weight_norm", "0.0", "no parameter"),
        ("warped", "flow", "positions to read from"),
        ("norm_of_written_size", "stem.0", "written in forward"),
        ("non_local", "q", "two activations"),
        ("attention_over_positions", "q", "two activations"),
        ("windows_of_channels", "stem.0", "picked by position"),
        ("diagonal_of_channels", "stem.0", "picked by position"),
        ("tied_transpose", "a", "makes these channels and reads them"),
        ("tied_product", "a", "makes these channels and reads them"),
    ],
)
def test_what_cannot_be_pruned_says_why(toy: str, group: str, words: str) -> None:
    assert words in graph_of(toy).fixed[group]


@pytest.mark.parametrize(
    ("toy", "expected"),
    [
        ("channel_shuffle", {"a.0": 8, "b.0": 6, "c.0": 8}),
        ("view_by_size", {"a.0": 8, "b.0": 6, "fc1": 10}),
        ("view_by_count", {"a.0": 8, "b.0": 6, "fc1": 10}),
        ("blurred", {"stem.0": 8}),
        ("split_attention", {"a.0": 6, "b.0": 8, "fc1": 4, "out.0": 6}),
        ("scaled_and_shifted", {"a.0": 6, "b.0": 8}),
        ("shared_module", {"stem.0": 8}),
        ("matmul_parameter", {"stem.0": 8, "w1": 10}),
        ("parameter_direct", {"stem.0": 8, "out.0": 6}),
        ("buffers", {"stem.0": 8, "out.0": 6}),
        ("gated_halves", {"up": 8, "mid": 6}),
        ("split_derived", {"stem.0": 6, "out.0": 8}),
        ("pixel_shuffle", {"0.0": 4, "2.0": 6, "4.0": 6}),
        ("stack_and_sum", {"a.0": 8}),
        ("max_out", {"a": 8}),
        ("class_token", {"stem.0": 8, "fc1": 12}),
        ("padding_in_words", {"0": 8, "2": 6, "4": 8}),
        ("fewer_chunks_than_asked", {"stem.0": 2, "out.0": 8}),
        ("larger_of_two", {"a.0": 8}),
        ("warped", {"stem.0": 8}),
        ("top_values", {"stem": 8}),
        ("norm_of_read_size", {"stem.0": 8}),
        ("non_local", {"stem.0": 8, "v": 4}),
        ("attention_over_positions", {"v.0": 8}),
        ("matmul_computed", {"stem.0": 8, "w1": 10}),
        ("windows_of_space", {"stem.0": 8}),
        ("views_in_place", {"stem.0": 8, "a": 6}),
        ("activations_in_place", {"a": 8, "b": 6}),
        ("selective_kernels", {"stem.0": 8, "a.0": 6}),
        ("shape_of_another", {"stem": 8}),
        ("weights_that_are_added", {"stem.0": 8, "w1": 6, "a": 4}),
        ("low_rank_addition", {"up": 10}),
        ("keeps_its_size", {"stem.0": 8, "out.0": 6}),
        ("widths_are_read", {"a": 8, "b": 6}),
        ("writes_into_its_input", {"stem.0": 8}),
        ("returns_an_object", {"stem.0": 8}),
        ("diagonal_of_space", {"stem.0": 8}),
    ],
)
def test_what_can_be_pruned_is(toy: str, expected: dict[str, int]) -> None:
    assert prunable(toy) == expected


def test_yolo_trunk_is_prunable_and_its_heads_are_not() -> None:
    graph = graph_of("yolo")
    assert {"stem.0", "c3.cv1.0", "sppf.cv1.0", "down4.0", "box.0.0.0"} <= {g.name for g in graph.prunable}
    assert set(graph.fixed) == {"box.0.2", "cls.0.2"}  # the second scale is joined to the first


def test_norm_across_channels_is_marked() -> None:
    assert graph_of("layer_norm").group("stem").normalised
    assert not graph_of("layer_norm").group("fc1").normalised


BRUTE = ("plain", "residual", "depthwise", "concat", "se_block", "grouped", "pixel_shuffle", "yolo")
BRUTE += ("flatten_after_concat", "shared_module", "view_by_size", "split_attention", "scaled_and_shifted", "dense_block")


@pytest.mark.parametrize("toy", BRUTE)
def test_members_are_found_by_brute_force_too(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knows nothing of the tracer: zeroing a channel's consumer slots must stop every gradient into its producer slots.

    Conversely a producer slot that belongs to another channel keeps some gradient, so the sets are equal. (ReLU stops
    gradients of its own, so a smooth function takes its place.)
    """
    monkeypatch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.tanh(x))
    model, example = TOYS[toy]()
    graph = trace(model, example)
    for group in graph.prunable:
        for channel in (0, group.size - 1):
            dead = _dead_slots(model, example, graph, group.name, channel)
            for member in group.members:
                if member.role == "produces":
                    expected = set(member.slots(channel))
                    assert dead[member.param] == expected, (group.name, member.param)


def _dead_slots(model: nn.Module, example: tuple, graph: Graph, name: str, channel: int) -> dict[str, set[int]]:
    """Return, per producing parameter, the output slots whose gradient vanishes when the channel's consumers are zero."""
    changed = copy.deepcopy(model)
    state = dict(changed.named_parameters())
    for member in graph.group(name).members:
        if member.role == "consumes":
            with torch.no_grad():
                state[member.param].index_fill_(member.axis, torch.tensor(member.slots(channel)), 0.0)
    torch.manual_seed(1)
    total = 0.0
    for _ in range(4):
        outputs = changed(*[torch.randn_like(x) for x in example])
        leaves = torch.utils._pytree.tree_leaves(outputs)
        total = total + sum((leaf * torch.randn_like(leaf)).sum() for leaf in leaves)
    total.backward()
    dead = {}
    for member in graph.group(name).members:
        if member.role == "produces":
            gradient = state[member.param].grad.abs().movedim(member.axis, 0)
            gradient = gradient.reshape(len(gradient), -1).sum(1)
            dead[member.param] = set(np.flatnonzero(gradient.numpy() == 0).tolist())
    return dead


def test_model_is_left_as_it_was() -> None:
    model, example = TOYS["norm_zoo"]()
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, example)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(name.startswith("_deploypipe") for p in model.parameters() for name in vars(p))


def test_failing_forward_is_the_users_error_with_its_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(4, 8, 3)))
    with pytest.raises(ModelError) as caught:
        trace(model, torch.zeros(1, 3, 8, 8))
    assert "1.0" in caught.value.at
    assert "(1, 3, 8, 8)" in caught.value.at


def test_fingerprint_is_stable_and_tells_graphs_apart() -> None:
    assert graph_of("plain").fingerprint == graph_of("plain").fingerprint
    names = ["plain", "residual", "depthwise", "grouped", "concat", "shared_module", "transposed", "norm_zoo", "yolo"]
    assert len({graph_of(name).fingerprint for name in names}) == len(names)


def test_layers_state_their_geometry_and_widths() -> None:
    graph = graph_of("depthwise")
    first, dw, pw, *_ = graph.layers
    assert (first.kind, first.kernel, first.in_size, first.out_size) == ("conv", (3, 3), (8, 8), (8, 8))
    assert (first.batch, first.positions) == (2, 128)
    assert dw.kind == "depthwise"
    kept = graph.kept() | {"0.0": 5, "2.0": 7}
    assert (dw.n_in.at(kept), dw.n_out.at(kept), dw.n_groups.at(kept)) == (5, 5, 5)
    assert (pw.n_in.at(kept), pw.n_out.at(kept)) == (5, 7)
    assert first.n_in.at(kept) == 3


def test_padding_in_words_is_stated_in_numbers() -> None:
    assert [layer.padding for layer in graph_of("padding_in_words").layers[:3]] == [(2, 2), (2, 0), (0, 0)]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_with_more_behind_is_stated_for_both_sides() -> None:
    """All that is added in front, then all that is added behind: the order of ONNX."""
    (layer,) = trace(nn.Conv2d(3, 4, (3, 4), padding="same"), torch.zeros(1, 3, 8, 8)).layers
    assert layer.padding == (1, 1, 1, 2)


def test_what_a_module_keeps_of_one_trace_is_taken_out_again() -> None:
    """Tensors of inference mode may take no part in training, and a second trace would not see what makes them."""

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.ones(8, 1, 1, 1))
            self.head, self.fused, self.calls = nn.Conv2d(8, 4, 1), None, 0
            self.register_buffer("window", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.fused is None:
                self.fused = self.weight * self.scale
            self.size, self.window, self.seen = x.shape[1], torch.ones(1), x
            return self.head(nn.functional.conv2d(x, self.fused))

    model, example = Lazy().eval(), torch.randn(1, 3, 8, 8)
    assert [group.name for group in trace(model, example).prunable] == ["weight"]
    assert [group.name for group in trace(model, example).prunable] == ["weight"]
    assert (model.fused, model.calls, float(model.window)) == (None, 2, 0.0)
    assert "size" not in vars(model)
    model.train()(example).sum().backward()
    assert model.weight.grad is not None


def test_a_list_of_parts_may_begin_with_an_empty_tensor() -> None:
    def joined(m: Any, x: torch.Tensor) -> torch.Tensor:
        parts = torch.Tensor()
        for layer in (m.a, m.b):
            parts = torch.cat([parts, layer(x)], 1)
        return m.head(parts)

    model = Fn(joined, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 6, 1), head=nn.Conv2d(10, 2, 1)).eval()
    assert [(group.name, group.size) for group in trace(model, torch.randn(1, 3, 4, 4)).prunable] == [("a", 4), ("b", 6)]


def test_sizes_may_be_given_by_name() -> None:
    def named(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.head(torch.reshape(input=y, shape=(y.shape[0], y.shape[1], -1)).mean(2))

    model = Fn(named, a=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 2)).eval()
    assert [group.name for group in trace(model, torch.randn(1, 3, 4, 4)).prunable] == ["a"]


def test_what_is_shuffled_into_pixels_may_meet_a_skip_and_a_mask() -> None:
    model, example = TOYS["pixel_shuffle_sum"]()
    assert [(group.name, group.size) for group in trace(model, example).prunable] == [("stem.0", 4)]


def test_products_with_views_of_weights_are_layers() -> None:
    model, example = TOYS["matmul_of_views"]()
    graph = trace(model, example)
    assert [(layer.name, layer.kind) for layer in graph.layers[1:]] == [(n, "matmul") for n in ("wide", "narrow", "out")]
    assert [(group.name, group.size) for group in graph.prunable] == [("stem", 8), ("wide", 12), ("narrow", 10)]


def test_lazy_layers_are_run_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ModelError, match=r"'0\.weight' has no size yet"):
        trace(model, torch.randn(1, 3, 4, 4))
    model(torch.randn(1, 3, 4, 4))
    assert [group.name for group in trace(model, torch.randn(1, 3, 4, 4)).prunable] == ["0"]


def test_new_tensors_of_a_written_size_do_not_hold_channels() -> None:
    model = Fn(lambda m, x: m.head(m.a(x) + m.a(x).new_ones(1)), a=nn.Conv2d(3, 4, 1), head=nn.Conv2d(4, 2, 1)).eval()
    assert [group.name for group in trace(model, torch.randn(1, 3, 4, 4)).prunable] == ["a"]


def test_a_model_without_outputs_is_told() -> None:
    with pytest.raises(ModelError, match="returns no tensors but a NoneType"):
        trace(Fn(lambda m, x: setattr(m, "kept", m.conv(x)), conv=nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 4, 4))


def test_what_einops_remembers_of_a_shape_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache takes a size that was read off a tensor for a literal of the same value, and the other way round."""
    einops = ModuleType("einops.einops")
    einops._reconstruct_from_shape = lru_cache(lambda shape: (shape[0], shape[1], shape[2] * shape[3]))
    monkeypatch.setitem(sys.modules, "einops.einops", einops)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.fc(x.reshape(einops._reconstruct_from_shape(tuple(x.shape))).mean(2))

    example = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        model = Fn(forward, stem=nn.Conv2d(3, 8, 1), fc=nn.Linear(8, 4)).eval()
        model(example)
        assert [group.name for group in trace(model, example).prunable] == ["stem"]
        assert all(type(size) is int for size in einops._reconstruct_from_shape((2, 8, 8, 8)))
