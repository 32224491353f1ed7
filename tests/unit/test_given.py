"""What is refused when model and data are opened, before anything slow."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from deploypipe.errors import ModelError
from deploypipe.pipeline.given import given
from deploypipe.pipeline.request import Request
from deploypipe.progress import Silent

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, x, scale{default}):
        {first}
        return self.b(self.a(x).mean((2, 3)) * scale)

def make():
    return Net(), (torch.zeros(1, 1, 16, 16), torch.ones(1, 8))
"""


def opened(folder: Path, default: str = "", first: str = "pass"):
    path = folder / "net.py"
    path.write_text(MODEL.format(default=default, first=first))
    return given(Request(model=f"{path}:make"), Silent())


@pytest.mark.parametrize(
    ("default", "reason"),
    [("", "missing 1 required positional argument: 'scale'"), ("=None", "unsupported operand type")],
)
def test_a_model_that_needs_several_inputs_is_refused(tmp_path: Path, default: str, reason: str) -> None:
    with pytest.raises(ModelError, match="the model takes 2 inputs") as caught:
        opened(tmp_path, default)
    assert reason in caught.value.message
    assert "net.py" in caught.value.at
    for way_out in ("one input", "deploypipe inspect and profile", "metric='macs'"):
        assert way_out in caught.value.fix


def test_a_model_that_can_do_without_the_other_inputs_is_taken(tmp_path: Path) -> None:
    found = opened(tmp_path, "=None", "scale = 1 if scale is None else scale")
    assert [len(inputs) for inputs in found.inputs] == [2] * len(found.inputs)


AUXILIARY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.aux = nn.Linear({width}, 10)

    def forward(self, x):
        y = self.a(x).relu()
        out = self.fc(self.b(y).relu().mean((2, 3)))
        return (out, self.aux({read})) if self.training else out

def make():
    return Net(), (torch.zeros(2, 1, 16, 16),)
"""


def test_layers_of_training_mode_that_could_not_follow_are_named_before_anything_slow(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(AUXILIARY.format(width=8, read="y.mean((2, 3))"))
    with pytest.raises(ModelError, match="aux run in training mode only") as caught:
        given(Request(model=f"{path}:make"), Silent(), trains=True)
    assert "auxiliary classifiers are not deployed" in caught.value.fix
    assert given(Request(model=f"{path}:make"), Silent()).graph.prunable, "where nothing is trained they do no harm"
    assert given(Request(model=f"{path}:make", keep=("a",)), Silent(), trains=True)
    path.write_text(AUXILIARY.format(width=256, read="x.flatten(1)"))
    assert given(Request(model=f"{path}:make"), Silent(), trains=True), "they read the input alone"


def test_a_model_that_is_frozen_whole_is_refused_before_anything_slow(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(AUXILIARY.format(width=8, read="y.mean((2, 3))").replace("Net(),", "Net().requires_grad_(False),"))
    with pytest.raises(ModelError, match="nothing to train"):
        given(Request(model=f"{path}:make"), Silent(), trains=True)
    assert given(Request(model=f"{path}:make"), Silent()).graph.prunable


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_data_of_another_type_than_the_model_takes_is_refused(kind: torch.dtype) -> None:
    data = TensorDataset(torch.zeros(40, 1, 16, 16, dtype=kind), torch.arange(40) % 10)
    with pytest.raises(ModelError, match=f"inputs of {kind}, the model takes torch.float32"):
        given(Request(data=(data, data)), Silent())


VOLUMES = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def make():
    layers = nn.Conv3d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers), torch.zeros(1, 1, 6, 6, 6)

def data():
    return TensorDataset(torch.zeros(40, 1, 6, 6, 6), torch.arange(40) % 2)
"""


def test_volumes_are_taken_from_the_user_s_own_datasets(tmp_path: Path) -> None:
    path = tmp_path / "volumes.py"
    path.write_text(VOLUMES)
    found = given(Request(model=f"{path}:make", data=f"{path}:data"), Silent())
    assert found.data.input_shape == (1, 6, 6, 6)
    with pytest.raises(ModelError, match="the model takes \\(1, 6, 6, 6\\)"):
        given(Request(model=f"{path}:make"), Silent())


@pytest.mark.parametrize(("classes", "told"), [(10, False), (7, True)])
def test_a_model_made_for_other_classes_is_told_of(classes: int, told: bool) -> None:
    data = TensorDataset(torch.zeros(40, 1, 16, 16), torch.arange(40) % classes)
    notes = given(Request(data=(data, data)), Silent()).loaded.notes
    assert [note for note in notes if f"10 outputs, the data {classes} classes" in note] == list(notes)
    assert bool(notes) == told


def digits(n: int = 40, **changed: torch.Tensor) -> TensorDataset:
    return TensorDataset(changed.get("x", torch.zeros(n, 1, 16, 16)), changed.get("y", torch.arange(n) % 10))


def nan_at(place: int) -> torch.Tensor:
    images = torch.zeros(40, 1, 16, 16)
    images[place] = float("nan")
    return images


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (digits(), digits(y=torch.arange(40) % 10 + 1), "label 10 is out of range"),
        (digits(), digits(y=torch.arange(40) % 10 - 1), "label -1 is out of range"),
        (digits(), digits(x=torch.zeros(40, 3, 16, 16)), "samples of shape (3, 16, 16), where training has (1, 16, 16)"),
        (digits(), digits(x=torch.zeros(40, 1, 20, 20)), "samples of shape (1, 20, 20)"),
        (digits(), digits(x=nan_at(39)), "sample 39 holds NaN"),
        (digits(x=nan_at(13)), digits(), "sample 13 holds NaN"),
    ],
)
def test_samples_that_do_not_fit_are_found_at_the_start(train: TensorDataset, test: TensorDataset, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        given(Request(data=(train, test)), Silent())
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x = torch.nn.functional.dropout(x, 0.5)", "forward draws"),
        ("x = x / 0", "outputs are not all numbers"),
        ("x = self.a(x).detach().mean((2, 3)); return x @ torch.ones(8, 10)", "no gradient flows"),
    ],
)
def test_a_forward_that_cannot_be_judged_or_trained_is_told_at_the_start(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "net.py"
    path.write_text(MODEL.format(default="=1", first=line).replace(", torch.ones(1, 8))", ",)"))
    with pytest.raises(ModelError, match=words):
        given(Request(model=f"{path}:make"), Silent(), trains=True)
