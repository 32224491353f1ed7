"""Auxiliary classifiers on inner layers: what the features there say about the labels.

Zhuang et al., Discrimination-aware Channel Pruning for Deep Neural Networks, NeurIPS 2018, arXiv:1810.11809, section 3.2:
`F = AvgPool(ReLU(BN(O)))` of a layer's output O, and the cross entropy of `theta^T F`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from deploypipe.data.batches import seeded
from deploypipe.errors import NotApplicable
from deploypipe.graph.outputs import copied
from deploypipe.ingredients.statistics import Convolution, Transposed, evaluating, generator
from deploypipe.training.evaluate import main_output
from deploypipe.training.settings import TrainHook
from deploypipe.types import Graph

HEAD = "auxiliary_head"


class Head(nn.Module):
    """A classifier on the output (N, C, ...) of a convolution.

    Args:
        n_channels: C.
        n_classes: Number of labels.
        seed: Of its weights.
    """

    def __init__(self, n_channels: int, n_classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(n_channels)
        with seeded(seed):
            self.linear = nn.Linear(n_channels, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        normal = self.norm(features.flatten(2))
        out: Tensor = self.linear(F.relu(normal).mean(2))
        return out


def evenly(model: nn.Module, graph: Graph, n_heads: int) -> list[str]:
    """Return the weights of up to `n_heads` convolutions that divide the forward pass into `n_heads + 1` stretches.

    Layers that are called more than once, those whose output is no image, and weights that no convolution owns (they are used
    by a function, or are made of others) carry no head.
    """
    calls, modules = [layer.weight for layer in graph.layers], dict(model.named_modules())
    owned = {f"{name}.weight" for name, module in modules.items() if isinstance(module, Convolution | Transposed)}
    usable = [weight for weight in calls if weight in owned and calls.count(weight) == 1]
    if not usable:
        return []
    places = [round((p + 1) * len(usable) / (n_heads + 1)) - 1 for p in range(n_heads)]
    return [usable[place] for place in dict.fromkeys(max(place, 0) for place in places)]


def owner_of(model: nn.Module, weight: str) -> nn.Module:
    """Return the module that owns a weight.

    Raises:
        NotApplicable: There is none: the weight is used by a function.
    """
    owner: nn.Module | None = dict(model.named_modules()).get(weight.rpartition(".")[0])
    if owner is None or not weight.endswith(".weight"):
        raise NotApplicable(f"{weight} belongs to no module")
    return owner


class _Enough(Exception):
    """Ends a forward pass early."""


class Listening:
    """The outputs of some layers.

    Args:
        model: Read by forward hooks while the context is open.
        weights: Names of the layers' weights.
        stop_after: End the pass after this layer, which is met once; None to finish it.
    """

    def __init__(self, model: nn.Module, weights: Sequence[str], stop_after: str | None = None) -> None:
        self._model, self._stop_after = model, stop_after
        self._layers = {weight: owner_of(model, weight) for weight in weights}
        self.outputs: dict[str, list[Tensor]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Listen."""
        self.outputs = {}

        def hook(weight: str, out: Tensor) -> None:
            self.outputs.setdefault(weight, []).append(out.clone())  # what follows may overwrite it: ReLU(inplace=True)
            if weight == self._stop_after:
                raise _Enough

        handles = [
            layer.register_forward_hook(lambda _, __, out, weight=weight: hook(weight, out))
            for weight, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, inputs: Tensor) -> None:
        """Run the model on inputs, as far as the layer to stop after."""
        with suppress(_Enough):
            self._model(inputs)


class AuxiliaryLoss(TrainHook):
    """Adds the loss of a head on one layer to the training loss; the head learns with the model and is removed at the end.

    Args:
        weight: Of the layer.
        n_channels: Of its output.
        n_classes: Number of labels.
        seed: Of the head's weights.
    """

    def __init__(self, weight: str, n_channels: int, n_classes: int, seed: int) -> None:
        self._weight, self._head = weight, Head(n_channels, n_classes, seed)
        self._met: list[Tensor] = []
        self.key = f"head on {weight}, {n_classes} classes, seed {seed}"

    def on_train_begin(self, model: nn.Module) -> None:
        """Put the head's parameters into the model, so that they are trained, and listen to the layer."""
        for name, parameter in self._parameters():
            model.register_parameter(name, parameter)  # a module more would be run by containers such as Sequential
        layer = owner_of(model, self._weight)
        self._listener = layer.register_forward_hook(lambda _, __, out: self._met.append(out.clone()))  # as in Listening

    def on_loss(self, model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
        """Add the head's cross entropy."""
        features, self._met = self._met[-1], []
        return loss + F.cross_entropy(self._head.to(features.device)(features), labels)

    def on_train_end(self, model: nn.Module) -> None:
        """Take the head away."""
        self._listener.remove()
        for name, _ in self._parameters():
            delattr(model, name)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{HEAD}_{name.replace('.', '_')}", parameter) for name, parameter in self._head.named_parameters()]


def fitted(head: Head, features: Tensor, labels: Tensor, *, steps: int, batch: int, seed: int, lr: float = 0.1) -> Head:
    """Return the head, trained on the features of a model that stays as it is, in evaluation mode.

    Args:
        head: Trained in place.
        features: (N, C, ...) of a layer.
        labels: (N,).
        steps: Of SGD with momentum.
        batch: Images of a step.
        seed: Of the order.
        lr: Learning rate.
    """
    optimizer = SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    head.train()
    rng = generator(seed, "fit head")
    for _ in range(steps):
        chosen = torch.randint(len(labels), (min(batch, len(labels)),), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(head(features[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head.eval().requires_grad_(False)


def n_classes(model: nn.Module, example: Sequence[Any]) -> int:
    """Return the number of logits of a classifier."""
    with evaluating(model), torch.no_grad():
        out = model(*copied(example))
    return int(main_output(out).shape[-1])
