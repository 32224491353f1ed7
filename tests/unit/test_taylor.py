"""Taylor importance (Molchanov et al., CVPR 2019): its falsifiable tests."""

import copy
import itertools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Orders, Problem, Values, allocated, log_share, n_readers, shared_out
from deploypipe.algorithms.taylor import Terms, smoothed
from deploypipe.allocation.allocate import ranking
from deploypipe.count import MacTable
from deploypipe.data.batches import batches
from deploypipe.data.load import Data
from deploypipe.graph import trace
from deploypipe.ingredients.curvature import Unit, curvature, gates
from deploypipe.ingredients.gates import Scaled, norms_of
from deploypipe.ingredients.statistics import generator
from deploypipe.pipeline.criteria import all_scores
from deploypipe.plan import KeepPlan
from deploypipe.testing.problems import problem_of as problem_with
from deploypipe.testing.toys import cbr, conv, head
from deploypipe.training.adapt import Adapting
from deploypipe.training.evaluate import evaluate
from deploypipe.training.finetune import finetune
from deploypipe.training.settings import TrainSettings
from tests.toy_task import net, pictures, problem_of, trained_net, trainer
from tests.toys import TOYS, Fn


def oracle(model: nn.Module, problem: Problem, data: TensorDataset) -> Tensor:
    """The squared change of the loss when each channel alone is set to zero behind its norm."""
    x, y = data.tensors
    found = []
    with torch.no_grad():
        base = F.cross_entropy(model(x), y)
        for group in problem.graph.prunable:
            norm = norms_of(model, group)[0].module(model)
            for c in range(group.size):
                before = norm.weight[c].clone(), norm.bias[c].clone()
                norm.weight[c] = norm.bias[c] = 0.0
                found.append((F.cross_entropy(model(x), y) - base) ** 2)
                norm.weight[c], norm.bias[c] = before
    return torch.stack(found)


def terms(model: nn.Module, problem: Problem, data: Iterable[tuple[Tensor, Tensor]], **options: object) -> Terms:
    method = make("taylor", options)
    found = Terms(method, method.units(model, problem.graph)[0], generator(0, "probes"))
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found.add(model, (x, y))
    return found


def flat(scores: dict[str, Tensor]) -> np.ndarray:
    return torch.cat(list(scores.values())).numpy()


@pytest.mark.parametrize("epochs", [2, 3, 4, 6])
def test_gates_rank_like_the_oracle_and_norms_and_scales_do_not(epochs: int) -> None:
    model = trainer(lr=0.1).fit(net(), epochs).eval()
    problem, unseen = problem_of(model), pictures(2000, seed=9)
    assert evaluate(model, unseen).top1 > 0.95
    truth = oracle(model, problem, unseen)
    data = list(batches(pictures(2000, seed=3), 100))
    first = spearmanr(flat(terms(model, problem, data).scores()), truth)[0]
    gammas = torch.cat([norms_of(model, g)[0].module(model).weight.detach().abs() for g in problem.graph.prunable])
    norms = torch.cat([model[i][0].weight.detach().flatten(1).norm(dim=1) for i in (0, 1, 2)])
    assert first >= 0.8
    assert spearmanr(gammas, truth)[0] < first - 0.3
    assert spearmanr(norms, truth)[0] < first - 0.3
    assert spearmanr(flat(terms(model, problem, data, on="weight").scores()), truth)[0] >= 0.7
    if epochs == 2:  # later a hundred images, which are what there is time for, hardly have a loss
        exact = terms(model, problem, batches(pictures(100, seed=3), 100), order="second", probes=0)
        assert spearmanr(flat(exact.scores()), truth)[0] > max(first, 0.95)


def test_the_square_of_the_mean_is_a_wrong_score_near_a_minimum() -> None:
    data = pictures(600, noise=1.5)
    settings = TrainSettings(epochs=14, lr=0.05, batch_size=50, distill=0.0)
    model = finetune(net(0), Data(data, data, ("a",) * 4, "noisy", None, ""), settings)
    problem = problem_of(model)
    truth = oracle(model, problem, data)
    found = terms(model, problem, batches(data, 20))
    wrong = torch.cat([mean**2 for mean in found._means.values()]).numpy()
    assert spearmanr(flat(found.scores()), truth)[0] > 0.9
    assert spearmanr(wrong, truth)[0] < 0.75


