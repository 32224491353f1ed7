"""All scoring criteria on one model, for `deploypipe criteria`."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from deploypipe.algorithms.base import Problem, judged
from deploypipe.algorithms.scores import DATA_FREE, activation_scores, data_free, filters_of
from deploypipe.algorithms.taylor import Taylor, Terms
from deploypipe.count import MacTable
from deploypipe.data.batches import count
from deploypipe.ingredients.statistics import batch_size, generator, images, trained_weights
from deploypipe.pipeline.given import given
from deploypipe.pipeline.request import Request
from deploypipe.progress import Reporter, Silent
from deploypipe.training.adapt import Adapting
from deploypipe.worth.criteria import Analysis, analyse

Scores = dict[str, NDArray[np.float64]]
N_IMAGES = 1000


def criteria(request: Request, reporter: Reporter | None = None, n_images: int = N_IMAGES) -> Analysis:
    """Score the channels of a model by every criterion, and compare the criteria.

    Args:
        request: Model, weights, data, seed and groups to keep.
        reporter: Hears how far it is.
        n_images: Training images for the criteria that look at activations or gradients.

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    tell = reporter or Silent()
    request.check()
    found = given(request, tell)
    table = MacTable()
    problem = Problem(found.loaded.model, found.graph, table, table.predict(found.graph), found.data.train, request.seed, tell)
    return analyse(all_scores(problem, n_images), _filters(problem))


def all_scores(problem: Problem, n_images: int) -> dict[str, Scores]:
    """Return criterion -> group -> (C,) scores, higher = keep; groups that a criterion cannot judge are missing."""
    problem.reporter.stage("criteria")
    model, graph, seed = problem.model, problem.graph, problem.seed
    names = [name for name in DATA_FREE if name != "random"]
    found: dict[str, Scores] = {name: judged(graph, data_free(name, model, seed))[0] for name in names}
    found |= {f"taylor-{on}": _taylor(problem, on, n_images) for on in ("gate", "weight")}
    batch = batch_size(graph.example)
    return found | activation_scores(model, graph, images(problem.data, n_images, seed, batch))


def _taylor(problem: Problem, on: str, n_images: int) -> Scores:
    """Return the first-order Taylor scores of the model as it is."""
    method = replace(Taylor(), on=on, lr=0.0)
    data: Any = problem.data  # drawn like the images of other criteria: folders are sorted by class
    chosen = torch.randperm(count(data), generator=generator(problem.seed, "images"))[:n_images]
    part = Subset(data, chosen.tolist())
    batch = min(method.batch, batch_size(problem.graph.example), count(part))
    run = Adapting(problem.model, part, 0.0, batch, problem.seed)
    units, _ = method.units(run.model, problem.graph)
    met = Terms(method, units, generator(problem.seed, "probes"))
    for model in run.steps(max(1, count(part) // batch)):
        met.add(model, run.latest)
    return {name: score.cpu().numpy() for name, score in met.scores().items()}


def _filters(problem: Problem) -> Scores:
    """Return the filters of each layer that makes prunable channels, (n, d), by group."""
    view = trained_weights(problem.model)
    return {name: found[0].cpu().numpy() for name, found in judged(problem.graph, lambda g: filters_of(g, view))[0].items()}
