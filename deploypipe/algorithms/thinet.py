"""ThiNet: drop the channels that the next layer misses least.

Luo et al., ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017, arXiv:1707.06342; the
objective is its equation 6, the greedy choice algorithm 1, the rescaling equation 7.

Deviations: all groups are judged on the trained model at once and their widths decided together by the allocator, which is
handed the measured error of every width after rescaling (the paper fixes one ratio for all layers and fine-tunes between
layers). Where several layers read a group, their relative errors are added; residual trunks are pruned too. The greedy steps
work on the Gram matrix of the contributions, which gives the running sums exactly. The rescaling is done for all layers after
compaction, in forward order, on what the corrected layers before deliver, so that later layers make up for earlier ones; it
reads at most 500 images, with more locations of each, and states batch norms anew in the statistics that they meet, with the
same function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem, allocated
from deploypipe.algorithms.options import option
from deploypipe.algorithms.reconstruction import inputs, readers, reconstructed, regular, summed
from deploypipe.ingredients.statistics import FeatureTap, batch_size
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.types import Member

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class ThiNet:
    """Greedy removal by the error of the next layers' outputs, and least squares rescaling after compaction."""

    name: ClassVar[str] = "thinet"
    images: int = option(2000, "selection images whose activations are read", low=1)
    locations: int = option(10, "random (filter, position) pairs read for each image and layer", low=1)
    ridge: float = option(1e-6, "ridge of the least squares, as a share of the mean squared contribution", low=1e-9, high=1)

    def plan(self, problem: Problem) -> KeepPlan:
        """Measure what every channel gives to its next layers, order the channels greedily, and allocate by the errors.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data.
        """
        reading, skipped = readers(problem)
        orders, values = {}, {}
        for name, found in self._grams(problem, reading).items():
            size = problem.graph.group(name).size
            grams = found or [np.zeros((size, size))]  # nothing of it reaches a next layer: every width is as good
            orders[name] = removal_order(np.mean(grams, axis=0))[::-1]
            values[name] = -np.sum([errors(gram, orders[name], self.ridge) for gram in grams], axis=0)
        return allocated(self, problem, orders, values, skipped)

    def repair(self, small: nn.Module, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Return a copy of the compacted model whose pruned layers rescale their inputs by least squares."""
        return reconstructed(small, problem, plan, (self.images, self.locations), self.ridge)

    def _grams(self, problem: Problem, readers: Mapping[str, Sequence[Member]]) -> dict[str, list[Matrix]]:
        """Return for every group one (C, C) Gram matrix for each layer that reads it.

        Entry (a, b) is the sum over locations of x_a x_b, as a share of the sum of squared outputs y of that layer.
        """
        of_weight: dict[str, list[tuple[str, Member]]] = {}
        for name, members in readers.items():
            for member in members:
                of_weight.setdefault(member.param, []).append((name, member))
        grams: dict[tuple[str, str], Tensor] = {}
        power = dict.fromkeys(of_weight, 0.0)
        tap = FeatureTap(problem.model, list(of_weight), self.locations, problem.seed)
        total = -(-self.images // batch_size(problem.graph.example))  # fewer if there are not as many images
        with counted(problem.reporter, "read activations", total) as reporter:
            for done, read in enumerate(tap.samples(inputs(problem, self.images)), 1):
                for weight, sample in ((weight, sample) for weight, samples in read.items() for sample in samples):
                    power[weight] += float(sample.y @ sample.y)
                    for name, member in of_weight[weight]:
                        x = summed(sample.x, member.owner)
                        grams[name, weight] = grams.get((name, weight), 0.0) + x.T @ x
                reporter.advance(done)
        return {
            name: [grams[name, m.param].cpu().numpy() / power[m.param] for m in members if power[m.param] > 0]
            for name, members in readers.items()
        }


def removal_order(gram: Matrix) -> NDArray[np.int64]:
    """Return channels in the order in which they go: each time the one that makes `sum_i (sum_{c gone} x_ic)^2` smallest.

    Args:
        gram: (C, C) with entries `sum_i x_ia x_ib`. Of equal channels the lower index stays longer.
    """
    n = len(gram)
    order, alive, with_gone = np.empty(n, np.int64), np.ones(n, bool), np.zeros(n)
    for k in range(n):
        rise = np.where(alive, 2 * with_gone + gram.diagonal(), np.inf)
        order[k] = n - 1 - int(np.argmin(rise[::-1]))
        alive[order[k]] = False
        with_gone += gram[order[k]]
    return order


def errors(gram: Matrix, order: NDArray[np.int64], ridge: float) -> NDArray[np.float64]:
    """Return the error of the layer's output after rescaling, for every number w of channels kept.

    With A the Gram matrix of the first w channels and b their products with the whole output, the least squares error is
    `y.y - b A^-1 b`. The sets are nested, so one Cholesky factor L of the reordered matrix serves all of them: the error
    falls by the squared entries of L^-1 b, one after the other.

    Args:
        gram: (C, C) Gram matrix of the contributions.
        order: (C,) channels, the one to keep longest first.
        ridge: Share of the mean diagonal that is added to the diagonal.

    Returns:
        (C + 1,) errors in units of `gram`, falling, for w = 0 ... C.
    """
    sorted_gram = gram[np.ix_(order, order)]
    factor: Matrix = cholesky(sorted_gram + regular(sorted_gram, ridge), lower=True)
    explained: Matrix = np.cumsum(solve_triangular(factor, sorted_gram.sum(1), lower=True) ** 2)
    left: Matrix = gram.sum() - np.append(0.0, explained)
    return np.maximum(left, 0.0)
