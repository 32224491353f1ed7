"""Lottery tickets: train, remove the smallest weights, go back to the weights of the start, and train again.

Frankle and Carbin, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, ICLR 2019, arXiv:1803.03635; late
rewinding: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671.

Deviations: the budget decides how much stays, and every round removes the same share of what is left on the way there (of the
cost that the budget counts; with --metric params of the weights, as in the paper). The training of the last ticket is the
fine-tuning of the run, which the dense model teaches unless `--no-distill` says otherwise. Every training starts its learning
rate and optimizer anew, also one that starts from rewound weights. `start=given` takes the loaded weights for those of the
start; a survivor that is zero there is set to the smallest number there is, because zero means pruned from then on. One weight
of every layer survives in any case. Biases and norms are never pruned, and the output layer is pruned like any other (the
paper: at half the rate). The three controls keep the masks of the last round: `reinit` draws new weights, `random-mask` puts
as many survivors of each layer elsewhere, `finetune` does not go back.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.masking import masked_plan
from deploypipe.algorithms.options import option
from deploypipe.errors import UsageError
from deploypipe.ingredients.density import largest, prices, require_within
from deploypipe.ingredients.statistics import generator
from deploypipe.plan import KeepPlan
from deploypipe.training.fresh import fresh
from deploypipe.training.masked import MaskedWeights, told_from_pruned
from deploypipe.training.rewind import Rewind
from deploypipe.training.trainer import Trainer

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lth:
    """Find a ticket in rounds of training, pruning and rewinding."""

    name: ClassVar[str] = "lth"
    sparse: ClassVar[bool] = True
    rounds: int = option(5, "rounds of training and pruning", low=1)
    train_epochs: int = option(5, "epochs of each round", low=1)
    rewind: int = option(0, "optimizer steps after which the weights are those to go back to; 0 for the very start", low=0)
    start: str = option("fresh", "weights of the start: drawn anew, or those that were loaded", choices=("fresh", "given"))
    scope: str = option("global", "one threshold for all weights, or one for each layer", choices=("global", "layer"))
    control: str = option("ticket", "what the masks of the last round are put on",
                          choices=("ticket", "reinit", "random-mask", "finetune"))  # fmt: skip

    @property
    def renumbered(self) -> bool:
        """Whether the trained channels are not those of the user's model."""
        return self.start == "fresh" or self.control == "reinit"

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Return the ticket: the weights to go back to where the masks of the last round let them live, zero elsewhere.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: A round has fewer steps than `rewind`.
        """
        if self.rewind > trainer.n_steps(self.train_epochs):
            message = f"a round has only {trainer.n_steps(self.train_epochs)} steps"
            raise UsageError(message, at=f"--set rewind={self.rewind}", fix="lower it, or raise train_epochs")
        price = prices(problem.model, problem.graph, problem.table.unit)
        require_within(price.cost(dict.fromkeys(price.sizes, 1)), problem.budget, price)  # else fail now
        origin = end = fresh(problem.model, problem.seed) if self.start == "fresh" else problem.model
        masks: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights_of(problem, origin).items()}
        for number in range(1, self.rounds + 1):
            rewind = Rewind(self.rewind if number == 1 else 0)
            end = trainer.fit(masked(origin, masks), self.train_epochs, [MaskedWeights(masks), rewind], distill=0.0)
            origin = rewind.rewound(origin)  # the first round has passed the point to go back to
            masks = self._pruned(problem, end, masks, number)
        return self._chosen(problem, origin, end, masks)

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep every channel.

        Raises:
            BudgetError: The model costs more than the budget.
        """
        return masked_plan(self, problem)

    def _pruned(self, problem: Problem, end: nn.Module, masks: Masks, number: int) -> dict[str, Tensor]:
        """Return the masks after so many rounds: those of survivors with the largest magnitudes at the end of training."""
        price, named = prices(end, problem.graph, problem.table.unit), weights_of(problem, end)
        share = (problem.budget - price.rest) / (price.dense - price.rest)
        share = max(share, 0.0) ** (number / self.rounds)
        budget = problem.budget if number == self.rounds else price.rest + share * (price.dense - price.rest)
        if self.scope == "layer":
            named = {name: ranks(weight, masks[name]) for name, weight in named.items()}
        return largest(named, price, budget, masks)

    def _chosen(self, problem: Problem, origin: nn.Module, end: nn.Module, masks: Masks) -> nn.Module:
        """Return the ticket, or one of its controls."""
        if self.control == "reinit":
            return ticket(fresh(problem.model, problem.seed + 1), masks)
        if self.control == "random-mask":
            return ticket(origin, {name: shuffled(mask, name, problem.seed) for name, mask in masks.items()})
        return ticket(end if self.control == "finetune" else origin, masks)


def weights_of(problem: Problem, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of all layers, detached: what may be pruned."""
    named = dict(model.named_parameters())
    return {layer.weight: named[layer.weight].detach() for layer in problem.graph.layers if layer.weight in named}


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy with zeros where the masks are False."""
    model = copy.deepcopy(model)
    MaskedWeights(masks).apply(model)
    return model


@torch.no_grad()
def ticket(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy with zeros where the masks are False, and nowhere else in these weights."""
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        weight.copy_(told_from_pruned(weight, mask.to(weight.device)))
    return model


def shuffled(mask: Tensor, name: str, seed: int) -> Tensor:
    """Return a mask with as many survivors, anywhere."""
    order = torch.randperm(mask.numel(), generator=generator(seed, "random mask", name))
    return mask.flatten()[order].view_as(mask)


def ranks(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the rank of every survivor's magnitude in its layer, from 0 to 1, so that layers can be compared."""
    found = torch.zeros(weight.numel(), dtype=torch.float64)
    alive = torch.nonzero(mask.flatten().cpu()).flatten()
    order = alive[torch.argsort(weight.flatten().cpu()[alive].abs(), stable=True)]
    found[order] = torch.arange(1, len(order) + 1, dtype=torch.float64) / len(order)
    return found.view_as(weight)
