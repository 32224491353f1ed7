"""ThiNet: drop the channels that the next layer misses least.

Luo et al., ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017, arXiv:1707.06342; the
objective is its equation 6, the greedy choice algorithm 1, the rescaling equation 7.

Deviations: all groups are judged on the trained model at once and their widths decided together by the allocator, which is
handed the measured error of every width after rescaling (the paper fixes one ratio for all layers and fine-tunes between
layers). Where several layers read a group, their relative errors are added; residual trunks are pruned too. The greedy steps
work on the Gram matrix of the contributions, which gives the running sums exactly. The rescaling is done for all layers after
compaction, in forward order, on what the corrected layers before deliver, so that later layers make up for earlier ones.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular
from torch import Tensor, nn

from deploypipe.algorithms.base import Problem, allocated
from deploypipe.algorithms.options import option
from deploypipe.branch import branches, removed_params
from deploypipe.compact import kept_slots
from deploypipe.errors import NotApplicable
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.statistics import BATCH, FeatureTap, batch_size, images, readable, rebase_norms, weights
from deploypipe.types import Member

Matrix = NDArray[np.float64]
REPAIR_IMAGES = 500  # every layer has its own forward passes: fewer images, more locations in each; 64 if they are large


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
        readers, skipped = _readers(problem)
        orders, values = {}, {}
        for name, grams in self._grams(problem, readers).items():
            if not grams:
                skipped[name] = "nothing of it reaches a next layer on the selection data"
                continue
            orders[name] = removal_order(np.mean(grams, axis=0))[::-1]
            values[name] = -np.sum([errors(gram, orders[name], self.ridge) for gram in grams], axis=0)
        return allocated(self, problem, orders, values, skipped)

    def repair(self, small: nn.Module, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Return a copy of the compacted model whose pruned layers rescale their inputs to give the dense model's outputs.

        Input channel c of a weight is multiplied by w_c, where w minimises `sum_i (y_i - sum_c w_c x_ic)^2` over sampled
        locations: y of the dense model, x of the small one. Layers are corrected in forward order, each on what the corrected
        layers before it deliver. Batch norms are told the statistics that they then meet, without a change of the function.
        """
        fixed = copy.deepcopy(small)
        cuts = _pruned_layers(problem, plan)
        n_images = min(self.images, REPAIR_IMAGES if batch_size(problem.graph.example) == BATCH else 64)
        locations = -(-self.images * self.locations // n_images)
        filters = {cut.weight: torch.from_numpy(cut.kept_out) for cut in cuts}
        dense = FeatureTap(problem.model, list(filters), locations, problem.seed, filters)
        targets: dict[str, list[Tensor]] = {weight: [] for weight in filters}
        for read in dense.samples(_inputs(problem, n_images)):
            for weight, samples in read.items():
                targets[weight] += [sample.y for sample in samples]
        with counted(problem.reporter, "repair", len(cuts)) as reporter:
            for done, cut in enumerate(cuts, 1):
                tap = FeatureTap(fixed, [cut.weight], locations, problem.seed)
                met = tap.samples(_inputs(problem, n_images), stop_after=cut.n_calls)
                samples = [sample for each in met for sample in each[cut.weight]]
                x, y = torch.cat([_summed(sample.x, cut.column) for sample in samples]), torch.cat(targets[cut.weight])
                scale = rescale((x.T @ x).cpu().numpy(), (x.T @ y).cpu().numpy(), self.ridge)
                _multiply(weights(fixed)[cut.weight], cut.axis, scale[cut.column])
                reporter.advance(done, cut.weight)
        rebase_norms(fixed, _inputs(problem, n_images))
        return fixed

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
            for done, read in enumerate(tap.samples(_inputs(problem, self.images)), 1):
                for weight, sample in ((weight, sample) for weight, samples in read.items() for sample in samples):
                    power[weight] += float(sample.y @ sample.y)
                    for name, member in of_weight[weight]:
                        x = _summed(sample.x, member.owner)
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
    factor: Matrix = cholesky(sorted_gram + _ridge(sorted_gram, ridge), lower=True)
    explained: Matrix = np.cumsum(solve_triangular(factor, sorted_gram.sum(1), lower=True) ** 2)
    left: Matrix = gram.sum() - np.append(0.0, explained)
    return np.maximum(left, 0.0)


def rescale(gram: Matrix, products: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Return the (C,) factors w that minimise `|y - X w|^2`, with a ridge; ones if X is zero.

    Args:
        gram: (C, C) X^T X, for the contributions X of the channels that are left.
        products: (C,) X^T y, for the outputs y to give.
        ridge: Share of the mean diagonal that is added to the diagonal.
    """
    if not np.trace(gram) > 0:
        return np.ones(len(gram))
    factors: NDArray[np.float64] = cho_solve(cho_factor(gram + _ridge(gram, ridge)), products)
    return factors


def _ridge(gram: Matrix, share: float) -> Matrix:
    # The smallest normal number keeps a matrix of zeros positive definite.
    ridge: Matrix = np.eye(len(gram)) * max(share * float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    return ridge


def _inputs(problem: Problem, n_images: int) -> Iterator[Tensor]:
    return images(problem.data, n_images, problem.seed, batch_size(problem.graph.example))


def _readers(problem: Problem) -> tuple[dict[str, list[Member]], dict[str, str]]:
    """Return for every prunable group the weights that read it, and why groups without any are skipped."""
    readers, skipped = {}, {}
    for group in problem.graph.prunable:
        found, reasons = [], ["no layer reads it"]
        for member in group.members:
            if member.role != "consumes":
                continue
            try:
                readable(problem.model, member.param)
                found.append(member)
            except NotApplicable as reason:
                reasons.append(str(reason))
        if found:
            readers[group.name] = found
        else:
            skipped[group.name] = reasons[-1]
    return readers, skipped


@dataclass(frozen=True, eq=False)
class _Cut:
    """A layer that lost input channels: what is left of it."""

    weight: str
    axis: int  # of the inputs
    kept_out: NDArray[np.int64]  # dense indices of the outputs that stayed
    column: NDArray[np.int64]  # unknown of each input slot that stayed: slots of one channel share it
    n_calls: int


def _pruned_layers(problem: Problem, plan: KeepPlan) -> list[_Cut]:
    """Return the readable layers that lost inputs, in forward order."""
    graph, calls = problem.graph, [layer.weight for layer in problem.graph.layers]
    readers, _ = _readers(problem)
    axes = {
        member.param: member.axis
        for name, members in readers.items()
        for member in members
        if len(plan.keep.get(name, ())) not in (0, graph.group(name).size)
    }
    cuts, gone = [], removed_params(graph, branches(graph, plan).values())
    for weight in dict.fromkeys(weight for weight in calls if weight in axes and weight not in gone):
        axis = axes[weight]
        unknown = np.arange(graph.shapes[weight][axis])
        for group, member in graph.cuts(weight, axis):
            owned = np.flatnonzero(member.owner >= 0)
            first = [owned[member.owner[owned] == c][0] for c in range(group.size)]
            unknown[owned] = np.array(first)[member.owner[owned]]
        column = np.unique(unknown[kept_slots(graph, plan, weight, axis)], return_inverse=True)[1]
        cuts.append(_Cut(weight, axis, kept_slots(graph, plan, weight, 1 - axis), column, calls.count(weight)))
    return cuts


def _summed(x: Tensor, owner: NDArray[np.int64]) -> Tensor:
    """Return the (m, C) contributions of channels: those of their slots (m, S), summed; slots of owner -1 are left out."""
    slots = torch.from_numpy(np.flatnonzero(owner >= 0)).to(x.device)
    channel = torch.from_numpy(owner[owner >= 0]).to(x.device)
    return x.new_zeros(len(x), int(owner.max()) + 1).index_add_(1, channel, x[:, slots])


def _multiply(weight: Tensor, axis: int, factors: NDArray[np.float64]) -> None:
    shape = [-1 if d == axis else 1 for d in range(weight.dim())]
    weight.mul_(torch.from_numpy(factors).to(weight).reshape(shape))
