"""The loss of a plan before training: compact, estimate the batch norms anew, and run on training images held out for this.

Every answer is written to a file the moment it is known. Whoever asks for the same plan again, after a crash, for another
budget or in another run, reads it there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import TensorDataset

from deploypipe.compact import compact
from deploypipe.data.batches import Samples, count, seeded, split, take
from deploypipe.data.load import Data
from deploypipe.errors import ModelError
from deploypipe.folder import explained
from deploypipe.plan import KeepPlan
from deploypipe.progress import Reporter
from deploypipe.training.evaluate import Accuracy, evaluate, recalibrate
from deploypipe.training.finetune import finetune
from deploypipe.training.hints import Hint
from deploypipe.training.settings import TrainSettings
from deploypipe.types import Graph

SCHEMA = 1
HELD_OUT = 0.2  # share of the training set that nothing but these measurements looks at
MOST_VALUES = 1 << 26  # input values kept in memory, for calibration and for the loss each: 445 images of 3x224x224
BATCH = 128


@dataclass(frozen=True)
class Effort:
    """How many images a measurement takes.

    Attributes:
        calibration: Images for the batch norm statistics.
        images: Held-out images for the loss. All plans meet the same ones, so that their differences are surer than each.
    """

    calibration: int = 512
    images: int = 1000


class Meter(Protocol):
    """Says how well plans do before training."""

    def known(self, plan: KeepPlan) -> bool:
        """Say whether the answer costs nothing."""
        ...

    def measure(self, plan: KeepPlan) -> Accuracy:
        """Return loss and accuracy on held-out images."""
        ...

    def trained(self, plan: KeepPlan, reporter: Reporter) -> Accuracy:
        """Return the same after one epoch of training."""
        ...


class HeldOut:
    """Measures plans of one model on a held-out part of its training set.

    Attributes:
        fit: The rest of the training set: what scores and batch norm statistics may be made from.
        part: The held-out part, disjoint from `fit`; the split depends on the seed alone.

    Args:
        model: The dense model.
        graph: Of the model.
        data: Whose training set is split.
        memo: File of what was measured before; None for memory.
        seed: Of the split, of the images that are used, and of training.
        effort: How many images a measurement takes.
        find_hint: Says where plans that are trained learn inner activations, as fine-tuning will; by default nowhere.
        training: How plans are trained; how long and the seed are decided here.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        data: Data,
        memo: Path | None,
        *,
        seed: int = 0,
        effort: Effort | None = None,
        find_hint: Callable[[KeepPlan], Hint | None] = lambda _plan: None,
        training: TrainSettings | None = None,
    ) -> None:
        self._model, self._graph, self._seed, self._data, self._augment = model, graph, seed, data, data.augment
        self.effort, self._find_hint = effort or Effort(), find_hint
        self._training = replace(training or TrainSettings(), epochs=1, seed=seed)
        self.fit, self.part = split(data.train, HELD_OUT, seed)
        self._path = memo

    @cached_property
    def _calibration(self) -> TensorDataset:
        return _loaded(self.fit, self.effort.calibration, self._seed)

    @cached_property
    def _judges(self) -> TensorDataset:
        return _loaded(self.part, self.effort.images, self._seed)

    @cached_property
    def _memo(self) -> "Memo":
        return Memo(self._path, len(self._judges))

    @cached_property
    def _trials(self) -> "Memo":
        return Memo(self._path and self._path.with_suffix(".taught.csv"), count(self.part))

    def known(self, plan: KeepPlan) -> bool:
        """Say whether the plan has been measured."""
        return _key(self._graph, plan) in self._memo.found

    def measure(self, plan: KeepPlan) -> Accuracy:
        """Return loss (mean cross entropy, nats) and accuracy of the compacted model, its batch norms estimated anew.

        Raises:
            ModelError: The smaller model cannot be run on this data, or its loss is not a number.
        """
        key = _key(self._graph, plan)
        if key not in self._memo.found:
            small = compact(self._model, self._graph, plan, check=False)
            data, n_images = self._calibration, len(self._calibration)
            fresh = recalibrate(small, data, n_images, self._seed, augment=self._augment, batch_size=BATCH)
            found = evaluate(fresh, self._judges)
            if not isfinite(found.loss):
                raise ModelError(
                    f"the loss on held-out images is {found.loss}",
                    at="widths " + ", ".join(f"{name}={len(kept)}" for name, kept in plan.keep.items()),
                    fix="check that the weights are finite and the data is normalised as the model expects",
                )
            self._memo.add(key, found)
        return self._memo.found[key]

    def trained(self, plan: KeepPlan, reporter: Reporter) -> Accuracy:
        """Return loss and accuracy on the whole held-out part after one epoch on the rest.

        The dense model teaches if the settings distill.

        Raises:
            ModelError: The smaller model cannot be trained on this data.
            UsageError: The loss is no longer finite.
        """
        key = _key(self._graph, plan, self._training)
        if key not in self._trials.found:
            small = compact(self._model, self._graph, plan, check=False)
            start = recalibrate(small, self.fit, self.effort.calibration, self._seed, augment=self._augment, batch_size=BATCH)
            data, teacher = replace(self._data, train=self.fit), self._model if self._training.distill else None
            hint = self._find_hint(plan) if teacher else None
            tuned = finetune(start, data, self._training, teacher=teacher, reporter=reporter, hint=hint)
            self._trials.add(key, evaluate(tuned, self.part))
        return self._trials.found[key]


class Memo:
    """Measured losses by plan, in a file that is only appended to; without a path, in memory.

    Args:
        path: The file; it is made if need be.
        n: Images of every measurement: a row of another number was cut off while it was written, and is not read.
    """

    def __init__(self, path: Path | None, n: int) -> None:
        self._path, self._n = path, n
        self.found: dict[str, Accuracy] = {}
        text = path.read_text() if path and path.is_file() else ""
        self._begin = "\n" if text and not text.endswith("\n") else ""  # after a line that a dying process left
        for line in text.splitlines():
            key, *numbers = line.split(",")
            try:
                top1, loss, number = map(float, numbers)
            except ValueError:
                continue
            if number == n:
                self.found[key] = Accuracy(top1, loss, n)

    def add(self, key: str, found: Accuracy) -> None:
        """Write one row, at once."""
        self.found[key] = found
        if self._path is None:
            return
        with explained(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{self._begin}{key},{found.top1!r},{found.loss!r},{self._n}\n")
        self._begin = ""


def memo_name(*parts: object) -> str:
    """Return a file name that differs whenever two measurements must not be mixed."""
    return hashlib.sha256(repr((SCHEMA, torch.__version__, *parts)).encode()).hexdigest()[:16] + ".csv"


def _key(graph: Graph, plan: KeepPlan, *more: object) -> str:
    """Return a key of the model that the plan leaves, and of what else counts: groups that stay whole make no difference."""
    cut = sorted((name, kept) for name, kept in plan.keep.items() if len(kept) < graph.group(name).size)
    return hashlib.sha256(repr((cut, *more) if more else cut).encode()).hexdigest()[:16]


def _loaded(dataset: Samples, n_images: int, seed: int) -> TensorDataset:
    """Return random samples in memory: hundreds of measurements read them, of several processes.

    The user's random transforms are seeded, so that all processes measure on the same images: they share one file of answers.
    """
    order = torch.randperm(count(dataset), generator=torch.Generator().manual_seed(seed))
    with seeded(seed):
        size = prod(take(dataset, order[:1])[0].shape)
        return TensorDataset(*take(dataset, order[: min(n_images, max(1, MOST_VALUES // size))]))
