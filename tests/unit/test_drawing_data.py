"""Data sets whose transforms draw, as training sets with random crops do: what is compared meets the same images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deploypipe.algorithms import make
from deploypipe.compact import compact
from deploypipe.ingredients.statistics import images
from deploypipe.plan import KeepPlan
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.evaluate import evaluate, recalibrate
from tests.toy_task import net, problem_of, toy_data


class Drawing(Dataset[tuple[Tensor, int]]):
    """The toy pictures, each shifted and flipped at random whenever it is read; two libraries draw."""

    def __init__(self, n: int) -> None:
        self._inner = toy_data(n).train

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._inner[index]
        shifted = image.roll(int(torch.randint(-3, 4, ())), -1)
        return (shifted.flip(-1) if np.random.rand() < 0.5 else shifted), int(label)


def test_equal_arguments_give_equal_images_and_others_differ() -> None:
    first, again = (torch.cat(list(images(Drawing(100), 40, seed=3, batch=16))) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat(list(images(toy_data(100).train, 40, seed=3, batch=16)))), "nothing is drawn"
    state = torch.get_rng_state()
    list(images(Drawing(100), 40, seed=3))
    assert torch.equal(torch.get_rng_state(), state), "the user's own draws go on as they would"


def test_accuracies_and_renewed_statistics_repeat() -> None:
    model, data = net(), Drawing(200)
    assert evaluate(model, data) == evaluate(model, data)
    assert state_digest(recalibrate(model, data, seed=1)) == state_digest(recalibrate(model, data, seed=1))


@pytest.mark.parametrize("algo", ["thinet", "dcp"])
def test_repair_compares_the_small_model_with_the_dense_one_on_the_same_images(algo: str) -> None:
    """A duplicated filter goes: then the other one can take its place exactly, if their outputs belong to one image."""
    model = net(widths=(8, 8, 8))
    with torch.no_grad():
        conv, norm, reader = model[0][0], model[0][1], model[1][0]
        norm.bias.normal_(generator=torch.Generator().manual_seed(1))
        for tensor in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[5] = tensor[2]
        reader.weight[:, 5] = reader.weight[:, 2]
    task = replace(problem_of(model), data=Drawing(200))
    plan = KeepPlan({"0.0": (0, 1, 2, 3, 4, 6, 7)})
    small = compact(model, task.graph, plan)
    x = next(images(task.data, 32, seed=9))
    with torch.no_grad():
        repaired = make(algo).repair(small, task, plan)
        assert (small(x) - model(x)).norm() > 0.01 * model(x).norm()
        torch.testing.assert_close(repaired(x), model(x), atol=1e-3, rtol=1e-3)
