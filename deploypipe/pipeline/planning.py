"""Choose channels; with a latency budget, measure what was chosen, correct the table by that, and choose again.

A table that is right within two percent leaves a plan two percent over its budget every other time. What a model takes does
not depend on its weights, so the chosen one is built and measured before it is trained.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from deploypipe import saved
from deploypipe.algorithms.base import Problem
from deploypipe.allocation.budget import parse_budget
from deploypipe.compact import compact
from deploypipe.errors import BudgetError
from deploypipe.latency.table import LatencyTable
from deploypipe.measurement import Latency, Round
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.sparsify import patterned
from deploypipe.pipeline.stages import Device
from deploypipe.pipeline.valuing import choose
from deploypipe.plan import KeepPlan
from deploypipe.profiler.export import exported
from deploypipe.store import Kept, Store
from deploypipe.types import Graph
from deploypipe.worth.heldout import HeldOut

MOST_CORRECTIONS = 2
SLACK = 0.03  # of the budget left unused, above which the table is corrected too: it was far too careful
ROUNDS = "plan-rounds.json"
REFUSED = "refused.json"  # instead of a plan: after correction the budget cannot be reached


@dataclass(frozen=True, eq=False)
class Planner:
    """Chooses the plan of one run.

    Attributes:
        problem: What the algorithm is asked.
        key: What the plan depends on besides the table's correction.
        dense: Gives the built dense model.
        meter: Measures what widths are worth, if the request wants that.
    """

    request: Request
    store: Store
    device: Device
    problem: Problem
    key: Sequence[object]
    dense: Callable[[], Kept[Path]]
    meter: HeldOut | None = None

    def once(self) -> Kept[KeepPlan]:
        """Ask the algorithm; counts (MACs, parameters) need no correction."""
        return self.store.keep("plan", [2, *self.key], lambda folder: self._choose(self.problem, folder), _read_plan)

    def measured(self, table: LatencyTable) -> Kept[KeepPlan]:
        """Ask the algorithm, measure its plan, and ask again with a corrected table, at most twice, if it misses the budget.

        It is asked again, too, if much of the budget is left. Of the plans that fit, the slowest one is taken (it keeps most),
        and if none does, the one that misses it least.
        """
        plans, rounds = [self._round(table, 1, None)], list[Kept[Round]]()
        while True:
            rounds.append(self._measured(table, plans[-1], rounds))
            latest = rounds[-1].value
            if len(rounds) > MOST_CORRECTIONS or (latest.fits and latest.upper_us >= (1 - SLACK) * latest.limit_us):
                break
            try:
                plans.append(self._round(table, len(rounds) + 1, rounds[-1]))
            except BudgetError as error:
                self.problem.reporter.note(f"after measuring, {error.message}")
                break
            now, former = plans[-1].value, plans[-2].value
            if (now.keep, now.two_four) == (former.keep, former.two_four):  # nothing lies between this plan and the budget
                plans.pop()
                break
        return self._settle(plans, rounds)

    def _round(self, table: LatencyTable, number: int, after: Kept[Round] | None) -> Kept[KeepPlan]:
        factor = after.value.next_factor if after else 1.0
        problem = replace(self.problem, table=table.corrected(self.problem.graph, factor))
        stage = f"plan-{number}"
        return self.store.keep(
            stage,
            [1, *self.key, after],
            lambda folder: self._choose(problem, folder, stage, refusable=number > 1),
            lambda root: _read_plan(root, stage),
        )

    def _choose(self, problem: Problem, folder: Path, subfolder: str = "", *, refusable: bool = False) -> None:
        """Write the plan; if it may be, also that there is none: a run that is taken up again need not look once more."""
        (folder / subfolder).mkdir(exist_ok=True)
        try:
            plan = choose(self.request, problem, self.meter, folder / subfolder)
        except BudgetError as error:
            if not refusable:
                raise
            (folder / subfolder / REFUSED).write_text(json.dumps(vars(error)) + "\n")
            return
        plan = plan.replace(fingerprint=problem.graph.fingerprint)
        plan.check(problem.graph)
        plan.save(folder / subfolder / saved.PLAN)

    def _measured(self, table: LatencyTable, plan: Kept[KeepPlan], before: Sequence[Kept[Round]]) -> Kept[Round]:
        """Build the planned model with the weights that it has and measure it in turns with the dense one."""
        stage, problem, request = f"measure-{plan.stage}", self.problem, self.request
        factor = before[-1].value.next_factor if before else 1.0
        dense = self.dense()

        def measure(folder: Path) -> None:
            with tempfile.TemporaryDirectory(prefix="deploypipe-") as name:
                small = compact(problem.model, problem.graph, plan.value)
                rates = self.device.target.rates
                small = patterned(small, problem.graph.example, request.sparsity, plan.value, rates)
                files = {"dense": dense.value, "pruned": built(small, problem.graph, self.device, Path(name))}
                times = self.device.bench(files, table.predict(problem.graph))
                found = {side: Latency(**timing) for side, timing in times.items()}
            limit = parse_budget(request.budget, request.metric, found["dense"].median_us)
            predicted = factor * table.predict(problem.graph, plan.value)
            absolute = not request.budget_is_share
            result = Round(factor, problem.budget, predicted, limit, found["pruned"], found["dense"], absolute)
            (folder / plan.stage).mkdir()
            (folder / plan.stage / "latency.json").write_text(json.dumps(asdict(result), indent=1) + "\n")

        def read(root: Path) -> Round:
            return Round.from_json(json.loads((root / plan.stage / "latency.json").read_text()))

        target = self.device.target
        key = [2, plan, dense, asdict(target.build), asdict(target.measure), self.device.facts, request.budget]
        return self.store.keep(stage, key, measure, read)

    def _settle(self, plans: Sequence[Kept[KeepPlan]], rounds: Sequence[Kept[Round]]) -> Kept[KeepPlan]:
        chosen = best([kept.value for kept in rounds])

        def settle(folder: Path) -> None:
            plans[chosen].value.save(folder / saved.PLAN)
            state = {"chosen": chosen, "rounds": [asdict(kept.value) for kept in rounds]}
            (folder / ROUNDS).write_text(json.dumps(state, indent=1) + "\n")

        return self.store.keep("plan", [2, *plans, *rounds], settle, _read_plan)


def best(rounds: Sequence[Round]) -> int:
    """Return which plan to take: the slowest of those that fit, else the one that misses the budget least."""
    fitting = [i for i, found in enumerate(rounds) if found.fits]
    if fitting:
        return max(fitting, key=lambda i: rounds[i].upper_us / rounds[i].limit_us)
    return min(range(len(rounds)), key=lambda i: rounds[i].upper_us / rounds[i].limit_us)


def read_rounds(root: Path) -> tuple[int, tuple[Round, ...]]:
    """Return which round was taken and all of them; no rounds if nothing was measured while planning."""
    if not (root / ROUNDS).is_file():
        return 0, ()
    state = json.loads((root / ROUNDS).read_text())
    return state["chosen"], tuple(Round.from_json(found) for found in state["rounds"])


def built(model: nn.Module, graph: Graph, device: Device, folder: Path) -> Path:
    """Export, simplify and build `model` in `folder`; return the built file."""
    artifact = folder / f"built{device.backend.suffix}"
    device.build(exported(model, graph.example, device.target, folder), artifact)
    return artifact


def _read_plan(root: Path, subfolder: str = "") -> KeepPlan:
    if (root / subfolder / REFUSED).is_file():
        raise BudgetError(**json.loads((root / subfolder / REFUSED).read_text()))
    return KeepPlan.load(root / subfolder / saved.PLAN)
