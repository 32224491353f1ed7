"""Measured values: what a curve says, what it was measured on, and the search that mends what curves cannot say."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from deploypipe.count import MacTable
from deploypipe.data.load import Data
from deploypipe.errors import ModelError
from deploypipe.graph import trace
from deploypipe.ingredients.removal import removable
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.valuing import held_out
from deploypipe.plan import KeepPlan
from deploypipe.progress import Recorder, Reporter, Silent
from deploypipe.training.checkpoint import state_digest
from deploypipe.training.evaluate import Accuracy
from deploypipe.worth.curves import curves_table, rows
from deploypipe.worth.heldout import Effort, HeldOut, Memo
from deploypipe.worth.sensitivity import Curve, Found, Sensitivity, Trial

CLASSES = 4
EFFORT = Effort(calibration=64, images=80)


class Copies(nn.Module):
    """Four classes, each shown by one signal. `a` and `b` read the same signals, and either suffices; `c` reads weaker ones.

    Attributes:
        weak: How much `c` adds to the logits.
    """

    def __init__(self, weak: float = 0.7) -> None:
        super().__init__()
        names = ("a", "b", "c", "from_a", "from_b", "from_c")
        for name in names:
            layer = nn.Linear(2 * CLASSES if len(name) == 1 else CLASSES, CLASSES, bias=False)
            with torch.no_grad():
                layer.weight.zero_()
                first = CLASSES if name == "c" else 0
                layer.weight[:, first : first + CLASSES] = torch.eye(CLASSES) * (weak if name == "from_c" else 1.0)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        both = self.from_a(torch.relu(self.a(x))) + self.from_b(torch.relu(self.b(x)))
        return 6 * torch.clamp(both, 0, 1) + self.from_c(torch.relu(self.c(x)))


class Watched(Dataset[Any]):
    """Examples that remember which of them were read."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.targets, self.read = x, labels, set[int]()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.add(index)
        return self.x[index], int(self.targets[index])


