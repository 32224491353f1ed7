"""Weights on disk: what was written comes back, whatever the tensors share."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from deploypipe.errors import ModelError
from deploypipe.saved import load_weights, save_weights


class Sharing(nn.Module):
    """Tied weights, a buffer that is a slice of something larger, two halves of one table, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.register_buffer("ramp", torch.linspace(0, 1, 9)[:-1])
        sine, cosine = torch.randn(4, 6).chunk(2, -1)
        self.register_buffer("sine", sine)
        self.register_buffer("cosine", cosine)
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_written_comes_back(tmp_path: Path, layout: torch.memory_format) -> None:
    model, other = Sharing().to(memory_format=layout), Sharing()
    save_weights(model, tmp_path / "w.safetensors")
    assert "second.weight" not in load_file(tmp_path / "w.safetensors"), "a tensor of two names is written once"
    kept = other.scratch.clone()
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other.second.weight is other.first.weight
    assert torch.equal(other.scratch, kept)


def test_files_written_by_safetensors_itself_are_read(tmp_path: Path) -> None:
    """Which of several names it keeps is its own choice."""
    model, other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for each in (model, other):
        each[1].weight = each[0].weight
    save_model(model, str(tmp_path / "w.safetensors"))
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    for model, why in (
        (nn.Linear(3, 2, bias=False), "left over: bias"),
        (nn.BatchNorm1d(2), "missing: running_mean"),
        (nn.Linear(4, 2), "size mismatch"),
    ):
        with pytest.raises(ModelError, match=why):
            load_weights(model, tmp_path / "w.safetensors")
