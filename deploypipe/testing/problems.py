"""What contracts of algorithms are tried with: a problem on a small network, and an algorithm as the pipeline runs it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from deploypipe.algorithms.base import Problem
from deploypipe.compact import compact, mask
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.load import Data
from deploypipe.graph import trace
from deploypipe.pipeline.training import trained
from deploypipe.plan import KeepPlan
from deploypipe.testing.toys import NETS
from deploypipe.training.settings import TrainSettings


class Selection(Dataset[Any]):
    """Selection data that remembers what was read."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs, self.read = inputs, set[int]()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.add(index)
        return self.inputs[index], index % 2


def inputs_like(example: Tensor, n: int = 64, seed: int = 0) -> Tensor:
    """Return (n, ...) random inputs of the shape of an example."""
    return torch.randn(n, *example.shape[1:], generator=torch.Generator().manual_seed(seed))


def problem_on(net: str, share: float = 0.5, seed: int = 0, table: MacTable | ParamTable | None = None) -> Problem:
    """Return the problem of pruning one of the small networks, whose weights are always the same, to a share of its cost."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = NETS[net](), torch.randn(2, 3, 8, 8)
    return problem_of(model, (example,), share, seed, table)


def problem_of(
    model: nn.Module, example: tuple[Any, ...], share: float, seed: int = 0, table: MacTable | ParamTable | None = None
) -> Problem:
    """Return the problem of pruning a model to a share of its cost; its batch norms get values that betray a lost entry."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.3, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    graph, table = trace(model.eval(), example), table or MacTable(multiple=1)
    return Problem(model, graph, table, share * table.predict(graph), Selection(inputs_like(example[0])), seed)


@dataclass(frozen=True, eq=False)
class AlgorithmCase:
    """One algorithm, with options that make it quick.

    Attributes:
        method: The algorithm.
        needs: What it says that it needs of "data", "labels" and "training".
    """

    method: Any
    needs: tuple[str, ...] = ()
    _solved: dict[str, tuple[Problem, KeepPlan]] = field(default_factory=dict, repr=False)

    @property
    def cuts(self) -> bool:
        """Whether channels go; otherwise its result is zeros inside weights."""
        return not getattr(self.method, "sparse", False)

    @property
    def trains(self) -> bool:
        """Whether it trains before it plans."""
        return hasattr(self.method, "train")

    def learned(self, problem: Problem, precision: str = "fp32") -> Problem:
        """Return what planning starts from: the trained model, if the method trains before it plans."""
        if not self.trains:
            return problem
        assert problem.data is not None
        data = Data(problem.data, problem.data, ("a", "b"), "toy", None, "toy")
        settings = TrainSettings(lr=0.01, batch_size=32, seed=problem.seed, precision=precision)
        return dataclasses.replace(problem, model=trained(self.method, problem, data, settings)[0])

    def plan(self, problem: Problem) -> KeepPlan:
        """Return the method's plan."""
        found: KeepPlan = self.method.plan(problem)
        return found

    def finished(self, problem: Problem, plan: KeepPlan) -> nn.Module:
        """Return the compacted model, repaired where the method does."""
        small = compact(problem.model, problem.graph, plan)
        found: nn.Module = self.method.repair(small, problem, plan) if hasattr(self.method, "repair") else small
        return found

    def solved(self, net: str) -> tuple[Problem, KeepPlan]:
        """Return the problem as planning meets it, and the plan: made once for all contracts, which leave both alone."""
        if net not in self._solved:
            problem = self.learned(problem_on(net))
            self._solved[net] = problem, self.plan(problem)
        return self._solved[net]


def equal_when_masked(problem: Problem, plan: KeepPlan) -> None:
    """Assert that the compacted model computes what the model with masked channels does."""
    x = inputs_like(problem.graph.example[0], 64, seed=1)
    with torch.no_grad():
        masked, sliced = mask(problem.model, problem.graph, plan)(x), compact(problem.model, problem.graph, plan)(x)
        dense = problem.model(x)
    off = float((masked - sliced).abs().max() / dense.abs().max())
    assert off <= 1e-5, f"compacted and masked differ by {off:.1e} of the largest output"


def only_plain(after: nn.Module, before: nn.Module) -> None:
    """Assert that a model consists of the same modules as before, without hooks."""
    kinds = [[type(module) for module in model.modules()] for model in (after, before)]
    assert kinds[0] == kinds[1], "modules were added, removed or replaced"
    hooked = [m for m in after.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooked, f"hooks were left on {hooked}"
