"""NetAdapt (Yang et al., ECCV 2018): its falsifiable tests."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms import make, netadapt
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.netadapt import Network, best, proposals, rounds
from deploypipe.cost import CostTerm
from deploypipe.count import MacTable
from deploypipe.data.batches import count
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.training.adapt import Adapting
from deploypipe.training.evaluate import evaluate
from deploypipe.types import Graph, Width
from tests.toy_task import Watched
from tests.toys import TOYS

LEGAL = {"a": tuple(range(1, 11)), "b": tuple(range(1, 11))}
PRICE = {"a": 3.0, "b": 1.0}
QUICK = {"reduction": 0.1, "images": 32, "norm_images": 32}


def linear(kept: Mapping[str, int]) -> float:
    return sum(PRICE[name] * n for name, n in kept.items())


def network(kept: Mapping[str, int], accuracy: Callable[[Mapping[str, int]], float]) -> Network:
    return Network(dict(kept), linear(kept), accuracy(kept), 1 - accuracy(kept))


def path(accuracy: Callable[[Mapping[str, int]], float], budget: float, **options: Any) -> list[Network]:
    def narrowed(now: Network, name: str, width: int) -> Network:
        return network({**now.kept, name: width}, accuracy)

    dense = network({"a": 10, "b": 10}, accuracy)
    return list(rounds(dense, LEGAL, linear, narrowed, budget, make("netadapt", options)))


def test_path_equals_a_hand_simulation() -> None:
    """Cost 3a + b from (10, 10), that is 40. Reductions 4, 2, 1; the accuracy falls with a at 1 and with b at 2 a channel.

    Round 1 may cost 36: a = 8 (34, accuracy -2) or b = 6 (36, accuracy -8): a. Round 2 may cost 32: a = 7 (31, -3) or b = 8
    (32, -6): a. Round 3 may cost 30, which is also the budget: a = 6 (28, -4) or b = 9 (30, -5): a.
    """
    found = path(lambda kept: (kept["a"] + 2 * kept["b"]) / 100, 30.0, reduction=0.1, decay=0.5)
    assert [dict(network.kept) for network in found] == [{"a": 8, "b": 10}, {"a": 7, "b": 10}, {"a": 6, "b": 10}]


def test_ratio_divides_by_what_is_saved() -> None:
    """a loses 0.03 for 6, b loses 0.025 for 4: the most accurate is b, the cheapest loss is a."""

    def accuracy(kept: Mapping[str, int]) -> float:
        return 0.5 + 0.015 * kept["a"] + 0.00625 * kept["b"]

    assert path(accuracy, 36.0, reduction=0.1)[0].kept == {"a": 10, "b": 6}
    assert path(accuracy, 36.0, reduction=0.1, prefer="ratio")[0].kept == {"a": 8, "b": 10}


def test_equal_accuracy_is_decided_by_the_loss() -> None:
    now, left, right = (Network({}, cost, 0.5, loss) for cost, loss in ((10.0, 0.1), (8.0, 0.9), (8.0, 0.2)))
    assert best(now, [left, right], "accuracy") is right
    assert best(now, [left, right], "ratio") is right
    assert best(now, [right, replace(right)], "accuracy") is right


def test_every_network_keeps_its_constraint_and_costs_fall() -> None:
    options = {"reduction": 0.08, "decay": 0.9}
    found = path(lambda kept: min(kept["a"], 2 * kept["b"]) / 20, 9.0, **options)
    costs = [40.0, *(network.cost for network in found)]
    for i, (before, after) in enumerate(itertools.pairwise(costs)):
        assert after < before
        saved = 0.08 * 40 * 0.9**i
        assert after <= max(before - saved, 9.0) + 1e-9
    assert costs[-1] <= 9.0 < costs[-2]


def test_the_last_round_asks_for_no_more_than_the_budget() -> None:
    """A reduction of 4 would leave 36; the budget of 39.5 allows b = 9."""
    found = path(lambda kept: kept["a"] / 10 - kept["b"] / 1000, 39.5, reduction=0.1)
    assert [dict(network.kept) for network in found] == [{"a": 10, "b": 9}]


@pytest.mark.parametrize("limit", [39.0, 36.5, 30.0, 20.0, 13.0])
def test_the_offered_width_is_the_largest_that_fits(limit: float) -> None:
    kept = {"a": 10, "b": 10}
    offers = proposals(kept, LEGAL, linear, limit)
    assert "a" in offers
    for name, width in offers.items():
        assert linear({**kept, name: width}) <= limit < linear({**kept, name: width + 1})
    assert ("b" in offers) == (linear({**kept, "b": 1}) <= limit)


def test_where_no_group_can_save_enough_the_most_that_one_can_is_taken() -> None:
    """A fixed reduction gets stuck here: no group alone saves 39 of 40."""
    assert proposals({"a": 10, "b": 10}, LEGAL, linear, 1.0) == {"a": 1}
    found = path(lambda kept: kept["b"] / 10, 4.0, reduction=1.0, decay=1.0)
    assert [network.cost for network in found] == [13.0, 4.0]
    assert proposals({"a": 1, "b": 1}, LEGAL, linear, 1.0) == {}


def test_a_dip_in_the_latency_is_used_and_a_rise_is_not() -> None:
    prices = {10: 10.0, 9: 14.0, 8: 8.0, 7: 9.0, 6: 7.0}

    def cost(kept: Mapping[str, int]) -> float:
        return prices[kept["a"]]

    assert proposals({"a": 10}, {"a": (6, 7, 8, 9, 10)}, cost, 9.5) == {"a": 8}
    assert proposals({"a": 6}, {"a": (6, 7, 8, 9, 10)}, cost, 1.0) == {}


class Dear(MacTable):
    """MACs, but the layers of one group take fifty times as long."""

    def __init__(self, group: str) -> None:
        super().__init__(multiple=1)
        object.__setattr__(self, "group", group)

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        return tuple(replace(term, price=self.price(term)) for term in super().terms(graph))

    def price(self, term: CostTerm) -> Callable[[int, int], float]:
        slow = self.group in term.n_out.groups  # type: ignore[attr-defined]
        return lambda a, b: (50 if slow else 1) * term.price(a, b)

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in self.terms(graph))


def samples(example: Tensor, n: int = 128) -> TensorDataset:
    """Labels that the brightness decides, so that accuracy means something."""
    x = torch.randn(n, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def problem(net: str = "plain", share: float = 0.6, table: MacTable | None = None) -> Problem:
    model, example = TOYS[net]()
    graph, table = trace(model, example), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), samples(example[0]))


def first_choice(table: MacTable) -> dict[str, int]:
    """The first round's offers, which depend on the table alone."""
    task = problem(table=table)

    def cost(kept: Mapping[str, int]) -> float:
        return table.predict(task.graph, KeepPlan({name: tuple(range(n)) for name, n in kept.items()}))

    return proposals(task.graph.kept(), table.candidates(task.graph), cost, 0.9 * cost(task.graph.kept()))


