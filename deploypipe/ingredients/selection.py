"""Greedy selection of parts of weights, from none on: the part of the largest gradient joins, then what is in adapts.

Zhuang et al., Discrimination-aware Channel Pruning for Deep Neural Networks, NeurIPS 2018, arXiv:1810.11809, algorithm 2, with
channels; Liu et al., Discrimination-aware Network Pruning for Deep Model Compression, TPAMI 2021, arXiv:2001.01050, with
kernels.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam

from deploypipe.ingredients.heads import Head, Listening
from deploypipe.ingredients.stacks import Stack
from deploypipe.training.evaluate import logits


@dataclass(frozen=True, eq=False)
class JointLoss:
    """What a layer's new weights are judged by: `mean |O - O_baseline|^2 / 2 + weight * cross entropy`.

    The mean is over images, channels and places, so that layers of different size count alike; layers are summed.

    Attributes:
        baseline: The model whose outputs are to be kept; stays as it is.
        layers: Names of the weights whose outputs count.
        inputs: (N, ...) images.
        labels: (N,).
        weight: Of the cross entropy; lambda in the paper.
        head: Weight of a layer, and the classifier on its output; None for the model's own output.
        batch: Images of one step.
    """

    baseline: nn.Module
    layers: Sequence[str]
    inputs: Tensor
    labels: Tensor
    weight: float
    head: tuple[str, Head] | None
    batch: int = 64
    wanted: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            outputs = [self._outputs(self.baseline, part)[0] for part in self.parts()]
        object.__setattr__(self, "wanted", outputs)

    def parts(self) -> list[Tensor]:
        """Return the indices of the images of each batch."""
        return list(torch.split(torch.arange(len(self.labels)), self.batch))

    def losses(self, model: nn.Module) -> Iterator[tuple[Tensor, float]]:
        """Yield the loss of each batch and the share of all images that it holds."""
        for part, wanted in zip(self.parts(), self.wanted, strict=True):
            found, logit = self._outputs(model, part)
            loss = torch.stack([F.mse_loss(o, w) / 2 for o, w in zip(found, wanted, strict=True)]).sum()
            if self.weight:
                loss = loss + self.weight * F.cross_entropy(logit, self.labels[part])
            yield loss, len(part) / len(self.labels)

    def _outputs(self, model: nn.Module, part: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the layers' outputs for every call, and the logits."""
        last = self.head[0] if self.head else None
        listening = Listening(model, list(dict.fromkeys([*self.layers, *([last] if last else [])])), stop_after=last)
        with listening():
            if self.head is None:
                logit = logits(model, self.inputs[part], self.labels[part])
            else:
                listening.run(self.inputs[part])
                logit = self.head[1](listening.outputs[self.head[0]][-1])
        return [out for name in self.layers for out in listening.outputs[name]], logit


@dataclass(frozen=True, eq=False)
class Selected:
    """What a greedy selection found.

    Attributes:
        order: Units as they joined, (n,).
        sizes: Numbers of units in, after each pass, from 0 on.
        losses: The joint loss there.
        model: With the weights that were adapted; units that did not join are exactly zero.
    """

    order: NDArray[np.int64]
    sizes: list[int]
    losses: list[float]
    model: nn.Module

    def curve(self, n: int) -> NDArray[np.float64]:
        """Return the loss with w units in, w = 0 ... n, between passes by interpolation, never rising."""
        return np.minimum.accumulate(np.interp(np.arange(n + 1), self.sizes, self.losses))


def select(
    model: nn.Module, stack: Stack, n_units: int, limit: int, loss: JointLoss, *, per_pass: int, lr: float, passes: int = 1
) -> Selected:
    """Return the greedy selection of units of a stack.

    Args:
        model: Where the weights lie; stays as it is.
        stack: The weights: its matrix is read as (n_units, K).
        n_units: Number of units.
        limit: How many shall join.
        loss: That is minimised.
        per_pass: Units that join at once.
        lr: Learning rate of Adam, on what has joined.
        passes: Over the images, after each joining.
    """
    run = _Run(model, stack, n_units, lr)
    order, sizes, losses = list[int](), [0], list[float]()
    while True:
        value, scores = run.scored(loss)
        losses.append(value)
        if len(order) >= limit:
            break
        scores[order] = -np.inf
        joining = np.argsort(-scores, kind="stable")[: min(per_pass, limit - len(order))]
        order += joining.tolist()
        sizes.append(len(order))
        run.join(joining)
        for _ in range(passes):
            run.adapt(loss)
    return Selected(np.array(order, np.int64), sizes, losses, run.model)


class _Run:
    """A model in which only one stack can change."""

    def __init__(self, model: nn.Module, stack: Stack, n_units: int, lr: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._stack, self._n_units = stack, n_units
        named = dict(self.model.named_parameters())
        self._named = {member.param: named[member.param].requires_grad_(True) for member in stack.members}
        self._first = stack.read(self._named)
        self._in = torch.zeros(n_units, dtype=torch.bool, device=self._first.device)
        self._optimizer = Adam(self._named.values(), lr=lr)
        with torch.no_grad():
            stack.add(self._named, -self._first)

    def scored(self, loss: JointLoss) -> tuple[float, NDArray[np.float64]]:
        """Return the loss over all images, and the norms of its gradient by each unit."""
        self._optimizer.zero_grad()
        total = 0.0
        for value, share in loss.losses(self.model):
            (share * value).backward()  # type: ignore[no-untyped-call]
            total += share * value.item()
        gradient = self._stack.read(self._gradients()).reshape(self._n_units, -1)
        return total, gradient.double().square().sum(1).sqrt().cpu().numpy()

    @torch.no_grad()
    def join(self, units: NDArray[np.int64]) -> None:
        """Let units in, with the weights that they have in the model."""
        new = torch.zeros_like(self._in)
        new[torch.from_numpy(units).to(new.device)] = True
        self._in |= new
        self._stack.add(self._named, self._only(self._first, new))

    def adapt(self, loss: JointLoss) -> None:
        """Train what is in, for one pass over the images."""
        for value, _ in loss.losses(self.model):
            self._optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                gradients = self._gradients()
                kept = self._only(self._stack.read(gradients), self._in)
                for gradient in gradients.values():
                    gradient.zero_()
                self._stack.add(gradients, kept)
            self._optimizer.step()

    def _only(self, matrix: Tensor, units: Tensor) -> Tensor:
        return (matrix.reshape(self._n_units, -1) * units[:, None]).view_as(matrix)

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._named.items() if p.grad is not None}