@pytest.mark.parametrize("options", [{}, {"on": "weight"}, {"order": "second"}, {"on": "weight", "order": "second"}], ids=str)
def test_gathering_batch_by_batch_is_the_mean_of_squares_and_keeps_no_batch(options: dict[str, str]) -> None:
    """Single weights times batches would fill the memory: a network of 25 million weights takes 200 MB for each."""
    model = copy.deepcopy(trained_net())
    problem = problem_of(model)
    data = list(batches(pictures(160, seed=3, noise=1.0), 20))
    found = terms(model, problem, data, **options)
    units, firsts, seconds = make("taylor", options).units(model, problem.graph)[0], [], []
    rng = generator(0, "probes")
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        firsts.append({name: unit.first(dict(model.named_parameters())) for name, unit in units.items()})
        if "order" in options:
            seconds.append(curvature(model, units, lambda call, x=x, y=y: F.cross_entropy(call(x), y), 1, rng))
    for name, score in found.scores().items():
        half = 0.5 * sum(second[name] for second in seconds) / len(data)
        squares = torch.stack([(first[name] - half) ** 2 for first in firsts]).mean(0)
        torch.testing.assert_close(score, squares.sum(1) if squares.dim() > 1 else squares, rtol=1e-9, atol=0)
    assert n_values(vars(found)) < 3.5 * sum(first.numel() for first in firsts[0].values())


def n_values(held: object) -> int:
    """How many numbers tensors hold, in whatever they are kept."""
    if isinstance(held, Tensor):
        return held.numel()
    if isinstance(held, dict):
        return sum(n_values(each) for each in held.values())
    return sum(n_values(each) for each in held) if isinstance(held, list) else 0


@pytest.mark.parametrize(
    ("toy", "name", "training"),
    [
        *((toy, name, True) for toy, name in (("plain", "1.0"), ("residual", "short"), ("residual", "stem.0"))),
        *((toy, name, True) for toy, name in (("depthwise", "2.0"), ("concat", "a.0"), ("concat", "stem.0"))),
        ("plain", "1.0", False),
    ],
)
def test_the_gate_is_the_derivative_by_one_factor_on_all_that_reads_the_channel(toy: str, name: str, training: bool) -> None:
    """Batch norms before and behind a depthwise layer, sums and concats: all readers see the channel times its gate."""
    model, example = TOYS[toy]()
    graph = trace(model, example)
    group, unit = graph.group(name), gates(model, graph)(graph.group(name))
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, 8, 8, generator=rng).double(), torch.randint(0, 4, (32,), generator=rng)
    for module in model.double().train(training).modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # it is what a norm does not take back of a scale before it
    F.cross_entropy(model(x), y).backward()
    named = dict(model.named_parameters())
    expected = torch.zeros(group.size, dtype=torch.float64)
    for member in (m for m in group.members if m.role == "consumes"):
        parameter, owned = named[member.param], torch.from_numpy(member.owner >= 0)
        product = (parameter * parameter.grad).detach().double().movedim(member.axis, 0).flatten(1).sum(1)
        expected.index_add_(0, torch.from_numpy(member.owner)[owned], product[owned])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(unit.first(named), expected, atol=1e-6, rtol=0)


def test_joint_weight_scores_vanish_behind_a_norm_in_training_mode() -> None:
    """Such a layer is scale invariant; gates and additive weight scores are not fooled."""
    model = copy.deepcopy(net(0)).train()
    problem = problem_of(net(0))
    x, y = pictures(100).tensors
    F.cross_entropy(model(x), y).backward()
    weight = model[1][0].weight
    joint = (weight * weight.grad).sum((1, 2, 3)).abs().max()
    method = make("taylor")
    gate = method.units(model, problem.graph)[0]["1.0"].first(dict(model.named_parameters())).abs().max()
    assert joint < 1e-3 * gate


def test_channels_of_fixed_filters_are_judged_by_the_norm_behind_them() -> None:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.b(F.relu(m.norm(F.conv2d(x, m.filters, padding=1))))))

    torch.manual_seed(0)
    model = Fn(f, norm=nn.BatchNorm2d(8), b=conv(8, 8), head=head(8))
    model.register_buffer("filters", torch.randn(8, 3, 3, 3))
    task = problem_of(model, 0.6)
    (fixed,) = [g.name for g in task.graph.groups for m in g.members if m.param == "filters" and m.role == "produces"]
    plan = make("taylor", {"steps": 2, "interval": 2}).plan(task)
    assert fixed not in plan.skipped
    assert 0 < len(plan.keep[fixed]) < 8