def test_another_resource_changes_what_is_offered_and_chosen() -> None:
    macs, dear = first_choice(MacTable(multiple=1)), first_choice(Dear("3.0"))
    assert set(macs) == {"0.0", "1.0", "3.0"}
    assert dear["3.0"] > macs["3.0"]
    assert dear.get("0.0", 0) < macs["0.0"]
    plans = [make("netadapt", QUICK).plan(problem(table=table)) for table in (MacTable(multiple=1), Dear("3.0"))]
    kept = [{name: len(channels) for name, channels in plan.keep.items()} for plan in plans]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat"])
@pytest.mark.parametrize("options", [{}, {"steps": 2, "lr": 0.05}, {"prefer": "ratio", "norm_images": 0}], ids=str)
def test_ends_within_the_budget_by_the_tables_own_prediction(net: str, options: dict[str, Any]) -> None:
    task = problem(net, 0.5, MacTable(multiple=2))
    plan = make("netadapt", {**QUICK, **options}).plan(task)
    assert plan.certificate is not None
    assert plan.certificate.predicted == task.table.predict(task.graph, plan) <= task.budget
    assert 0 <= plan.certificate.value <= 1
    assert plan.certificate.bound is None
    legal = task.table.candidates(task.graph)
    assert all(len(channels) in legal[name] for name, channels in plan.keep.items())


def test_filters_with_the_largest_l2_norms_stay() -> None:
    task = problem()
    with torch.no_grad():
        for group, small in (("1.0", [0, 3, 8, 11]), ("3.0", [1, 2])):
            task.model.get_parameter(f"{group}.weight")[small] *= 0.01
    plan = make("netadapt", QUICK).plan(task)
    norms = {name: task.model.get_parameter(f"{name}.weight").detach().square().sum((1, 2, 3)) for name in plan.keep}
    for name, channels in plan.keep.items():
        gone = [c for c in range(task.graph.group(name).size) if c not in channels]
        assert not gone or norms[name][list(channels)].min() >= norms[name][gone].max()
    assert any(len(channels) < task.graph.group(name).size for name, channels in plan.keep.items())


def test_candidates_are_judged_on_images_that_no_norm_and_no_step_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem()
    data = Watched(task.data)
    judged, renewed = set[int](), set[int]()

    def watching(call: Any, seen: set[int]) -> Any:
        def watched(*args: Any, **named: Any) -> Any:
            data.read.clear()
            found = call(*args, **named)
            seen.update(data.read)
            return found

        return watched

    monkeypatch.setattr(netadapt, "evaluate", watching(netadapt.evaluate, judged))
    monkeypatch.setattr(netadapt, "recalibrate", watching(netadapt.recalibrate, renewed))
    make("netadapt", QUICK).plan(replace(task, data=data))
    assert 24 <= len(judged) <= 40
    assert len(renewed) == 32
    assert judged.isdisjoint(renewed)
    assert count(task.data) == 128


