"""Training in the fast memory layout must neither die nor learn wrong gradients: oneDNN's does for some narrow shortcuts."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from deploypipe.data.batches import Data
from deploypipe.training.finetune import TrainSettings, finetune
from deploypipe.training.layout import training_layout

SHORTCUT = {"kernel_size": 1, "stride": 2}


@pytest.mark.parametrize(
    ("layer", "fast"),
    [
        (nn.Conv2d(6, 16, 1, stride=2), False),
        (nn.Conv2d(7, 16, 1, stride=(1, 2)), False),
        (nn.Conv2d(24, 16, 1, stride=2, groups=4), False),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        (nn.Conv2d(6, 16, 1), True),  # not strided
        (nn.Conv2d(6, 16, 3, stride=2, padding=1), True),
        (nn.Conv1d(6, 16, 1, stride=2), True),
        (nn.Linear(6, 16), True),
    ],
)
def test_only_strided_pointwise_convolutions_of_few_channels_lose_the_fast_layout(layer, fast):
    assert training_layout(nn.Sequential(nn.ReLU(), layer)) == (torch.channels_last if fast else torch.contiguous_format)


@pytest.mark.parametrize(("capability", "block"), [("AVX2", 8), ("AVX512", 16), ("DEFAULT", 8)])
def test_few_is_less_than_a_vector_register(monkeypatch, capability, block):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert training_layout(nn.Conv2d(block, 8, **SHORTCUT)) == torch.channels_last
    assert training_layout(nn.Conv2d(block - 1, 8, **SHORTCUT)) == torch.contiguous_format


def narrow() -> tuple[nn.Module, Data]:
    """Return a network with such a shortcut, and images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, **SHORTCUT), nn.Flatten(), nn.Linear(2048, 2)
    )
    images = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(2, (64,)))
    return model, Data(images, images, ("a", "b"), "noise", None, "noise")


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
