"""Train a pruned model: SGD with warm-up and cosine decay, distilled from the dense model, resumable after every epoch."""

import copy
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from deploypipe.data.batches import Data, batches, count, n_batches, seeded, take
from deploypipe.errors import DeployPipeError, ModelError, UsageError
from deploypipe.progress import Reporter, Silent
from deploypipe.training.checkpoint import Checkpoint, finished_epochs, run_key
from deploypipe.training.evaluate import Accuracy, evaluate, logits, recalibrate
from deploypipe.training.hints import Hint, Listener, listening
from deploypipe.training.layout import laid_out, lay_out
from deploypipe.training.settings import PRECISIONS, TrainHook, TrainSettings

__all__ = ["Accuracy", "TrainHook", "TrainSettings", "evaluate", "finetune", "recalibrate"]


def finetune(  # noqa: PLR0913 - named arguments in practice
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    reporter: Reporter | None = None,
    hooks: Sequence[TrainHook] = (),
    hint: Hint | None = None,
    fabric: Fabric | None = None,
) -> nn.Module:
    """Return a trained copy of `model`, in eval mode on the CPU.

    The result depends only on the arguments and the number of threads: a run that was killed and is started again with
    the same `checkpoint` ends with the same bits as one that was not.

    Args:
        model: Classifier; stays as it is.
        data: Only `data.train` is used, augmented by `data.augment`.
        settings: The schedule.
        teacher: The dense model to learn from; stays as it is. Without one, only the labels count.
        checkpoint: File that holds the state after the latest epoch; written here, and read if it belongs to this run.
        reporter: Is told about every step.
        hooks: Called in order.
        hint: Where inner activations are learnt from the teacher, too.
        fabric: Devices, strategy and precision, already launched; default: one device, a GPU if there is one.

    Raises:
        ModelError: The model cannot be run or trained on this data.
        UsageError: The loss is no longer finite.
    """
    fabric = fabric or _fabric(settings.precision)
    trainer = _Trainer(fabric, data, settings, reporter or Silent(), tuple(hooks), hint)
    return trainer.train(copy.deepcopy(model), copy.deepcopy(teacher), checkpoint)


def _fabric(precision: str) -> Fabric:
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces what it was asked for
    return Fabric(accelerator="auto", devices=1, precision=PRECISIONS[precision])  # type: ignore[arg-type]