def examples(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % CLASSES
    noise = 0.2 * torch.randn(n, 2 * CLASSES, generator=torch.Generator().manual_seed(seed))
    return torch.eye(CLASSES)[labels].repeat(1, 2) + noise, labels


def data_of(train: Dataset[Any]) -> Data:
    return Data(train, TensorDataset(torch.empty(0), torch.empty(0)), ("0", "1", "2", "3"), "key", None, "toy")


def task(model: nn.Module, *, train: Dataset[Any] | None = None, memo: Path | None = None, orders: Any = None, seed: int = 0):
    model.eval()
    train = train or TensorDataset(*examples())
    graph = trace(model, examples(1)[0])
    meter = HeldOut(model, graph, data_of(train), memo, seed=seed, effort=EFFORT)
    orders = orders or {group.name: np.arange(group.size) for group in graph.prunable}
    return Sensitivity(graph, MacTable(multiple=1), orders, meter, Silent())


def by_group(curves: tuple[Curve, ...]) -> dict[str, Curve]:
    return {curve.group: curve for curve in curves}


class Shaken(Watched):
    """Examples whose transform draws from the generators of Python, numpy and torch."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, label = super().__getitem__(index)
        shake = random.random() + np.random.rand() + float(torch.rand(()))
        return x + 0.3 * shake, label


def test_every_process_measures_on_the_same_images_though_transforms_draw() -> None:
    model, plan = Copies(), KeepPlan({})
    meters = [task(model, train=Shaken(*examples())).meter for _ in range(2)]
    first, second = (meter.measure(plan) for meter in meters)  # the generators have moved on in between
    assert first == second


# --- curves ----------------------------------------------------------------------------------------------------------


def test_a_group_that_does_nothing_has_a_flat_curve_and_one_that_matters_a_steep_one() -> None:
    model = Copies(weak=0.0)
    with torch.no_grad():
        model.from_b.weight.zero_()
    curves = by_group(task(model).curves({}, "curves"))
    assert np.ptp(curves["c"].value) == pytest.approx(0, abs=1e-6)
    assert np.ptp(curves["b"].value) == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(curves["a"].value[1:]) > 0.1)
    assert curves["a"].found[-1].top1 > 0.95
    assert curves["a"].found[0].top1 < 0.7


def test_a_value_never_falls_with_the_width_and_is_zero_at_full_width() -> None:
    noisy = [2.0, 1.2, 1.3, 0.9, 0.4, 0.5]
    curve = Curve("g", 12, (2, 4, 6, 8, 10, 12), tuple(Accuracy(0.5, loss, 100) for loss in noisy))
    assert list(curve.losses) == pytest.approx([2.0, 1.25, 1.25, 0.9, 0.45, 0.45])
    assert curve.value.shape == (13,)
    assert np.all(np.diff(curve.value) >= 0)
    assert curve.value[-1] == 0
    assert curve.value[3] == pytest.approx(-(2.0 + 1.25) / 2 + 0.45)
    assert curve.value[1] == curve.value[2]


def test_a_measurement_is_the_compacted_model_with_batch_norms_estimated_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = task(model)
    curve = work.curves({}, "curves")[0]
    shifted = task(Shifted(model))
    assert [f.loss for f in shifted.curves({}, "curves")[0].found] == pytest.approx([f.loss for f in curve.found], rel=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Shifted(nn.Module):
    """The same network, its batch norm statistics wrong: estimating them anew must make no difference of it."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
        self.net.load_state_dict(net.state_dict())
        self.net[1].running_mean += 3.0
        self.net[1].running_var *= 9.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_curves_rest_on_images_that_neither_scores_nor_batch_norms_have_seen() -> None:
    train = Watched(*examples())
    work = task(Copies(), train=train)
    fit, part = (set(subset.indices) for subset in (work.meter.fit, work.meter.part))
    assert not fit & part
    assert len(fit | part) == len(train)
    other = task(Copies(), seed=1).meter
    assert set(other.part.indices) != part
    assert set(task(Copies()).meter.part.indices) == part
    labels = train.targets[sorted(part)]
    assert torch.bincount(labels).tolist() == [len(part) // CLASSES] * CLASSES
    work.curves({}, "curves")
    assert len(train.read & fit) == EFFORT.calibration
    assert len(train.read & part) == min(EFFORT.images, len(part))


def test_the_order_says_which_channels_go() -> None:
    found = {}
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        work = task(Copies(weak=0.0), orders={"a": np.array(order)})
        assert work.plan({"a": 2}).keep == {"a": tuple(sorted(order[:2]))}
        found[order[0]] = work.curves({"b": 1}, "curves")[0]
    assert [curve.widths for curve in found.values()] == [(1, 2, 3, 4)] * 2


def test_curves_as_a_table_start_with_the_group_that_saves_most() -> None:
    work = task(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, CLASSES)))
    table = curves_table(work.graph, work.table, work.curves({}, "curves"), work.meter.measure(KeepPlan({})), {})
    assert [point.group for point in table.points] == ["0"] * 16 + ["2"] * 4
    assert [point.width for point in table.points][:16] == list(range(16, 0, -1))
    assert (table.points[0].saves, table.points[0].rise) == (0, 0)
    assert table.points[15].saves == 15 * (8 + 4)
    assert table.cost == 8 * 16 + 16 * 4 + 4 * CLASSES
    assert rows(table)[15][:2] == ("0", "1 of 16")


# --- interactions ----------------------------------------------------------------------------------------------------


def brute_force(work: Sensitivity, budget: float) -> tuple[dict[str, int], float]:
    """Return the widths of the smallest measured loss, over all choices within the budget."""
    best: tuple[dict[str, int], float] = ({}, float("inf"))
    for widths in itertools.product(range(1, CLASSES + 1), repeat=len(work.orders)):
        kept = dict(zip(work.orders, widths, strict=True))
        if work.table.predict(work.graph, work.plan(kept)) <= budget:
            loss = work.meter.measure(work.plan(kept)).loss
            best = min(best, (kept, loss), key=lambda each: each[1])
    return best


