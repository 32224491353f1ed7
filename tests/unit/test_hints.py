"""Hints: where they listen, what they measure, and that training follows them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploypipe.compact import compact, mask
from deploypipe.graph import trace
from deploypipe.pipeline.hinting import find_hint
from deploypipe.plan import KeepPlan
from deploypipe.testing.toys import cbr
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.finetune import finetune
from deploypipe.training.hints import Hint, listening
from tests.toys import EXACT, INEXACT, TOYS
from tests.trainings import SETTINGS, digits, make_net

torch.set_num_threads(1)
WHOLE = Hint("norm", tuple(range(8)))  # of the net that is trained on digits


def without_the_first(graph) -> KeepPlan:
    """Leave out a quarter of every group, at least one channel."""
    return KeepPlan({group.name: tuple(range(-(-group.size // 4), group.size)) or (0,) for group in graph.prunable})


def net(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
    return nn.Sequential(*layers).eval()


def found(model: nn.Module, keep: dict[str, tuple[int, ...]]) -> Hint | None:
    example = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
    return find_hint(model, trace(model, example), KeepPlan(keep))


@pytest.mark.parametrize("name", [name for name in EXACT if name != "reduces_channels"])  # 0/0 where all its channels are zero
def test_a_compacted_network_says_what_the_masked_one_says(name):
    """Its activations are the masked model's own, so there is no distance, whatever the architecture."""
    model, example = TOYS[name]()
    graph = trace(model, example)
    plan = without_the_first(graph)
    hint = find_hint(model, graph, plan)
    if hint is None:
        return
    small, masked = compact(model, graph, plan), mask(model, graph, plan)
    with listening(small, masked, hint) as listener, torch.no_grad():
        small(*example)
        masked(*example)
        assert listener.distance() < 1e-9
        assert listener.ours.shape[1] == len(hint.channels)


def test_most_architectures_have_a_hint():
    def has(name):
        model, example = TOYS[name]()
        graph = trace(model, example)
        return find_hint(model, graph, without_the_first(graph)) is not None

    assert sum(map(has, EXACT)) > len(EXACT) / 2
    assert not any(map(has, ("layer_norm", "norm_over_chw"))), "norms that run across channels see that some are missing"
    assert {"layer_norm", "norm_over_chw"} <= INEXACT


def test_the_last_activations_with_positions_are_heard():
    model = net(cbr(3, 8), cbr(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    assert found(model, {"0.0": (1, 2), "1.0": (0, 2, 5)}) == Hint("1", (0, 2, 5))
    assert found(model, {}) == Hint("1", tuple(range(6)))


def test_what_dropout_says_is_not_heard():
    """In training it is something else than the teacher says."""
    features = nn.Sequential(cbr(3, 8), nn.Dropout(0.5))
    assert found(net(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), {"0.0.0": (3, 4)}) == Hint(
        "0.0", (3, 4)
    )
    squeeze = net(cbr(3, 8), nn.Dropout(0.5), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert found(squeeze, {"0.0": (3, 4)}) == Hint("0", (3, 4))


def test_of_flattened_images_the_classifiers_own_input_is_heard():
    model = net(cbr(3, 8), nn.Flatten(), nn.Linear(8 * 64, 12), nn.ReLU(), nn.Linear(12, 4))
    assert found(model, {"0.0": (1, 2), "2": (0, 7, 11)}) == Hint("3", (0, 7, 11))


def test_a_layer_of_the_same_width_far_before_the_classifier_is_not_taken():
    """As where images are cut into tokens: the channels are the same ones, but all the work comes after."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.work, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            return self.head((x + self.work(x)).mean(1))

    assert found(net(Tokens())[0], {}) is None


def test_the_distance_is_relative_to_the_teachers_activations():
    teacher = net(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    student = net(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 5, 3))
    x = torch.randn(7, 3, 8, 8)
    with listening(student, teacher, Hint("1", (1, 4))) as listener:
        student(x)
        teacher(x)
        distance = listener.distance()
    ours, theirs = (F.relu(model[0](x)).detach().numpy() for model in (student, teacher))
    wanted = theirs[:, [1, 4]]
    assert distance.item() == pytest.approx(((ours - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-5)
    assert distance.requires_grad
    assert np.isfinite(distance.item())


def test_nothing_is_left_on_the_networks():
    student, teacher = make_net(), make_net(1)
    with pytest.raises(RuntimeError, match="stop"), listening(student, teacher, WHOLE):
        raise RuntimeError("stop")
    tuned = finetune(student, digits(), replace(SETTINGS, epochs=1), teacher=teacher, hint=WHOLE)
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    find_hint(model, graph, without_the_first(graph))
    for network in (student, teacher, tuned, model):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def distance(student, teacher, images) -> float:
    with listening(student, teacher, WHOLE) as listener, torch.no_grad():
        student(images)
        teacher(images)
        return listener.distance().item()


def test_training_with_a_hint_comes_nearer_to_the_teacher():
    data, teacher = digits(), make_net(1, dropout=0.0)
    teacher = finetune(teacher, data, replace(SETTINGS, epochs=6, distill=0))
    images = data.test.take(torch.arange(100))[0]
    nearer, without = (
        finetune(make_net(dropout=0.0), data, replace(SETTINGS, hint=weight), teacher=teacher, hint=WHOLE) for weight in (1, 0)
    )
    assert distance(nearer, teacher, images) < 0.8 * distance(without, teacher, images)


@pytest.mark.parametrize("change", [{"distill": 0.0}, {"hint": 0.0}, {}])
def test_hints_are_a_part_of_distillation(change):
    data, settings = digits(), replace(SETTINGS, epochs=1, **change)
    plain = finetune(make_net(), data, settings, teacher=make_net(1))
    heard = finetune(make_net(), data, settings, teacher=make_net(1), hint=WHOLE)
    assert (state_digest(plain) == state_digest(heard)) == bool(change)


def test_a_checkpoint_of_another_hint_is_not_used(tmp_path):
    data, teacher, settings = digits(), make_net(1), replace(SETTINGS, epochs=1)
    file = tmp_path / "state.safetensors"
    finetune(make_net(), data, settings, teacher=teacher, checkpoint=file)
    tuned = finetune(make_net(), data, settings, teacher=teacher, checkpoint=file, hint=WHOLE)
    assert state_digest(tuned) == state_digest(finetune(make_net(), data, settings, teacher=teacher, hint=WHOLE))
