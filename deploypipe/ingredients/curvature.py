"""First and second order terms of the loss by factors at 1: one factor for each channel, or one for each weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deploypipe.errors import NotApplicable
from deploypipe.ingredients.gates import Scaled, feeders, gated_parameters
from deploypipe.types import Graph, Group

Loss = Callable[[Callable[..., object]], Tensor]  # of a model, or what stands for it


@dataclass(frozen=True, eq=False)
class Unit:
    """What the channels of one group scale.

    Attributes:
        size: Channels.
        scaled: The parameters, slot by slot.
        each: Every weight has a factor of its own, instead of one for all that a channel owns.
    """

    size: int
    scaled: Sequence[Scaled]
    each: bool = False

    def first(self, named: Mapping[str, nn.Parameter]) -> Tensor:
        """Return the derivatives of the loss by the factors, from the gradients that `backward` left: (C,), or (C, K).

        Raises:
            NotApplicable: No parameter has a gradient: the loss does not depend on them.
        """
        parameters = [named[s.param] for s in self.scaled]
        if all(p.grad is None for p in parameters):
            raise NotApplicable("no norm and no weight that makes its channels has a gradient")
        return self.gathered([torch.zeros_like(p) if p.grad is None else p.detach() * p.grad for p in parameters])

    def gathered(self, products: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes by channel: their sums (C,), or side by side (C, K)."""
        pairs = list(zip(self.scaled, products, strict=True))
        if not self.each:
            return torch.stack([s.per_channel(product.double(), self.size) for s, product in pairs]).sum(0)
        return torch.cat([_rows(s, product.double()) for s, product in pairs], dim=1)

    def factors(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """Return factors of 1 that gradients can be taken of."""
        if self.each:
            return [torch.ones_like(named[s.param]).requires_grad_() for s in self.scaled]
        return [torch.ones(self.size, device=named[self.scaled[0].param].device, requires_grad=True)]

    def apply(self, values: dict[str, Tensor], factors: Sequence[Tensor]) -> None:
        """Multiply the parameters in `values` by the factors."""
        for i, s in enumerate(self.scaled):
            values[s.param] = values[s.param] * factors[i] if self.each else s.times(values[s.param], factors[0])


def gates(model: nn.Module, graph: Graph) -> Callable[[Group], Unit]:
    """Return what tells for a group what one factor on each of its channels multiplies; one forward pass serves all groups.

    The derivative of the loss by a factor z on a norm's output is `gamma dE/dgamma + beta dE/dbeta` at z = 1, by one on a
    layer's output `sum w dE/dw + b dE/db`. A channel made or normalised in several places has one factor for all of them:
    terms are added with their signs (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
    arXiv:1906.10771).

    Raises:
        NotApplicable: (the result) Nothing can be scaled.
    """
    followed = feeders(model, graph.example)
    return lambda group: Unit(group.size, gated_parameters(model, group, followed))


def derivatives(model: nn.Module, units: Mapping[str, Unit]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the derivatives of the loss by the factors of every group, and why groups have none.

    Args:
        model: In training mode, after `backward` of a mean loss, parameters not yet changed.
        units: What is scaled, by group.
    """
    named, found, skipped = dict(model.named_parameters()), dict[str, Tensor](), dict[str, str]()
    for name, unit in units.items():
        try:
            found[name] = unit.first(named)
        except NotApplicable as reason:
            skipped[name] = str(reason)
    return found, skipped


def curvature(model: nn.Module, units: Mapping[str, Unit], loss: Loss, probes: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Return the diagonal of the Hessian of the loss by the factors, (C,) or (C, K) for each group.

    With random signs v the mean of `v * (H v)` is the diagonal (Hutchinson's estimator). It is zero where the loss does not
    depend on a factor.

    Args:
        model: Its parameters are left as they are.
        units: What is scaled, by group.
        loss: Of a callable that stands for the model.
        probes: Number of random probes; 0 for the exact diagonal, one backward pass for each factor.
        rng: CPU generator of the probes.
    """
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    factors = {name: unit.factors(values) for name, unit in units.items()}
    for name, unit in units.items():
        unit.apply(values, factors[name])
    flat = [factor for group in factors.values() for factor in group]
    value = loss(partial(functional_call, model, values))
    slopes = torch.autograd.grad(value, flat, create_graph=True, materialize_grads=True)
    total = [torch.zeros_like(factor) for factor in flat]
    for probe in _random(flat, probes, rng) if probes else _units(flat):
        products = torch.autograd.grad(slopes, flat, probe, retain_graph=True, materialize_grads=True)
        total = [sum_ + v * product / max(1, probes) for sum_, v, product in zip(total, probe, products, strict=True)]
    parts = iter(total)
    found = {}
    for name, unit in units.items():
        mine = [next(parts) for _ in factors[name]]
        found[name] = unit.gathered(mine) if unit.each else mine[0].double()
    return found


def _random(like: Sequence[Tensor], n: int, rng: torch.Generator) -> Iterator[list[Tensor]]:
    for _ in range(n):
        yield [(2 * torch.randint(0, 2, t.shape, generator=rng) - 1).to(t) for t in like]


def _units(like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    for i, tensor in enumerate(like):
        for j in range(tensor.numel()):
            probe = [torch.zeros_like(t) for t in like]
            probe[i].view(-1)[j] = 1.0
            yield probe


def _rows(s: Scaled, tensor: Tensor) -> Tensor:
    """Return what each channel owns, (C, K)."""
    slots = torch.argsort(s.owner, stable=True)[int((s.owner < 0).sum()) :].to(tensor.device)
    return tensor.movedim(s.axis, 0)[slots].reshape(int(s.owner.max()) + 1, -1)
