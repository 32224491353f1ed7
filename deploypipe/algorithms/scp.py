"""SCP: channels that batch norm and ReLU will switch off, found by masks that are sampled and trained.

Kang and Han, Operation-Aware Soft Channel Pruning using Differentiable Masks, ICML 2020, arXiv:2007.03938, section 3.

Deviations: there is no public code, and the form of the penalty is our choice: `lambda` times the summed probability that a
channel stays, raised from 0 in the first 15 % of the steps. Its weight follows by default from the training: long enough to
move shifts by `reach`, and adding at most `most` to the loss at the start, since a short training that shall reach as far
would unlearn what the weights know. The temperature falls from 1 to 0.1 in the last third. The mask stands behind the batch
norm instead of behind the ReLU, which is the same, since it is not negative (behind a ReLU6 nearly: large values are cut off
later). What a norm puts out is taken to be normally distributed, without a test of it; a channel whose probability is below
1e-7, or as near to 1, is decided and has no gradient any more. Coupled channels share one mask, from the sum of the
independent normal terms that they are made of (behind a depthwise layer: of its own norm). Groups whose readers see negative
values have no ReLU and stay whole; so do residual sums to which a shortcut without a batch norm adds, since no mask could be
folded into it. Training goes on from the user's model. What is left of the masks is folded into the batch norms. How many
channels of a group stay is left to the exact allocator, by the share of its probabilities: one threshold on them
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
from deploypipe.ingredients.statistics import evaluating, first, layer_of
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph, Group

RAMP, ANNEALED_FROM = 0.15, 2 / 3  # shares of the training
WARM, COLD = 1.0, 0.1  # temperatures
SURE = 1e-6  # random numbers stay this far from 0 and 1
DECIDED = 1e-7  # and probabilities this far: nearer, single precision knows no difference
# Smaller scales count as this: gradients divide by its square. Folding makes scales small, and must not raise probabilities.
FLAT = 1e-12


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
        norms, last = norms_of(model, group), last_norms(model, graph, group)
        met = readings(model, graph, group)
        if not met or any(bool((x < 0).any()) for x in met):
            raise NotApplicable("its batch norm is not followed by a ReLU")
        if heard(model, graph, group, norms):
            raise NotApplicable("its readers see more than what passes a batch norm")
        if not heard(model, graph, group, last):
            return cls(norms, last)
        # Something passes the depthwise layer by, as around it in a residual block.
        names = {norm.name for norm in last}
        alone = {norm.name: [other for other in norms if other is not norm] for norm in norms}
        return cls(norms, [norm for norm in norms if norm.name in names or heard(model, graph, group, alone[norm.name])])

    def keep_probability(self, model: nn.Module) -> Tensor:
        """Return the (C,) probabilities q that the ReLU passes anything: of a normal variable, `1 - Phi(-beta / |gamma|)`."""
        modules = [(norm, norm.module(model)) for norm in self.seen]
        beta = torch.stack([norm.per_channel(module.bias) for norm, module in modules]).sum(0)
        square = torch.stack([norm.per_channel(module.weight.square()) for norm, module in modules]).sum(0)
        return keep_probability(beta, square.clamp_min(FLAT**2).sqrt())


class SoftMasks(TrainHook):
    """Multiplies batch norms by sampled masks while training, penalises what stays, and folds what is left at the end."""

    def __init__(self, masks: Mapping[str, Mask], weight: float, n_steps: int) -> None:
        self._masks, self._weight, self._n_steps = masks, weight, n_steps
        self._step, self._handles = 0, list[RemovableHandle]()
        self._sampled = {name: dict[str, Tensor]() for name in masks}  # a norm behind a concat has slots of several groups
        self.key = f"masks {weight!r} {','.join(masks)}"

    def on_train_begin(self, model: nn.Module) -> None:
        """Put the masks in: new samples before every pass."""
        self._handles = [model.register_forward_pre_hook(lambda m, args: self._sample(m))]
        for name, mask in self._masks.items():
            self._handles += gate_forward(model, mask.norms, self._sampled[name])

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
        stays = {name: mask.keep_probability(model).detach() for name, mask in self._masks.items()}
        for name, mask in self._masks.items():
            fold_gates(model, mask.norms, {norm.name: stays[name] for norm in mask.norms})

    def state(self) -> Mapping[str, Tensor]:
        """Return the number of steps."""
        return {"step": torch.tensor(self._step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on at the step."""
        self._step = int(state["step"])

    def _sample(self, model: nn.Module) -> None:
        for name, mask in self._masks.items():
            q = mask.keep_probability(model)
            sampled = soft_mask(q, temperature(self._step / max(1, self._n_steps))) if model.training else q
            self._sampled[name].update({norm.name: sampled for norm in mask.norms})


def keep_probability(beta: Tensor, gamma: Tensor) -> Tensor:
    """Return `Phi(beta / |gamma|)`, the probability that a normal variable N(beta, gamma^2) is positive."""
    return (0.5 * (1 + torch.erf(beta / (sqrt(2) * gamma.abs().clamp_min(FLAT))))).clamp(DECIDED, 1 - DECIDED)


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


def heard(model: nn.Module, graph: Graph, group: Group, off: Sequence[Norm]) -> bool:
    """Say whether the layers that read the channels see anything but zeros when these batch norms give zeros."""
    handles = gate_forward(model, off, {norm.name: torch.zeros(group.size) for norm in off})
    try:
        return any(bool(x.any()) for x in readings(model, graph, group))
    finally:
        for handle in handles:
            handle.remove()


def readings(model: nn.Module, graph: Graph, group: Group) -> list[Tensor]:
    """Return what the layers that read the channels meet of them, on random inputs.

    Raises:
        NotApplicable: One of them is no convolution and no linear layer, so that no hook sees what it reads.
    """
    owners = {m.param: torch.from_numpy(m.owner >= 0) for m in group.members if m.role == "consumes"}
    met: list[Tensor] = []

    def look(module: nn.Module, owned: Tensor, x: Tensor) -> None:
        met.append(x.movedim(-1 if isinstance(module, nn.Linear) else 1, 0)[owned])

    modules = [(layer_of(model, weight), owned) for weight, owned in owners.items()]
    handles = [
        m.register_forward_pre_hook(lambda m, args, kwargs, owned=owned: look(m, owned, first(args, kwargs)), with_kwargs=True)
        for m, owned in modules
    ]
    rng = torch.Generator().manual_seed(0)
    try:
        with evaluating(model), torch.no_grad():
            example, *rest = graph.example
            model(torch.randn(example.shape, generator=rng).to(example), *rest)
    finally:
        for handle in handles:
            handle.remove()
    return met