def searched(rounds: int, seed: int = 0) -> tuple[Sensitivity, float, Found]:
    work = task(Copies(), seed=seed)
    budget = 0.5 * work.table.predict(work.graph)
    return work, budget, work.search(budget, rounds)


def test_two_groups_that_do_the_same_mislead_the_curves_and_the_search_finds_out() -> None:
    work, budget, additive = searched(0)
    kept, loss = brute_force(work, budget)
    assert additive.best.found.loss > loss + 0.3, "either copy may go, says each curve alone"
    assert max(additive.best.kept["a"], additive.best.kept["b"]) < CLASSES
    _, _, found = searched(4)
    assert found.best.found.loss == pytest.approx(loss)
    assert {found.best.kept["a"], found.best.kept["b"]} == {kept["a"], kept["b"]} == {1, CLASSES}
    assert found.trials[0].kept == additive.best.kept
    assert all(work.table.predict(work.graph, work.plan(trial.kept)) <= budget for trial in found.trials)
    assert found.best.found.loss == min(trial.found.loss for trial in found.trials)


def test_the_search_is_deterministic_and_ends_by_itself() -> None:
    _, _, found = searched(4)
    _, _, again = searched(30)
    assert [trial.kept for trial in again.trials[: len(found.trials)]] == [trial.kept for trial in found.trials]
    assert again.best.kept == found.best.kept


def test_a_plan_by_scores_that_is_better_than_the_curves_is_taken() -> None:
    work, budget, additive = searched(0)
    kept, loss = brute_force(work, budget)
    found = work.search(budget, 0, (kept, additive.best.certificate))
    assert [trial.origin for trial in found.trials] == ["scores", "curves"]
    assert (found.best.origin, found.best.kept, found.best.found.loss) == ("scores", kept, loss)


def test_of_two_branches_that_do_the_same_one_goes_entirely() -> None:
    work, budget, _ = searched(0)
    gone = removable(Copies().eval(), work.graph)
    assert gone == ("a", "b"), "all three together are needed"
    may_go = replace(work, removable=gone)
    assert {curve.group: curve.widths[0] for curve in may_go.curves({}, "curves")} == {"a": 0, "b": 0, "c": 1}
    best = min(
        work.meter.measure(work.plan(kept)).loss
        for choice in itertools.product(range(CLASSES + 1), range(CLASSES + 1), range(1, CLASSES + 1))
        if work.table.predict(work.graph, work.plan(kept := dict(zip("abc", choice, strict=True)))) <= budget
    )
    found = may_go.search(budget, 6)
    assert found.best.found.loss == pytest.approx(best)
    assert 0 in found.best.kept.values()


