"""Run a classifier on a data set: its accuracy, and its batch norm statistics estimated anew."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset

from deploypipe.data.batches import Augment, Samples, batches, count, seeded
from deploypipe.errors import ModelError
from deploypipe.factory import guarded
from deploypipe.progress import Reporter, Silent
from deploypipe.training.layout import device_of, fast_layout, in_mode, laid_out


@dataclass(frozen=True)
class Accuracy:
    """How well a classifier does.

    Attributes:
        top1: Share of samples whose largest logit is at the label, 0 to 1.
        loss: Mean cross entropy.
        n: Number of samples.
    """

    top1: float
    loss: float
    n: int


def evaluate(model: nn.Module, dataset: Samples, *, batch_size: int = 256, reporter: Reporter | None = None) -> Accuracy:
    """Return the accuracy of `model`, in eval mode and on its own device; its mode is put back.

    All models meet the same images, also where the user's transforms draw.

    Raises:
        ModelError: The model cannot be run on this data.
    """
    reporter = reporter or Silent()
    n = count(dataset)
    reporter.stage("evaluate", n)
    right, loss, done = 0, 0.0, 0
    with in_mode(model, training=False), torch.inference_mode(), seeded(0):
        for inputs, labels in _placed(model, batches(dataset, batch_size)):
            out = logits(model, inputs, labels)
            right += int((out.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(out.double(), labels, reduction="sum"))
            done += len(labels)
            reporter.advance(done)
    return Accuracy(right / n, loss / n, n)


def recalibrate(
    model: nn.Module,
    dataset: Samples,
    n_images: int = 2000,
    seed: int = 0,
    *,
    augment: Augment | None = None,
    batch_size: int = 128,
) -> nn.Module:
    """Return a copy of `model` whose batch norm statistics are the mean over batches of `n_images` training images.

    Everything else (dropout, weights) is left alone. A model without batch norm comes back as a plain copy.

    Args:
        model: Stays as it is.
        dataset: The training set.
        n_images: How many images are looked at; all if there are fewer.
        seed: Decides which, and what the user's transforms draw.
        augment: The augmentation that the model was trained with (`Data.augment`): the statistics depend on it.
        batch_size: Images per batch; every batch counts alike.

    Raises:
        ModelError: The model cannot be run on this data.
    """
    fresh = copy.deepcopy(model).eval()
    norms = [module for module in fresh.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return fresh
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean: every batch counts alike
        norm.train()
    order = torch.randperm(count(dataset), generator=torch.Generator().manual_seed(seed))[:n_images]
    part = Subset(dataset, order.tolist())
    with torch.inference_mode(), seeded(seed):
        for inputs, labels in _placed(fresh, batches(part, batch_size, shuffle_seed=seed, augment=augment, drop_last=True)):
            logits(fresh, inputs, labels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return fresh


def logits(model: Callable[..., Any], inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the model's logits (N, K) for a batch.

    Raises:
        ModelError: The forward pass fails, the output is not (N, K), or a label is not below K.
    """
    shape = tuple(inputs.shape)
    fix = "check that --data and --model fit together: number of channels, image size, number of classes"
    out = guarded(partial(model, inputs), f"the model fails on a batch of shape {shape}", "forward", ModelError, fix)
    out = main_output(out)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(inputs):
        found = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ModelError(f"the model returns {found}, not logits of shape ({shape[0]}, classes)", at="forward", fix=fix)
    if int(labels.max()) >= out.shape[1] or int(labels.min()) < 0:
        label = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        message = f"label {label} is out of range: the model has {out.shape[1]} outputs"
        raise ModelError(message, at="forward", fix="use a model made for these classes, or other data")
    return out


def main_output(out: Any) -> Any:
    """Return the first tensor of what a classifier returns: some add auxiliary outputs or wrap the logits."""
    if isinstance(out, Mapping):
        return out.get("logits", next(iter(out.values()), None))
    if isinstance(out, tuple | list):
        return out[0] if out else None
    return getattr(out, "logits", out)


def _placed(model: nn.Module, stream: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Move batches to the model's device, images in the fastest layout that the model runs in."""
    device, layout = device_of(model), None
    for batch, labels in stream:
        inputs = batch.to(device)
        layout = layout or fast_layout(model, inputs)
        yield laid_out(inputs, layout), labels.to(device)
