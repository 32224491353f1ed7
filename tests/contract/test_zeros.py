"""What every method owes that leaves zeros inside weights: contracts C4, C5, C9 and C10 in their terms."""

import dataclasses

import pytest
import torch

from deploypipe.count import MacTable, ParamTable
from deploypipe.errors import BudgetError, UsageError
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.training import tuning_hooks
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.contract.test_algorithms import FAST, SPARSE, Data, algorithm, inputs_like, learned, make, task

OPTIONS = {"admm": ("unstructured",)}  # methods that also cut channels: the schemes that leave zeros
EVERY = pytest.mark.parametrize("name", [*SPARSE, "admm"])
EVERYWHERE = pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "fixed_shortcut"])


@pytest.fixture(autouse=True)
def _sparse_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAST, "admm", {**FAST["admm"], "scheme": "unstructured"})


@EVERY
@EVERYWHERE
@pytest.mark.parametrize("table", [MacTable(), ParamTable()], ids=["macs", "params"])
def test_what_is_not_zero_is_within_the_budget_and_every_channel_stays(
    name: str, net: str, table: MacTable | ParamTable
) -> None:
    problem = learned(name, task(net, 0.7, table=table))  # dkp leaves depthwise and linear layers whole
    plan = algorithm(name).plan(problem)
    reached = NONZERO[table.unit](problem.model, problem.graph)
    assert 0.5 * table.predict(problem.graph) < reached <= problem.budget
    assert dict(plan.keep) == {}
    assert plan.algorithm == name
    assert plan.certificate is not None
    assert plan.certificate.predicted == pytest.approx(reached)
    assert torch.isfinite(problem.model(*problem.graph.example)).all()


@EVERY
def test_zeros_are_kept_through_fine_tuning(name: str) -> None:
    problem = learned(name, task("residual", 0.4))
    method = algorithm(name)
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
    first = learned(name, task("plain", 0.4, seed=3)).model
    torch.manual_seed(99)
    second, other = (learned(name, task("plain", 0.4, seed=seed)).model for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@EVERY
def test_out_of_reach_and_latency_are_refused(name: str) -> None:
    problem = task("plain")
    with pytest.raises(BudgetError, match="smallest reachable cost is"):
        learned(name, dataclasses.replace(problem, budget=1.0))
    with pytest.raises(BudgetError):
        algorithm(name).plan(problem)  # nothing has been set to zero yet
    with pytest.raises(UsageError, match="no dense runtime"):
        Request(algo=name, options=FAST[name], metric="latency").check()
    assert make(name, FAST[name]).sparse
    assert inputs_like(problem.graph.example[0]).shape[0] == 64