class Trains:
    """A meter by which training turns the order of plans around."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def known(self, plan: KeepPlan) -> bool:
        return True

    def measure(self, plan: KeepPlan) -> Accuracy:
        return Accuracy(0.5, float(len(plan.keep["a"])), 10)

    def trained(self, plan: KeepPlan, reporter: Reporter) -> Accuracy:
        self.asked.append(len(plan.keep["a"]))
        return Accuracy(0.5, -float(len(plan.keep["a"])), 10)


def test_of_the_best_few_the_one_that_trains_best_is_taken() -> None:
    work, meter = task(Copies()), Trains()
    work = replace(work, meter=meter)
    trials = tuple(
        Trial(f"{i}", {"a": width}, searched(0)[2].best.certificate, meter.measure(work.plan({"a": width})))
        for i, width in enumerate((4, 1, 3, 1, 2))
    )
    found = work.finals(Found(trials, 1), 3)
    assert sorted(meter.asked) == [1, 2, 3], "each plan once, and of five tried only the best three different ones"
    assert (found.best.origin, found.best.kept) == ("2", {"a": 3})
    assert [trial.trained is not None for trial in found.trials] == [False, True, True, False, True]


# --- resuming --------------------------------------------------------------------------------------------------------


class Breaks:
    """A meter whose measurements fail after some."""

    def __init__(self, meter: HeldOut, after: int) -> None:
        self.meter, self.left = meter, after

    def known(self, plan: KeepPlan) -> bool:
        return self.meter.known(plan)

    def measure(self, plan: KeepPlan) -> Accuracy:
        if not self.known(plan):
            self.left -= 1
            if self.left < 0:
                raise InterruptedError
        return self.meter.measure(plan)


def losses(found: Found) -> list[tuple[Mapping[str, int], float]]:
    return [(trial.kept, trial.found.loss) for trial in found.trials]


def test_a_search_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    memo = tmp_path / "sub" / "memo.csv"
    whole, budget, expected = searched(4)
    for after in (3, 9):
        work = task(Copies(), memo=memo)
        with pytest.raises(InterruptedError):
            Sensitivity(work.graph, work.table, work.orders, Breaks(work.meter, after), Silent()).search(budget, 4)
    assert len(memo.read_text().splitlines()) == 12
    memo.write_text(memo.read_text()[:-3])  # a process that died while it wrote
    work = task(Copies(), memo=memo)
    assert losses(work.search(budget, 4)) == losses(expected)
    n_rows = len(memo.read_text().splitlines())
    recorder = Recorder()
    work = task(Copies(), memo=memo)
    nothing_left = Sensitivity(work.graph, work.table, work.orders, Breaks(work.meter, 0), recorder)
    assert losses(nothing_left.search(budget, 4)) == losses(expected)
    nothing_left.curves({}, "curves")
    assert not recorder.ran
    assert recorder.was_reused[0] == "curves"
    assert len(memo.read_text().splitlines()) == n_rows
    other = Sensitivity(work.graph, work.table, work.orders, work.meter, Recorder())
    other.search(0.8 * work.table.predict(work.graph), 0)
    assert (other.reporter.ran, other.reporter.was_reused) == ([], ["curves"]), "another budget measures no first curve again"
    assert whole.meter.known(KeepPlan({name: tuple(range(CLASSES)) for name in whole.orders}))


def test_a_memo_reads_only_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "memo.csv"
    path.write_text("a,0.5,1.25,1000\nb,0.5\nnonsense\nc,0.5,1.25,100\n\nd,0.25,2.5,1000")
    memo = Memo(path, 1000)
    assert memo.found == {"a": Accuracy(0.5, 1.25, 1000), "d": Accuracy(0.25, 2.5, 1000)}
    memo.add("e", Accuracy(0.1, 1 / 3, 1000))
    assert Memo(path, 1000).found == memo.found


def test_a_loss_that_is_no_number_is_an_error_in_three_parts() -> None:
    model = Copies()
    with torch.no_grad():
        model.a.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="loss on held-out images is nan") as raised:
        task(model).curves({}, "curves")
    assert raised.value.at
    assert raised.value.fix


def test_two_networks_with_equal_weights_are_not_taken_for_one_another() -> None:
    """Their fingerprints and weights are equal; what lies between the layers is not."""
    torch.manual_seed(0)
    images, labels = torch.randn(60, 3, 8, 8), torch.randint(0, 4, (60,))
    samples = TensorDataset(images, labels)
    data = Data(samples, samples, ("0", "1", "2", "3"), "key", None, "toy")
    layers = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    losses = []
    for act in (nn.ReLU(), nn.SiLU()):
        model = nn.Sequential(layers[0], act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers[1]).eval()
        graph = trace(model, images[:2])
        losses.append(held_out(Request(), model, state_digest(model), graph, data).measure(KeepPlan({})).loss)
    assert losses[0] != losses[1]