def test_a_channel_that_nobody_reads_scores_zero_and_goes_first() -> None:
    model = copy.deepcopy(trained_net())
    with torch.no_grad():
        model[2][0].weight[:, [4, 9]] = 0.0
    found = terms(model, problem_of(model), [pictures(100).tensors]).scores()["1.0"]
    assert found[[4, 9]].tolist() == [0.0, 0.0]
    plan = make("taylor", {"steps": 1, "interval": 2, "lr": 0}).plan(problem_of(model, 0.8))
    assert not {4, 9} & set(plan.keep["1.0"])


def test_curvature_by_probes_is_the_diagonal_of_the_hessian() -> None:
    model = copy.deepcopy(trained_net())
    graph = problem_of(model).graph
    unit = gates(model, graph)(graph.group("0.0"))
    model = model.double().eval()
    x, y = pictures(60, noise=2.0).tensors

    def loss(call):  # type: ignore[no-untyped-def]
        return F.cross_entropy(call(x.double()), y)

    exact = curvature(model, {"g": unit}, loss, 0, generator(0))["g"]

    def gated(z: Tensor) -> Tensor:
        handle = model[0][1].register_forward_hook(lambda m, args, out: out * z[:, None, None])
        found = loss(model)
        handle.remove()
        return found

    hessian = torch.autograd.functional.hessian(gated, torch.ones(16).double())
    torch.testing.assert_close(exact, hessian.diagonal())
    assert (hessian - hessian.diag().diag()).abs().max() > 0.1 * exact.abs().max(), "no diagonal matrix: probes are needed"
    guessed = curvature(model, {"g": unit}, loss, 60, generator(0))["g"]
    assert np.corrcoef(exact, guessed)[0, 1] > 0.8


def test_scores_are_smoothed_and_what_is_gone_stays_last() -> None:
    before, now = {"g": torch.tensor([1.0, 2.0, 3.0])}, {"g": torch.tensor([2.0, 0.0, 9.0])}
    assert smoothed({}, now, KeepPlan({}))["g"].tolist() == [2.0, 0.0, 9.0]
    found = smoothed(before, now, KeepPlan({"g": (0, 2)}))["g"]
    assert found.tolist() == pytest.approx([1.1, 0.0, 3.6])
    assert found[1] < 0, "also behind a channel whose score is exactly zero"


def test_what_is_gone_does_not_change_the_shares_of_what_is_left() -> None:
    """Scores are far below one: any visible number below zero for what is gone would make all the others alike."""
    scores = 1e-9 * torch.tensor([8.0, 4.0, 2.0, 1.0, 16.0], dtype=torch.float64)
    found = smoothed({"g": scores}, {"g": scores}, KeepPlan({"g": (0, 1, 2, 3)}))["g"].numpy()
    shares = log_share(found[ranking(found)])
    assert shares[1:] == pytest.approx(np.log(np.array([8, 12, 14, 15, 15]) / 15))


def test_from_the_second_step_on_shares_follow_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator is told at every step is the share of the scores that were measured, of the channels that are left."""
    seen: list[dict[str, np.ndarray]] = []
    told: list[dict[str, np.ndarray]] = []

    def spied(self: Terms) -> dict[str, Tensor]:
        found = {name: 1e-6 * score for name, score in scores(self).items()}
        seen.append({name: score.numpy() for name, score in found.items()})
        return found

    def asked(algorithm: object, problem: Problem, orders: Orders, values: Values, skipped: Mapping[str, str]) -> KeepPlan:
        readers = {name: n_readers(problem.graph.group(name)) for name in values}
        told.append({name: np.diff(np.exp(np.asarray(value) / readers[name])) for name, value in values.items()})
        return allocated(algorithm, problem, orders, values, skipped)

    scores = Terms.scores
    monkeypatch.setattr(Terms, "scores", spied)
    monkeypatch.setattr(sys.modules["deploypipe.algorithms.base"], "allocated", asked)
    monkeypatch.setattr(sys.modules["deploypipe.algorithms.taylor"], "SMOOTHING", 0.0)
    make("taylor", {"steps": 3, "interval": 3, "widths": "shares"}).plan(problem_of(copy.deepcopy(trained_net()), 0.4))
    assert len(told) == 3
    for now, shares in zip(seen, told, strict=True):
        for name, score in now.items():
            expected = np.sort(score)[::-1] / score.sum()  # those that are gone pass no gradient
            np.testing.assert_allclose(shares[name], expected, atol=1e-9)


@pytest.mark.parametrize("widths", ["threshold", "uniform"])
def test_every_step_keeps_a_part_of_what_the_step_before_kept(widths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of four channels leave room in the budget, which what is gone must not fill again."""
    problem, plans = problem_of(copy.deepcopy(trained_net()), 0.3, MacTable(multiple=4)), []

    def spied(*args: Any) -> KeepPlan:
        plans.append(shared_out(*args))
        return plans[-1]

    monkeypatch.setattr(sys.modules["deploypipe.algorithms.taylor"], "shared_out", spied)
    once = make("taylor", {"steps": 1, "interval": 3, "widths": widths}).plan(problem)
    last = make("taylor", {"steps": 6, "interval": 3, "widths": widths}).plan(problem)
    assert widths == "uniform" or once.keep != last.keep
    for before, after in itertools.pairwise(plans[1:]):
        assert all(set(kept) <= set(before.keep[name]) for name, kept in after.keep.items())
    assert all(problem.table.predict(problem.graph, plan) <= problem.budget for plan in (once, last))


