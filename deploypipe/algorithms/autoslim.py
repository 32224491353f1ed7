"""AutoSlim: train one network that holds all narrower ones, then take off channels where it hurts least, greedily.

Yu and Huang, AutoSlim: Towards One-Shot Architecture Search for Channel Numbers, 2019, arXiv:1903.11728, section 3; training by
the sandwich rule with in-place distillation: Yu and Huang, Universally Slimmable Networks, ICCV 2019, arXiv:1903.05134.

Deviations: the cost that falls is that of the table, which is measured latency by default, and the widths are those that the
table offers. The network is the user's, not a wider one. Training starts from its trained weights, with the channels of every
group sorted by the L2 norms of their filters, because sub-networks are always the first channels (groups that fixed weights
take part in keep their order); `start=fresh` starts from random weights as the paper does. Batch norms of a candidate are
estimated anew (the authors' code judges on one batch in training mode), and equal accuracy is decided by the loss. The images
that judge are a part of the training data that the supernet is not trained on; the weights that it starts from may know them.
The network found goes on from the supernet's weights in fine-tuning, on all the data; from scratch it is trained by the
Rethinking protocol. Groups are what the paper calls linked layers. If no single group makes the network cheaper any more, all
widths are set to the cheapest at once. Only widths that are trained can be chosen: those from `least` on, or all where no
network of these is within the budget.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deploypipe.algorithms.base import Problem, filter_norms, judged, labelled, signed
from deploypipe.algorithms.options import option
from deploypipe.allocation.allocate import cheapest_widths, ranking, unproved
from deploypipe.errors import BudgetError
from deploypipe.ingredients.judge import Judge
from deploypipe.ingredients.permute import in_place, permuted
from deploypipe.ingredients.statistics import trained_weights
from deploypipe.ingredients.supernet import Sandwich
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import Accuracy
from deploypipe.training.fresh import fresh
from deploypipe.training.trainer import Trainer

Cost = Callable[[Mapping[str, int]], float]
Look = Callable[[Mapping[str, int]], Accuracy]


@dataclass(frozen=True)
class AutoSlim:
    """Slim the supernet greedily: every step narrows the group without which the network still knows most."""

    name: ClassVar[str] = "autoslim"
    renumbered: ClassVar[bool] = True
    train_epochs: int = option(10, "epochs in which the supernet is trained", low=0)
    start: str = option("trained", "weights that the supernet starts from", choices=("trained", "fresh"))
    n_random: int = option(2, "random sub-networks of each step, beside the largest and the smallest", low=0)
    bins: int = option(10, "widths of each group to choose from, at most; evenly from those that the table offers", low=2)
    least: float = option(0.15, "narrowest width of a sub-network, as a share of its group", low=0, high=1)
    prefer: str = option("accuracy", "narrows where accuracy stays highest, or where least is lost for what is saved",
                         choices=("accuracy", "ratio"))  # fmt: skip
    images: int = option(512, "training images that are held out to judge candidates, at most half of all", low=1)
    norm_images: int = option(256, "training images that renew a candidate's batch norms; 0 leaves them as they are", low=0)

    def train(self, problem: Problem, trainer: Trainer) -> nn.Module:
        """Train the supernet.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        model, graph = problem.model, problem.graph
        if self.start == "fresh":
            model = fresh(model, problem.seed)
        else:
            view = trained_weights(model)
            norms, _ = judged(graph, lambda group: filter_norms(group, view, 2).cpu().numpy())
            if unsorted := [name for name in norms if in_place(graph, name)]:
                problem.reporter.note(f"{', '.join(unsorted)}: channels keep their order, since fixed weights take part")
            model = permuted(model, graph, {name: ranking(norm).tolist() for name, norm in norms.items()})
        sandwich = Sandwich(graph, self.offered(problem), self.n_random, problem.seed)
        part = self._judge(problem).fit if self.train_epochs else None
        return trainer.fit(model, self.train_epochs, [sandwich], part)

    def plan(self, problem: Problem) -> KeepPlan:
        """Narrow one group after the other, until the network is within the budget.

        Raises:
            BudgetError: The budget cannot be reached.
            UsageError: There is no data, or too little to hold some out.
        """
        graph, table = problem.graph, problem.table
        legal = self.offered(problem)  # those that were trained
        cheapest = cheapest_widths(graph, legal, table, problem.budget, legal)
        judge = self._judge(problem)

        def look(kept: Mapping[str, int]) -> Accuracy:
            return judge(problem.model, KeepPlan.of_widths({name: kept[name] for name in legal}))

        def cost(kept: Mapping[str, int]) -> float:
            return table.predict(graph, KeepPlan.of_widths(kept))

        path = [(graph.kept(), look(graph.kept()))]
        problem.reporter.stage("autoslim")
        for step in slimmed(graph.kept(), legal, cost, look, problem.budget, self.prefer):
            path.append(step)
            problem.reporter.advance(len(path) - 1, f"{cost(step[0]):,.6g} of {problem.budget:,.6g} {table.unit}")
        kept, found = path[-1] if cost(path[-1][0]) <= problem.budget else (cheapest, look(cheapest))
        certificate = unproved(graph, kept, table, problem.budget, found.top1, "greedy")
        plan = KeepPlan.of_widths({name: kept[name] for name in legal})
        return signed(self, plan.replace(fingerprint=graph.fingerprint, certificate=certificate), {})

    def _judge(self, problem: Problem) -> Judge:
        return Judge(problem.graph, labelled(problem.data), self.images, self.norm_images, problem.seed)

    def offered(self, problem: Problem) -> dict[str, tuple[int, ...]]:
        """Return the widths of sub-networks, which are trained and then chosen from: those of the table from `least` on.

        If no network of such widths is within the budget, narrower ones are offered as well, and the reporter hears of it.

        Raises:
            BudgetError: The budget cannot be reached at all.
        """
        graph, table, budget = problem.graph, problem.table, problem.budget
        every = {name: evenly(widths, self.bins) for name, widths in table.candidates(graph).items()}
        wide = {name: _from(self.least * graph.group(name).size, widths) for name, widths in every.items()}
        try:
            cheapest_widths(graph, wide, table, budget, wide)
        except BudgetError:
            cheapest_widths(graph, every, table, budget, every)  # fails if narrower ones do not help either
            problem.reporter.note(
                f"no network that keeps {self.least:.0%} of every group is within the budget (option least): narrower ones"
                " are trained and offered as well"
            )
            return every
        return wide


