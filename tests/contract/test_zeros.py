"""What every method owes that leaves zeros inside weights: contracts C4, C5, C9 and C10 in their terms."""

import dataclasses

import pytest
import torch

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.load import Data
from deploypipe.errors import BudgetError, UsageError
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.training import tuning_hooks
from deploypipe.testing.problems import AlgorithmCase, problem_of, problem_on
from deploypipe.testing.toys import NETS
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.contract.test_algorithms import CASES, FAST, SPARSE
from tests.toys import TOYS

ADMM = {**FAST["admm"], "scheme": "unstructured"}  # it also cuts channels, by other schemes
OPTIONS = {**{name: FAST.get(name, {}) for name in SPARSE}, "admm": ADMM}
ZEROS = {**{name: CASES[name] for name in SPARSE}, "admm": AlgorithmCase(make("admm", ADMM))}
EVERY = pytest.mark.parametrize("name", ZEROS)
EVERYWHERE = pytest.mark.parametrize("net", [*NETS, "fixed_shortcut"])


def task(net: str, share: float = 0.5, **more: object) -> Problem:
    return problem_on(net, share, **more) if net in NETS else problem_of(*TOYS[net](), share, **more)  # type: ignore[arg-type]


@EVERY
@EVERYWHERE
@pytest.mark.parametrize("table", [MacTable(), ParamTable()], ids=["macs", "params"])
def test_what_is_not_zero_is_within_the_budget_and_every_channel_stays(
    name: str, net: str, table: MacTable | ParamTable
) -> None:
    problem = ZEROS[name].learned(task(net, 0.7, table=table))  # dkp leaves depthwise and linear layers whole
    plan = ZEROS[name].plan(problem)
    reached = NONZERO[table.unit](problem.model, problem.graph)
    assert 0.5 * table.predict(problem.graph) < reached <= problem.budget
    assert dict(plan.keep) == {}
    assert plan.algorithm == name
    assert plan.certificate is not None
    assert plan.certificate.predicted == pytest.approx(reached)
    assert torch.isfinite(problem.model(*problem.graph.example)).all()


@EVERY
def test_zeros_are_kept_through_fine_tuning(name: str) -> None:
    problem, method = ZEROS[name].learned(task("residual", 0.4)), ZEROS[name].method
    hooks = tuning_hooks(method, problem, problem.model, method.plan(problem))
    data = Data(problem.data, problem.data, ("a", "b"), "toy", None, "toy")  # type: ignore[arg-type]
    tuned = Trainer(data, TrainSettings(lr=0.2, batch_size=16, weight_decay=0.01)).fit(problem.model, 2, hooks)
    for (key, before), after in zip(problem.model.named_parameters(), tuned.parameters(), strict=True):
        if before.dim() >= 2:
            assert (after[before == 0] == 0).all(), key
            assert not torch.equal(before, after)
    assert NONZERO["MACs"](tuned, problem.graph) <= problem.budget


@EVERY
def test_the_same_seed_gives_the_same_zeros(name: str) -> None:
    first = ZEROS[name].learned(task("plain", 0.4, seed=3)).model
    torch.manual_seed(99)
    second, other = (ZEROS[name].learned(task("plain", 0.4, seed=seed)).model for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@EVERY
def test_out_of_reach_and_latency_are_refused(name: str) -> None:
    problem = task("plain")
    with pytest.raises(BudgetError, match="smallest reachable cost is"):
        ZEROS[name].learned(dataclasses.replace(problem, budget=1.0))
    with pytest.raises(BudgetError):
        ZEROS[name].plan(problem)  # nothing has been set to zero yet
    with pytest.raises(UsageError, match="no dense runtime"):
        Request(algo=name, options=OPTIONS[name], metric="latency").check()
    assert ZEROS[name].method.sparse