def test_short_training_never_sees_the_images_that_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are left as they are: what is read outside of judging is read to train."""
    task = problem(share=0.9)
    data, judged, trained = Watched(task.data), set[int](), set[int]()

    def watched(*args: Any, **named: Any) -> Any:
        trained.update(data.read)
        data.read.clear()
        found = evaluate(*args, **named)
        judged.update(data.read)
        data.read.clear()
        return found

    monkeypatch.setattr(netadapt, "evaluate", watched)
    make("netadapt", {**QUICK, "norm_images": 0, "steps": 2}).plan(replace(task, data=data))
    assert len(judged) == 32
    assert len(trained) > 64
    assert judged.isdisjoint(trained)


class Lone(MacTable):
    """MACs, but one group alone may be narrower, in two steps."""

    def candidates(self, graph: Graph) -> dict[str, tuple[int, ...]]:
        return {"1.0": (4, 8, 12)}


def two_rounds() -> Problem:
    """A problem with one candidate in each round: 8 of 12 channels, then 4."""
    task = problem(table=Lone(multiple=1))
    return replace(task, budget=task.table.predict(task.graph, KeepPlan.of_widths({"1.0": 4})))


TWO_ROUNDS = {**QUICK, "reduction": 1e-4, "steps": 1}


def test_candidates_that_were_trained_shortly_know_more() -> None:
    task, found = two_rounds(), {}
    for steps in (0, 8):
        plan = make("netadapt", {**TWO_ROUNDS, "steps": steps, "lr": 0.5}).plan(task)
        assert plan.certificate is not None
        found[steps] = plan.certificate.value
    assert found[8] > found[0] + 0.15, found


class Turned(Adapting):
    """The weaker a filter was, the stronger it is after training."""

    def steps(self, n: int) -> Iterator[nn.Module]:
        weight = self.model.get_parameter("1.0.weight").detach()
        weight /= weight.square().sum((1, 2, 3), keepdim=True)
        yield self.model


def test_later_rounds_drop_what_is_weak_after_the_training_of_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netadapt, "Adapting", Turned)
    task = two_rounds()
    order = task.model.get_parameter("1.0.weight").square().sum((1, 2, 3)).argsort(descending=True).tolist()
    plan = make("netadapt", TWO_ROUNDS).plan(task)
    assert plan.keep["1.0"] == tuple(sorted(order[4:8])), "first the strongest eight, then the weakest four of these"


def test_every_round_trains_on_from_the_network_that_the_last_one_took(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = list[nn.Module](), list[nn.Module]()

    class Seen(Adapting):
        def __init__(self, model: nn.Module, *rest: Any) -> None:
            super().__init__(model, *rest)
            begun.append(model)
            ended.append(self.model)

    monkeypatch.setattr(netadapt, "Adapting", Seen)
    task = two_rounds()
    make("netadapt", TWO_ROUNDS).plan(task)
    assert len(begun) == 2
    assert begun[0] is task.model
    assert begun[1] is ended[0]


class Joint(MacTable):
    """Narrowing one group alone never saves: only both together fall off the step."""

    def price(self, a: int, b: int) -> float:
        return 100.0 if max(a, b) > 4 else 40.0

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        return (CostTerm("pair", Width(0, (("0.0", 1),)), Width(0, (("1.0", 1),)), self.price),)

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return self.price(kept["0.0"], kept["1.0"])


def test_where_only_a_joint_step_saves_the_budget_is_still_met() -> None:
    task = problem()
    plan = make("netadapt", QUICK).plan(replace(task, table=Joint(multiple=1), budget=50.0))
    assert plan.certificate is not None
    assert plan.certificate.predicted == 40.0
    assert max(len(plan.keep["0.0"]), len(plan.keep["1.0"])) <= 4


class Valley(MacTable):
    """Narrowing one group after the other leads astray: the cheapest network is wide in the group that went first."""

    COSTS = {(8, 12): 100, (2, 12): 90, (8, 2): 30, (2, 2): 95}  # noqa: RUF012

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        return {"0.0": (2, 8), "1.0": (2, 12), "3.0": (8,)}

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        price = lambda a, b: float(self.COSTS[a, b])  # noqa: E731
        return (CostTerm("pair", Width(0, (("0.0", 1),)), Width(0, (("1.0", 1),)), price),)

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return float(self.COSTS[kept["0.0"], kept["1.0"]])


@pytest.mark.parametrize("steps", [0, 2])
def test_the_cheapest_widths_are_cut_from_the_whole_network(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the one that the rounds ended in, which has too few channels of the first group."""
    monkeypatch.setattr(netadapt, "best", lambda now, networks, prefer: min(networks, key=lambda n: n.kept["0.0"]))
    task = problem()
    task = replace(task, table=Valley(), budget=40.0)
    plan = make("netadapt", {**QUICK, "steps": steps}).plan(task)
    assert {name: len(channels) for name, channels in plan.keep.items()} == {"0.0": 8, "1.0": 2, "3.0": 8}
    assert plan.certificate is not None
    assert plan.certificate.predicted == task.table.predict(task.graph, plan) == 30.0


def test_nothing_to_do_and_no_data() -> None:
    task = problem(share=1.0)
    plan = make("netadapt", QUICK).plan(task)
    assert {name: len(channels) for name, channels in plan.keep.items()} == {"0.0": 8, "1.0": 12, "3.0": 8}
    with pytest.raises(UsageError, match="needs data"):
        make("netadapt").plan(replace(task, data=None))
