"""Prune in one call: trace, price, and let an algorithm choose the channels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.budget import parse_budget
from deploypipe.cost import CostTable
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.load import load_data
from deploypipe.graph import trace
from deploypipe.pipeline.request import Request
from deploypipe.plan import KeepPlan
from deploypipe.profiler.measure import profile
from deploypipe.progress import Reporter, Silent


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

    Args:
        model: Trained; left as it is.
        example_inputs: A tensor or the tuple of `forward`'s arguments.
        algo: Name of the algorithm.
        target: Name or file of the target whose latency counts.
        budget: "50%", "3ms", ...
        data: A (train, test) pair of Datasets of (input, label), one Dataset, or a `--data` string; only the training part is
            used. None for algorithms that need no data.
        epochs: For algorithms that train before they prune; others ignore it.
        seed: Of everything random.
        options: Of the algorithm.
        metric: What the budget counts: latency, macs or params.
        reporter: Hears how far it is.

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    request = Request(target=target, algo=algo, budget=budget, metric=metric, epochs=epochs, options=options or {}, seed=seed)
    request.check()
    example = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    graph = trace(model, example)
    cost: CostTable
    if metric == "latency":
        cost = profile(model, example, request.resolved_target(), graph=graph, reporter=reporter)
    else:
        cost = MacTable() if metric == "macs" else ParamTable()
    limit = parse_budget(budget, metric, cost.predict(graph))
    train = None if data is None else load_data(data, size=tuple(example[0].shape[1:]), seed=seed).train
    plan: KeepPlan = make(algo, options or {}).plan(Problem(model, graph, cost, limit, train, seed, reporter or Silent()))
    return plan.replace(fingerprint=graph.fingerprint)
