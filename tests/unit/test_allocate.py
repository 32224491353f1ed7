"""What the allocator promises besides being optimal (tests/property/test_allocate.py compares with brute force)."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from deploypipe.allocation.allocate import allocate, allocate_widths
from deploypipe.cost import CostTerm
from deploypipe.errors import BudgetError, ModelError, UsageError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group, Width


@dataclass(frozen=True)
class Table:
    """Price of a layer = in x out, rounded up to steps; plus a cost that no term states."""

    pairs: tuple[tuple[Width, Width], ...]
    step: int = 1
    beside: float = 0.0
    unit: str = "us"

    def _price(self, n_in: int, n_out: int) -> float:
        return float(-(-n_in // self.step) * -(-n_out // self.step) * self.step**2)

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        return tuple(CostTerm(f"t{i}", a, b, self._price) for i, (a, b) in enumerate(self.pairs))

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        return {group.name: tuple(range(1, group.size + 1)) for group in graph.prunable}

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return self.beside + sum(t.price(t.n_in.at(kept), t.n_out.at(kept)) for t in self.terms(graph))


def graph_of(sizes: Mapping[str, int], fixed: tuple[str, ...] = ()) -> Graph:
    groups = tuple(Group(name, size, (), "it is fixed" if name in fixed else "") for name, size in sizes.items())
    return Graph((), groups, (), {}, {}, ())


def one(name: str) -> Width:
    return Width(0, ((name, 1),))


def chain(sizes: Mapping[str, int], **kw: float) -> Table:
    ends = [Width(3), *(one(name) for name in sizes), Width(10)]
    return Table(tuple(itertools.pairwise(ends)), **kw)


SIZES = {"a": 8, "b": 8}


def scores(seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(1.0, 1.0, size) for name, size in sizes.items()}


def test_the_best_channels_stay_and_ties_keep_the_lower_index() -> None:
    graph, table = graph_of({"a": 6}), chain({"a": 6})
    given = {"a": torch.tensor([1.0, 5.0, 1.0, 3.0, 5.0, 1.0])}
    plan = allocate(graph, given, table, budget=4 * 13.0)
    assert plan.keep["a"] == (0, 1, 3, 4)
    assert plan.fingerprint == graph.fingerprint


def test_everything_stays_when_the_budget_allows_it() -> None:
    graph, table = graph_of(SIZES), chain(SIZES)
    for factor in (1.0, 1.5):
        plan = allocate(graph, scores(), table, factor * table.predict(graph))
        assert plan.keep == {"a": tuple(range(8)), "b": tuple(range(8))}
        assert plan.certificate is not None
        assert (plan.certificate.status, plan.certificate.gap) == ("whole", 0.0)


def test_groups_without_scores_and_fixed_groups_stay_whole() -> None:
    sizes = {"a": 8, "b": 8, "c": 8}
    graph, table = graph_of(sizes, fixed=("c",)), chain(sizes)
    given = scores(sizes=sizes)
    kept, _ = allocate_widths(graph, {"a": np.arange(9.0), "c": np.arange(9.0)}, table, 0.7 * table.predict(graph))
    assert (kept["b"], kept["c"]) == (8, 8)
    assert kept["a"] < 8
    plan = allocate(graph, {"a": given["a"], "c": given["c"]}, table, 0.7 * table.predict(graph))
    assert set(plan.keep) == {"a"}


def test_staircase_prices_put_widths_on_the_edges() -> None:
    sizes = {"a": 32, "b": 32}
    graph, table = graph_of(sizes), chain(sizes, step=8)
    plan = allocate(graph, {name: np.ones(size) for name, size in sizes.items()}, table, 0.5 * table.predict(graph), gap=0)
    widths = [len(channels) for channels in plan.keep.values()]
    assert [width % 8 for width in widths] == [0, 0]
    assert min(widths) < 32


def test_costs_that_no_term_states_still_count_against_the_budget() -> None:
    graph, table = graph_of(SIZES), chain(SIZES, beside=40.0)
    budget = 0.5 * table.predict(graph)
    plan = allocate(graph, scores(), table, budget)
    assert 0.8 * budget < table.predict(graph, plan) <= budget


def test_certificate_states_the_unit() -> None:
    graph = graph_of(SIZES)
    for unit in ("us", "MACs"):
        table = chain(SIZES, unit=unit)
        certificate = allocate(graph, scores(), table, 0.5 * table.predict(graph)).certificate
        assert certificate is not None
        assert certificate.unit == unit
        assert certificate.predicted_us == (certificate.predicted if unit == "us" else None)
        assert certificate.predicted <= certificate.budget
        assert certificate.value <= certificate.bound
        assert certificate.n_variables >= 16 + 64
        assert certificate.seconds >= 0


def test_same_question_same_answer() -> None:
    graph, table = graph_of(SIZES), chain(SIZES)
    plans = [allocate(graph, scores(), table, 0.4 * table.predict(graph)) for _ in range(3)]
    assert plans[0].keep == plans[1].keep == plans[2].keep


def test_out_of_reach_names_the_smallest_cost_and_its_share() -> None:
    graph, table = graph_of(SIZES), chain(SIZES)  # smallest: 3 * 1 + 1 * 1 + 1 * 10 = 14 of 24 + 64 + 80 = 168
    with pytest.raises(BudgetError) as caught:
        allocate(graph, scores(), table, budget=10.0)
    assert "smallest reachable cost is 14 us (8.3 %)" in caught.value.message
    assert "8.4%" in caught.value.fix
    assert caught.value.exit_code == 6
    assert allocate(graph, scores(), table, 0.084 * 168).certificate is not None  # the fix is true


def test_nothing_to_prune_is_out_of_reach() -> None:
    graph, table = graph_of(SIZES, fixed=("a", "b")), chain(SIZES)
    with pytest.raises(BudgetError, match=r"cost is 168 us \(100\.0 %\)"):
        allocate(graph, scores(), table, budget=100.0)


def test_time_limit_returns_a_plan_within_budget_and_a_bound() -> None:
    sizes = {f"g{i}": 64 for i in range(24)}
    graph, table = graph_of(sizes), chain(sizes, step=8)
    values = {name: np.append(0, np.cumsum(np.sort(s)[::-1])) for name, s in scores(sizes=sizes).items()}
    budget, start = 0.4 * table.predict(graph), time.monotonic()
    kept, certificate = allocate_widths(graph, values, table, budget, gap=0, time_limit_s=0.01)
    assert time.monotonic() - start < 30
    assert certificate.status == "time limit"
    assert certificate.predicted <= budget
    best, proof = allocate_widths(graph, values, table, budget, candidates={n: tuple(range(8, 65, 8)) for n in sizes})
    assert certificate.bound >= proof.value - 1e-9
    assert certificate.value >= 0.9 * proof.value
    assert all(width >= 1 for width in kept.values())
    assert all(width % 8 == 0 for width in best.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": np.ones(7)}, r"shape \(7,\), expected \(8,\)"),
        ({"a": np.ones((8, 1))}, "shape"),
        ({"a": np.array([np.nan] + [1.0] * 7)}, "not all finite"),
        ({"a": np.array([np.inf] + [1.0] * 7)}, "not all finite"),
    ],
)
def test_broken_scores_are_refused(given: dict[str, np.ndarray], message: str) -> None:
    graph, table = graph_of(SIZES), chain(SIZES)
    with pytest.raises(UsageError, match=message):
        allocate(graph, given, table, 50.0)


def test_unknown_groups_and_widths_are_refused() -> None:
    graph, table = graph_of(SIZES), chain(SIZES)
    with pytest.raises(ModelError, match="unknown group 'z'"):
        allocate(graph, {"z": np.ones(8)}, table, 50.0)
    for widths in ((-1, 4), (4, 9)):
        with pytest.raises(UsageError, match="candidate widths"):
            allocate(graph, scores(), table, 50.0, candidates={"a": widths})
    with pytest.raises(UsageError, match="which may vanish, are not all finite"):
        allocate_widths(graph, {"a": [-np.inf, *range(8)]}, table, 50.0, candidates={"a": (0, 4)})
    with pytest.raises(UsageError, match="more than zero"):
        allocate(graph, scores(), table, 0.0)
