import copy
import math
import random
import signal
import socket
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from deploypipe.data.load import Data
from deploypipe.errors import ModelError, UsageError
from deploypipe.progress import Silent
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.evaluate import logits
from deploypipe.training.finetune import TrainHook, TrainSettings, distillation_loss, evaluate, finetune, recalibrate
from tests.jobs import soon
from tests.ready import READY
from tests.trainings import SETTINGS, device, digits, make_net, shared_task, slow

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> Data:
    return digits()


class Killed(Exception):
    pass


class KillAfter(TrainHook):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, model, epoch):
        if epoch == self.epoch:
            raise Killed


class Told(Silent):
    def __init__(self):
        self.stages, self.steps, self.notes = [], [], []

    def stage(self, name, total=None):
        self.stages.append((name, total))

    def advance(self, done, note=""):
        self.steps.append((done, note))

    def note(self, text):
        self.notes.append(text)


def test_training_learns_and_leaves_its_inputs_alone(data):
    model, teacher = make_net(), make_net(1)
    before = [state_digest(model), state_digest(teacher)]
    tuned = finetune(model, data, replace(SETTINGS, epochs=6, distill=0), teacher=teacher)
    assert [state_digest(model), state_digest(teacher)] == before
    assert model.training
    assert not tuned.training
    assert all(tensor.is_contiguous() for tensor in tuned.state_dict().values())
    assert evaluate(model, data.test).top1 < 0.3
    assert evaluate(tuned, data.test).top1 > 0.7


def test_same_seed_same_bits_other_seed_other_bits(data):
    torch.manual_seed(1)
    first = state_digest(finetune(make_net(), data, SETTINGS))
    torch.manual_seed(2)
    assert state_digest(finetune(make_net(), data, SETTINGS)) == first
    assert state_digest(finetune(make_net(), data, replace(SETTINGS, seed=4))) != first


def test_the_callers_random_numbers_are_left_alone(data):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    finetune(make_net(), data, replace(SETTINGS, epochs=1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_stopped_run_resumes_to_the_same_bits(data, tmp_path, epoch):
    """Dropout, augmentation, order, momentum and the learning rate all have to be where they were."""
    teacher, path = make_net(1), tmp_path / "sub" / "state.safetensors"
    wanted = state_digest(finetune(make_net(), data, SETTINGS, teacher=teacher))
    stop = KillAfter(epoch)
    with pytest.raises(Killed):
        finetune(make_net(), data, SETTINGS, teacher=teacher, checkpoint=path, hooks=[stop])
    stop.epoch = -1
    told = Told()
    resumed = finetune(make_net(), data, SETTINGS, teacher=teacher, checkpoint=path, hooks=[stop], reporter=told)
    assert state_digest(resumed) == wanted
    assert told.notes == ([f"fine-tuning goes on after epoch {epoch} of 3"] if epoch else [])
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    path = tmp_path / "state.safetensors"
    first = finetune(make_net(), data, SETTINGS, checkpoint=path)
    started = []
    hook_free = finetune(
        make_net(), Data(_Watched(data.train, started), data.test, (), "part", data.augment, ""), SETTINGS, checkpoint=path
    )
    assert state_digest(hook_free) == state_digest(first)
    assert not started


class _Watched(Dataset):
    def __init__(self, inner, seen):
        self.inner, self.seen = inner, seen

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        self.seen.append(index)
        return self.inner[index]


@pytest.mark.parametrize("change", ["settings", "weights", "data", "teacher", "damage"])
def test_a_checkpoint_of_another_run_is_not_used(data, tmp_path, change):
    path = tmp_path / "state.safetensors"
    finetune(make_net(), data, replace(SETTINGS, epochs=1), checkpoint=path)
    settings, seed, teacher, used = replace(SETTINGS, epochs=1), 0, None, data
    if change == "settings":
        settings = replace(settings, lr=0.04)
    elif change == "weights":
        seed = 5
    elif change == "teacher":
        teacher = make_net(7)
    elif change == "data":
        used = replace_data(data, key="other", train=TensorDataset(*(tensor[:150] for tensor in data.train.tensors)))
    else:
        path.write_bytes(path.read_bytes()[:-100])
    wanted = state_digest(finetune(make_net(seed), used, settings, teacher=teacher))
    assert state_digest(finetune(make_net(seed), used, settings, teacher=teacher, checkpoint=path)) == wanted


def replace_data(data, **changes):
    fields = {name: getattr(data, name) for name in ("train", "test", "classes", "key", "augment", "description")}
    return Data(**(fields | changes))


@pytest.mark.slow
def test_a_run_killed_by_the_system_resumes_to_the_same_bits(data, tmp_path):
    wanted = state_digest(finetune(make_net(), data, SETTINGS, teacher=make_net(1)))
    path, out = tmp_path / "state.safetensors", tmp_path / "out.pt"
    process = READY.Process(target=slow, args=(0.2, path, out))
    process.start()
    assert soon(path.exists, 120)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    again = READY.Process(target=slow, args=(0, path, out))
    again.start()
    again.join(120)
    tuned = make_net()
    tuned.load_state_dict(torch.load(out, weights_only=True))
    assert state_digest(tuned) == wanted


class Remembers(TrainHook):
    """Pulls the weights toward a running mean of their own: without its state a resumed run would differ."""

    key = "pull 0.1"

    def __init__(self):
        self.mean, self.calls = {}, []

    def on_batch_backward(self, model, step):
        assert model.conv.weight.grad is not None
        self.calls.append(("backward", step))
        for name, parameter in model.named_parameters():
            mean = self.mean.setdefault(name, torch.zeros_like(parameter))
            parameter.grad.add_(parameter.detach() - mean, alpha=0.1)
            mean.lerp_(parameter.detach(), 0.2)

    def on_step_end(self, model, step):
        self.calls.append(("step", step))

    def on_epoch_end(self, model, epoch):
        self.calls.append(("epoch", epoch))

    def state(self):
        return self.mean

    def restore(self, state):
        self.mean = {name: tensor.clone() for name, tensor in state.items()}


def test_hooks_are_called_in_order_and_keep_their_state(data, tmp_path):
    hook = Remembers()
    wanted = state_digest(finetune(make_net(), data, replace(SETTINGS, batch_size=100), hooks=[hook]))
    assert hook.calls == [
        call
        for epoch in range(3)
        for call in (
            *((kind, step) for step in (2 * epoch, 2 * epoch + 1) for kind in ("backward", "step")),
            ("epoch", epoch),
        )
    ]
    stop, path = KillAfter(1), tmp_path / "s"
    with pytest.raises(Killed):
        finetune(make_net(), data, replace(SETTINGS, batch_size=100), hooks=[Remembers(), stop], checkpoint=path)
    stop.epoch = -1
    resumed = finetune(make_net(), data, replace(SETTINGS, batch_size=100), hooks=[Remembers(), stop], checkpoint=path)
    assert state_digest(resumed) == wanted


def test_steps_are_those_of_plain_sgd(data):
    """Against the loop written out, on full batches so that the order of samples does not matter."""
    settings = TrainSettings(epochs=3, lr=0.1, batch_size=200, weight_decay=0.01, distill=0.3, temperature=2, warmup=0)
    start, teacher = make_net(dropout=0.0), make_net(1).eval()
    tuned = finetune(start, replace_data(data, augment=None), settings, teacher=teacher)
    inputs, labels = data.train.tensors
    model = copy.deepcopy(start).train()
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for step in range(3):
        model.zero_grad()
        out, wanted = model(inputs), teacher(inputs).detach()
        divergence = F.kl_div(F.log_softmax(out / 2, 1), F.softmax(wanted / 2, 1), reduction="batchmean") * 4
        (0.7 * F.cross_entropy(out, labels) + 0.3 * divergence).backward()
        lr = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 3))
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                gradient = parameter.grad + (0.01 * parameter if parameter.dim() > 1 else 0)
                velocity[i] = 0.9 * velocity[i] + gradient
                parameter.sub_(lr * (gradient + 0.9 * velocity[i]))
    for ours, theirs in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned.conv.weight, start.conv.weight, atol=1e-3)


