"""Prune in one call: trace, price, and let an algorithm choose the channels."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.budget import parse_budget
from deploypipe.cost import CostTable
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.load import load_data
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.pipeline.recipe import resolved
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.training import trained
from deploypipe.pipeline.valuing import choose, held_back, held_out
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Reporter, Silent
from deploypipe.training.checkpoint import state_digest


def prune(  # noqa: PLR0913, PLR0917 - the public surface, named arguments in practice
    model: nn.Module,
    example_inputs: Any,
    algo: str = "thinet",
    target: str | Path = "cpu",
    budget: str = "50%",
    data: Any = None,
    epochs: int = 3,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    metric: str = "latency",
    reporter: Reporter | None = None,
) -> KeepPlan:
    """Return which channels of `model` to keep, by any algorithm.

    An algorithm that trains before it prunes trains a copy here; the plan then fits the channels of that copy best. Algorithms
    that leave zeros in weights cut no channels: use `build`.

    Args:
        model: Trained; left as it is.
        example_inputs: A tensor or the tuple of `forward`'s arguments.
        algo: Name of the algorithm, or "auto".
        target: Name or file of the target whose latency counts.
        budget: "50%", "3ms", ...
        data: A (train, test) pair of Datasets of (input, label), one Dataset, or a `--data` string; only the training part is
            used. None for algorithms that need no data.
        epochs: Of the fine-tuning that is to follow, for algorithms that take it into account. How long an algorithm trains
            before it prunes is its option `train_epochs`.
        seed: Of everything random.
        options: Of the algorithm.
        metric: What the budget counts: latency, macs or params.
        reporter: Hears how far it is.

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    request = resolved(
        Request(target=target, algo=algo, budget=budget, metric=metric, epochs=epochs, options=options or {}, seed=seed)
    )
    request.check()
    _check(request, algo, data)
    example = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    graph = trace(model, example)
    cost: CostTable
    if metric == "latency":
        cost = profile(model, example, request.only_target(), graph=graph, reporter=reporter)
    else:
        cost = MacTable() if metric == "macs" else ParamTable()
    limit = parse_budget(budget, metric, cost.predict(graph))
    shape = tuple(example[0].shape[1:])  # of an image, or of something that no file of images holds
    loaded = None if data is None else load_data(data, size=shape if len(shape) in {2, 3} else None, seed=seed)
    algorithm = make(request.algo, request.options)
    measured = loaded if request.value == "measured" else None
    seen = held_back(request, measured) if measured else loaded
    problem = Problem(model, graph, cost, limit, seen.train if seen else None, seed, reporter or Silent())
    if hasattr(algorithm, "train"):
        problem = replace(problem, model=trained(algorithm, problem, seen, request.training)[0])
    meter = held_out(request, problem.model, state_digest(problem.model), graph, measured) if measured else None
    with TemporaryDirectory(prefix="deploypipe-") as folder:
        plan = choose(request, problem, meter, Path(folder))
    return plan.replace(fingerprint=graph.fingerprint)


def _check(request: Request, algo: str, data: Any) -> None:
    """Refuse what ends in no plan of channels."""
    if request.value != "scores" and data is None:
        message, fix = "widths are judged on images, and there are none", "give data, or another algo"
        raise UsageError(message, at=f"algo='{algo}'", fix=fix)
    if getattr(make(request.algo, request.options), "sparse", False):
        message, fix = f"'{algo}' leaves zeros in weights and cuts no channels", "use deploypipe.build: it keeps the weights"
        raise UsageError(message, at="prune", fix=fix)
