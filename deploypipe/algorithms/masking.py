"""The plan of methods whose result is zeros inside weights."""

from dataclasses import replace
from typing import Any

from deploypipe.algorithms.base import Problem, signed
from deploypipe.allocation.allocate import unproved
from deploypipe.errors import BudgetError
from deploypipe.ingredients.density import prices, require_within
from deploypipe.plan import KeepPlan


def masked_plan(algorithm: Any, problem: Problem) -> KeepPlan:
    """Return the plan of a method whose result is zeros inside weights: every channel stays.

    Its cost counts weights that are not zero.

    Raises:
        BudgetError: The model costs more than the budget.
    """
    graph, price = problem.graph, prices(problem.model, problem.graph, problem.table.unit)
    named = dict(problem.model.named_parameters())
    kept = {name: int((named[name] != 0).sum()) for name in price.sizes}
    if price.cost(kept) > problem.budget:
        require_within(price.cost(dict.fromkeys(price.sizes, 1)), problem.budget, price)
        raise BudgetError(
            f"the weights that are not zero cost {price.cost(kept):,.6g} {price.unit}, the budget is {problem.budget:,.6g}",
            at=algorithm.name,
            fix="let the method train first (deploypipe build does): the zeros are in the model that it returns",
        )
    share = sum(kept.values()) / sum(price.sizes.values())
    plain = unproved(graph, graph.kept(), problem.table, problem.budget, share, "zeros")
    return signed(algorithm, KeepPlan({}, graph.fingerprint, certificate=replace(plain, predicted=price.cost(kept))), {})