def test_distillation_loss_is_the_divergence_written_out():
    student, teacher, temperature = torch.randn(5, 7).double(), torch.randn(5, 7).double(), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    wanted = sum(p[i, k] * (p[i, k] / q[i, k]).log() for i in range(5) for k in range(7)) / 5 * 9
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), wanted)
    assert distillation_loss(teacher, teacher, temperature).abs() < 1e-12


def test_distillation_alone_follows_the_teacher_and_not_the_labels(data):
    teacher = finetune(make_net(), data, replace(SETTINGS, epochs=6))
    inputs, labels = data.train.tensors
    lying = replace_data(data, train=TensorDataset(inputs, (labels + 1) % 10), key="lying")
    student = finetune(make_net(5), lying, replace(SETTINGS, epochs=8, distill=1.0), teacher=teacher)
    agreement = (student(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()
    assert agreement > 0.8


def test_bfloat16_trains_much_like_fp32_and_leaves_fp32_weights(data, capsys):
    teacher = make_net(9, dropout=0.0)
    ways = {
        how: finetune(make_net(), data, replace(SETTINGS, epochs=6, precision=how), teacher=teacher) for how in ("fp32", "bf16")
    }
    assert {value.dtype for value in ways["bf16"].state_dict().values()} <= {torch.float32, torch.int64}
    moved, apart = (
        (a - b).norm()
        for a, b in ((ways["fp32"].head.weight, make_net().head.weight), (ways["fp32"].head.weight, ways["bf16"].head.weight))
    )
    assert capsys.readouterr() == ("", "")
    assert 0 < apart < 0.3 * moved  # another rounding: neither the same bits nor another way


def test_schedule_rises_and_falls():
    settings = TrainSettings(lr=1.0, warmup=0.1)
    rates = [settings.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert rates[10] == 1.0
    assert 0 < rates[-1] < 0.001
    assert TrainSettings(lr=1.0).lr_at(0, 1) == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"lr": 0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"batch_size": 1},
        {"momentum": 1.0},
        {"weight_decay": -1},
        {"distill": 1.1},
        {"precision": "fp8"},
        {"temperature": 0},
        {"label_smoothing": 1},
        {"warmup": -0.1},
        {"seed": -1},
    ],
)
def test_settings_are_checked(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        TrainSettings(**bad)


def test_divergence_is_an_error_with_advice(data, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(UsageError, match="diverged") as caught:
        finetune(make_net(), data, replace(SETTINGS, lr=1e30, warmup=0), checkpoint=path)
    assert "learning rate" in caught.value.fix
    assert not path.exists()
    broken = make_net()
    with torch.no_grad():
        broken.conv.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ModelError, match="before any training"):
        finetune(broken, data, SETTINGS)


def test_progress_counts_every_step_and_tells_the_time_left(data):
    told = Told()
    finetune(make_net(), data, SETTINGS, reporter=told)
    assert told.stages == [("finetune", 18)]
    assert told.steps[-1] == (18, "")
    assert "epoch 3/3" in told.steps[-2][1]
    assert told.steps[-2][1].endswith("0 s left")
    assert {6, 12, 18} <= {done for done, _ in told.steps}


def test_no_epochs_is_a_copy(data):
    model = make_net()
    copied = finetune(model, data, replace(SETTINGS, epochs=0))
    assert copied is not model
    assert state_digest(copied) == state_digest(model)


def test_frozen_parameters_stay(data):
    model = make_net()
    model.conv.requires_grad_(False)
    tuned = finetune(model, data, replace(SETTINGS, epochs=1))
    assert torch.equal(tuned.conv.weight, model.conv.weight)
    assert not torch.equal(tuned.head.weight, model.head.weight)
    with pytest.raises(ModelError, match="nothing to train"):
        finetune(make_net().requires_grad_(False), data, SETTINGS)


def test_evaluate_counts_like_a_plain_loop(data):
    model = make_net()
    model.norm.eval()
    accuracy = evaluate(model, data.test, batch_size=100)
    assert model.training
    assert not model.norm.training, "every module keeps its own mode"
    model.eval()
    with torch.no_grad():
        out = [(model(data.test[i][0][None])[0], data.test[i][1]) for i in range(len(data.test))]
    assert accuracy.n == len(out)
    assert accuracy.top1 == sum(int(row.argmax()) == label for row, label in out) / len(out)
    losses = [float(F.cross_entropy(row[None].double(), torch.tensor([label]))) for row, label in out]
    assert accuracy.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_recalibrated_statistics_are_the_means_over_batches(data):
    model = make_net()
    model.norm.running_mean.fill_(5)
    model.norm.num_batches_tracked.fill_(7)
    before = state_digest(model)
    fresh = recalibrate(model, data.train, 128, seed=1, batch_size=32)
    assert state_digest(model) == before
    assert model.training
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:128]
    chosen = data.train.tensors[0][order]
    out = model.conv(chosen)
    torch.testing.assert_close(fresh.norm.running_mean, out.mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.norm.running_var, out.var((0, 2, 3)).detach(), rtol=0.1, atol=1e-3)
    assert fresh.norm.momentum == model.norm.momentum
    assert not fresh.norm.training
    assert torch.equal(fresh.head.weight, model.head.weight)
    tuned = finetune(make_net(), data, replace(SETTINGS, epochs=6))
    ruined = copy.deepcopy(tuned)
    ruined.norm.reset_running_stats()
    assert evaluate(recalibrate(ruined, data.train), data.test).top1 > evaluate(tuned, data.test).top1 - 0.05
    assert evaluate(ruined, data.test).top1 < evaluate(tuned, data.test).top1 - 0.05


