"""What channels are worth to first order: how the loss changes when a channel is scaled to zero, as its gradient tells.

Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771, equations 7 and 8, with one
gate for all layers of a coupled group; scores are not divided by the number of those layers, because the loss changes once.
"""

import numpy as np
from numpy.typing import NDArray

from deploypipe.algorithms.base import Orders, Problem, Values, judged, labelled, masks_of
from deploypipe.allocation.allocate import allocate_widths, charged_once, prefix_sums, vanishing
from deploypipe.ingredients.curvature import derivatives, gates
from deploypipe.ingredients.removal import removable
from deploypipe.ingredients.statistics import batch_size
from deploypipe.plan import Certificate
from deploypipe.progress import counted
from deploypipe.training.adapt import Adapting

BATCHES, BATCH = 16, 128  # images of a batch at most: as many as fit where the example's size is the measure


def first_order(problem: Problem) -> dict[str, NDArray[np.float64]]:
    """Return the (C,) mean over batches of the squared first-order change of the loss, for every group that has gradients.

    Args:
        problem: Its data is labelled; its model stays as it is.

    Raises:
        UsageError: There is no data, or the loss is not finite.
    """
    run = Adapting(problem.model, labelled(problem.data), 0.0, min(BATCH, batch_size(problem.graph.example)), problem.seed)
    sums = dict[str, NDArray[np.float64]]()
    units, _ = judged(problem.graph, gates(run.model, problem.graph))
    with counted(problem.reporter, "first order", BATCHES) as reporter:
        for done, model in enumerate(run.steps(BATCHES), 1):
            found, _ = derivatives(model, units)
            for name, gradient in found.items():
                sums[name] = sums.get(name, 0.0) + gradient.square().cpu().numpy() / BATCHES
            reporter.advance(done)
    return sums


def by_first_order(problem: Problem, orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
    """Return the widths of the largest summed worth within the budget; a branch worth less than its cost goes as a whole.

    An `Allocator`: how many channels a group needs is said by how its worth is spread, best first; which ones stay is the
    algorithm's order, and its `values` do not count. Summed in another order, the worth of a group rises in fits and
    starts, and the best sum leaves a part of the budget unused.
    """
    worth = first_order(problem)
    sums = {name: prefix_sums(np.sort(worth[name])[::-1]) for name in orders if name in worth}
    gone = [name for name in removable(problem.model, problem.graph) if name in sums]
    widths = vanishing(problem.table.candidates(problem.graph), gone)
    masks, sums = masks_of(problem, orders, sums), charged_once(problem.graph, sums, gone)
    return allocate_widths(problem.graph, sums, problem.table, problem.budget, candidates=widths, masks=masks)
