"""Network Slimming: an L1 penalty on the scales of batch norms while training; channels with the smallest go.

Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017, arXiv:1708.06519, equation 1 and
section 3; the step is the sub-gradient that the authors' own code takes.

Deviations: training goes on from the user's model, with the scales that it has, instead of from fresh weights with scales of
0.5. The penalty's weight follows by default from the length of the training: `reach` is how far it alone can move a scale,
`lambda * sum of learning rates / (1 - momentum)`, which the paper's settings put between 0.7 and 6.6. In a short training such
a penalty outweighs the loss at first (the paper's add 0.06 to 0.3 to it), and the scales of all channels shrink together; a
lighter one, by `lambda`, unlearns less, but leaves the scales as they were, and these say little. How many channels of a group
stay is left to the exact allocator, by the share of its scales. The paper's one threshold on all scales (`widths=threshold`)
compares layers with scales at levels of their own, and needs a training that is long enough to bring those of all superfluous
channels down to zero. It leaves every group its narrowest legal width, so that no layer collapses; there is no other limit on
what a group may lose. A channel that goes takes its shift along: what it emitted without any input is not folded into the
layers behind it, and statistics of batch norms are renewed instead. Coupled channels go together, by the sum of their scales;
no layer that picks channels is put in front of a block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from deploypipe.algorithms.base import SHARED_OUT, Problem, judged, shared_out
from deploypipe.algorithms.options import option
from deploypipe.ingredients.gates import Norm, norms_of
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Group


@dataclass(frozen=True)
class Slimming:
    """Train with a penalty on |gamma|, then keep the channels with the largest."""

    name: ClassVar[str] = "slimming"
    train_epochs: int = option(5, "epochs of training with the penalty, before channels are chosen", low=0)
    lambda_: float = option(0.0, "weight of the penalty; 0 lets reach decide", low=0)
    reach: float = option(1.0, "how far the penalty alone can move a scale during the training", low=0)
    widths: str = option("shares", "what decides widths: the exact allocator, one threshold, or equal shares",
                         choices=SHARED_OUT)  # fmt: skip

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train with the penalty on the scales of all channels that may go."""
        norms, _ = judged(problem.graph, lambda group: norms_of(problem.model, group))
        travel = trainer.settings.travel(trainer.n_steps(self.train_epochs))
        weight = self.lambda_ or (self.reach / travel if travel else 0.0)
        return trainer.fit(problem.model, self.train_epochs, [ScalePenalty([*chain(*norms.values())], weight)])

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep the channels with the largest scales.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        scores, skipped = judged(problem.graph, lambda group: scale_sums(problem.model, group).cpu().numpy())
        return shared_out(self, problem, scores, skipped, self.widths)


class ScalePenalty(TrainHook):
    """Adds the sub-gradient of `weight * sum |gamma|`; zero stays where it is."""

    def __init__(self, norms: Sequence[Norm], weight: float) -> None:
        self._owners: Mapping[str, Tensor] = _slots(norms)
        self._weight = weight
        self.key = f"lambda={weight!r} on {','.join(self._owners)}"

    @torch.no_grad()
    def on_batch_backward(self, model: nn.Module, step: int) -> None:
        """Add `weight * sign(gamma)` to the gradient of each scale."""
        for name, chosen in self._owners.items():
            gamma = model.get_parameter(f"{name}.weight")
            if gamma.grad is not None:
                gamma.grad += self._weight * torch.sign(gamma) * chosen.to(gamma)


def scale_sums(model: nn.Module, group: Group) -> Tensor:
    """Return the (C,) sums of |gamma| over the batch norms that a channel passes.

    Raises:
        NotApplicable: There is none.
    """
    norms = norms_of(model, group)
    return torch.stack([norm.per_channel(norm.module(model).weight.detach().double().abs()) for norm in norms]).sum(0)


def _slots(norms: Sequence[Norm]) -> dict[str, Tensor]:
    """Return which slots of each norm may go: a norm behind a concat belongs to several groups."""
    found: dict[str, Tensor] = {}
    for norm in norms:
        found[norm.name] = found.get(norm.name, torch.zeros_like(norm.owner, dtype=torch.bool)) | (norm.owner >= 0)
    return found
