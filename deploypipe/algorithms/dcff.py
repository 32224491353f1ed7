"""DCFF: train compact filters that are mixtures of all filters of a layer, from blurred to sharp.

Lin et al., Training Compact CNNs for Image Classification using Dynamic-coded Filter Fusion, TPAMI 2023, arXiv:2107.06916,
equations 3 to 8.

Deviations: widths are not given but follow from the budget by the allocator, with the importances of the filters at the start.
Fused are groups that one layer makes; those of several layers (residual trunks) stay whole, as in the paper. A depthwise layer
behind a fused one keeps the filters of the chosen channels, unfused. In the paper's schedule of T = 1/t filters are fused in
the first epoch only, whatever its k: distances are 2 to 3, so that mixtures are the filters themselves from T = 5 on, and T is
in the hundreds after one of twenty epochs at the least. Here it follows the filters (`even`): the share of a filter in its own
mixture rises from a half to one, evenly over the training. Divergences are computed in logarithms, so that the selection
reacts to the weights at every temperature; filters that stay chosen keep their place among the outputs. Training starts from
fresh weights, as in the paper; `start=trained` starts from the user's.

Since trunks stay whole, the budget has to be met by the inner layers of blocks alone: where trunks take much of the time,
methods that narrow these as well, or leave out blocks, keep more accuracy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem, allocated, judged, log_share, n_readers, rows
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import ranking
from deploypipe.compact import compact, kept_slots
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.expand import expanded
from deploypipe.ingredients.fusion import COLDEST, SCHEDULES, Fusing, fuse, importance, likeness, settle
from deploypipe.ingredients.statistics import readable, weights
from deploypipe.plan import KeepPlan
from deploypipe.training.fresh import fresh
from deploypipe.training.trainer import Trainer
from deploypipe.types import Group, Member

DEAD = 1e-2  # what one more dead channel takes off the value: it costs and gives nothing


@dataclass(frozen=True)
class Dcff:
    """Fuse the filters of every layer into fewer while they are trained."""

    name: ClassVar[str] = "dcff"
    train_epochs: int = option(20, "epochs in which filters are fused and trained", low=0)
    start: str = option("fresh", "weights that training starts from", choices=("fresh", "trained"))
    temperature: str = option("even", "how mixtures sharpen: evenly over the training, or as in the paper", choices=SCHEDULES)
    rise: float = option(10.0, "of the paper's schedule: k times the number of epochs", low=1e-3, high=500)

    @property
    def renumbered(self) -> bool:
        """Whether the trained channels are not those of the user's model."""
        return self.start == "fresh"

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Return a model of full size whose channels are the fused ones, all others dead.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        model, graph = problem.model, problem.graph
        if self.start == "fresh":
            model = fresh(model, problem.seed)
        if not self.train_epochs:
            return trainer.fit(model, 0)
        chosen = self._planned(problem, model)
        plan = chosen.replace(keep={n: kept for n, kept in chosen.keep.items() if len(kept) < graph.group(n).size})
        small, view, places = compact(model, graph, plan), weights(model), {}
        for name, kept in plan.keep.items():
            member = maker(problem, graph.group(name))
            inputs = torch.from_numpy(kept_slots(graph, plan, member.param, 1 - member.axis))
            layer = member.param.rpartition(".")[0]
            fuse(small.get_submodule(layer), view[member.param].index_select(1, inputs), view.get(f"{layer}.bias"), kept)
            places[layer] = kept
        hook = Fusing(places, self.train_epochs, self.temperature, self.rise)
        fused = trainer.fit(small, self.train_epochs, [hook], distill=0.0)
        for layer in places:
            settle(fused.get_submodule(layer))
        return expanded(fused, model, graph, plan)

    def plan(self, problem: Problem) -> KeepPlan:
        """Keep the fused channels: those that are not dead.

        Before training, or for a smaller budget, the most important filters stay, in widths that the allocator chooses.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        return self._planned(problem, problem.model)

    def _planned(self, problem: Problem, model: nn.Module) -> KeepPlan:
        view = weights(model)
        scores, skipped = judged(problem.graph, lambda group: unlike(problem, group, view))
        orders = {name: ranking(score) for name, score in scores.items()}
        values = {name: self._values(problem, name, scores[name][orders[name]]) for name in scores}
        return allocated(self, problem, orders, values, skipped)

    def _values(self, problem: Problem, name: str, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (C + 1,) values of widths, for scores from best to worst; dead channels have a score of -1."""
        alive = int((score >= 0).sum())
        value = log_share(score[:alive]) if alive else np.zeros(1)
        value = np.concatenate([value, -DEAD * np.arange(1, len(score) - alive + 1)])
        return n_readers(problem.graph.group(name)) * value


def maker(problem: Problem, group: Group) -> Member:
    """Return the member of the one weight that makes a group's channels.

    Raises:
        NotApplicable: Several do, or what does has no filters of its own.
    """
    made = [m for m in group.members if m.role == "produces" and len(problem.graph.shapes[m.param]) > 1]
    if len(made) != 1:
        raise NotApplicable(f"{len(made) or 'no'} weights make its channels: only filters of one layer can be fused")
    layer: Any = readable(problem.model, made[0].param)
    whole = np.array_equal(made[0].owner, np.arange(group.size))
    if made[0].axis != 0 or not whole or getattr(layer, "transposed", False):
        raise NotApplicable(f"the channels are no filters of {made[0].param}")
    return made[0]


def unlike(problem: Problem, group: Group, view: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return how unlike the others each filter is (C,), at the temperature of the start; -1 for dead ones, which are zero."""
    member = maker(problem, group)
    filters = rows(view[member.param], member)
    score, alive = torch.full((group.size,), -1.0, dtype=torch.float64), (filters != 0).any(dim=1)
    score[alive] = importance(likeness(filters[alive], COLDEST)).clamp_min(0).cpu()
    return score.numpy()
