"""Choose how many channels stay in every group: the most valuable widths that fit a budget."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deploypipe.allocation.program import Program
from deploypipe.allocation.search import Choice, Search, Values
from deploypipe.branch import together
from deploypipe.cost import CostTable
from deploypipe.errors import UsageError
from deploypipe.plan import Certificate, KeepPlan
from deploypipe.types import Graph


def allocate(
    graph: Graph,
    scores: Mapping[str, ArrayLike],
    table: CostTable,
    budget: float,
    *,
    candidates: Mapping[str, tuple[int, ...]] | None = None,
    removable: Sequence[str] = (),
    gap: float = 1e-3,
    time_limit_s: float = 60.0,
) -> KeepPlan:
    """Return the plan that keeps the largest sum of scores within the budget.

    Within a group the channels with the highest scores stay (of equal ones, the lower index). Scores are summed over groups as
    they are: make them comparable first (`deploypipe.algorithms.base` does for its criteria).

    Args:
        graph: The traced model.
        scores: Group -> (C,) scores, higher = keep. Groups without scores stay whole; fixed groups always do.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.
        candidates: Group -> numbers of channels to choose from, instead of the table's.
        removable: Groups that may be left without channels, so that their branch goes: `removal.removable` names them.
        gap: Relative gap of the value given up at which the solver may stop.
        time_limit_s: Seconds after which the best plan so far is returned, with its gap.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
        UsageError: Scores of wrong shape or not finite, or candidates out of range.
        ModelError: Scores for a group that the graph does not have.

    Example:
        >>> allocate(graph, {"conv1": weight.abs().sum((1, 2, 3))}, MacTable(), budget=1e6)  # doctest: +SKIP
    """
    orders, values = {}, {}
    for name, given in scores.items():
        score = _vector(given, f"scores of group '{name}'", graph.group(name).size)
        if not graph.group(name).fixed:
            orders[name] = ranking(score)
            values[name] = prefix_sums(score[orders[name]])
    if removable:
        candidates = vanishing(table.candidates(graph) if candidates is None else candidates, removable)
    kept, certificate = allocate_widths(graph, values, table, budget, candidates=candidates, gap=gap, time_limit_s=time_limit_s)
    return plan_of(graph, orders, kept, certificate)


def prefix_sums(scores: ArrayLike) -> Values:
    """Return the (C + 1,) values of keeping the first w channels of an order, from their (C,) scores in that order.

    >>> prefix_sums([3.0, 1.0]).tolist()
    [0.0, 3.0, 4.0]
    """
    return np.concatenate([[0.0], np.cumsum(scores)])


def vanishing(candidates: Mapping[str, tuple[int, ...]], removable: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the candidate widths, with none at all among those of the removable groups."""
    return {**candidates, **{name: (0, *candidates.get(name, ())) for name in removable}}


def ranking(score: Values) -> NDArray[np.int64]:
    """Return the channels from the one to keep longest to the first to go; of equal scores the lower index stays longer."""
    return np.argsort(-score, kind="stable")


def plan_of(graph: Graph, orders: Mapping[str, ArrayLike], kept: Mapping[str, int], certificate: Certificate) -> KeepPlan:
    """Return the plan that keeps the first `kept[group]` channels of each group's order (best first)."""
    keep = first_channels(orders, {name: kept[name] for name in orders})
    return KeepPlan(keep, fingerprint=graph.fingerprint, certificate=certificate, two_four=certificate.two_four)