def test_recalibration_without_batch_norm_is_a_copy(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    assert state_digest(recalibrate(model, data.train)) == state_digest(model)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, lambda x: [x]])
def test_outputs_of_several_forms(wrap):
    x = torch.randn(4, 3)
    assert torch.equal(logits(wrap, x, torch.tensor([0, 1, 2, 0])), x)


def test_the_label_that_is_out_of_range_is_named():
    for labels, wrong in (([0, -1, 2], -1), ([0, 1, 3], 3)):
        with pytest.raises(ModelError, match=f"label {wrong} is out of range: the model has 3 outputs"):
            logits(lambda x: x, torch.randn(3, 3), torch.tensor(labels))


def test_models_and_data_that_do_not_fit(data):
    with pytest.raises(ModelError, match="fails on a batch of shape"):
        evaluate(nn.Conv2d(3, 4, 3), data.test)
    with pytest.raises(ModelError, match="not logits"):
        evaluate(nn.Conv2d(1, 4, 3), data.test)
    with pytest.raises(ModelError, match="label 9 is out of range: the model has 5 outputs"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(256, 5)), data.test)


@pytest.mark.slow
def test_two_devices_train_like_one(tmp_path):
    """The same samples make the same steps however they are shared out."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = tmp_path / "two.pt"
    processes = [READY.Process(target=device, args=(rank, port, out)) for rank in (0, 1)]
    for process in processes:
        process.start()
    model, data, settings = shared_task()
    one = finetune(model, data, settings, teacher=model)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    two = torch.load(out, weights_only=True)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
