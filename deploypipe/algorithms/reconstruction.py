"""Least squares on what layers read: after compaction, pruned layers rescale their inputs to give the dense model's outputs.

Luo et al., ThiNet, ICCV 2017, arXiv:1707.06342, equation 7. Shared by the methods that reconstruct outputs.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploypipe.algorithms.base import Problem
from deploypipe.branch import branches, removed_params
from deploypipe.compact import kept_slots
from deploypipe.errors import NotApplicable
from deploypipe.ingredients.statistics import BATCH, FeatureTap, batch_size, called, evaluating, images, readable, weights
from deploypipe.plan import KeepPlan
from deploypipe.progress import counted
from deploypipe.types import Member

Matrix = NDArray[np.float64]
REPAIR_IMAGES = 500  # every layer has its own forward passes: fewer images, more locations in each; 64 if they are large


def reconstructed(small: nn.Module, problem: Problem, plan: KeepPlan, n_values: tuple[int, int], share: float) -> nn.Module:
    """Return a copy of the compacted model whose pruned layers rescale their inputs to give the dense model's outputs.

    Input channel c of a weight is multiplied by w_c, where w minimises `sum_i (y_i - sum_c w_c x_ic)^2` over sampled
    locations: y of the dense model, x of the small one. Layers are corrected in forward order, each on what the corrected
    layers before it deliver. Batch norms are told the statistics that they then meet, without a change of the function.

    Args:
        small: The compacted model; stays as it is.
        problem: With the model that the plan cuts, and the data.
        plan: What was cut.
        n_values: Images, and locations of each, as many as the equations of every layer are made of.
        share: Ridge, as a share of the mean squared contribution.
    """
    fixed = copy.deepcopy(small)
    cuts = _pruned_layers(problem, plan)
    n_images = min(n_values[0], REPAIR_IMAGES if batch_size(problem.graph.example) == BATCH else 64)
    locations = -(-n_values[0] * n_values[1] // n_images)
    filters = {cut.weight: torch.from_numpy(cut.kept_out) for cut in cuts}
    dense = FeatureTap(problem.model, list(filters), locations, problem.seed, filters)
    targets: dict[str, list[Tensor]] = {weight: [] for weight in filters}
    for read in dense.samples(inputs(problem, n_images)):
        for weight, samples in read.items():
            targets[weight] += [sample.y for sample in samples]
    with counted(problem.reporter, "repair", len(cuts)) as reporter:
        for done, cut in enumerate(cuts, 1):
            tap = FeatureTap(fixed, [cut.weight], locations, problem.seed)
            met = tap.samples(inputs(problem, n_images), stop_after=cut.n_calls)
            # Summed batch by batch: a flattened image has dozens of slots for each channel.
            x = torch.cat([summed(sample.x, cut.column) for each in met for sample in each[cut.weight]])
            y = torch.cat(targets[cut.weight])
            scale = rescale((x.T @ x).cpu().numpy(), (x.T @ y).cpu().numpy(), share)
            _multiply(weights(fixed)[cut.weight], cut.axis, scale[cut.column])
            reporter.advance(done, cut.weight)
    rebase_norms(fixed, inputs(problem, n_images))
    return fixed


def rebase_norms(model: nn.Module, data: Iterator[Tensor]) -> None:
    """Give every batch norm the statistics that it really meets, in place, and leave what the model computes as it is.

    The change of mean and variance is taken back by scale and shift. Afterwards a re-estimation on like data, or a step in
    training mode, finds the statistics where they are, instead of undoing what was fitted to the old ones.

    Args:
        model: In evaluation mode it computes the same before and after, up to rounding.
        data: Batches of the model's input.
    """
    norms: dict[Any, list[Any]] = {  # batch norm -> number, sum and sum of squares of what each channel met
        m: [0, 0.0, 0.0] for m in model.modules() if isinstance(m, _BatchNorm) and m.affine and m.running_mean is not None
    }

    def hook(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        n, total, squares = norms[norm]
        norms[norm] = [n + x.shape[1], total + x.sum(1), squares + (x * x).sum(1)]

    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.inference_mode():
            for inputs in data:
                model(inputs.to(device))
    finally:
        for handle in handles:
            handle.remove()
    for norm, (n, total, squares) in norms.items():
        if n:
            mean = total / n
            _rebase(norm, mean, (squares / n - mean * mean).clamp_min(0))


@torch.no_grad()
def _rebase(norm: Any, mean: Tensor, var: Tensor) -> None:
    slope = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    norm.bias += (slope * (mean - norm.running_mean)).to(norm.bias)
    norm.weight.copy_(slope * (var + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def rescale(gram: Matrix, products: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """Return the (C,) factors w that minimise `|y - X w|^2`, with a ridge; ones if X is zero.

    Args:
        gram: (C, C) X^T X, for the contributions X of the channels that are left.
        products: (C,) X^T y, for the outputs y to give.
        ridge: Share of the mean diagonal that is added to the diagonal.
    """
    if not np.trace(gram) > 0:
        return np.ones(len(gram))
    factors: NDArray[np.float64] = cho_solve(cho_factor(gram + regular(gram, ridge)), products)
    return factors


def regular(gram: Matrix, share: float) -> Matrix:
    """Return a multiple of the identity: that share of the mean diagonal."""
    # The smallest normal number keeps a matrix of zeros positive definite.
    added: Matrix = np.eye(len(gram)) * max(share * float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    return added


def inputs(problem: Problem, n_images: int) -> Iterator[Tensor]:
    """Yield batches of selection images."""
    return images(problem.data, n_images, problem.seed, batch_size(problem.graph.example))


def readers(problem: Problem) -> tuple[dict[str, list[Member]], dict[str, str]]:
    """Return for every prunable group the weights that read it, and why groups without any are skipped."""
    found_by, skipped, fixed = {}, {}, problem.graph.buffers
    known = called(problem.model, problem.graph.example)
    for group in problem.graph.prunable:
        found, reasons = [], ["no layer reads it"]
        for member in group.members:
            if member.role != "consumes":
                continue
            try:
                layer = readable(problem.model, member.param)
            except NotApplicable as reason:
                reasons.append(str(reason))
                continue
            if member.param in fixed:
                reasons.append(f"{member.param} is fixed")
            elif layer not in known:
                reasons.append(f"{member.param} is used, but its layer is not called")
            else:
                found.append(member)
        if found:
            found_by[group.name] = found
        else:
            skipped[group.name] = reasons[-1]
    return found_by, skipped


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
    reading, _ = readers(problem)
    axes = {
        member.param: member.axis
        for name, members in reading.items()
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


def summed(x: Tensor, owner: NDArray[np.int64]) -> Tensor:
    """Return the (m, C) contributions of channels: those of their slots (m, S), summed; slots of owner -1 are left out."""
    slots = torch.from_numpy(np.flatnonzero(owner >= 0)).to(x.device)
    channel = torch.from_numpy(owner[owner >= 0]).to(x.device)
    return x.new_zeros(len(x), int(owner.max()) + 1).index_add_(1, channel, x[:, slots])


def _multiply(weight: Tensor, axis: int, factors: NDArray[np.float64]) -> None:
    shape = [-1 if d == axis else 1 for d in range(weight.dim())]
    weight.mul_(torch.from_numpy(factors).to(weight).reshape(shape))
