"""DKP: select, kernel by kernel, what keeps a layer's outputs and tells the classes apart.

Liu et al., Discrimination-aware Network Pruning for Deep Model Compression, TPAMI 2021, arXiv:2001.01050, section 5: the
greedy selection of discrimination-aware channel pruning (Zhuang et al., NeurIPS 2018) on single kernels W[j, c].

Deviations: every convolution keeps the same share of its kernels, the largest that the budget allows, instead of a rate that is
set by hand. Layers are gone through in forward order, each in the model in which those before are pruned already, as in the
paper; an eighth of the kernels joins at a time, and Adam adapts what is in over some hundred images. Linear, depthwise and
grouped layers stay whole. The classifiers are trained stage by stage, in one step with the final loss (the paper takes two),
and fitted anew before the selection. Filters whose channel no kernel reads any more are set to zero as well; to cut them out,
prune channels. Zeros of this kind save no time in a dense runtime.
"""

import copy
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from torch import nn

from deploypipe.algorithms.base import Problem, labelled
from deploypipe.algorithms.masking import masked_plan
from deploypipe.algorithms.options import option
from deploypipe.algorithms.stages import Stages, staged
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.density import prices, uniform
from deploypipe.ingredients.purify import silenced
from deploypipe.ingredients.selection import select
from deploypipe.ingredients.stacks import Stack
from deploypipe.ingredients.statistics import readable
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.training.trainer import Trainer


@dataclass(frozen=True)
class Dkp:
    """Select kernels layer by layer on the joint loss."""

    name: ClassVar[str] = "dkp"
    sparse: ClassVar[bool] = True
    train_epochs: int = option(6, "epochs with auxiliary classifiers before selecting, over all stages", low=0)
    heads: int = option(2, "auxiliary classifiers", low=0)
    lambda_: float = option(1.0, "weight of the classifier's loss against the error of the outputs", low=0)
    images: int = option(256, "training images that the selection looks at", low=2)
    parts: int = option(8, "passes over them in which the kernels of a layer join", low=1)
    lr: float = option(0.003, "learning rate with which selected kernels adapt", low=0)

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train with auxiliary classifiers, then select the kernels of every layer.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        labelled(problem.data)
        kept = self.kernels(problem)
        baseline = staged(problem, trainer, self.heads, self.train_epochs)
        stages = Stages(replace(problem, model=baseline), self.heads, self.images, self.lambda_)
        model = copy.deepcopy(baseline)
        with counted(problem.reporter, "dkp", len(kept)) as reporter:
            for done, (weight, n) in enumerate(kept.items(), 1):
                shape = problem.graph.shapes[weight]
                loss = stages.loss(baseline, [weight])
                stack, n_kernels = Stack.of_weight(weight, shape), shape[0] * shape[1]
                per_pass = max(1, -(-n // self.parts))
                model = select(model, stack, n_kernels, n, loss, per_pass=per_pass, lr=self.lr).model
                reporter.advance(done, weight)
        for name, parameter in problem.model.named_parameters():  # the selection froze all but its own
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        return silenced(model, problem.graph)

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep every channel.

        Raises:
            BudgetError: The model costs more than the budget.
        """
        return masked_plan(self, problem)

    def kernels(self, problem: Problem) -> dict[str, int]:
        """Return how many kernels of every convolution stay, in forward order.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        price = prices(problem.model, problem.graph, problem.table.unit)
        counts = {}
        for weight in price.sizes:
            try:
                layer = readable(problem.model, weight)
            except NotApplicable as reason:
                problem.reporter.note(f"{weight} stays whole: {reason}")
                continue
            if not isinstance(layer, nn.Linear):
                counts[weight] = prod(problem.graph.shapes[weight][:2])
        return uniform(price, problem.budget, counts)
