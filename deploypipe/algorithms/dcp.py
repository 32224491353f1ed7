"""DCP: select, channel by channel, what keeps a layer's outputs and tells the classes apart.

Zhuang et al., Discrimination-aware Channel Pruning for Deep Neural Networks, NeurIPS 2018, arXiv:1810.11809, algorithms 1 and
2: auxiliary classifiers on inner layers, then greedy selection of input channels by the gradient of
`L = L_M + lambda L_S`, the error of the layer's output and the loss of the next classifier.

Deviations: how many channels each group keeps is not a fixed rate or a stopping rule but decided for all groups at once by the
allocator, which is handed the joint loss at every width as a share of the loss with none (made to fall with the width
throughout); therefore every group is judged on the trained model with all others whole, and not one after the other. The
classifiers are trained with the model stage by stage, in one step with the final loss where the paper takes two, and fitted
anew on the fixed model before the selection. Several layers that read a group are judged together: errors are summed, the
gradient's norm is taken over all of them. Residual trunks are pruned, too. An eighth of the channels joins at a time, and Adam
adapts what is in over some hundred images (the paper: SGD over all of them for every single channel). The weights that were
adapted during selection only serve to judge; after compaction the layers rescale their inputs by least squares on the dense
model's outputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from deploypipe.algorithms.base import Problem, allocated, labelled, least_cost
from deploypipe.algorithms.options import option
from deploypipe.algorithms.reconstruction import readers, reconstructed
from deploypipe.algorithms.stages import Stages, staged
from deploypipe.ingredients.selection import select
from deploypipe.ingredients.stacks import Stack
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.training.trainer import Trainer


@dataclass(frozen=True)
class Dcp:
    """Order the channels of every group by greedy selection on the joint loss, and allocate by that loss."""

    name: ClassVar[str] = "dcp"
    train_epochs: int = option(6, "epochs with auxiliary classifiers before selecting, over all stages", low=0)
    heads: int = option(2, "auxiliary classifiers", low=0)
    lambda_: float = option(1.0, "weight of the classifier's loss against the error of the outputs", low=0)
    images: int = option(256, "training images that the selection looks at", low=2)
    parts: int = option(8, "passes over them in which all channels of a group join", low=1)
    lr: float = option(0.003, "learning rate with which selected channels adapt", low=0)

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train the model with a classifier on one inner layer after the other."""
        return staged(problem, trainer, self.heads, self.train_epochs)

    def plan(self, problem: Problem) -> KeepPlan:
        """Select the channels of every group.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data.
        """
        labelled(problem.data)
        reading, skipped = readers(problem)
        least_cost(problem, reading)  # fails now if the budget is out of reach
        stages = Stages(problem, self.heads, self.images, self.lambda_)
        orders, values = {}, {}
        with counted(problem.reporter, "dcp", len(reading)) as reporter:
            for done, (name, members) in enumerate(reading.items(), 1):
                size = problem.graph.group(name).size
                loss = stages.loss(problem.model, [member.param for member in members])
                per_pass = max(1, -(-size // self.parts))
                stack = Stack(name, tuple(members))
                found = select(problem.model, stack, size, size, loss, per_pass=per_pass, lr=self.lr)
                curve = found.curve(size)
                orders[name], values[name] = found.order, -curve / max(curve[0], np.finfo(float).tiny)
                reporter.advance(done, name)
        return allocated(self, problem, orders, values, skipped)

    def repair(self, small: nn.Module, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Return a copy of the compacted model whose pruned layers rescale their inputs by least squares."""
        return reconstructed(small, problem, plan, (self.images, 40), 1e-6)