class TwoHeads(nn.Module):
    """A classifier with an auxiliary one that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.side = cbr(3, 8), cbr(8, 8), nn.Sequential(conv(8, 6, bias=True), nn.ReLU())
        self.head, self.aux = head(8), head(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.head(self.body(x)), self.aux(self.side(x))


@pytest.mark.parametrize("on", ["gate", "weight"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_group_that_the_loss_does_not_depend_on_is_not_judged(on: str, order: str) -> None:
    problem = problem_with(TwoHeads(), (torch.randn(2, 3, 8, 8),), 0.8)
    plan = make("taylor", {"steps": 2, "interval": 2, "on": on, "order": order}).plan(problem)
    assert plan.skipped == {"side.0": "no norm and no weight that makes its channels has a gradient"}
    assert set(plan.keep) == {"stem.0", "body.0"}


@pytest.mark.parametrize("on", ["gate", "weight"])
def test_a_group_of_which_one_layer_has_no_gradient_is_judged_by_the_others(on: str) -> None:
    model = copy.deepcopy(net(0))
    problem = problem_of(model)
    F.cross_entropy(model(pictures(20).tensors[0]), pictures(20).tensors[1]).backward()
    unit, named = make("taylor", {"on": on}).units(model, problem.graph)[0]["1.0"], dict(model.named_parameters())
    two = Unit(unit.size, [*unit.scaled, *unit.scaled], unit.each)
    gone = {f"{s.param}.gone": s for s in unit.scaled}
    other = Unit(unit.size, [Scaled(name, s.axis, s.owner) for name, s in gone.items()] + list(unit.scaled), unit.each)
    found = other.first(named | {name: nn.Parameter(named[s.param].detach()) for name, s in gone.items()})
    own = unit.first(named)
    torch.testing.assert_close(found, torch.cat([torch.zeros_like(own), own], dim=1) if on == "weight" else own)
    assert found.shape == two.first(named).shape


def test_criteria_leave_out_a_group_that_the_loss_does_not_depend_on() -> None:
    found = all_scores(problem_with(TwoHeads(), (torch.randn(2, 3, 8, 8),), 1.0), 16)
    assert [set(found[f"taylor-{on}"]) for on in ("gate", "weight")] == [{"stem.0", "body.0"}] * 2


@pytest.mark.parametrize("on", ["gate", "weight"])
def test_dropout_in_the_second_order_follows_the_seed_and_leaves_the_global_state_alone(on: str) -> None:
    plans = []
    for state in (0, 1):
        torch.manual_seed(5)
        model = nn.Sequential(cbr(3, 8), cbr(8, 8), nn.Dropout(0.5), head(8))
        problem = problem_with(model, (torch.randn(2, 3, 8, 8),), 0.6)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        plans.append(make("taylor", {"on": on, "order": "second", "steps": 2, "interval": 2}).plan(problem))
        assert torch.equal(torch.get_rng_state(), before)
    assert plans[0].keep == plans[1].keep


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """The scores that decide at every step."""
    found: list[dict[str, np.ndarray]] = []

    def spied(algorithm: object, problem: Problem, scores: dict[str, np.ndarray], *args: Any) -> KeepPlan:
        found.append(scores)
        return shared_out(algorithm, problem, scores, *args)

    monkeypatch.setattr(sys.modules["deploypipe.algorithms.taylor"], "shared_out", spied)
    return found


def trunk(share: float = 0.8) -> Problem:
    model, example = TOYS["residual"]()
    return problem_with(model, example, share)


def measured(problem: Problem, first: int, n: int, **options: object) -> dict[str, Tensor]:
    """The scores of batches `first` to `first + n` of the stream that a plan meets, on weights that stay as they are."""
    run = Adapting(problem.model, problem.data, 0.0, 16, problem.seed)
    method = make("taylor", options)
    found = Terms(method, method.units(run.model, problem.graph)[0], generator(0, "probes"))
    for i, model in enumerate(run.steps(first + n)):
        if i >= first:
            found.add(model, run.latest)
    return found.scores()


@pytest.mark.parametrize("on", ["gate", "weight"])
def test_a_step_judges_by_all_its_batches_and_divides_a_trunks_score_by_its_makers(told: list[Any], on: str) -> None:
    problem = trunk()
    make("taylor", {"steps": 1, "interval": 3, "batch": 16, "lr": 0, "on": on}).plan(problem)
    expected = measured(problem, 0, 3, on=on)
    assert set(told[0]) == set(expected) == {"stem.0", "b1.0", "short", "d1.0"}
    for name, score in told[0].items():
        n_makers = 2 if name in ("stem.0", "short") else 1
        np.testing.assert_allclose(score, expected[name].numpy() / n_makers, rtol=1e-6)


def test_nine_tenths_of_a_score_are_those_of_the_steps_before(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, scores = list[dict[str, Tensor]](), Terms.scores
    monkeypatch.setattr(Terms, "scores", lambda self: seen.append(scores(self)) or seen[-1])
    problem = trunk()
    make("taylor", {"steps": 3, "interval": 2, "batch": 16, "lr": 0}).plan(problem)
    expected = seen[0]["b1.0"].numpy()
    for step in (1, 2):
        alive = told[step]["b1.0"] >= 0
        now = seen[step]["b1.0"].numpy()
        expected = 0.9 * expected + 0.1 * now
        np.testing.assert_allclose(told[step]["b1.0"][alive], expected[alive], rtol=1e-6)
        assert alive.any()
        assert not np.allclose(now[alive], expected[alive], rtol=0.01)


def test_the_learning_rate_decides_how_far_the_weights_that_are_judged_adapt(told: list[Any]) -> None:
    problem = trunk()
    for lr in (0, 0.05):
        make("taylor", {"steps": 1, "interval": 3, "batch": 16, "lr": lr}).plan(problem)
    assert not np.allclose(told[0]["b1.0"], told[1]["b1.0"], rtol=0.01)


def test_single_weights_of_all_layers_that_make_a_channel_count() -> None:
    problem = trunk()
    model = copy.deepcopy(problem.model)
    x, y = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
    found = terms(model, problem, [(x, y)], on="weight").scores()["stem.0"]
    made = [getattr(model, name)[0].weight for name in ("stem", "b2")]
    expected = [(w * w.grad).detach().double().square().flatten(1).sum(1) for w in made]
    torch.testing.assert_close(found, expected[0] + expected[1])
    assert all(part.any() for part in expected)


def test_probes_of_a_diagonal_hessian_give_its_diagonal_however_many_they_are() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, -3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return (self.scale * x).square().sum()

    model, x = Squares(), torch.tensor([1.0, 0.5, 2.0])
    unit = Unit(3, [Scaled("scale", 0, torch.arange(3))])
    for probes in (0, 1, 2, 5):
        found = curvature(model, {"g": unit}, lambda call: call(x), probes, generator(0))["g"]
        torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 72.0]).double())


def test_only_the_survivors_keep_their_momentum() -> None:
    """The trap: the authors' code clears that of the channels that stay."""
    data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3)
    torch.manual_seed(0)
    run = Adapting(nn.Linear(4, 3), data, 0.1, 16, 0)
    weight, slopes, before = run.model.weight, list[Tensor](), torch.zeros(0)
    gone, stays = torch.tensor([1, 3]), torch.tensor([0, 2])
    for step in range(2):
        for _ in run.steps(1):
            slopes.append(weight.grad.clone())
            before = weight.detach().clone()
        if step == 0:
            run.hold([("weight", 1, gone)])
    moved = weight.detach() - before
    torch.testing.assert_close(moved[:, stays], -0.1 * (0.9 * slopes[0] + slopes[1])[:, stays])
    assert not weight[:, gone].any()
    run.hold([])
    for _ in run.steps(1):
        slopes.append(weight.grad.clone())
    torch.testing.assert_close(weight.detach()[:, gone], -0.1 * slopes[2][:, gone])
