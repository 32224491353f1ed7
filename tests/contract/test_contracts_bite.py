"""The published contracts catch backends and algorithms that are wrong in ways that would go unnoticed."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from deploypipe.algorithms.l2 import L2
from deploypipe.algorithms.options import option
from deploypipe.backends.base import Profile
from deploypipe.backends.onnxruntime import OnnxRuntime
from deploypipe.plan import KeepPlan
from deploypipe.targets import load_target
from deploypipe.testing.algorithms import contracts_of
from deploypipe.testing.backends import BACKEND_CONTRACTS, BackendCase
from deploypipe.testing.problems import AlgorithmCase


class Imprecise(OnnxRuntime):
    """Off by half a percent."""

    def read_run(self, result):
        return {name: 1.005 * value for name, value in super().read_run(result).items()}


class Nameless(OnnxRuntime):
    """Does not say which version it measured."""

    def read_description(self, result):
        return {**super().read_description(result), "version": ""}


class Confused(OnnxRuntime):
    """Takes kernels for layers in an order of its own."""

    def read_profile(self, result, models):
        found = super().read_profile(result, models)["m"]
        order = iter(["stem.weight", "heavy.weight", "first.weight", "shortcut.weight", "head.weight"])
        kernels = [replace(kernel, weight=next(order)) if kernel.weight else kernel for kernel in found.kernels]
        return {"m": Profile(tuple(kernels), found.foreign_load)}


class Credulous(OnnxRuntime):
    """Takes any precision for the one that it has."""

    def build_job(self, model, target):
        return super().build_job(model, target.replace(precision="fp32"))


@pytest.mark.parametrize(
    ("wrong", "contract"),
    [
        (Imprecise, "builds_what_torch_computes"),
        (Nameless, "names_runtime_and_version"),
        (Confused, "times_each_layer_once"),
        (Credulous, "refuses_other_precisions"),
    ],
)
def test_a_wrong_backend_is_caught(wrong, contract, tmp_path):
    case = BackendCase(load_target("cpu"), tmp_path)
    case.__dict__["backend"] = wrong()
    with pytest.raises(AssertionError):
        BACKEND_CONTRACTS[contract](case)


def fewer(plan: KeepPlan) -> KeepPlan:
    """Leave one more channel out of every group that can spare it, and say nothing of it."""
    return plan.replace(keep={name: channels[:-1] or channels for name, channels in plan.keep.items()})


@dataclass(frozen=True)
class Right(L2):
    """Keeps all contracts: what the others are made of."""

    name: ClassVar[str] = "right"


class Modest(Right):
    """Keeps fewer channels than its certificate says."""

    def plan(self, problem):
        return fewer(super().plan(problem))


class Spender(Right):
    """Takes a fifth more than it was given."""

    def plan(self, problem):
        return super().plan(replace(problem, budget=1.2 * problem.budget))


class Lazy(Right):
    """Removes nothing."""

    def plan(self, problem):
        return super().plan(replace(problem, budget=problem.table.predict(problem.graph)))


class Silent(Right):
    """Empties groups where it should say that a budget is out of reach."""

    def plan(self, problem):
        if problem.budget > 1:
            return super().plan(problem)
        return KeepPlan({group.name: () for group in problem.graph.prunable})


class Unseeded(Right):
    """Draws its scores from whatever state chance is in."""

    def score(self, group, stats):
        return torch.rand(group.size)


class Reseeding(Right):
    """Seeds the generator of everybody."""

    def score(self, group, stats):
        torch.manual_seed(stats.seed)
        return torch.rand(group.size)


class Careless(Right):
    """Leaves the user's model changed."""

    def plan(self, problem):
        with torch.no_grad():
            next(problem.model.parameters()).mul_(1.01)
        return super().plan(problem)


class Evaluating(Right):
    """Leaves the user's model in another mode."""

    def plan(self, problem):
        problem.model.eval()
        return super().plan(problem)


