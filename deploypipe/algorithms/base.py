"""What an algorithm is: a problem in, a keep plan out; and the criterion, which only has to score channels."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from deploypipe.allocation.allocate import allocate_widths, cheapest_widths, plan_of, ranking
from deploypipe.allocation.pattern import mask_losses
from deploypipe.allocation.pattern import n_readers as n_readers  # noqa: PLC0414 - part of what an algorithm may import from here
from deploypipe.allocation.threshold import threshold_widths, uniform_widths, worth_keeping
from deploypipe.cost import CostTable
from deploypipe.errors import NotApplicable, UsageError
from deploypipe.ingredients.stacks import rows as rows  # noqa: PLC0414 - part of what an algorithm may import from here
from deploypipe.ingredients.statistics import trained_weights, weights
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.progress import Reporter, Silent
from deploypipe.types import Graph, Group, Member

T = TypeVar("T")
Orders = Mapping[str, ArrayLike]  # group -> channels, the one to keep longest first
Values = Mapping[str, ArrayLike]  # group -> (C + 1,) value of keeping the first w channels of its order


class Allocator(Protocol):
    """Decides how many channels stay in every group, once an algorithm has ordered them."""

    def __call__(self, problem: "Problem", orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
        """Return the number of channels that stay in each group, and what was proved about it."""
        ...


def by_values(problem: "Problem", orders: Orders, values: Values) -> tuple[dict[str, int], Certificate]:
    """Return the widths of the largest summed value: the algorithm's own values decide, not the orders.

    Where the table prices 2:4 weights, a layer may also get these; what its mask costs follows from the values and the orders.
    """
    masks = masks_of(problem, orders, values)
    return allocate_widths(problem.graph, values, problem.table, problem.budget, masks=masks)


def masks_of(problem: "Problem", orders: Orders, values: Values) -> dict[str, float]:
    """Return layer -> value given up by 2:4 weights there, for the layers that the problem's table offers them for."""
    offered = [term.name for term in problem.table.terms(problem.graph) if term.two_four]
    arrays = {name: tensor.cpu().numpy() for name, tensor in weights(problem.model).items()} if offered else {}
    return mask_losses(problem.graph, arrays, orders, values, offered)


@dataclass(frozen=True, eq=False)
class Problem:
    """What an algorithm is asked: prune this model to this budget.

    Attributes:
        model: The trained model; an algorithm leaves it as it is.
        graph: Its channel graph.
        table: What widths cost.
        budget: Upper limit of the cost, in the table's unit.
        data: Selection data, (input, label) pairs from the training set; None for algorithms that need none.
        seed: Of every random choice.
        reporter: Hears how far it is.
        allocator: Decides the widths; by default by the values that the algorithm states.
    """

    model: nn.Module
    graph: Graph
    table: CostTable
    budget: float
    data: Dataset[Any] | None = None
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    allocator: Allocator = by_values


def least_cost(problem: Problem, names: Iterable[str] | None = None) -> float:
    """Return what the cheapest widths cost that leave no group empty: the least that steps on the way to a budget can ask for.

    Args:
        problem: What was asked.
        names: The groups that may get narrower; all that can be without it.

    Raises:
        BudgetError: That is above the budget, and there is no other allocator, which may know how to leave out whole branches.
    """
    graph, table = problem.graph, problem.table
    limit = problem.budget if problem.allocator is by_values else np.inf
    widths = cheapest_widths(graph, [g.name for g in graph.prunable] if names is None else names, table, limit)
    return table.predict(graph, KeepPlan.of_widths(widths)) * (1 + 1e-9)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a criterion may look at."""

    problem: Problem

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Every parameter by name, detached: no buffers, since fixed weights tell nothing of a channel's worth."""
        return trained_weights(self.problem.model)

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.problem.seed


class Algorithm(Protocol):
    """A pruning method. Its options are the fields of its frozen dataclass.

    A method whose result is zeros inside weights (single weights, kernels, columns), which no dense runtime skips, also has an
    attribute or property `sparse = True`: its plan keeps everything, and its zeros are in the model that `train` returns.
    """

    name: ClassVar[str]

    def plan(self, problem: Problem) -> KeepPlan:
        """Return which channels stay; `problem.table.predict` of it is within the budget."""
        ...


