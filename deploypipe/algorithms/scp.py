"""SCP: channels that batch norm and ReLU will switch off, found by masks that are sampled and trained.

Kang and Han, Operation-Aware Soft Channel Pruning using Differentiable Masks, ICML 2020, arXiv:2007.03938, section 3.

Deviations: there is no public code, and the form of the penalty is our choice: `lambda` times the summed probability that a
channel stays, raised from 0 in the first 15 % of the steps. Its weight follows by default from the training: long enough to
move shifts by `reach`, and adding at most `most` to the loss at the start, since a short training that shall reach as far
would unlearn what the weights know. The temperature falls from 1 to 0.1 in the last third. The mask stands behind the batch
norm instead of behind the ReLU, which is the same, since it is not negative. Coupled channels share one mask, from the sum of
the independent normal terms that they are made of (behind a depthwise layer: of its own norm). Groups whose readers see
negative values have no ReLU and stay whole; so do residual sums to which a shortcut without a batch norm adds, since no mask
could be folded into it. Training goes on from the user's model. What is left of the masks is folded into the batch norms. How
many channels of a group stay is left to the exact allocator, by the share of its probabilities: one threshold on them
(`widths=threshold`) compares layers whose channels pass a ReLU more or less often in any trained network, deep ones rarely,
and needs a training that is long enough to decide them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deploypipe.algorithms.base import SHARED_OUT, Problem, judged, shared_out
from deploypipe.algorithms.options import option
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.gates import Norm, fold_gates, gate_forward, last_norms, norms_of, penalty_weight
from deploypipe.ingredients.statistics import evaluating
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph, Group

RAMP, ANNEALED_FROM = 0.15, 2 / 3  # shares of the training
WARM, COLD = 1.0, 0.1  # temperatures
SURE = 1e-6  # probabilities stay this far from 0 and 1


@dataclass(frozen=True)
class Scp:
    """Train with sampled soft masks and a penalty on what stays, fold the masks, keep the most probable channels."""

    name: ClassVar[str] = "scp"
    train_epochs: int = option(5, "epochs of training with sampled masks, before channels are chosen", low=0)
    lambda_: float = option(0.0, "weight of the penalty on the number of channels that stay; 0 lets reach decide", low=0)
    reach: float = option(3.0, "how far a gradient of 1 times the penalty's weight moves a shift during the training", low=0)
    most: float = option(0.3, "most that the penalty adds to the loss at the start, whatever reach says; 0 for no limit", low=0)
    widths: str = option("shares", "what decides widths: the exact allocator, one threshold, or equal shares",
                         choices=SHARED_OUT)  # fmt: skip

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train all masks, then fold their expectation into the batch norms."""
        masks, _ = judged(problem.graph, lambda group: Mask.of(problem.model, problem.graph, group))
        n_steps = trainer.n_steps(self.train_epochs)
        total = sum(float(mask.keep_probability(problem.model).detach().sum()) for mask in masks.values())
        weight = self.lambda_ or penalty_weight(self.reach, trainer.settings.travel(n_steps), total, self.most)
        hook = SoftMasks(masks, weight, n_steps)
        return trainer.fit(problem.model, self.train_epochs, [hook])

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep the channels that are switched on most probably.

        Raises:
            BudgetError: The budget cannot be reached.
        """

        def stays(group: Group) -> Any:
            mask = Mask.of(problem.model, problem.graph, group)
            return mask.keep_probability(problem.model).detach().double().cpu().numpy()

        scores, skipped = judged(problem.graph, stays)
        return shared_out(self, problem, scores, skipped, self.widths)


@dataclass(frozen=True, eq=False)
class Mask:
    """The one mask of a group's channels.

    Attributes:
        norms: All batch norms that the channels pass: where it acts.
        seen: Those whose outputs add up to what the readers see: what it is made from.
    """

    norms: Sequence[Norm]
    seen: Sequence[Norm]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, group: Group) -> "Mask":
        """Return the mask of a group.

        Raises:
            NotApplicable: Something else than a batch norm and a ReLU decides what the readers see.
        """
        norms, seen = norms_of(model, group), last_norms(model, graph, group)
        met = readings(model, graph, group)
        if not met or any(bool((x < 0).any()) for x in met):
            raise NotApplicable("its batch norm is not followed by a ReLU")
        off = gate_forward(model, norms, {norm.name: torch.zeros(group.size) for norm in norms})
        try:
            silent = not any(bool(x.any()) for x in readings(model, graph, group))
        finally:
            for handle in off:
                handle.remove()
        if not silent:
            raise NotApplicable("its readers see more than what passes a batch norm")
        return cls(norms, seen)

    def keep_probability(self, model: nn.Module) -> Tensor:
        """Return the (C,) probabilities q that the ReLU passes anything: of a normal variable, `1 - Phi(-beta / |gamma|)`."""
        modules = [(norm, norm.module(model)) for norm in self.seen]
        beta = torch.stack([norm.per_channel(module.bias) for norm, module in modules]).sum(0)
        square = torch.stack([norm.per_channel(module.weight.square()) for norm, module in modules]).sum(0)
        return keep_probability(beta, square.clamp_min(torch.finfo(square.dtype).tiny).sqrt())


class SoftMasks(TrainHook):
    """Multiplies batch norms by sampled masks while training, penalises what stays, and folds what is left at the end."""

    def __init__(self, masks: Mapping[str, Mask], weight: float, n_steps: int) -> None:
        self._masks, self._weight, self._n_steps = masks, weight, n_steps
        self._step, self._sampled, self._handles = 0, dict[str, Tensor](), list[RemovableHandle]()
        self.key = f"masks {weight!r} {','.join(masks)}"

    def on_train_begin(self, model: nn.Module) -> None:
        """Put the masks in: new samples before every pass."""
        self._handles = [model.register_forward_pre_hook(lambda m, args: self._sample(m))]
        for mask in self._masks.values():
            self._handles += gate_forward(model, mask.norms, self._sampled)

    def on_loss(self, model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
        """Add the penalty: the expected number of channels, of all groups."""
        ramp = min(1.0, self._step / max(1.0, RAMP * self._n_steps))
        stays = [mask.keep_probability(model).sum() for mask in self._masks.values()]
        return loss + self._weight * ramp * torch.stack(stays).sum() if stays else loss

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Count, for ramp and temperature."""
        self._step = step + 1

    def on_train_end(self, model: nn.Module) -> None:
        """Take the masks out and multiply the batch norms by their expectation."""
        for handle in self._handles:
            handle.remove()
        folded = {norm.name: mask.keep_probability(model).detach() for mask in self._masks.values() for norm in mask.norms}
        for mask in self._masks.values():
            fold_gates(model, mask.norms, folded)

    def state(self) -> Mapping[str, Tensor]:
        """Return the number of steps."""
        return {"step": torch.tensor(self._step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on at the step."""
        self._step = int(state["step"])

    def _sample(self, model: nn.Module) -> None:
        for mask in self._masks.values():
            q = mask.keep_probability(model)
            sampled = soft_mask(q, temperature(self._step / max(1, self._n_steps))) if model.training else q
            self._sampled.update({norm.name: sampled for norm in mask.norms})


def keep_probability(beta: Tensor, gamma: Tensor) -> Tensor:
    """Return `Phi(beta / |gamma|)`, the probability that a normal variable N(beta, gamma^2) is positive."""
    return (0.5 * (1 + torch.erf(beta / (sqrt(2) * gamma.abs().clamp_min(SURE))))).clamp(SURE, 1 - SURE)


def soft_mask(q: Tensor, tau: float, noise: Tensor | None = None) -> Tensor:
    """Return binary Gumbel-softmax samples, (C,), of keeping with probability q; `noise` (2, C) is uniform in (0, 1)."""
    uniform = torch.rand(2, *q.shape, device=q.device) if noise is None else noise
    gumbel = -torch.log(-torch.log(uniform.clamp(SURE, 1 - SURE)))
    return torch.sigmoid((torch.log(q) - torch.log1p(-q) + gumbel[1] - gumbel[0]) / tau)


def temperature(share: float) -> float:
    """Return the temperature after that share of the training.

    >>> temperature(0.5), round(temperature(1.0), 3)
    (1.0, 0.1)
    """
    late = max(0.0, (share - ANNEALED_FROM) / (1 - ANNEALED_FROM))
    return float(WARM * (COLD / WARM) ** min(1.0, late))


def readings(model: nn.Module, graph: Graph, group: Group) -> list[Tensor]:
    """Return what the layers that read the channels meet of them, on random inputs."""
    owners = {m.param.rpartition(".")[0]: torch.from_numpy(m.owner >= 0) for m in group.members if m.role == "consumes"}
    met: list[Tensor] = []

    def look(module: nn.Module, owned: Tensor, x: Tensor) -> None:
        met.append(x.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)[owned])

    modules = [(module, owners[name]) for name, module in model.named_modules() if name in owners]
    handles = [m.register_forward_pre_hook(lambda m, args, owned=owned: look(m, owned, args[0])) for m, owned in modules]
    rng = torch.Generator().manual_seed(0)
    try:
        with evaluating(model), torch.no_grad():
            first, *rest = graph.example
            model(torch.randn(first.shape, generator=rng).to(first), *rest)
    finally:
        for handle in handles:
            handle.remove()
    return met