def _from(least: float, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths from `least` on, ascending; the widest one always."""
    return tuple(width for width in widths if width >= least) or widths[-1:]


def evenly(widths: Sequence[int], n: int) -> tuple[int, ...]:
    """Return at most `n` of the widths, evenly spread, the first and the last among them.

    >>> evenly(range(1, 17), 4), evenly((8, 16), 10)
    ((1, 6, 11, 16), (8, 16))
    """
    if len(widths) <= n:
        return tuple(widths)
    return tuple(widths[round(i * (len(widths) - 1) / (n - 1))] for i in range(n))


def slimmed(
    kept: Mapping[str, int],
    legal: Mapping[str, Sequence[int]],
    cost: Cost,
    look: Look,
    budget: float,
    prefer: str = "accuracy",
) -> Iterator[tuple[dict[str, int], Accuracy]]:
    """Yield the widths after every step and how good they are; each step costs less than the one before.

    Args:
        kept: Where to start.
        legal: Group -> widths to choose from, ascending.
        cost: Of widths.
        look: Says how accurate widths are.
        budget: The last yielded widths cost no more, unless no group alone makes the network cheaper.
        prefer: "accuracy": the highest one; "ratio": the smallest loss of accuracy for what is saved.
    """
    now = dict(kept)
    found = look(now) if prefer == "ratio" else Accuracy(0.0, 0.0, 0)
    while (price := cost(now)) > budget:
        offers = [{**now, name: width} for name, widths in legal.items() if (width := _next(now, name, widths, cost, price))]
        if not offers:
            return
        judged = [(look(offer), price - cost(offer), offer) for offer in offers]
        if prefer == "accuracy":
            best = max(judged, key=lambda each: (each[0].top1, -each[0].loss))
        else:
            best = min(judged, key=lambda each: (max(found.top1 - each[0].top1, 0.0) / each[1], each[0].loss))
        found, now = best[0], best[2]
        yield dict(now), found


def _next(now: Mapping[str, int], name: str, widths: Sequence[int], cost: Cost, price: float) -> int:
    """Return the next narrower width of a group that makes the network cheaper; 0 if there is none."""
    narrower = (width for width in sorted(widths, reverse=True) if width < now[name])
    return next((width for width in narrower if cost({**now, name: width}) < price), 0)
