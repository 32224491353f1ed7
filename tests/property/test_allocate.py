"""The allocator against brute force, on small random nets of every coupling and price shape."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploypipe.allocation.allocate import allocate, allocate_widths
from deploypipe.cost import CostTerm
from deploypipe.errors import BudgetError
from deploypipe.plan import KeepPlan
from deploypipe.types import Graph, Group, Width

Term = tuple[Width, Width]
IMAGE, LOGITS = Width(3), Width(10)


@dataclass(frozen=True)
class Table:
    """A cost table of given terms; every price is looked up in a function of the two widths."""

    costs: tuple[CostTerm, ...]
    widths: Mapping[str, tuple[int, ...]]
    unit: str = "us"

    def terms(self, graph: Graph) -> tuple[CostTerm, ...]:
        return self.costs

    def candidates(self, graph: Graph) -> Mapping[str, tuple[int, ...]]:
        return self.widths

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return sum(term.price(term.n_in.at(kept), term.n_out.at(kept)) for term in self.costs)


def graph_of(sizes: Mapping[str, int]) -> Graph:
    return Graph((), tuple(Group(name, size, ()) for name, size in sizes.items()), (), {}, {}, ())


def one(name: str, slots: int = 1) -> Width:
    return Width(0, ((name, slots),))


def chain(names: Sequence[str]) -> list[Term]:
    ends = [IMAGE, *(one(name) for name in names), LOGITS]
    return list(itertools.pairwise(ends))


def residual(names: Sequence[str]) -> list[Term]:
    trunk, *inner = (one(name) for name in names)
    blocks = [term for b in inner for term in ((trunk, b), (b, trunk))]
    return [(IMAGE, trunk), *blocks, (trunk, trunk), (trunk, LOGITS)]


def depthwise(names: Sequence[str]) -> list[Term]:
    return [*chain(names), *((one(name), one(name, 2)) for name in names)]


def concat(names: Sequence[str]) -> list[Term]:
    *sources, last = names
    both = Width(2, tuple((name, 1 + i % 2) for i, name in enumerate(sources)))
    return [*((IMAGE, one(name)) for name in sources), (both, one(last)), (both, both), (both, LOGITS), (one(last), LOGITS)]


def dense(names: Sequence[str]) -> list[Term]:
    """Each layer reads the concat of all before it (DenseNet)."""
    return [(Width(3, tuple((n, 1) for n in names[:i])), one(name)) for i, name in enumerate(names)]


def split(names: Sequence[str]) -> list[Term]:
    """A layer whose output is cut into several groups, read by another concat of them."""
    first, second, *rest = names
    both = Width(0, ((first, 1), (second, 1)))
    tail = Width(0, ((second, 1), *((name, 1) for name in rest)))
    return [(IMAGE, both), (both, tail), (tail, one(first)), (tail, LOGITS)]


NETS: dict[str, Callable[[Sequence[str]], list[Term]]] = {
    f.__name__: f for f in (chain, residual, depthwise, concat, dense, split)
}


def product(rng: np.random.Generator) -> Callable[[int, int], float]:
    scale = float(rng.uniform(0.2, 3))
    return lambda a, b: scale * a * b


def staircase(rng: np.random.Generator) -> Callable[[int, int], float]:
    scale, step = float(rng.uniform(0.2, 3)), int(rng.integers(2, 5))
    return lambda a, b: scale * (-(-a // step)) * (-(-b // 2)) + 1.5


def jump(rng: np.random.Generator) -> Callable[[int, int], float]:
    base, at, height = product(rng), int(rng.integers(2, 6)), float(rng.uniform(5, 60))
    return lambda a, b: base(a, b) + height * (a >= at) + height / 2 * (b >= at)


def ragged(rng: np.random.Generator) -> Callable[[int, int], float]:
    """Any price at all: wider can be cheaper."""
    noise = rng.uniform(0, 30, (64, 64))
    return lambda a, b: float(noise[a % 64, b % 64])


PRICES = {f.__name__: f for f in (product, staircase, jump, ragged)}


def instance(net: str, price: str, seed: int) -> tuple[Graph, Table, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(int(rng.integers(3, 5)))]
    sizes = {name: int(rng.integers(3, 9)) for name in names}
    widths = {}
    for name, size in sizes.items():
        some = rng.choice(np.arange(1, size + 1), size=min(size, int(rng.integers(2, 5))), replace=False)
        none = (0,) if rng.random() < 0.3 else ()  # a branch that may vanish
        widths[name] = tuple(sorted({*none, *some.tolist(), size}))
    costs = tuple(CostTerm(f"t{i}", a, b, PRICES[price](rng)) for i, (a, b) in enumerate(NETS[net](names)))
    scores = {name: rng.gamma(1.0, 1.0, size) for name, size in sizes.items()}
    return graph_of(sizes), Table(costs, widths), scores


def brute_force(graph: Graph, table: Table, scores: Mapping[str, np.ndarray], budget: float) -> tuple[float, float]:
    """Return (largest value within the budget or -inf, smallest cost)."""
    best, cheapest = -np.inf, np.inf
    names = [g.name for g in graph.groups]
    for choice in itertools.product(*(table.widths[name] for name in names)):
        kept = dict(zip(names, choice, strict=True))
        cost = sum(t.price(t.n_in.at(kept), t.n_out.at(kept)) for t in table.costs)
        cheapest = min(cheapest, cost)
        if cost <= budget:
            best = max(best, sum(np.sort(scores[n])[::-1][:w].sum() for n, w in kept.items()))
    return best, cheapest


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("price", PRICES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.95))
def test_equals_brute_force(net: str, price: str, seed: int, share: float) -> None:
    graph, table, scores = instance(net, price, seed)
    budget = share * table.predict(graph)
    best, cheapest = brute_force(graph, table, scores, budget)
    if best == -np.inf:
        with pytest.raises(BudgetError, match="smallest reachable") as caught:
            allocate(graph, scores, table, budget, gap=0)
        assert f"{cheapest:,.6g}" in caught.value.message
        return
    plan = allocate(graph, scores, table, budget, gap=0)
    assert plan.certificate is not None
    assert table.predict(graph, plan) <= budget
    assert plan.certificate.predicted == table.predict(graph, plan) == plan.certificate.predicted_us
    kept_value = sum(scores[name][list(channels)].sum() for name, channels in plan.keep.items())
    assert kept_value == pytest.approx(best, rel=1e-6)
    assert plan.certificate.value == pytest.approx(kept_value, rel=1e-9)
    assert plan.certificate.bound >= best - 1e-6 * abs(best)
    assert plan.certificate.gap < 1e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), net=st.sampled_from(list(NETS)), price=st.sampled_from(list(PRICES)))
def test_more_budget_never_keeps_less(seed: int, net: str, price: str) -> None:
    graph, table, scores = instance(net, price, seed)
    values = {name: np.append(0, np.cumsum(np.sort(score)[::-1])) for name, score in scores.items()}
    dense_cost, last = table.predict(graph), -np.inf
    for share in (0.3, 0.5, 0.7, 0.9, 1.0, 1.5):
        try:
            kept, certificate = allocate_widths(graph, values, table, share * dense_cost, gap=0)
        except BudgetError:
            assert last == -np.inf, "a larger budget became infeasible"
            continue
        assert certificate.value >= last - 1e-9
        last = certificate.value
    assert kept == {g.name: g.size for g in graph.groups}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), net=st.sampled_from(list(NETS)), price=st.sampled_from(list(PRICES)))
@pytest.mark.parametrize("gap", [1e-3, 0.2])  # the product's own; one that the solver uses up even on small nets
def test_at_a_gap_more_budget_loses_no_more_than_the_gap(gap: float, seed: int, net: str, price: str) -> None:
    graph, table, scores = instance(net, price, seed)
    values = {name: np.append(0, np.cumsum(np.sort(score)[::-1])) for name, score in scores.items()}
    whole, best = sum(float(value[-1]) for value in values.values()), -np.inf
    for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        with suppress(BudgetError):
            _, certificate = allocate_widths(graph, values, table, share * table.predict(graph), gap=gap)
            lost, optimum = whole - certificate.value, brute_force(graph, table, scores, share * table.predict(graph))[0]
            assert certificate.bound >= optimum - 1e-6 * whole
            assert certificate.bound - certificate.value <= gap * lost + 1e-6 * whole
            assert certificate.value >= best - gap * lost - 1e-6 * whole
            best = max(best, certificate.value)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), net=st.sampled_from(["dense", "concat", "split"]), price=st.sampled_from(list(PRICES)))
def test_envelopes_keep_the_bound_valid(seed: int, net: str, price: str) -> None:
    """With totals priced by envelopes the answer may be worse, never over budget, and the bound must still hold."""
    graph, table, scores = instance(net, price, seed)
    budget = 0.6 * table.predict(graph)
    best, _ = brute_force(graph, table, scores, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploypipe.allocation.program.MAX_PAIRS", 0)
        if best == -np.inf:
            with pytest.raises(BudgetError, match="smallest reachable"):
                allocate(graph, scores, table, budget, gap=0)
            return
        if price == "ragged":  # only there can the search for a cheap choice end early, and then it says so
            with suppress(BudgetError):
                plan = allocate(graph, scores, table, budget, gap=0)
                assert table.predict(graph, plan) <= budget
            return
        plan = allocate(graph, scores, table, budget, gap=0)
    assert plan.certificate is not None
    assert table.predict(graph, plan) <= budget
    assert plan.certificate.value <= best + 1e-9
    assert plan.certificate.bound >= best - 1e-6 * abs(best)
    if price == "product":  # affine in each total: the envelope is the price
        assert plan.certificate.value == pytest.approx(best, rel=1e-6)


# ---- 2:4 weights as one more alternative of each layer, against brute force over widths and masks

MOST = 4  # layers that may have the pattern


class Masked(Table):
    """A table whose prediction knows which layers have 2:4 weights."""

    def predict(self, graph: Graph, plan: KeepPlan | None = None) -> float:
        kept = graph.kept(plan)
        return sum(term.under(kept, plan.two_four if plan else ()) for term in self.costs)


def sparse(term: CostTerm, factor: float) -> CostTerm:
    """Give a term a price with 2:4 weights: allowed at even widths, and never more than the dense one."""

    def two_four(n_in: int, n_out: int) -> float:
        dense = term.price(n_in, n_out)
        return min(dense, factor * dense) if n_in % 2 == n_out % 2 == 0 else dense

    return replace(term, two_four=two_four)


def offered(net: str, price: str, seed: int) -> tuple[Graph, Masked, dict[str, np.ndarray], dict[str, float]]:
    """Return an instance of the other test in which some layers may have the pattern, each for a loss of its own."""
    graph, table, scores = instance(net, price, seed)
    rng = np.random.default_rng(seed + 1)
    chosen = set(rng.choice(len(table.costs), min(MOST, len(table.costs)), replace=False).tolist())
    factors = rng.uniform(0.3, 1.3, len(table.costs))  # some are slower
    costs = tuple(sparse(term, factors[i]) if i in chosen else term for i, term in enumerate(table.costs))
    values = {name: np.append(0, np.cumsum(np.sort(score)[::-1])) for name, score in scores.items()}
    masks = {costs[i].name: float(rng.gamma(1.0, 1.0)) for i in chosen}
    return graph, Masked(costs, table.widths), values, masks


def brute_force_with_masks(
    graph: Graph, table: Table, values: Mapping[str, np.ndarray], masks: Mapping[str, float], budget: float
) -> tuple[float, float]:
    """Return (largest value within the budget or -inf, smallest cost) over all widths and all subsets of masks."""
    best, cheapest = -np.inf, np.inf
    names = [group.name for group in graph.groups]
    subsets = [s for k in range(len(masks) + 1) for s in itertools.combinations(masks, k)]
    for choice in itertools.product(*(table.widths[name] for name in names)):
        kept = dict(zip(names, choice, strict=True))
        value = sum(values[name][width] for name, width in kept.items())
        dense = sum(term.under(kept) for term in table.costs)
        saved = {term.name: term.under(kept) - term.under(kept, masks) for term in table.costs if term.name in masks}
        for subset in subsets:
            cost = dense - sum(saved[name] for name in subset)
            cheapest = min(cheapest, cost)
            if cost <= budget:
                best = max(best, value - sum(masks[name] for name in subset))
    return best, cheapest


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("price", ["product", "staircase", "ragged"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.1, 0.95))
def test_equals_brute_force_over_widths_and_masks(net: str, price: str, seed: int, share: float) -> None:
    graph, table, values, masks = offered(net, price, seed)
    budget = share * table.predict(graph)
    best, cheapest = brute_force_with_masks(graph, table, values, masks, budget)
    if best == -np.inf:
        with pytest.raises(BudgetError, match="smallest reachable") as caught:
            allocate_widths(graph, values, table, budget, masks=masks, gap=0)
        assert f"{cheapest:,.6g}" in caught.value.message
        return
    kept, certificate = allocate_widths(graph, values, table, budget, masks=masks, gap=0)
    plan = KeepPlan.of_widths(kept, certificate.two_four)
    assert certificate.predicted == table.predict(graph, plan) <= budget
    value = sum(values[name][width] for name, width in kept.items()) - sum(masks[name] for name in certificate.two_four)
    assert value == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert certificate.value == pytest.approx(value, rel=1e-9)
    assert certificate.bound >= best - 1e-6 * abs(best)
    for term in table.costs:  # a mask that saves nothing at these widths is never chosen
        if term.name in certificate.two_four:
            assert term.under(kept, certificate.two_four) < term.under(kept)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), net=st.sampled_from(list(NETS)), price=st.sampled_from(list(PRICES)))
def test_an_alternative_never_makes_the_answer_worse(seed: int, net: str, price: str) -> None:
    graph, table, values, masks = offered(net, price, seed)
    budget = 0.7 * table.predict(graph)
    try:
        kept, without = allocate_widths(graph, values, table, budget, gap=0)
    except BudgetError:
        return
    again, same = allocate_widths(graph, values, table, budget, masks={}, gap=0)
    assert (kept, without.two_four) == (again, same.two_four) == (kept, ())
    _, certificate = allocate_widths(graph, values, table, budget, masks=masks, gap=0)
    assert certificate.value >= without.value - 1e-6 * abs(without.value)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), net=st.sampled_from(["chain", "residual", "concat"]))
def test_without_time_for_the_solver_the_answer_still_fits(seed: int, net: str) -> None:
    graph, table, values, masks = offered(net, "staircase", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploypipe.allocation.program.Program.solve", _nothing)
        for share in (0.3, 0.6, 0.9):
            budget = share * table.predict(graph)
            best, _ = brute_force_with_masks(graph, table, values, masks, budget)
            try:
                kept, certificate = allocate_widths(graph, values, table, budget, masks=masks)
            except BudgetError:
                continue
            assert table.predict(graph, KeepPlan.of_widths(kept, certificate.two_four)) <= budget
            assert certificate.value <= best + 1e-9


def _nothing(self: object, *_: object) -> object:
    from deploypipe.allocation.program import Solution  # noqa: PLC0415 - what is patched

    return Solution(None, -np.inf, "time limit")
