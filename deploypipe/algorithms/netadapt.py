"""NetAdapt: in each round every group offers one narrower network of the wanted cost, and the most accurate one is taken.

Yang et al., NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications, ECCV 2018, arXiv:1804.03230, algorithm
1; `prefer=ratio` is the choice of the authors' own code.

Deviations: widths come from those that the table offers. Candidates are judged after renewing their batch norm statistics, and
by default without short-term training (`steps`); equal accuracy is decided by the loss. The held-out images are a part of the
training data. The last round asks for no more than the budget, and where no group alone can save enough, the round takes the
most that one can. The networks trained on the way only serve to judge: the plan is carried out on the trained weights and
fine-tuned afterwards. If no single group makes the network cheaper any more, all widths are set to the cheapest at once, from
the trained weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from deploypipe.algorithms.base import Problem, filter_norms, judged, labelled, signed
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import cheapest_widths, ranking, unproved
from deploypipe.compact import compact, masked_slots
from deploypipe.data.batches import Samples, count, split
from deploypipe.ingredients.statistics import batch_size, trained_weights
from deploypipe.plan import KeepPlan
from deploypipe.training.adapt import Adapting
from deploypipe.training.evaluate import evaluate, recalibrate

Cost = Callable[[Mapping[str, int]], float]
BATCH = 64  # of short-term training
MOST_HELD_OUT = 0.5


@dataclass(frozen=True, eq=False)
class Network:
    """A network on the way to the budget.

    Attributes:
        kept: Group -> number of channels that stay.
        cost: By the table.
        accuracy: Share of the held-out images that it names right.
        loss: Mean cross entropy on them.
        keep: Group -> channels that stay, the one to keep longest first.
        model: Its weights, of full size.
    """

    kept: Mapping[str, int]
    cost: float
    accuracy: float = 0.0
    loss: float = 0.0
    keep: Mapping[str, Sequence[int]] | None = None
    model: nn.Module | None = None


@dataclass(frozen=True)
class NetAdapt:
    """Narrow one group a round, chosen by what the network still knows afterwards, until it is within the budget."""

    name: ClassVar[str] = "netadapt"
    reduction: float = option(0.025, "what the first round takes off the cost, as a share of the dense cost", low=1e-4, high=1)
    decay: float = option(0.96, "factor on the reduction from one round to the next", low=0.01, high=1)
    prefer: str = option("accuracy", "takes the most accurate, or the smallest loss of accuracy for what is saved",
                         choices=("accuracy", "ratio"))  # fmt: skip
    images: int = option(512, "training images that are held out to judge candidates, at most half of all", low=1)
    norm_images: int = option(256, "training images that renew a candidate's batch norms; 0 leaves them as they are", low=0)
    steps: int = option(0, "steps of short-term training before a candidate is judged", low=0)
    lr: float = option(0.001, "learning rate of the short-term training", low=0)

    def plan(self, problem: Problem) -> KeepPlan:
        """Narrow round by round.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data, or too little to hold some out.
        """
        graph, table = problem.graph, problem.table
        judge = _Judge(self, problem)
        legal = {name: widths for name, widths in table.candidates(graph).items() if name in judge.orders}
        cheapest_widths(graph, legal, table, problem.budget)  # fails now if the budget is out of reach
        found = dense = judge.dense()
        problem.reporter.stage("netadapt")
        path = rounds(found, legal, judge.cost, judge.narrowed, problem.budget, self)
        for n, found in enumerate(path, 1):
            problem.reporter.advance(n, f"{found.cost:,.6g} of {problem.budget:,.6g} {table.unit}")
        # From the start: on the way a group may have become narrower than it is where the network is cheapest.
        if found.cost > problem.budget:
            found = judge.at(dense, cheapest_widths(graph, legal, table, problem.budget))
        keep = {name: tuple(sorted(channels)) for name, channels in (found.keep or {}).items()}
        certificate = unproved(graph, found.kept, table, problem.budget, found.accuracy, "greedy")
        return signed(self, KeepPlan(keep, fingerprint=graph.fingerprint, certificate=certificate), judge.skipped)


def rounds(
    dense: Network,
    legal: Mapping[str, Sequence[int]],
    cost: Cost,
    narrowed: Callable[[Network, str, int], Network],
    budget: float,
    options: NetAdapt,
) -> Iterator[Network]:
    """Yield the network of every round, until one is within the budget or no group alone makes it cheaper.

    Args:
        dense: Where to start.
        legal: Group -> widths to choose from, ascending.
        cost: Of widths.
        narrowed: Returns the judged network in which one group has that width.
        budget: Upper limit of the cost.
        options: Schedule and choice.
    """
    now, reduction = dense, options.reduction * dense.cost
    while now.cost > budget:
        offers = proposals(now.kept, legal, cost, max(now.cost - reduction, budget))
        if not offers:
            return
        networks = [narrowed(now, name, width) for name, width in offers.items()]
        now = best(now, networks, options.prefer)
        yield now
        reduction *= options.decay


def proposals(kept: Mapping[str, int], legal: Mapping[str, Sequence[int]], cost: Cost, limit: float) -> dict[str, int]:
    """Return for every group that can the largest width with which the network costs at most `limit`.

    If there is no such group, the limit is the least that one group alone can make of it; without any saving it is empty.
    """
    costs = {
        name: {width: cost({**kept, name: width}) for width in widths if width < kept[name]} for name, widths in legal.items()
    }
    least = min((price for prices in costs.values() for price in prices.values()), default=float("inf"))
    limit = max(limit, least) if least < cost(kept) else limit
    fitting = {name: [width for width, price in prices.items() if price <= limit] for name, prices in costs.items()}
    return {name: max(widths) for name, widths in fitting.items() if widths}


def best(now: Network, networks: Sequence[Network], prefer: str) -> Network:
    """Return the network to go on with; of equal ones the first."""
    if prefer == "accuracy":
        return max(networks, key=lambda network: (network.accuracy, -network.loss))
    lost = {id(n): (now.accuracy - n.accuracy + 1e-6) / (now.cost - n.cost + 1e-5 * now.cost) for n in networks}
    return min(networks, key=lambda network: (lost[id(network)], network.loss))


class _Judge:
    """Makes candidate networks and looks how accurate they are."""

    def __init__(self, options: NetAdapt, problem: Problem) -> None:
        self._options, self._problem = options, problem
        data = labelled(problem.data)
        share = min(MOST_HELD_OUT, options.images / count(data))
        self._fit: Samples
        self._fit, self._held_out = split(data, share, problem.seed)
        view = trained_weights(problem.model)
        norms, self.skipped = judged(problem.graph, lambda group: filter_norms(group, view, 2).cpu().numpy())
        self.orders: dict[str, list[int]] = {name: ranking(norm).tolist() for name, norm in norms.items()}

    def cost(self, kept: Mapping[str, int]) -> float:
        return self._problem.table.predict(self._problem.graph, KeepPlan.of_widths(kept))

    def dense(self) -> Network:
        kept = self._problem.graph.kept()
        return self._judged(Network(kept, self.cost(kept), keep=self.orders, model=self._problem.model))

    def narrowed(self, now: Network, name: str, width: int) -> Network:
        return self.at(now, {**now.kept, name: width})

    def at(self, now: Network, kept: Mapping[str, int]) -> Network:
        """Return the network with fewer channels: in every group the filters with the largest L2 norms of those left."""
        keep = {name: self._order(now, name)[: kept[name]] for name in self.orders}
        small = Network(kept, self.cost(kept), keep=keep, model=now.model)
        return self._judged(self._trained(small) if self._options.steps else small)

    def _order(self, now: Network, name: str) -> Sequence[int]:
        left = (now.keep or self.orders)[name]
        if not self._options.steps or now.model is None:
            return left  # the weights are those that the first order was made of
        group = self._problem.graph.group(name)
        norms = filter_norms(group, trained_weights(now.model), 2)[torch.as_tensor(sorted(left))]
        return [sorted(left)[i] for i in ranking(norms.cpu().numpy())]

    def _plan(self, network: Network) -> KeepPlan:
        return KeepPlan({name: tuple(sorted(channels)) for name, channels in (network.keep or {}).items()})

    def _trained(self, network: Network) -> Network:
        graph, options = self._problem.graph, self._options
        run = Adapting(network.model or self._problem.model, self._fit, options.lr, self._batch, self._problem.seed)
        run.hold(masked_slots(graph, self._plan(network)))
        for _ in run.steps(options.steps):
            pass
        return replace(network, model=run.model)

    def _judged(self, network: Network) -> Network:
        small = compact(network.model or self._problem.model, self._problem.graph, self._plan(network), check=False)
        if self._options.norm_images:
            small = recalibrate(small, self._fit, self._options.norm_images, self._problem.seed, batch_size=self._batch)
        found = evaluate(small, self._held_out, batch_size=batch_size(self._problem.graph.example))
        return replace(network, accuracy=found.top1, loss=found.loss)

    @property
    def _batch(self) -> int:
        return min(BATCH, batch_size(self._problem.graph.example))