def first_channels(orders: Mapping[str, ArrayLike], kept: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the first `kept[group]` channels of each group's order, ascending, for the groups that `kept` names."""
    return {name: tuple(sorted(np.asarray(order)[: kept[name]].tolist())) for name, order in orders.items() if name in kept}


def allocate_widths(
    graph: Graph,
    values: Mapping[str, ArrayLike],
    table: CostTable,
    budget: float,
    *,
    candidates: Mapping[str, tuple[int, ...]] | None = None,
    masks: Mapping[str, float] | None = None,
    gap: float = 1e-3,
    time_limit_s: float = 60.0,
) -> tuple[dict[str, int], Certificate]:
    """Return how many channels stay in every group of the graph, and what was proved about it.

    Maximises the sum over groups of `values[group][kept]`, less the masks that are chosen, subject to
    `table.predict(...) <= budget`. The solver stops when the value given up (against keeping everything) is within `gap` of the
    least possible; the certificate's own `gap` is `(bound - value) / |value|`. The answer is deterministic as long as the time
    limit is not hit. Certificate.status is "whole" (everything fits), "optimal", "relaxed" (large concats, or all where
    branches may go, were priced too low in the proof, or the solver's own answer was over budget by a hair: the bound is valid,
    not tight), "time limit" (the best answer so far), "unsolved" (the solver gave up on numbers that differ too much: a walk
    through the widths gave the answer, nothing is proved) or "infeasible" (the terms do not fit, the table's prediction does).
    Layers behind such concats are offered no masks; the proof is about the others.

    Args:
        graph: The traced model.
        values: Group -> (C + 1,) value of keeping the best w channels, w = 0 ... C; entry 0 is only used if 0 is a candidate,
            for a group whose branch may go. Only differences within a group matter. Groups without values stay whole; fixed
            groups always do. Groups of one branch have no channels all at once or not at all (`branch.together`).
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.
        candidates: Group -> numbers of channels to choose from, instead of the table's. The full width is always one.
        masks: Layer -> value given up by making its weights 2:4, for layers that may have them; the table's terms say what that
            saves. The certificate names those chosen.
        gap: Relative gap of the value given up at which the solver may stop.
        time_limit_s: Seconds after which the best answer so far is returned.

    Raises:
        BudgetError: No choice of widths fits; the message names the smallest reachable cost.
        UsageError: Values of wrong shape or not finite, or candidates out of range.
    """
    start = time.monotonic()
    search = _search(graph, values, table, budget, candidates, masks)
    whole = Choice({})
    most = sum(float(search.values[name][list(widths)].max()) for name, widths in search.widths.items())
    most += search.value(whole) - sum(float(search.values[name][-1]) for name in search.widths)
    if search.predict(whole) <= budget:
        return search.whole, search.certificate(whole, most, "whole", start)
    chosen, first = search.solve(gap, start + time_limit_s)
    bound = max(min(search.value(whole) - first.bound, most), search.value(chosen))
    lost = search.value(whole) - search.value(chosen)
    tight = search.exact and (1 - gap) * lost <= first.bound + 1e-6 * max(abs(first.bound), abs(lost))
    status = "relaxed" if first.status == "optimal" and not tight else first.status
    return search.whole | chosen.kept, search.certificate(chosen, bound, status, start)


def cheapest_widths(
    graph: Graph,
    names: Iterable[str],
    table: CostTable,
    budget: float,
    candidates: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, int]:
    """Return how many channels stay in every group when the named ones are chosen to make the model as cheap as possible.

    For methods that look for widths in a way of their own: it says at once that a budget cannot be reached. Widths come from
    `candidates`, or from the table.

    Raises:
        BudgetError: Even they do not fit; the message names the smallest reachable cost.
    """
    search = _search(graph, {name: np.zeros(graph.group(name).size + 1) for name in names}, table, budget, candidates)
    return search.whole | search.cheapest(time.monotonic()).kept


def unproved(graph: Graph, kept: Mapping[str, int], table: CostTable, budget: float, value: float, how: str) -> Certificate:
    """Return the certificate of widths that a method found by itself: their cost, and no bound.

    Args:
        graph: The traced model.
        kept: Group -> number of channels that stay.
        table: What widths cost.
        budget: Upper limit of `table.predict`, in the table's unit.
        value: What the method reached, in its own unit.
        how: How it was found, in a word.
    """
    predicted = table.predict(graph, KeepPlan.of_widths(kept))
    in_us = predicted if table.unit == "us" else None
    return Certificate(value, None, None, in_us, predicted, budget, table.unit, len(graph.prunable), how)


def _search(
    graph: Graph,
    values: Mapping[str, ArrayLike],
    table: CostTable,
    budget: float,
    candidates: Mapping[str, tuple[int, ...]] | None,
    masks: Mapping[str, float] | None = None,
) -> Search:
    if not budget > 0:
        raise UsageError(f"budget must be more than zero, not {budget}", at="allocate", fix="give a share or an amount")
    offered = table.candidates(graph) if candidates is None else candidates
    curves, widths = {}, {}
    for group in graph.prunable:
        if group.name not in values:
            continue
        curves[group.name] = _vector(values[group.name], f"values of group '{group.name}'", group.size + 1, first=1)
        choice = sorted({*offered.get(group.name, ()), group.size})
        if choice[0] == 0:
            _vector(values[group.name], f"values of group '{group.name}', which may vanish,", group.size + 1)
        if choice[0] < 0 or choice[-1] > group.size:
            raise UsageError(
                f"candidate widths of group '{group.name}' reach from {choice[0]} to {choice[-1]}",
                at="allocate",
                fix=f"offer widths from 0 to {group.size}",
            )
        if len(choice) > 1:
            widths[group.name] = tuple(choice)
    sizes = {group.name: group.size for group in graph.groups}
    terms = table.terms(graph)
    known = {term.name: masks[term.name] for term in terms if term.two_four and masks and term.name in masks}
    tied = together(graph, [name for name, choice in widths.items() if choice[0] == 0])
    program = Program(widths, sizes, terms, known)
    for name, others in tied.items():
        for other in others:
            program.imply(name, other)
    return Search(graph, table, budget, widths, curves, sizes, terms, program, tied)


def charged_once(graph: Graph, values: Mapping[str, Values], names: Iterable[str]) -> dict[str, Values]:
    """Return values in which groups that only go together lose once what their branch is worth: the most that one of them says.

    Args:
        graph: The traced model.
        values: Group -> (C + 1,) value of keeping the first w channels.
        names: Groups that may have no channels.
    """
    found, seen, tied = {name: np.array(value) for name, value in values.items()}, set[str](), together(graph, names)
    for name, others in tied.items():
        mutual = [name, *(other for other in others if name in tied.get(other, ()))]
        members = [member for member in mutual if member in found]
        if name not in seen and name in found and len(members) > 1:
            seen |= {*members}
            worth = max(float(found[member][-1] - found[member][0]) for member in members)
            for member in members:
                found[member][0] = found[member][-1] - (worth if member == name else 0.0)
    return found


def _vector(given: Any, what: str, length: int, first: int = 0) -> Values:
    """Return `given` (tensor, array or list) as an array of floats, checked from index `first` on."""
    tensor = given.detach().cpu() if hasattr(given, "detach") else given
    vector = np.asarray(tensor, dtype=np.float64)
    if vector.shape != (length,):
        raise UsageError(f"{what} have shape {vector.shape}, expected ({length},)", at="allocate", fix="one entry per channel")
    if not np.isfinite(vector[first:]).all():
        raise UsageError(f"{what} are not all finite", at="allocate", fix="replace NaN and infinite entries")
    return vector