class Curious(Right):
    """Reads data without saying so."""

    def plan(self, problem):
        if problem.data is not None:
            problem.data[0]
        return super().plan(problem)


class Peeking(Right):
    """Lets labels decide without saying so."""

    def score(self, group, stats):
        first = super().score(group, stats)
        return first.flip(0) if stats.problem.data[0][1] == stats.problem.data[1][1] else first


class Gated(Right):
    """Leaves a gate in the model."""

    def repair(self, small, problem, plan):
        small.register_forward_hook(lambda module, inputs, output: 1.0 * output)
        return small


class Scaling(Right):
    """Leaves a factor in what is exported."""

    def repair(self, small, problem, plan):
        forward = small.forward
        small.forward = lambda x: forward(torch.where(x > 1e9, torch.zeros_like(x), x))
        return small


class Frozen(Right):
    """Leaves a layer that cannot be trained."""

    def repair(self, small, problem, plan):
        next(small.parameters()).requires_grad_(False)
        return small


class Sharing(Right):
    """Hands out parameters of the user's model."""

    def repair(self, small, problem, plan):
        head = problem.model.get_submodule("head.2")
        small.get_submodule("head.2").bias = head.bias
        return small


class Anonymous(Right):
    """Does not sign its plan."""

    def plan(self, problem):
        return super().plan(problem).replace(algorithm="")


@dataclass(frozen=True)
class Untaught(Right):
    """Says that it trains, and does not."""

    train_epochs: int = option(1, "epochs", low=0)

    def train(self, problem, trainer):
        return problem.model


class Halved(Right):
    """Leaves weights in half precision."""

    def train(self, problem, trainer):
        return trainer.fit(problem.model, 1).to(torch.bfloat16).float().half()


class Wrapping(Right):
    """Puts another kind of module where a plain one was."""

    def repair(self, small, problem, plan):
        small.head[0] = type("Pool", (nn.AdaptiveAvgPool2d,), {})(1)
        return small


@pytest.mark.parametrize(
    ("wrong", "contract", "why"),
    [
        (Modest, "macs_are_within_the_budget-residual", "the certificate states another cost"),
        (Spender, "macs_are_within_the_budget-residual", "MACs of"),
        (Spender, "parameters_are_within_the_budget-residual", "params of"),
        (Lazy, "masked_equals_sliced-residual", "nothing was removed"),
        (Silent, "no_group_is_emptied-residual", "was accepted"),
        (Unseeded, "same_seed_same_plan-residual", "global generator"),
        (Reseeding, "same_seed_same_plan-residual", "global generator"),
        (Careless, "the_model_is_left_as_it_was-residual", "were changed"),
        (Evaluating, "the_model_is_left_as_it_was-residual", "its mode was changed"),
        (Curious, "only_declared_data_is_read-plain", "samples were read"),
        (Peeking, "only_declared_labels_are_read-plain", "labels decide"),
        (Gated, "only_plain_modules_are_left-residual", "hooks were left"),
        (Wrapping, "only_plain_modules_are_left-residual", "modules were added"),
        (Scaling, "exported_without_gates_and_equal-residual", "left in the exported model"),
        (Frozen, "parameters_are_trainable_and_their_own-residual", "cannot be trained"),
        (Sharing, "parameters_are_trainable_and_their_own-residual", "memory is shared"),
        (Anonymous, "plans_are_signed_and_survive_the_disk-residual", "it is signed by"),
        (Untaught, "training_leaves_plain_modules-residual", "nothing was trained"),
        (Halved, "half_precision_leaves_single_precision-residual", "float16"),
    ],
)
def test_a_wrong_algorithm_is_caught(wrong, contract, why):
    right = AlgorithmCase(Right())
    if contract in contracts_of(right):
        contracts_of(right)[contract](right)
    case = AlgorithmCase(wrong(), ("training",) if hasattr(wrong, "train") else ())
    with pytest.raises(AssertionError, match=why):
        contracts_of(case)[contract](case)