class _Trainer:
    def __init__(
        self,
        fabric: Fabric,
        data: Data,
        settings: TrainSettings,
        reporter: Reporter,
        hooks: tuple[TrainHook, ...],
        hint: Hint | None,
    ) -> None:
        self.fabric, self.data, self.settings, self.reporter, self.hooks = fabric, data, settings, reporter, hooks
        self.hint = hint if settings.distill and settings.hint else None
        self.listener: Listener | None = None
        self.layout = torch.contiguous_format
        self.batch_size = max(2, settings.batch_size // fabric.world_size)
        self.steps_per_epoch = n_batches(data.train, self.batch_size, drop_last=True, n_shards=fabric.world_size)
        self.n_steps = settings.epochs * self.steps_per_epoch
        self.began = self.shown = time.monotonic()
        self.skipped = 0

    def train(self, student: nn.Module, teacher: nn.Module | None, path: Path | None) -> nn.Module:
        if self.settings.epochs:
            key = run_key(self.settings, self.data.key, student, teacher, self.hooks, self.hint)
            if path is None or finished_epochs(path, key) < self.settings.epochs:  # else nothing is read of the data
                images, _ = take(self.data.train, torch.arange(min(2, count(self.data.train))))
                self.layout = lay_out(student, images)
            for hook in self.hooks:
                hook.on_train_begin(student)
            optimizer = _optimizer(student, self.settings)
            run, run_optimizer = self.fabric.setup(student, optimizer)
            if teacher is not None:
                teacher = self.fabric.to_device(teacher.to(memory_format=self.layout).eval().requires_grad_(False))
            saved = Checkpoint(path, key, student, optimizer, self.hooks) if path else None
            first = saved.load() if saved else 0
            with self._listening(student, teacher) as self.listener:
                self._epochs(first, (run, run_optimizer, student), teacher, saved)
            for hook in reversed(self.hooks):
                hook.on_train_end(student)
        return student.cpu().to(memory_format=torch.contiguous_format).eval()

    def _listening(self, student: nn.Module, teacher: nn.Module | None) -> AbstractContextManager[Listener | None]:
        return listening(student, teacher, self.hint) if self.hint and teacher is not None else nullcontext()

    def _epochs(
        self,
        first: int,
        parts: tuple[nn.Module, Optimizer, nn.Module],
        teacher: nn.Module | None,
        saved: Checkpoint | None,
    ) -> None:
        student = parts[2]
        self.reporter.stage("finetune", self.n_steps)
        if first:
            self.reporter.note(f"fine-tuning goes on after epoch {first} of {self.settings.epochs}")
        self.began, self.skipped = time.monotonic(), first * self.steps_per_epoch
        for epoch in range(first, self.settings.epochs):
            with seeded(self._seed(epoch) + self.fabric.global_rank):
                self._epoch(epoch, parts, teacher)
                for hook in self.hooks:
                    hook.on_epoch_end(student, epoch)
            if not all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters()):
                raise self._diverged("a weight", (epoch + 1) * self.steps_per_epoch - 1)
            if saved:
                if self.fabric.is_global_zero:
                    saved.save(epoch + 1)
                self.fabric.barrier()
        self.reporter.advance(self.n_steps)

    def _seed(self, epoch: int) -> int:
        """Every epoch has its own seed, so that a resumed run need not replay the epochs before."""
        return (self.settings.seed * 1_000_003 + epoch * 1009) % 2**31

    def _epoch(self, epoch: int, parts: tuple[nn.Module, Optimizer, nn.Module], teacher: nn.Module | None) -> None:
        run, optimizer, student = parts
        run.train()
        step = epoch * self.steps_per_epoch
        for inputs, labels in batches(
            self.data.train,
            self.batch_size,
            shuffle_seed=self._seed(epoch),
            augment=self.data.augment,
            drop_last=True,
            shard=(self.fabric.global_rank, self.fabric.world_size),
        ):
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr_at(step, self.n_steps)
            optimizer.zero_grad()
            placed = self.fabric.to_device((inputs, labels))
            loss = self._loss(run, teacher, placed[0], placed[1], step)
            with self.fabric.autocast():  # hooks run parts of the network, too
                for hook in self.hooks:
                    loss = hook.on_loss(student, loss, placed[1])
            self._check(loss, step)
            self.fabric.backward(loss)
            for hook in self.hooks:
                hook.on_batch_backward(student, step)
            optimizer.step()
            for hook in self.hooks:
                hook.on_step_end(student, step)
            step += 1
            self._show(epoch, step, loss.item())

    def _loss(self, run: nn.Module, teacher: nn.Module | None, inputs: Tensor, labels: Tensor, step: int) -> Tensor:
        inputs = laid_out(inputs, self.layout)
        out = logits(run, inputs.clone(), labels)  # a model may write into what it is given
        loss = F.cross_entropy(out, labels, label_smoothing=self.settings.label_smoothing)
        if teacher is None or not self.settings.distill:
            return loss
        with torch.no_grad(), self.fabric.autocast():
            wanted = logits(teacher, inputs, labels).to(out.dtype)
        if self.listener:
            self.listener.follow(self.settings.hint_at(step, self.n_steps))
        return torch.lerp(loss, distillation_loss(out, wanted, self.settings.temperature), self.settings.distill)

    def _check(self, loss: Tensor, step: int) -> None:
        if not torch.isfinite(loss):
            raise self._diverged("the loss", step)

    def _diverged(self, what: str, step: int) -> DeployPipeError:
        at = f"step {step + 1} of {self.n_steps}, learning rate {self.settings.lr_at(step, self.n_steps):.3g}"
        if step == 0:
            fix = "look for inf or nan in the weights and in the training inputs"
            return ModelError(f"{what} is not finite before any training", at=at, fix=fix)
        fix = f"lower the learning rate (lr, now {self.settings.lr:g}) by a factor of 5, or lengthen the warm-up"
        return UsageError(f"fine-tuning diverged: {what} is not finite", at=at, fix=fix)

    def _show(self, epoch: int, step: int, loss: float) -> None:
        now = time.monotonic()
        is_last = step % self.steps_per_epoch == 0
        if is_last or now - self.shown > 0.5:
            self.shown = now
            left_s = (now - self.began) / (step - self.skipped) * (self.n_steps - step)
            self.reporter.advance(step, f"epoch {epoch + 1}/{self.settings.epochs}, loss {loss:.3f}, {_clock(left_s)} left")


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of the softened distributions, times temperature squared.

    Hinton et al., Distilling the Knowledge in a Neural Network, NIPS 2014 workshop, arXiv:1503.02531, section 2.

    Args:
        student: Logits (N, K).
        teacher: Logits (N, K).
        temperature: Divides both; the square keeps the gradient's size independent of it.
    """
    ours, theirs = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def _optimizer(model: nn.Module, settings: TrainSettings) -> SGD:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ModelError("the model has nothing to train", at=type(model).__name__, fix="set requires_grad on its parameters")
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=True)


def _clock(seconds: float) -> str:
    """Return a time in words.

    >>> _clock(5.4), _clock(95), _clock(7260)
    ('5 s', '1 min 35 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
