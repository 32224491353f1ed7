"""Hints: where they listen, what they measure, and that training follows them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from deploypipe.compact import compact, mask
from deploypipe.graph import trace
from deploypipe.graph.outputs import copied
from deploypipe.pipeline.hinting import find_hint
from deploypipe.plan import KeepPlan
from deploypipe.progress import Silent
from deploypipe.testing.toys import cbr
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.evaluate import evaluate, recalibrate
from deploypipe.training.finetune import finetune
from deploypipe.training.hints import Hint, listening
from deploypipe.training.settings import TrainSettings
from deploypipe.worth.heldout import HeldOut
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


def said(network: nn.Module, hint: Hint, example) -> torch.Tensor:
    """Return what a network says where the hint is."""
    heard = []
    handle = network.get_submodule(hint.module).register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    with torch.no_grad():
        network(*copied(example))
    handle.remove()
    return heard[-1]


def found(model: nn.Module, keep: dict[str, tuple[int, ...]]) -> Hint | None:
    example = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
    return find_hint(model, trace(model, example), KeepPlan(keep))


@pytest.mark.parametrize("name", [name for name in EXACT if name != "reduces_channels"])  # 0/0 where all its channels are zero
def test_a_compacted_network_says_what_the_masked_one_says(name):
    """Its activations are the masked model's own, whatever the architecture: on other inputs than those it was found with."""
    model, example = TOYS[name]()
    graph = trace(model, example)
    plan = without_the_first(graph)
    hint = find_hint(model, graph, plan)
    if hint is None:
        return
    small, masked = compact(model, graph, plan), mask(model, graph, plan)
    others = tuple(torch.randn_like(x) if torch.is_tensor(x) and x.is_floating_point() else x for x in example)
    ours, theirs = said(small, hint, others), said(masked, hint, others)
    torch.testing.assert_close(ours, theirs[:, hint.channels], rtol=1e-4, atol=1e-4)


def test_most_architectures_have_a_hint():
    def has(name):
        model, example = TOYS[name]()
        graph = trace(model, example)
        return find_hint(model, graph, without_the_first(graph)) is not None

    assert sum(map(has, EXACT)) > len(EXACT) / 2
    assert not any(map(has, ("layer_norm", "norm_over_chw"))), "norms that run across channels see that some are missing"
    assert {"layer_norm", "norm_over_chw"} <= INEXACT


