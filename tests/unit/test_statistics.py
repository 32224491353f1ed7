"""Sampled inputs of layers: what is read must be what the layer computes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms.reconstruction import rebase_norms
from deploypipe.errors import NotApplicable, UsageError
from deploypipe.ingredients.statistics import (
    FeatureTap,
    batch_size,
    evaluating,
    generator,
    images,
    readable,
    sample,
    weights,
)

LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 6)),
    "strided, dilated": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 3)), (5, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (5, 4, 7, 6)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (5, 4, 7, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (5, 4, 7, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 7, 6)),
    "1d": (nn.Conv1d(4, 6, 5, padding=2), (5, 4, 9)),
    "3d": (nn.Conv3d(4, 6, (1, 3, 2), padding=(0, 1, 1)), (5, 4, 3, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (5, 4, 4, 5)),
    "transposed, dilated": (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), dilation=2), (5, 4, 4, 5)),
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear over tokens": (nn.Linear(4, 6, bias=False), (5, 3, 2, 4)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 7, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_contributions_add_up_to_the_output(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=generator(1))
    with torch.no_grad():
        out = layer(x)
        read = sample(layer, x, out, 40, generator(0))
    assert read.x.shape == (len(read.y), 4)
    assert read.y.std() > 0.1
    torch.testing.assert_close(read.x.sum(1), read.y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_each_column_is_one_input_channel(name: str) -> None:
    """A channel that is zero contributes nothing; the others contribute what they did."""
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=generator(1))
    axis = len(shape) - 1 if isinstance(layer, nn.Linear) else len(shape) - layer.weight.dim() + 1
    less = x.index_fill(axis, torch.tensor([2]), 0.0)
    with torch.no_grad():
        before = sample(layer, x, layer(x), 40, generator(0)).x
        after = sample(layer, less, layer(less), 40, generator(0)).x
    assert (after[:, 2] == 0).all()
    assert before[:, 2].abs().max() > 0.01
    torch.testing.assert_close(after[:, [0, 1, 3]], before[:, [0, 1, 3]], atol=1e-6, rtol=1e-5)


def test_locations_cover_filters_and_places_and_obey_the_choice_of_filters() -> None:
    layer = nn.Conv2d(1, 8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(8.0).reshape(8, 1, 1, 1))
        x = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
        every = sample(layer, x, layer(x), 3000, generator(0)).y
        some = sample(layer, x, layer(x), 3000, generator(0), torch.tensor([6, 2])).y
    assert set(every.tolist()) == {float(j * v) for j in range(8) for v in range(1, 13)}
    assert set(some.tolist()) == {float(j * v) for j in (2, 6) for v in range(1, 13)}


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 2)]
    return nn.Sequential(*layers)


def batches() -> Iterator[Tensor]:
    return iter(torch.randn(6, 3, 8, 8, generator=generator(3)).split(4))


def test_tap_reads_the_input_after_the_activation_and_leaves_the_model_alone() -> None:
    net = model().train()
    net[1].eval()
    before = {name: tensor.clone() for name, tensor in weights(net).items()}
    read = list(FeatureTap(net, ["3.weight", "5.weight"], 7, seed=0).samples(batches()))
    assert [len(each["3.weight"][0].y) for each in read] == [28, 14]
    assert net.training
    assert not net[1].training
    assert not any(module._forward_hooks for module in net.modules())
    for name, tensor in weights(net).items():
        assert torch.equal(tensor, before[name])
    with evaluating(net), torch.no_grad():
        inputs = next(batches())
        hidden = net[:3](inputs)  # after batch norm and ReLU
        expected = sample(net[3], hidden, net[3](hidden), 7, generator(0, "3.weight", 0, 0))
    torch.testing.assert_close(read[0]["3.weight"][0].x, expected.x)


def test_tap_repeats_itself_stops_early_and_forgets_its_hooks_on_failure() -> None:
    net, reached = model(), []
    net[5].register_forward_hook(lambda *_: reached.append(1))
    first, again = (list(FeatureTap(net, ["3.weight"], 3, 0).samples(batches(), stop_after=1)) for _ in range(2))
    assert not reached
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["3.weight"][0].x, b["3.weight"][0].x)
    other = next(FeatureTap(net, ["3.weight"], 3, 1).samples(batches()))
    assert not torch.equal(other["3.weight"][0].x, first[0]["3.weight"][0].x)
    with pytest.raises(RuntimeError):
        next(FeatureTap(net, ["3.weight"], 3, 0).samples(iter([torch.zeros(1, 9, 8, 8)])))
    assert not net[3]._forward_hooks


def test_layers_that_cannot_be_read_say_so() -> None:
    net = nn.ModuleDict(
        {"grouped": nn.Conv2d(4, 4, 3, groups=2), "norm": nn.BatchNorm2d(4), "attention": nn.MultiheadAttention(4, 2)}
    )
    for weight in ("grouped.weight", "norm.weight", "attention.in_proj_weight", "missing.weight", "grouped.bias"):
        with pytest.raises(NotApplicable, match=weight):
            readable(net, weight)
    assert readable(net, "attention.out_proj.weight") is net["attention"].out_proj


class Same(nn.Conv2d):
    """Pads inside forward, as layers do that come from TensorFlow: what its weight reads is not its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Renamed(nn.Conv2d):
    """Reads its input as its parent does."""


def test_a_layer_with_a_forward_of_its_own_is_not_read() -> None:
    with pytest.raises(NotApplicable, match=r"0\.weight"):
        readable(nn.Sequential(Same(3, 4, 3, 2)), "0.weight")
    readable(nn.Sequential(Renamed(3, 4, 3)), "0.weight")


def test_images_are_distinct_seeded_and_no_more_than_asked_for() -> None:
    data = TensorDataset(torch.arange(50.0)[:, None], torch.zeros(50, dtype=torch.long))
    chosen = torch.cat(list(images(data, 20, seed=0, batch=8))).flatten().tolist()
    assert len(chosen) == len(set(chosen)) == 20
    assert chosen == torch.cat(list(images(data, 20, seed=0, batch=3))).flatten().tolist()
    assert chosen != torch.cat(list(images(data, 20, seed=1))).flatten().tolist()
    assert sum(len(batch) for batch in images(data, 1000, seed=0)) == 50
    with pytest.raises(UsageError, match="needs data"):
        next(images(None, 20, seed=0))


def test_large_images_come_in_small_batches() -> None:
    assert batch_size((torch.zeros(1, 3, 32, 32),)) == 128
    assert batch_size((torch.zeros(1, 3, 512, 512),)) == 5
    assert batch_size((torch.zeros(1, 3, 4096, 4096),)) == 1
    assert batch_size(()) == 128


def test_rebasing_norms_keeps_the_function_and_finds_the_statistics() -> None:
    net = model().eval()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.normal_()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.1, 3)
    data = list(batches())
    with torch.no_grad():
        before, inside = net(data[0]), net[0](torch.cat(data))
        rebase_norms(net, iter(data))
        torch.testing.assert_close(net(data[0]), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net[1].running_mean, inside.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net[1].running_var, inside.var((0, 2, 3), unbiased=False), atol=1e-5, rtol=1e-5)


def test_weights_are_a_view() -> None:
    net = model()
    view: dict[str, Any] = weights(net)
    assert set(view) == {*dict(net.named_parameters()), *dict(net.named_buffers())}
    assert view["0.weight"].data_ptr() == net[0].weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in view.values())
