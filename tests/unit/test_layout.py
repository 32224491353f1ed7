"""The fast memory layout: not for networks that cannot run in it, nor for those whose gradients are wrong in it."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from deploypipe.data.batches import CropFlip, Data
from deploypipe.training.evaluate import evaluate, recalibrate
from deploypipe.training.finetune import TrainSettings, finetune
from deploypipe.training.layout import fast_layout, has_narrow_shortcut, laid_out, lay_out

SHORTCUT = {"kernel_size": 1, "stride": 2}


class Viewed(nn.Module):
    """A network as many tutorials write it: it only runs on the plain layout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4 * 8 * 8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.conv(self.first(x))).view(x.size(0), -1))


def noise(size: int, channels: int = 3, augment: CropFlip | None = None) -> Data:
    images = TensorDataset(torch.randn(64, channels, size, size), torch.randint(2, (64,)))
    return Data(images, images, ("a", "b"), "noise", augment, "noise")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [None, CropFlip(1, flip=True)])
def test_a_network_that_views_its_channels_runs_and_trains(training, channels, augment):
    torch.manual_seed(0)
    model, data = Viewed(channels).train(training), noise(8, channels, augment)
    flat = nn.Sequential(model.first, model.conv, model.norm, nn.Flatten(), model.last)
    assert fast_layout(model, torch.randn(4, channels, 8, 8)) == torch.contiguous_format
    assert fast_layout(flat, torch.randn(4, channels, 8, 8)) == torch.channels_last
    assert evaluate(model, data.test).loss == pytest.approx(evaluate(flat, data.test).loss, rel=1e-5)
    assert model.training == training
    fresh, plain = (recalibrate(net, data.train, batch_size=32, augment=augment) for net in (model, flat))
    torch.testing.assert_close(fresh.norm.running_mean, plain[2].running_mean)
    settings = TrainSettings(epochs=2, batch_size=32)
    one, other = (finetune(net, data, settings).state_dict() for net in (model, flat))
    for mine, theirs in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


class ViewedInTraining(nn.Module):
    """A branch for training only, which the trial in eval mode does not meet, needs the plain layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last, self.aux = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(144, 2)

    def forward(self, x: torch.Tensor) -> object:
        y = self.norm(self.conv(x))
        out = self.last(y.mean((2, 3)))
        return (out, self.aux(y.view(len(y), -1))) if self.training else out


def test_branches_of_training_mode_are_tried_too():
    model, data = ViewedInTraining(), noise(8)
    before = copy.deepcopy(model.state_dict())
    assert fast_layout(model, torch.randn(4, 3, 8, 8)) == torch.channels_last
    assert lay_out(model, torch.randn(4, 3, 8, 8)) == torch.contiguous_format
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    finetune(model, data, TrainSettings(epochs=1, batch_size=32))


def test_the_trial_leaves_statistics_and_modes_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast_layout(model, torch.randn(4, 3, 8, 8))
    assert [module.training for module in model] == [True, False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)])
def test_networks_for_inputs_of_any_rank_are_laid_out(layer):
    inputs = torch.randn(2, 3, *[6] * len(layer.kernel_size))
    model = copy.deepcopy(layer)
    layout = lay_out(model, inputs)
    assert layout == (torch.channels_last if isinstance(layer, nn.Conv2d) else torch.contiguous_format)
    torch.testing.assert_close(model(laid_out(inputs, layout)), layer(inputs))


class Batched(nn.Conv2d):
    """Only takes whole batches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == 8
        return super().forward(x)


def test_a_network_that_refuses_the_trial_gets_the_plain_layout():
    assert fast_layout(Batched(3, 4, 3), torch.randn(8, 3, 8, 8)) == torch.contiguous_format


def test_images_are_tried_where_the_model_is():
    """The device `meta` computes shapes only; on another one than the model, images would fail in any layout."""
    assert fast_layout(nn.Conv2d(3, 4, 3, device="meta"), torch.randn(2, 3, 8, 8)) == torch.channels_last


def test_what_is_no_image_has_the_plain_layout():
    assert fast_layout(nn.Linear(6, 2), torch.randn(4, 6)) == torch.contiguous_format


@pytest.mark.parametrize(
    ("layer", "narrow"),
    [
        (nn.Conv2d(6, 16, 1, stride=2), True),
        (nn.Conv2d(7, 16, 1, stride=(1, 2)), True),
        (nn.Conv2d(24, 16, 1, stride=2, groups=4), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(6, 16, 1), False),  # not strided
        (nn.Conv2d(6, 16, 3, stride=2, padding=1), False),
        (nn.Conv1d(6, 16, 1, stride=2), False),
        (nn.Linear(6, 16), False),
    ],
)
def test_narrow_shortcuts_are_strided_pointwise_convolutions_of_few_channels(layer, narrow):
    assert has_narrow_shortcut(nn.Sequential(nn.ReLU(), layer)) == narrow


@pytest.mark.parametrize(("capability", "block"), [("AVX2", 8), ("AVX512", 16), ("DEFAULT", 8)])
def test_few_is_less_than_a_vector_register(monkeypatch, capability, block):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not has_narrow_shortcut(nn.Conv2d(block, 8, **SHORTCUT))
    assert has_narrow_shortcut(nn.Conv2d(block - 1, 8, **SHORTCUT))


def narrow() -> tuple[nn.Module, Data]:
    """Return a network with such a shortcut, and images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, **SHORTCUT), nn.Flatten(), nn.Linear(2048, 2)
    )
    return model, noise(32)


def test_a_narrow_shortcut_learns_the_right_gradients():
    """Run apart: where it is wrong, the process may die. It learns what the same layer without a stride does."""
    code = "from test_layout import learned_alike; learned_alike()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:] or f"died with {done.returncode}"


class Skipping(nn.Module):
    """Every second row and column."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


def learned_alike() -> None:
    """Assert that a strided pointwise convolution learns what one without stride does on every second row and column."""
    torch.set_num_threads(1)
    model, data = narrow()
    stem, relu, shortcut, *rest = model
    plain = nn.Conv2d(6, 8, 1)
    plain.load_state_dict(shortcut.state_dict())
    same = nn.Sequential(stem, relu, nn.Sequential(Skipping(), plain), *rest)
    settings = TrainSettings(epochs=5, lr=0.01, batch_size=32, weight_decay=0.0)
    one, other = (finetune(net, data, settings).state_dict() for net in (model, same))
    for mine, theirs in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
