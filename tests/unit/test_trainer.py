"""What algorithms train with: several trainings in a row that resume, hooks around them, zeros that stay, zeros counted."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem
from deploypipe.errors import ModelError
from deploypipe.ingredients.sparsity import NONZERO, nonzero_macs, nonzero_params, sparse_layers
from deploypipe.pipeline.training import trained, tuning_hooks
from deploypipe.plan import KeepPlan
from deploypipe.progress import Recorder
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.masked import MaskedWeights
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toy_task import net, problem_of, toy_data

SETTINGS = TrainSettings(lr=0.05, batch_size=50, distill=0.0)


class Kill(Exception):
    pass


class KillIn(TrainHook):
    def __init__(self, epoch: int | None) -> None:
        self.epoch, self.seen = epoch, list[int]()

    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        if epoch == self.epoch:
            raise Kill
        self.seen.append(epoch)


def twice(folder: Path | None, first: int | None = None, second: int | None = None) -> tuple[nn.Module, list[int]]:
    trainer, hooks = Trainer(toy_data(200), SETTINGS, folder=folder), [KillIn(first), KillIn(second)]
    model = trainer.fit(trainer.fit(net(), 2, [hooks[0]]), 2, [hooks[1]])
    assert trainer.n_epochs == 4
    return model, hooks[0].seen + hooks[1].seen


def test_each_of_several_trainings_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted, _ = twice(None)
    with pytest.raises(Kill):
        twice(tmp_path, second=1)
    resumed, seen = twice(tmp_path)
    assert seen == [1], "both epochs of the first and one of the second are not trained again"
    assert state_digest(resumed) == state_digest(wanted)


def test_training_is_told_under_its_own_name() -> None:
    told = Recorder()
    Trainer(toy_data(200), SETTINGS, reporter=told).fit(net(), 1)
    assert told.ran == ["train"]


def test_trainings_in_a_row_meet_the_data_in_another_order() -> None:
    trainer = Trainer(toy_data(200), SETTINGS)
    a, b = (trainer.fit(net(), 1) for _ in range(2))
    assert state_digest(a) != state_digest(b)
    again = Trainer(toy_data(200), SETTINGS)
    assert state_digest(again.fit(net(), 1)) == state_digest(a)
    assert trainer.n_steps(3) == 12


def test_hooks_add_to_the_loss_train_what_they_add_and_take_it_back() -> None:
    class Head(TrainHook):
        def __init__(self) -> None:
            self.calls, self.extra = list[str](), torch.empty(0)

        def on_train_begin(self, model: nn.Module) -> None:
            self.calls.append("begin")
            model.extra = nn.Parameter(torch.zeros(3))

        def on_loss(self, model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
            assert len(labels) == 50
            return loss + (model.extra - 1).square().sum()

        def on_train_end(self, model: nn.Module) -> None:
            self.calls.append("end")
            self.extra = model.extra.detach().clone()
            del model.extra

    hook, start = Head(), net()
    model = Trainer(toy_data(200), SETTINGS).fit(start, 4, [hook])
    assert hook.calls == ["begin", "end"]
    assert (hook.extra - 1).abs().max() < 0.5, "the loss of the hook was minimised"
    assert list(model.state_dict()) == list(start.state_dict())
    untouched = Head()
    Trainer(toy_data(200), SETTINGS).fit(start, 0, [untouched])
    assert not untouched.calls


class Always:
    """Sets the smallest half of every weight to zero."""

    name, sparse = "always", True

    def __init__(self, spoil: Callable[[nn.Module], object] | None = None) -> None:
        self.spoil = spoil

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        model = copy.deepcopy(problem.model)
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.dim() >= 2):
                weight.masked_fill_(weight.abs() < weight.abs().median(), 0.0)
        if self.spoil:
            self.spoil(model)
        return model


def test_zeros_stay_in_every_step_whatever_momentum_and_decay_do() -> None:
    problem = problem_of(net())
    model, _ = trained(Always(), problem, toy_data(200), SETTINGS)
    masks = {name: p == 0 for name, p in model.named_parameters() if p.dim() >= 2}

    class Look(TrainHook):
        revived = 0

        def on_step_end(self, model: nn.Module, step: int) -> None:
            Look.revived += sum(int(model.get_parameter(name)[mask].count_nonzero()) for name, mask in masks.items())

    settings = TrainSettings(lr=0.05, batch_size=50, distill=0.0, weight_decay=0.1)
    hooks = tuning_hooks(Always(), problem, model, KeepPlan({}))
    tuned = Trainer(toy_data(200), settings).fit(model, 2, [*hooks, Look()])
    assert Look.revived == 0
    assert any(not torch.equal(p, model.get_parameter(name)) for name, p in tuned.named_parameters())
    free = Trainer(toy_data(200), settings).fit(model, 1)
    assert all(free.get_parameter(name)[mask].count_nonzero() > 0 for name, mask in masks.items())


@pytest.mark.parametrize("half", ["gradient", "weight"])
def test_a_mask_on_gradients_or_on_weights_alone_is_not_enough(half: str) -> None:
    """Momentum from before the mask moves weights without a gradient; without a mask on gradients momentum grows unseen."""
    weight = nn.Parameter(torch.ones(4))
    model = nn.ParameterDict({"w": weight})
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    hook = MaskedWeights({"w": torch.tensor([True, True, False, False])})
    for step in range(5):
        weight.grad = torch.ones(4)
        if step and half == "gradient":
            hook.on_batch_backward(model, step)
        optimizer.step()
        if step and half == "weight":
            hook.on_step_end(model, step)
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert weight[2:].any() if half == "gradient" else momentum[2:].abs().min() > 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.register_parameter("gate", nn.Parameter(torch.ones(1))),
        lambda model: model.append(nn.Identity()),
    ],
)
def test_a_method_that_leaves_its_gates_behind_is_found(spoil: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ModelError, match="another architecture"):
        trained(Always(spoil), problem_of(net()), toy_data(200), SETTINGS)


def test_zeros_are_counted_by_layer_and_a_layers_share_of_zeros_is_its_share_of_saved_work() -> None:
    model = net(widths=(4, 6, 8))
    graph = problem_of(model).graph
    with torch.no_grad():
        model[1][0].weight[:3] = 0.0
    layers = {layer.name: layer for layer in sparse_layers(model, graph)}
    assert layers["1.0.weight"].n_zeros == 3 * 4 * 9
    assert layers["0.0.weight"].n_zeros == 0
    dense = sum(layer.n_macs for layer in layers.values())
    assert nonzero_macs(model, graph) == dense - layers["1.0.weight"].n_macs / 2
    assert nonzero_params(model, graph) == sum(p.numel() for p in model.parameters()) - 3 * 4 * 9
    with torch.no_grad():
        model[0][1].bias.zero_()
    assert NONZERO["params"](model, graph) == sum(p.numel() for p in model.parameters()) - 3 * 4 * 9, "vectors count whole"
