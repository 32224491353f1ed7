"""ADMM: weights are pulled towards their own projection onto a sparse set while the loss keeps training them.

Zhang et al., A Systematic DNN Weight Pruning Framework using Alternating Direction Method of Multipliers, ECCV 2018,
arXiv:1804.03294, equations 5 to 9, with the scaled dual variable U:

    W <- argmin f(W) + rho/2 |W - Z + U|^2     by gradient steps
    Z <- P(W + U)
    U <- U + W - Z
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploypipe.ingredients.projections import Mask
from deploypipe.ingredients.stacks import Stack
from deploypipe.training.settings import TrainHook


@dataclass(frozen=True, eq=False)
class Constraint:
    """A sparse set that a part of the model is to end in.

    Attributes:
        stack: Which part.
        keep: The projection P(V) is `V * keep(V)`.
    """

    stack: Stack
    keep: Mask

    def project(self, values: Tensor) -> Tensor:
        """Return the nearest point of the set, in storage of its own."""
        return values * self.keep(values)


class Admm:
    """The variables Z and U of every constraint.

    Attributes:
        gaps: |W - Z| / |W| over all constraints, after each update.

    Args:
        constraints: Where the weights are to end.
        named: Parameters by name, at the start: Z is their projection, U is zero.
        rho: Strength of the pull; of the order of the loss's curvature.
        growth: Factor on rho after every update. U shrinks by it, as the unscaled dual rho U stays.
    """

    def __init__(self, constraints: Sequence[Constraint], named: Mapping[str, Tensor], rho: float, growth: float = 1.0) -> None:
        self._constraints, self._rho, self._growth = tuple(constraints), rho, growth
        start = [constraint.stack.read(named) for constraint in self._constraints]
        self._z = [constraint.project(w) for constraint, w in zip(self._constraints, start, strict=True)]
        self._u = [torch.zeros_like(w) for w in start]
        self.gaps: list[float] = []

    def pull(self, named: Mapping[str, Tensor]) -> list[tuple[Stack, Tensor]]:
        """Return the gradient `rho (W - Z + U)` of every constraint's part."""
        found = []
        for i, constraint in enumerate(self._constraints):
            w = constraint.stack.read(named)
            self._z[i], self._u[i] = self._z[i].to(w), self._u[i].to(w)  # where the model is trained now
            found.append((constraint.stack, self._rho * (w - self._z[i] + self._u[i])))
        return found

    def update(self, named: Mapping[str, Tensor]) -> float:
        """Renew Z and U, and return the gap."""
        distance = size = 0.0
        for i, constraint in enumerate(self._constraints):
            w = constraint.stack.read(named)
            u = self._u[i].to(w)
            self._z[i] = constraint.project(w + u)
            self._u[i] = (u + w - self._z[i]) / self._growth
            distance += float((w - self._z[i]).square().sum())
            size += float(w.square().sum())
        self._rho *= self._growth
        self.gaps.append((distance / max(size, 1e-30)) ** 0.5)
        return self.gaps[-1]

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes."""
        scalars = torch.tensor([self._rho, *self.gaps], dtype=torch.float64)
        pairs = [(f"z.{i}", z) for i, z in enumerate(self._z)] + [(f"u.{i}", u) for i, u in enumerate(self._u)]
        return {"scalars": scalars, **dict(pairs)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
        self._rho, *self.gaps = state["scalars"].tolist()
        self._z = [state[f"z.{i}"].to(z) for i, z in enumerate(self._z)]
        self._u = [state[f"u.{i}"].to(u) for i, u in enumerate(self._u)]


class AdmmHook(TrainHook):
    """Adds the pull to the gradients of every step, and renews Z and U after every `every` epochs.

    Args:
        constraints: Where the weights are to end.
        model: At the start; the hook is then given to the training of a copy of it.
        rho: Strength of the pull.
        growth: Factor on rho after every update.
        every: Epochs between two updates.
    """

    def __init__(
        self, constraints: Sequence[Constraint], model: nn.Module, rho: float, growth: float = 1.0, every: int = 1
    ) -> None:
        self.admm = Admm(constraints, dict(model.named_parameters()), rho, growth)
        self.key = repr((rho, growth, every, [(c.stack.name, c.keep) for c in constraints]))
        self._params = {member.param for constraint in constraints for member in constraint.stack.members}
        self._every = every

    @torch.no_grad()
    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Add the pull to the gradients."""
        named = dict(model.named_parameters())
        gradients = {name: _gradient(named[name]) for name in self._params}
        for stack, pull in self.admm.pull(named):
            stack.add(gradients, pull)

    @torch.no_grad()
    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Renew Z and U."""
        if (epoch + 1) % self._every == 0:
            self.admm.update(dict(model.named_parameters()))

    def state(self) -> Mapping[str, Tensor]:
        """Return Z, U, rho and the gaps so far."""
        return self.admm.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self.admm.restore(state)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