KNOWN = {
    "resnet18": "layer4", "mobilenet_v2": "features", "shufflenet_v2_x1_0": "conv5", "squeezenet1_1": "features",
    "regnet_y_400mf": "trunk_output", "googlenet": "inception5b", "densenet121": "features", "convnext_tiny": None,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_networks(name):
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(weights=None, **more).eval()
    graph = trace(model, (torch.randn(1, 3, 64, 64),))
    hint = find_hint(model, graph, without_the_first(graph))
    assert (hint and hint.module) == KNOWN[name]


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


def gradients(student, teacher, hint, share, x) -> dict[str, torch.Tensor]:
    student.zero_grad()
    with listening(student, teacher, hint) as listener:
        loss = student(x).square().sum()
        with torch.no_grad():
            teacher(x)
        listener.follow(share)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_gradients_before_the_hint_are_turned_and_those_behind_it_are_not(share):
    """Against a loss whose gradient at the activations is the wanted one, which autograd finds by itself."""
    teacher = net(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    student, x = net(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 5, 3)), torch.randn(7, 3, 8, 8)
    turned = gradients(student, teacher, Hint("1", (1, 4)), share, x)
    student.zero_grad()
    ours = student[1](student[0](x)).detach().requires_grad_()
    student[2](ours).square().sum().backward()
    behind = {name: student.get_parameter(name).grad.clone() for name in ("2.weight", "2.bias")}
    away = (ours - teacher[1](teacher[0](x))[:, [1, 4]]).detach()
    wanted = (1 - share) * ours.grad + share * away * np.linalg.norm(ours.grad) / np.linalg.norm(away)
    student.zero_grad()
    (student[1](student[0](x)) * wanted).sum().backward()
    before = {name: student.get_parameter(name).grad for name in ("0.weight", "0.bias")}
    for name, gradient in (before | behind).items():
        torch.testing.assert_close(turned[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_student_that_says_what_the_teacher_says_is_not_turned_aside():
    teacher = net(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))
    x, hint = torch.randn(7, 3, 8, 8), Hint("1", tuple(range(6)))
    plain, turned = (gradients(teacher, copy.deepcopy(teacher), hint, share, x) for share in (0.0, 0.25))
    torch.testing.assert_close(turned["0.weight"], 0.75 * plain["0.weight"])


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_that_are_changed_in_place_afterwards_are_heard_as_they_are_read(inplace):
    """As DenseNet does with its last norm."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            return self.head(F.relu(self.body(x), inplace=inplace))

    student, teacher, x = net(Late())[0], net(Late())[0], torch.randn(2, 3, 8, 8)
    torch.nn.init.ones_(teacher.body.weight)
    turned = gradients(student, teacher, Hint("body", tuple(range(4))), 1.0, x)["body.weight"]
    assert turned.isfinite().all()
    assert turned.norm() > 0


def test_a_network_whose_body_is_frozen_only_trains_its_head():
    data, student = digits(), make_net()
    for part in (student.conv, student.norm):
        part.requires_grad_(False)
    tuned = finetune(student, data, replace(SETTINGS, epochs=1), teacher=make_net(1), hint=WHOLE)
    assert torch.equal(tuned.conv.weight, student.conv.weight)
    assert not torch.equal(tuned.head.weight, student.head.weight)


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
    ours, theirs = said(student, WHOLE, (images,)), said(teacher.eval(), WHOLE, (images,))
    return float((ours - theirs).norm() / theirs.norm())


def test_training_with_a_hint_comes_nearer_to_the_teacher():
    data, teacher = digits(), make_net(1, dropout=0.0)
    teacher = finetune(teacher, data, replace(SETTINGS, epochs=6, distill=0))
    images = data.test.take(torch.arange(100))[0]
    nearer, without = (
        finetune(make_net(dropout=0.0), data, replace(SETTINGS, hint=share), teacher=teacher, hint=WHOLE) for share in (0.9, 0)
    )
    assert distance(nearer, teacher, images) < 0.8 * distance(without, teacher, images)


def test_the_share_falls_to_zero_over_the_training(monkeypatch):
    shares = []
    monkeypatch.setattr("deploypipe.training.hints.turned", lambda gradient, share, **_: shares.append(share) or gradient)
    finetune(make_net(), digits(), replace(SETTINGS, hint=0.6), teacher=make_net(1), hint=WHOLE)
    n_steps = 3 * (200 // 32)
    assert shares == pytest.approx([0.6 * (1 - step / n_steps) for step in range(n_steps)])


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


def test_a_finalists_epoch_is_the_one_that_fine_tuning_would_begin_with():
    """Taught by the dense model's outputs and activations, judged on images that it did not train on."""
    data, model = digits(), make_net().eval()
    graph = trace(model, data.test.take(torch.arange(2))[:1])
    plan, hint = KeepPlan({"conv": (0, 2, 3, 5)}), Hint("norm", (0, 2, 3, 5))
    taught = HeldOut(model, graph, data, None, seed=3, find_hint=lambda _: hint)
    plain = HeldOut(model, graph, data, None, seed=3)
    start = recalibrate(compact(model, graph, plan), taught.fit, taught.effort.calibration, 3, augment=data.augment)
    settings = TrainSettings(epochs=1, seed=3)
    tuned = finetune(start, replace(data, train=taught.fit), settings, teacher=model, hint=hint)
    assert taught.trained(plan, Silent()) == evaluate(tuned, taught.part)
    assert taught.trained(plan, Silent()) != plain.trained(plan, Silent())


def test_a_finalists_epoch_obeys_the_settings_of_the_run(tmp_path):
    """What was trained otherwise is not read from the file of answers; without distillation nothing is taught."""
    data, model = digits(), make_net().eval()
    graph = trace(model, data.test.take(torch.arange(2))[:1])
    plan, hint, memo = KeepPlan({"conv": (0, 2, 3, 5)}), Hint("norm", (0, 2, 3, 5)), tmp_path / "memo.csv"
    alone = TrainSettings(epochs=9, distill=0.0, lr=0.01, batch_size=32, seed=8)
    found = [
        HeldOut(model, graph, data, memo, seed=3, find_hint=lambda _: hint, training=told).trained(plan, Silent())
        for told in (None, alone, None)
    ]
    held = HeldOut(model, graph, data, None, seed=3)
    start = recalibrate(compact(model, graph, plan), held.fit, held.effort.calibration, 3, augment=data.augment)
    tuned = finetune(start, replace(data, train=held.fit), replace(alone, epochs=1, seed=3))
    assert found[1] == evaluate(tuned, held.part)
    assert found[0] == found[2] != found[1]
