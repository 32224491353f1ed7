"""Random search over widths: the most accurate of many random networks of the wanted cost.

Li et al., Revisiting Random Channel Pruning for Neural Network Compression, CVPR 2022, arXiv:2205.05676, section 3; the
authors' repository holds no code.

Deviations: the number of networks, the smallest keep ratio and the tolerance are our choices. A network is taken if its cost
is at most the budget and at least `1 - tolerance` of it; ratios are never rescaled to fit, but while hardly any draw fits,
both ends of the range are lowered by a fifth; where widths are too coarse for the tolerance, the nearest ones below the budget
are taken. Networks are judged on held-out training images after renewing their batch norm statistics; the least squares update
of weights, an option of the paper, is left to fine-tuning. If no draw fits at all, the cheapest widths are taken. Which
channels of a group stay is told by a criterion that reads weights alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from deploypipe.algorithms.base import Problem, judged, labelled, signed
from deploypipe.algorithms.options import option
from deploypipe.algorithms.scores import DATA_FREE, data_free
from deploypipe.allocation.allocate import cheapest_widths, first_channels, plan_of, ranking, unproved
from deploypipe.allocation.scaled import nearest_width
from deploypipe.compact import compact
from deploypipe.data.batches import count, split
from deploypipe.ingredients.statistics import batch_size, generator
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.training.evaluate import Accuracy, evaluate, recalibrate

MOST_HELD_OUT = 0.5
PATIENCE = 100  # draws for each network wanted, before the range of ratios is lowered
LOWER, LOWERINGS = 0.8, 15
Widths = Mapping[str, int]


@dataclass(frozen=True)
class RandomSearch:
    """Draw widths, keep those that cost what is wanted, and take the network that knows most."""

    name: ClassVar[str] = "random-search"
    n: int = option(50, "networks that are judged", low=1)
    r_min: float = option(0.25, "smallest share of a group's channels that is drawn", low=0, high=1)
    tolerance: float = option(0.02, "how far below the budget a network's cost may be, as a share of it", low=1e-4, high=1)
    criterion: str = option("l2", "which channels of a group stay", choices=DATA_FREE)
    images: int = option(1000, "training images that are held out to judge networks, at most half of all", low=1)
    norm_images: int = option(1280, "training images that renew a network's batch norms", low=1)

    def plan(self, problem: Problem) -> KeepPlan:
        """Draw, judge, choose.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data.
        """
        graph, table = problem.graph, problem.table
        data = labelled(problem.data)
        fit, held_out = split(data, min(MOST_HELD_OUT, self.images / count(data)), problem.seed)
        scores, skipped = judged(graph, data_free(self.criterion, problem.model, problem.seed))
        orders = {name: ranking(score) for name, score in scores.items()}
        cheapest = cheapest_widths(graph, orders, table, problem.budget)  # fails now if the budget is out of reach
        networks = accepted(problem, list(orders), self) or [cheapest]
        found: list[tuple[Accuracy, Widths]] = []
        with counted(problem.reporter, "random-search", len(networks)) as reporter:
            for kept in networks:
                small = compact(problem.model, graph, KeepPlan(first_channels(orders, kept)), check=not found)
                images = batch_size(graph.example)
                fresh = recalibrate(small, fit, self.norm_images, problem.seed, batch_size=images)
                found.append((evaluate(fresh, held_out, batch_size=images), kept))
                reporter.advance(len(found))
        accuracy, kept = max(found, key=lambda network: (network[0].top1, -network[0].loss))
        certificate = unproved(graph, kept, table, problem.budget, accuracy.top1, f"best of {len(found)} draws")
        return signed(self, plan_of(graph, orders, kept, certificate), skipped)


def accepted(problem: Problem, names: Sequence[str], options: RandomSearch) -> list[Widths]:
    """Return up to `n` drawn networks, different ones, whose cost is within the tolerance below the budget.

    Where widths are too coarse for that, those that come nearest from below; none if no draw fits at all.
    """
    high, below = 1.0, dict[tuple[int, ...], tuple[float, Widths]]()
    for lowering in range(LOWERINGS):
        found: dict[tuple[int, ...], Widths] = {}
        stream = draws(problem, names, (options.r_min * high, high), lowering)
        for _, kept in zip(range(PATIENCE * options.n), stream, strict=False):
            cost = problem.table.predict(problem.graph, KeepPlan.of_widths(kept))
            if cost <= problem.budget:
                below[tuple(kept.values())] = (cost, kept)
            if (1 - options.tolerance) * problem.budget <= cost <= problem.budget:
                found.setdefault(tuple(kept.values()), kept)
            if len(found) == options.n:
                break
        if found:
            return list(found.values())
        high *= LOWER
    nearest = sorted(below.values(), key=lambda network: -network[0])[: options.n]
    return [kept for _, kept in nearest]


def draws(problem: Problem, names: Sequence[str], ratios: tuple[float, float], lowering: int = 0) -> Iterator[dict[str, int]]:
    """Yield widths for ever: a uniform, independent ratio for every group, moved to the nearest legal width.

    The first networks are the same however many are asked for.
    """
    rng, legal = generator(problem.seed, "random-search", lowering), problem.table.candidates(problem.graph)
    low, high = ratios
    whole = problem.graph.kept()
    while True:
        shares = (low + (high - low) * torch.rand(len(names), generator=rng, dtype=torch.float64)).tolist()
        wanted = zip(names, shares, strict=True)
        yield whole | {name: nearest_width(legal[name], share * problem.graph.group(name).size) for name, share in wanted}
