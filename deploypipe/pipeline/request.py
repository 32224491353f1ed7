"""What a build is asked for."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from deploypipe.algorithms import AUTO, make
from deploypipe.allocation.budget import parse_budget
from deploypipe.backends import by_binary, load_backend
from deploypipe.errors import TargetError, UsageError, nearest
from deploypipe.runners import load_runner
from deploypipe.targets import Target, load_target
from deploypipe.training.settings import TrainSettings

METRICS = ("latency", "macs", "params")
TWO_FOUR, BY_CHOICE = "2:4", "auto"
PATTERNS = ("", TWO_FOUR, BY_CHOICE)
VALUES = ("scores", "taylor", "measured")
KEPT_BY_USER = "kept whole by --keep"
_TOLD_APART = 3  # last parts of a path in the name of a run folder


@dataclass(frozen=True)
class Request:
    """What the user asked for; every field has a working default (the embedded demo).

    Attributes:
        model: What `models.load_model` takes.
        weights: File of trained weights.
        data: What `data.load_data` takes.
        target: Name or file of a target; several with commas between them: planned for the first, built for all.
        algo: Name of a pruning algorithm, or "auto" for the recipe that did best (see `recipe`).
        budget: "50%", "3ms", "1.2M", ...
        metric: What the budget counts: latency, macs or params.
        epochs: Of fine-tuning; 0 only renews the batch norms.
        out: Run folder; chosen from the request if None.
        seed: Of everything random.
        options: Of the algorithm.
        distill: Let the dense model teach the pruned one.
        lr: Learning rate of fine-tuning, if not the default.
        batch_size: Of fine-tuning, if not the default.
        train_precision: Of all training, "fp32" or "bf16".
        threads: Of the runtime, if not the target's.
        accuracy_floor: Fail below this share of the test set.
        keep: Groups to leave whole.
        table: Folder of a latency table to use instead of measuring one; refused if it does not hold on this device.
        value: What a width is worth: what the algorithm's "scores" say; the change of the loss to first order ("taylor"); or
            the "measured" rise of the loss on held-out images. With the latter two, whole branches may go. By default
            "scores", and what the recipe says with "auto".
        value_rounds: How often widths are measured again around the solution, at most.
        sparsity: "2:4" gives the pruned model 2:4 weights wherever it can, before it is fine-tuned; "auto" lets the allocator
            choose the layers; "" leaves them dense.
        value_finalists: How many of the plans tried are trained for one epoch each before one is taken; 1: none.
        host: Which device, instead of the one that the target names; of several targets, for those not on this machine.
        benchmark_binary: The runtime's own benchmark program, built for the device, to measure with instead of Python.
        recipe: Name of the recipe that chose the algorithm and the value; "" if the user did.
        command: For the report.
    """

    model: str = "demo"
    weights: str | Path | None = None
    data: Any = "demo"
    target: str | Path = "cpu"
    algo: str = "auto"
    budget: str = "50%"
    metric: str = "latency"
    epochs: int = 3
    out: str | Path | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    distill: bool = True
    lr: float | None = None
    batch_size: int | None = None
    threads: int | None = None
    accuracy_floor: float | None = None
    keep: tuple[str, ...] = ()
    table: str | Path | None = None
    value: str = ""
    value_rounds: int = 2
    sparsity: str = ""
    value_finalists: int = 1
    host: str | None = None
    benchmark_binary: str | Path | None = None
    train_precision: str = "fp32"
    recipe: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.budget, str):
            fix = 'write it as text: "50%", "3ms", "1.2M"'
            raise UsageError(f"the budget is {self.budget!r}, a {type(self.budget).__name__}", at="budget", fix=fix)
        if (
            self.out is not None and not str(self.out).strip()
        ):  # as an unset shell variable gives: it would be the current folder
            raise UsageError("the run folder has no name", at="--out", fix="name a folder, or give no --out")
        if isinstance(self.keep, str):
            raise UsageError(f"the groups to keep are '{self.keep}'", at="keep", fix=f'give them as a tuple: ("{self.keep}",)')
        if not self.value and self.algo != AUTO:
            object.__setattr__(self, "value", VALUES[0])

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        if self.out is not None:
            return Path(os.path.expanduser(self.out))  # noqa: PTH111 - Path's own raises where there is no such user
        model = "-".join(Path(self.model).parts[-_TOLD_APART:])  # many files are called model.py
        metric = self.metric if self.metric != "latency" else ""
        parts = (model, Path(self.target).stem, self.host or "", self.algo, metric, self.budget)
        return Path("runs") / re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(filter(None, parts))).strip("-.")

    @property
    def asked(self) -> tuple[str, str, str]:
        """What decides a plan, next to the latencies: algorithm, budget and metric."""
        return self.algo, self.budget, self.metric

    @property
    def budget_is_share(self) -> bool:
        """Whether the budget is a share of the dense model, not an amount."""
        return self.budget.strip().endswith("%")

    @property
    def training(self) -> TrainSettings:
        """Settings of fine-tuning.

        Raises:
            UsageError: A value is out of range.
        """
        settings = TrainSettings(epochs=self.epochs, seed=self.seed, precision=self.train_precision)
        given: dict[str, Any] = {"lr": self.lr, "batch_size": self.batch_size, "distill": None if self.distill else 0.0}
        return replace(settings, **{name: value for name, value in given.items() if value is not None})

    def resolved_target(self) -> Target:
        """Return the first target with the threads and the device that were asked for: the plan is made for it."""
        return self.resolved_targets()[0]

    def only_target(self) -> Target:
        """Return the target as `resolved_target` does, where one alone is looked at.

        Raises:
            UsageError: Several were named.
        """
        first, *others = self.resolved_targets()
        if others:
            fix = f"name one of them, and run the command once for each: --target {first.name}"
            raise UsageError(
                "several targets are named, and only `build` takes more than one", at=f"--target {self.target}", fix=fix
            )
        return first

    def resolved_targets(self) -> tuple[Target, ...]:
        """Return all targets that were named, with commas between them.

        The host is that of those which are reached over a connection, if there are any: then the others stay on this machine.
        """
        names = [name.strip() for name in str(self.target).split(",")]
        if len(set(names)) < len(names):
            raise UsageError("a target is named twice", at=f"--target {self.target}", fix="leave one of them out")
        found = tuple(load_target(name) for name in names)
        found = tuple(target.replace(threads=self.threads) for target in found) if self.threads is not None else found
        if self.benchmark_binary:
            found = tuple(by_binary(target, self.benchmark_binary) for target in found)
        any_away = any(target.away for target in found)
        return tuple(
            target.reached_at(self.host) if self.host and (target.away or not any_away) else target for target in found
        )

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make a request from named values; an unknown name is the caller's mistake.

        Raises:
            UsageError: No field has this name.
        """
        for name in values:
            if name not in cls.__dataclass_fields__:
                raise UsageError(f"build has no argument '{name}'", at="build", fix=nearest(name, cls.__dataclass_fields__))
        return cls(**values)

    def check(self) -> None:
        """Find the mistakes that can be found before anything slow starts.

        Raises:
            UsageError: Metric, value, budget, algorithm, its options or a training setting cannot be used.
            TargetError: The target cannot be used.
        """
        if self.metric not in METRICS:
            raise UsageError(f"unknown metric '{self.metric}'", at="--metric", fix=nearest(self.metric, METRICS))
        if self.sparsity not in PATTERNS:
            raise UsageError(f"unknown sparsity '{self.sparsity}'", at="--sparsity", fix="use 2:4 or auto, or leave it out")
        if self.value and self.value not in VALUES:
            raise UsageError(f"unknown value '{self.value}'", at="--value", fix=nearest(self.value, VALUES))
        if self.value_rounds < 0:
            raise UsageError(f"value_rounds is {self.value_rounds}", at="--value-rounds", fix="use 0 or more")
        if self.value_finalists < 1:
            raise UsageError(f"value_finalists is {self.value_finalists}", at="--value-finalists", fix="use 1 or more")
        floor = self.accuracy_floor
        if floor is not None and not 0 <= floor <= 1:
            raise UsageError(f"accuracy_floor is {floor}", at="--accuracy-floor", fix="use a share from 0 to 1, such as 0.9")
        self._check_unused()
        parse_budget(self.budget, self.metric, float("inf"))
        algorithm = None if self.algo == AUTO else make(self.algo, self.options)
        if getattr(algorithm, "sparse", False) and self.metric == "latency":
            raise UsageError(
                f"'{self.algo}' sets single weights to zero: no dense runtime skips them, so that no latency is saved",
                at="--metric latency",
                fix="use --metric macs or --metric params, which count weights that are not zero",
            )
        target = self.resolved_target()
        load_runner(target)
        if self.sparsity == BY_CHOICE:
            self._check_auto(target)
        if self.metric == "latency" and load_backend(target).pricing == "never":
            message = f"what is built for target {target.name} cannot be run here: there is no latency to plan by"
            raise TargetError(
                message, at=f"--target {target.name}", fix="use --metric macs or params, or name a target to plan by first"
            )
        _ = self.training

    def _check_unused(self) -> None:
        """Raise where something was asked for that nothing would look at."""
        if self.table is not None and self.metric != "latency":
            fix = "leave it out, or use --metric latency"
            raise UsageError(f"a budget of {self.metric} looks at no latency table", at=f"--table {self.table}", fix=fix)
        if self.value == "measured":
            return
        for name in ("value_rounds", "value_finalists"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                at = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise UsageError(f"--value {self.value} measures no widths", at=at, fix="leave it out, or use --value measured")

    def _check_auto(self, target: Target) -> None:
        """Raise unless 2:4 weights can be weighed against channels: by latency, by values, on a runtime that gains by them."""
        if self.metric != "latency" or self.value == "measured":
            raise UsageError(
                "2:4 weights are weighed against channels by what both save in latency and cost in scores or first-order terms",
                at=f"--sparsity auto --metric {self.metric} --value {self.value}",
                fix="use --metric latency and --value scores or taylor, or --sparsity 2:4 for all layers that can",
            )
        if not load_backend(target).two_four:
            raise TargetError(
                f"backend {target.build.backend} has no kernels for 2:4 weights: there is nothing to choose",
                at=f"--target {target.name} --sparsity auto",
                fix="leave --sparsity out, or name a target whose runtime has them, such as jetson or nvidia-gpu",
            )
