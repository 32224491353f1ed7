"""Lottery tickets (Frankle and Carbin, ICLR 2019): counts, bitwise rewinding, zeros that stay, the order of the controls."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem
from deploypipe.algorithms.lth import Lth, masked, ranks, shuffled, weights_of
from deploypipe.count import MacTable, ParamTable
from deploypipe.data.batches import Data
from deploypipe.errors import BudgetError, UsageError
from deploypipe.graph import trace
from deploypipe.ingredients.density import prices
from deploypipe.ingredients.sparsity import NONZERO
from deploypipe.pipeline.training import tuning_hooks
from deploypipe.testing.problems import problem_of as problem_with
from deploypipe.training.evaluate import evaluate
from deploypipe.training.fresh import fresh
from deploypipe.training.masked import MaskedWeights
from deploypipe.training.rewind import Rewind
from deploypipe.training.settings import TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toy_task import EVEN, net, problem_of, toy_data, trained_net, trainer
from tests.toys import Fn, cbr, conv, head

QUICK: dict[str, Any] = {"rounds": 3, "train_epochs": 1}


class Watched(Trainer):
    """Remembers what every round started from, which masks it had and how it ended."""

    rounds: list[tuple[nn.Module, dict[str, Tensor], nn.Module]]

    def fit(self, model: nn.Module, epochs: int, hooks: Any = (), **changes: Any) -> nn.Module:
        end = super().fit(model, epochs, hooks, **changes)
        self.rounds = [*getattr(self, "rounds", []), (model, hooks[0].masks, end)]
        return end


def watched() -> Watched:
    return Watched(toy_data(), trainer().settings)


def small_problem(share: float = 0.2, table: Any = None) -> Problem:
    return problem_of(trained_net(widths=EVEN), share, table or ParamTable())


def alive(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def test_every_round_removes_the_same_share_of_what_is_left_and_nothing_returns() -> None:
    task, seen, method = small_problem(), watched(), make("lth", QUICK)
    ticket = method.train(task, seen)
    price = prices(task.model, task.graph, "params")
    n, target = sum(price.sizes.values()), task.budget - price.rest
    masks = [round_masks for _, round_masks, _ in seen.rounds]
    masks.append({name: weight != 0 for name, weight in weights_of(task, ticket).items()})
    for number, found in enumerate(masks):
        assert alive(found) == pytest.approx(n * (target / n) ** (number / 3), abs=3)
    for before, after in itertools.pairwise(masks):
        assert all(bool((before[name] | ~after[name]).all()) for name in before)
    assert NONZERO["params"](ticket, task.graph) <= task.budget


def test_the_largest_at_the_end_of_training_survive_over_all_layers() -> None:
    """The trap: magnitudes of the start, or a threshold counted over weights that are gone already."""
    task, seen, method = small_problem(), watched(), make("lth", QUICK)
    method.train(task, seen)
    for (_, masks, end), (_, later, _) in itertools.pairwise(seen.rounds):
        ends = weights_of(task, end)
        kept = torch.cat([ends[name][later[name]].abs() for name in masks])
        gone = torch.cat([ends[name][masks[name] & ~later[name]].abs() for name in masks])
        assert len(gone)
        assert kept.min() >= gone.max()


@pytest.mark.parametrize("step", [0, 5])
def test_rewinding_is_bitwise_with_batch_norm_statistics(step: int) -> None:
    task, seen = small_problem(), watched()
    ticket = make("lth", {**QUICK, "rewind": step}).train(task, seen)
    origin = fresh(task.model, task.seed)
    if step:  # the same training again, stopped there by hand
        rewind = Rewind(step)
        first = replace(seen.settings, epochs=1, distill=0.0)
        Trainer(toy_data(), first).fit(origin, 1, [rewind], distill=0.0)
        origin = rewind.rewound(origin)
    survivors = {name: weight != 0 for name, weight in weights_of(task, ticket).items()}
    for name, tensor in origin.state_dict().items():
        mask = survivors.get(name, torch.ones_like(tensor, dtype=torch.bool))
        found = ticket.state_dict()[name]
        assert torch.equal(found[mask], tensor[mask]), name
        assert (found[~mask] == 0).all()
    assert (ticket[0][1].running_mean == 0).all() == (step == 0)
    assert not torch.equal(ticket[0][0].weight, task.model[0][0].weight)


def test_the_state_is_that_after_so_many_steps() -> None:
    model, rewind = nn.Linear(2, 2), Rewind(2)
    states = []
    for step in range(4):
        with torch.no_grad():
            model.weight += 1
        rewind.on_step_end(model, step)
        states.append(model.weight.detach().clone())
    assert torch.equal(rewind.rewound(nn.Linear(2, 2)).weight, states[1])
    other = Rewind(2)
    other.restore(rewind.state())
    assert torch.equal(other.rewound(nn.Linear(2, 2)).weight, states[1])
    with pytest.raises(RuntimeError):
        Rewind(9).rewound(model)


def test_pruned_weights_stay_zero_while_a_ticket_trains() -> None:
    task, seen = small_problem(), watched()
    ticket = make("lth", QUICK).train(task, seen)
    for start, masks, end in seen.rounds:
        for name, mask in masks.items():
            assert (dict(start.named_parameters())[name][~mask] == 0).all()
            assert (dict(end.named_parameters())[name][~mask] == 0).all()
    tuned = trainer(lr=0.2).fit(ticket, 2, [MaskedWeights.of_zeros(ticket)])
    same = [((a == 0) == (b == 0)).all() for a, b in zip(ticket.parameters(), tuned.parameters(), strict=True) if a.dim() > 1]
    assert all(same)


def test_survivors_of_a_layer_that_began_at_zero_learn_and_nothing_else_does() -> None:
    """Zero is where the layer starts, as the last one of a residual branch does; the masks are those of the rounds."""
    torch.manual_seed(0)
    model = Fn(lambda m, x: m.head(F.relu(m.a(x) + m.z(m.a(x)))), a=cbr(3, 8), z=conv(8, 8, bias=False), head=head(8))
    nn.init.zeros_(model.z.weight)
    task = problem_with(model, (torch.randn(2, 3, 8, 8),), 0.6, table=ParamTable())
    own = Trainer(Data(task.data, task.data, ("a", "b"), "toy", None, ""), TrainSettings(lr=0.05, batch_size=32, distill=0.0))
    method = make("lth", {"rounds": 1, "train_epochs": 1, "start": "given"})
    found = method.train(task, own)
    n = int((found.z.weight != 0).sum())
    assert 0 < n < found.z.weight.numel()
    assert found.z.weight.abs().max() < 1e-30, "where the start was"
    plan = method.plan(replace(task, model=found))
    tuned = own.fit(found, 1, tuning_hooks(method, task, found, plan))
    assert int((tuned.z.weight != 0).sum()) == n
    assert tuned.z.weight.abs().max() > 1e-6
    assert plan.certificate.predicted == NONZERO["params"](tuned, task.graph) <= task.budget  # type: ignore[union-attr]


def test_biases_and_norms_are_never_pruned() -> None:
    ticket = make("lth", QUICK).train(small_problem(0.05), trainer())
    assert all((p != 0).all() for name, p in ticket.named_parameters() if name.endswith(("1.weight",)) and p.dim() == 1)


def test_controls_share_the_masks() -> None:
    task = small_problem()
    found = {
        c: make("lth", {**QUICK, "control": c}).train(task, trainer()) for c in ("ticket", "reinit", "random-mask", "finetune")
    }
    masks = {c: {n: w != 0 for n, w in weights_of(task, model).items()} for c, model in found.items()}
    for name, mask in masks["ticket"].items():
        assert torch.equal(mask, masks["reinit"][name])
        assert torch.equal(mask, masks["finetune"][name])
        assert mask.sum() == masks["random-mask"][name].sum()
        both = mask & masks["ticket"][name]
        assert not torch.equal(weights_of(task, found["reinit"])[name][both], weights_of(task, found["ticket"])[name][both])
    origin = weights_of(task, fresh(task.model, task.seed))
    shared = masks["random-mask"]["1.0.weight"]
    assert not torch.equal(shared, masks["ticket"]["1.0.weight"])
    assert torch.equal(weights_of(task, found["random-mask"])["1.0.weight"][shared], origin["1.0.weight"][shared])


def test_without_going_back_the_survivors_keep_what_the_last_round_taught_them() -> None:
    task, seen = small_problem(), Watched(toy_data(100), trainer().settings)
    found = make("lth", {"rounds": 2, "train_epochs": 1, "control": "finetune"}).train(task, seen)
    end, pruned = seen.rounds[-1][2], weights_of(task, found)
    for name, tensor in end.state_dict().items():
        alive = pruned[name] != 0 if name in pruned else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(found.state_dict()[name][alive], tensor[alive]), name
    origin = fresh(task.model, task.seed)
    alive = found[1][0].weight != 0
    assert (found[1][0].weight[alive] != origin[1][0].weight[alive]).any()


def test_every_round_trains_for_as_many_epochs() -> None:
    seen = Watched(toy_data(100), trainer().settings)
    make("lth", {"rounds": 3, "train_epochs": 2}).train(small_problem(), seen)
    assert len(seen.rounds) == 3
    assert seen.n_epochs == 6


def test_rounds_learn_from_the_labels_alone() -> None:
    """What a teacher says would decide which weights are the largest in the end."""
    task, settings = small_problem(), replace(trainer().settings, distill=0.9)
    method = make("lth", {"rounds": 1, "train_epochs": 1, "control": "finetune"})
    first, second = (method.train(task, Trainer(toy_data(100), settings, teacher=net(seed))) for seed in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# --- the experiment of the paper, in a second for each arm


def blobs(n: int, seed: int) -> TensorDataset:
    centres = 0.35 * torch.randn(10, 432, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % 10
    return TensorDataset(centres[labels] + torch.randn(n, 432, generator=torch.Generator().manual_seed(seed)), labels)


def trained_ticket(control: str, seed: int) -> float:
    given = Data(blobs(1000, seed + 10), blobs(1000, 99), (), f"blobs {seed}", None, "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(432, 100), nn.ReLU(), nn.Linear(100, 10)).eval()
    graph, table = trace(model, (torch.zeros(1, 432),)), ParamTable()
    task = Problem(model, graph, table, 0.05 * table.predict(graph), given.train, seed)
    own = Trainer(given, TrainSettings(batch_size=50, distill=0.0, weight_decay=0.0, seed=seed))
    start = Lth(rounds=4, train_epochs=3, control=control).train(task, own)
    return evaluate(own.fit(start, 4, [MaskedWeights.of_zeros(start)]), given.test).top1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_ticket_learns_better_than_its_masks_with_new_weights_and_those_better_than_random_masks(seed: int) -> None:
    found = {control: trained_ticket(control, seed) for control in ("ticket", "reinit", "random-mask")}
    assert found["ticket"] > found["reinit"] + 0.02
    assert found["reinit"] > found["random-mask"] + 0.02


# --- parts


def test_one_threshold_or_the_same_share_of_every_layer() -> None:
    task, shares = small_problem(0.3), {}
    for scope in ("global", "layer"):
        ticket = make("lth", {**QUICK, "scope": scope}).train(task, trainer())
        shares[scope] = [float((w != 0).float().mean()) for w in weights_of(task, ticket).values()]
        assert NONZERO["params"](ticket, task.graph) <= task.budget
    assert max(shares["layer"]) - min(shares["layer"]) < 0.04  # the head has 64 weights
    assert max(shares["global"]) - min(shares["global"]) > 0.1


def test_ranks_are_shares_of_the_survivors() -> None:
    weight, mask = torch.tensor([[3.0, -1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(ranks(weight, mask), torch.tensor([[1.0, 1 / 3, 2 / 3, 0.0]], dtype=torch.float64))
    assert shuffled(mask, "w", 0).sum() == 3


def test_macs_as_budget_and_what_cannot_be_reached() -> None:
    task = small_problem(0.2, MacTable())
    method = make("lth", QUICK)
    ticket = method.train(task, trainer())
    assert 0.19 < NONZERO["MACs"](ticket, task.graph) / task.table.predict(task.graph) <= 0.2
    plan = method.plan(replace(task, model=ticket))
    assert (dict(plan.keep), plan.algorithm) == ({}, "lth")
    own = trainer()
    with pytest.raises(BudgetError, match="smallest reachable"):
        method.train(replace(task, budget=1.0), own)
    assert own.n_epochs == 0, "before anything is trained"
    with pytest.raises(UsageError, match="only 12 steps"):
        make("lth", {**QUICK, "rewind": 13}).train(task, trainer())


def test_masking_copies() -> None:
    model = trained_net(widths=EVEN)
    before = model[1][0].weight.detach().clone()
    assert (masked(model, {"1.0.weight": torch.zeros_like(before, dtype=torch.bool)})[1][0].weight == 0).all()
    assert torch.equal(model[1][0].weight, before)