@dataclass(frozen=True)
class Criterion(ABC):
    """An algorithm that scores every channel by itself; the allocator decides how many stay in each group.

    A subclass writes `score`. Which channels stay is the method's; how many is decided by `log_share` of its scores, counted
    once for every layer that reads the group.
    """

    name: ClassVar[str]

    @abstractmethod
    def score(self, group: Group, stats: Statistics) -> Tensor:
        """Return the (C,) scores of a group's channels, higher = keep.

        Raises:
            NotApplicable: The criterion cannot judge this group, which then stays whole.
        """

    def plan(self, problem: Problem) -> KeepPlan:
        """Score every prunable group, then allocate.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        stats = Statistics(problem)
        scores, skipped = judged(problem.graph, lambda group: self.score(group, stats).double().cpu().numpy())
        return shared_out(self, problem, scores, skipped, "shares")


def judged(graph: Graph, judge: Callable[[Group], T]) -> tuple[dict[str, T], dict[str, str]]:
    """Return what `judge` says of every prunable group, and why it cannot judge the others (`NotApplicable`)."""
    found, skipped = dict[str, T](), dict[str, str]()
    for group in graph.prunable:
        try:
            found[group.name] = judge(group)
        except NotApplicable as reason:
            skipped[group.name] = str(reason)
    return found, skipped


def allocated(
    algorithm: Any,
    problem: Problem,
    orders: Orders,
    values: Values,
    skipped: Mapping[str, str],
) -> KeepPlan:
    """Return the plan for the best widths under the budget, by the problem's allocator, signed by the algorithm.

    Args:
        algorithm: A frozen dataclass with a `name`.
        problem: What was asked.
        orders: Which channels go first.
        values: What widths are worth to the algorithm; `problem.allocator` may know better.
        skipped: Group -> why it was not judged and stays whole.
    """
    kept, certificate = problem.allocator(problem, orders, values)
    return signed(algorithm, plan_of(problem.graph, orders, kept, certificate), skipped)


SHARED_OUT = ("threshold", "uniform", "shares")


def shared_out(
    algorithm: Any, problem: Problem, scores: Mapping[str, NDArray[np.float64]], skipped: Mapping[str, str], how: str
) -> KeepPlan:
    """Return the plan that keeps the channels with the highest scores; `how` says what decides the widths.

    Args:
        algorithm: A frozen dataclass with a `name`.
        problem: What was asked. An allocator other than the default decides the widths instead.
        scores: Group -> (C,) scores, higher = keep; comparable across groups if one threshold is to cut them.
        skipped: Group -> why it was not judged and stays whole.
        how: One "threshold" over all channels; the same share of every group ("uniform"), both filled up to the budget; or
            "shares", the exact allocator on `log_share` of the scores.
    """
    graph, table, budget = problem.graph, problem.table, problem.budget
    orders = {name: ranking(score) for name, score in scores.items()}
    if how == "shares" or problem.allocator is not by_values:
        values = {name: n_readers(graph.group(name)) * log_share(score[orders[name]]) for name, score in scores.items()}
        return allocated(algorithm, problem, orders, values, skipped)
    if how == "uniform":
        kept, certificate = uniform_widths(graph, scores, table, budget, worth_keeping(scores))
    else:
        kept, certificate = threshold_widths(graph, scores, table, budget)
    return signed(algorithm, plan_of(graph, orders, kept, certificate), skipped)


def signed(algorithm: Any, plan: KeepPlan, skipped: Mapping[str, str]) -> KeepPlan:
    """Return the plan with the algorithm's name and options, and why groups were skipped."""
    return plan.replace(algorithm=algorithm.name, options=dataclasses.asdict(algorithm), skipped=dict(skipped))


def labelled(data: Dataset[Any] | None) -> Dataset[Any]:
    """Return the data.

    Raises:
        UsageError: There is none.
    """
    if data is None:
        raise UsageError(
            "this algorithm trains or judges and needs data", at="--data", fix="name a data set, as in --data demo"
        )
    return data


def log_share(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the value of keeping the first w channels: the logarithm of their share of the group's score.

    Scores of different groups have different scales (fan-in, width), so only shares can be compared. Groups lie in series: what
    passes the network is closer to the product of the shares than to their sum, and the logarithm turns that product into the
    sum that the allocator maximises. Unlike a plain sum of shares it never empties a group because it is expensive: halving a
    group always costs the same as halving what is left of it.

    Args:
        scores: (C,) from best to worst. Negative scores are shifted so that the worst one is zero.

    Returns:
        (C + 1,) values, rising to 0 at w = C; entry 0 is -inf.
    """
    shifted = scores - min(0.0, float(scores.min()))
    if not shifted.sum() > 0:
        shifted = np.ones_like(shifted)  # nothing tells the channels apart: every one is an equal share
    with np.errstate(divide="ignore"):
        return np.concatenate([[-np.inf], np.log(np.cumsum(shifted) / shifted.sum())])


def relative(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores over the mean of those that are not zero, so that one threshold can cut several groups.

    >>> relative(np.array([3.0, 1.0, 0.0])).tolist()
    [1.5, 0.5, 0.0]
    """
    return scores / scores[scores > 0].mean() if (scores > 0).any() else scores


def producers(group: Group, weights: Mapping[str, Tensor]) -> list[Member]:
    """Return the members whose parameter makes the group's channels: weights, not biases; of those in `weights`.

    Raises:
        NotApplicable: There is none.
    """
    made = [m for m in group.members if m.role == "produces" and m.param in weights and weights[m.param].dim() > 1]
    if not made:
        raise NotApplicable("no weight produces its channels")
    return made


def filter_norms(group: Group, weights: Mapping[str, Tensor], p: int) -> Tensor:
    """Return the (C,) p-norms of the filters that make the group's channels, averaged over the layers that do.

    Filters of different size are compared after dividing each layer's norms by their mean, so that no layer outweighs another.

    Raises:
        NotApplicable: No weight produces the channels.
    """
    filters = [rows(weights[member.param], member).double() for member in producers(group, weights)]
    norms = [torch.linalg.vector_norm(each, p, dim=1) for each in filters]
    if len({each.shape[1] for each in filters}) > 1:
        norms = [norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny) for norm in norms]
    return torch.stack(norms).mean(0)
