"""What the discrimination-aware methods share: training with auxiliary classifiers by stages, and the loss of each stage."""

import copy
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem, labelled
from deploypipe.data.batches import count, seeded, take
from deploypipe.ingredients.heads import AuxiliaryLoss, Head, Listening, evenly, fitted, n_classes
from deploypipe.ingredients.selection import JointLoss
from deploypipe.ingredients.statistics import batch_size, evaluating, generator
from deploypipe.training.evaluate import logits
from deploypipe.training.trainer import Trainer

BATCH = 64
MOST_VALUES = 1 << 26  # of one layer's outputs in memory: fewer images where these are large
FIT_STEPS = 100  # of a classifier on fixed features: a convex problem of a few hundred unknowns


def staged(problem: Problem, trainer: Trainer, n_heads: int, epochs: int) -> nn.Module:
    """Return the model after training with the classifiers, one after the other, each for its part of the epochs."""
    model, places = problem.model, evenly(problem.model, problem.graph, n_heads)
    if not places:
        return trainer.fit(model, epochs)
    for number, weight in enumerate(places):
        share = epochs * (number + 1) // len(places) - epochs * number // len(places)
        hook = AuxiliaryLoss(weight, _channels(problem, weight), n_classes(model, problem.graph.example), problem.seed)
        model = trainer.fit(model, share, [hook])
    return model


class Stages:
    """The joint losses of a model's layers, each with the next classifier that sees it.

    Args:
        problem: With the model whose outputs are to be kept, and the data.
        n_heads: Auxiliary classifiers.
        n_images: Training images.
        weight: Of the cross entropy.
    """

    def __init__(self, problem: Problem, n_heads: int, n_images: int, weight: float) -> None:
        self._problem, self._weight = problem, weight
        data, device = labelled(problem.data), next(problem.model.parameters()).device
        kept = problem.graph.kept()
        largest = max(prod(layer.out_size) * layer.n_out.at(kept) for layer in problem.graph.layers)
        n_images = max(2, min(n_images, MOST_VALUES // largest))
        chosen = torch.randperm(count(data), generator=generator(problem.seed, "selection"))[:n_images]
        with seeded(problem.seed):  # the user's transforms may draw
            self._inputs, self._labels = (part.to(device) for part in take(data, chosen))
        self._batch = min(BATCH, batch_size(problem.graph.example))
        self._calls = [layer.weight for layer in problem.graph.layers]
        with evaluating(problem.model), torch.no_grad():
            logits(problem.model, self._inputs[: self._batch], self._labels[: self._batch])  # data of another kind: an error
            places = evenly(problem.model, problem.graph, n_heads) if weight else []
            self._heads = {place: self._fitted(place) for place in places}
            self._seen = _seen(problem.model, self._inputs[:2], places)

    def loss(self, baseline: nn.Module, layers: Sequence[str]) -> JointLoss:
        """Return the loss of some layers' weights.

        Args:
            baseline: Whose outputs are to be kept.
            layers: Names of their weights.
        """
        last = max(len(self._calls) - 1 - self._calls[::-1].index(weight) for weight in layers)
        later = [p for p in self._heads if self._calls.index(p) >= last and self._seen[p].issuperset(layers)]
        head = (later[0], self._heads[later[0]]) if later else None
        with evaluating(baseline):
            return JointLoss(baseline, layers, self._inputs, self._labels, self._weight, head, self._batch)

    def _fitted(self, place: str) -> Head:
        model = self._problem.model
        listening, features = Listening(model, [place], stop_after=place), []
        with listening():
            for part in torch.split(self._inputs, self._batch):
                listening.run(part)
                features = listening.outputs[place]
        channels = _channels(self._problem, place)
        head = Head(channels, n_classes(model, self._problem.graph.example), self._problem.seed)
        with torch.enable_grad():
            return fitted(head, torch.cat(features), self._labels, steps=FIT_STEPS, batch=self._batch, seed=self._problem.seed)


def _seen(model: nn.Module, inputs: Tensor, places: Sequence[str]) -> dict[str, set[str]]:
    """Return the weights that each of these layers' outputs depends on: a shortcut does not see the branch beside it."""
    trial = copy.deepcopy(model).requires_grad_(True)
    named, listening = dict(trial.named_parameters()), Listening(trial, places)
    found = dict[str, set[str]]()
    with torch.enable_grad(), listening():
        trial(inputs)
        for place in places:
            total = listening.outputs[place][-1].sum()
            slopes = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
            found[place] = {name for name, slope in zip(named, slopes, strict=True) if slope is not None}
    return found


def _channels(problem: Problem, weight: str) -> int:
    """Return how many channels a layer makes."""
    layer = next(layer for layer in problem.graph.layers if layer.weight == weight)
    return layer.n_out.at(problem.graph.kept())
