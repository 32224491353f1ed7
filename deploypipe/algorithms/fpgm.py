"""FPGM: drop the filters that the others can replace, those closest to their geometric median.

He et al., Filter Pruning via Geometric Median for Deep Neural Networks Acceleration, CVPR 2019, arXiv:1811.00250, equations 4
to 9 and algorithm 1.

Deviations: the paper gives every layer one rate; here it is the largest share of channels, the same for all groups, that fits
the budget, and what that leaves of it is filled group by group; or widths come from the allocator. With one threshold over all
groups, distances are divided by their group's mean, since sums of distances grow with the number of filters and of their
weights. In coupled groups the distances of all layers that make the channels are added.
Filters that are zero are not compared with others: they go first. Training goes on from the user's model at the run's learning
rate; the paper starts fresh, or with a tenth of the rate from a trained model. Zeroed filters are set to zero with their bias;
batch norms are left alone while training, so that filters may grow again, and are cut with the channel at the end. While
training equal shares are zeroed, whatever `widths` says. Data and training are needed only with `train_epochs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.algorithms.base import SHARED_OUT, Problem, judged, relative, shared_out
from deploypipe.algorithms.options import option
from deploypipe.algorithms.scores import filters_of, summed_distances
from deploypipe.allocation.allocate import ranking
from deploypipe.allocation.threshold import uniform_widths, worth_keeping
from deploypipe.ingredients.statistics import trained_weights
from deploypipe.plan import KeepPlan
from deploypipe.training.settings import TrainHook
from deploypipe.training.trainer import Trainer
from deploypipe.types import Graph

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Fpgm:
    """Drop the filters with the smallest summed distance to all others; softly after every epoch, if it trains."""

    name: ClassVar[str] = "fpgm"
    train_epochs: int = option(0, "epochs of training, filters zeroed softly after each; 0 prunes at once", low=0)
    norm_share: float = option(0.0, "share of what goes that goes by the smallest norm first (mix)", low=0, high=1)
    widths: str = option("uniform", "what decides widths: equal shares, one threshold, or the exact allocator",
                         choices=SHARED_OUT)  # fmt: skip

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train, and after every epoch set the most replaceable filters to zero; they may grow again in the next.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        found, _ = self._scores(problem)
        kept, _ = uniform_widths(problem.graph, found, problem.table, problem.budget, worth_keeping(found))
        hook = SoftZero(problem.graph, {name: kept[name] for name in found}, self.norm_share)
        return trainer.fit(problem.model, self.train_epochs, [hook])

    def plan(self, problem: Problem) -> KeepPlan:
        """Drop the most replaceable filters.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        scores, skipped = self._scores(problem)
        return shared_out(self, problem, scores, skipped, self.widths)

    def _scores(self, problem: Problem) -> tuple[dict[str, Scores], dict[str, str]]:
        view = trained_weights(problem.model)
        filters, skipped = judged(problem.graph, lambda group: filters_of(group, view))
        kept, _ = uniform_widths(problem.graph, filters, problem.table, problem.budget)
        return {name: relative(scores_of(found, kept[name], self.norm_share)) for name, found in filters.items()}, skipped


class SoftZero(TrainHook):
    """After every epoch sets the filters that are most replaceable then to zero."""

    def __init__(self, graph: Graph, kept: Mapping[str, int], norm_share: float) -> None:
        self._graph, self._kept, self._norm_share = graph, kept, norm_share
        self.key = f"soft {dict(kept)} {norm_share!r}"

    @torch.no_grad()
    def on_epoch_end(self, model: nn.Module, epoch: int) -> None:
        """Set them to zero: weights and biases of all layers that make the channels."""
        view = trained_weights(model)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}  # frozen ones could not grow again
        for name, n_keep in self._kept.items():
            group = self._graph.group(name)
            dropped = ranking(scores_of(filters_of(group, view), n_keep, self._norm_share))[n_keep:]
            for member in group.members:
                if member.role == "produces" and member.param in named:
                    slots = np.flatnonzero(np.isin(member.owner, dropped))
                    named[member.param].index_fill_(member.axis, torch.from_numpy(slots).to(view[member.param].device), 0.0)


def scores_of(filters: Sequence[Tensor], n_keep: int, norm_share: float = 0.0) -> Scores:
    """Return (C,) scores, higher = keep: the summed distance to the other filters.

    Args:
        filters: (C, K) filters of each layer that makes the channels.
        n_keep: How many channels will stay.
        norm_share: This share of those that go has the smallest norms, and is not compared with; the rest is by distance.
    """
    norms = torch.stack([layer.norm(dim=1) for layer in filters]).sum(0)
    by_norm = torch.argsort(norms, stable=True)
    n_cut = max(round(norm_share * (len(norms) - n_keep)), int((norms == 0).sum()))
    n_cut = min(n_cut, len(norms) - 1)
    cut, left = by_norm[:n_cut], by_norm[n_cut:].sort().values
    scores, distances = torch.zeros_like(norms), torch.stack([summed_distances(layer[left]) for layer in filters]).sum(0)
    scores[left] = distances if distances.any() else norms[left]  # of equal ones, or of a single one, distances say nothing
    # Those cut by norm come below, in the order of their norms.
    scores[cut] = scores[left].min() * norms[cut] / norms[left].max().clamp_min(torch.finfo(norms.dtype).tiny) / 2
    found: Scores = scores.cpu().numpy()
    return found
