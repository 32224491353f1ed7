"""DCFF (Lin et al., TPAMI 2023): mixtures, temperatures, gradients, and the compact model that is left."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.algorithms import make
from deploypipe.algorithms.dcff import maker, unlike
from deploypipe.compact import compact, difference, run
from deploypipe.count import MacTable
from deploypipe.errors import BudgetError, NotApplicable
from deploypipe.graph import trace
from deploypipe.ingredients.expand import expanded
from deploypipe.ingredients.fusion import Fusing, even, fuse, importance, likeness, reseated, settle, sharpness
from deploypipe.ingredients.statistics import weights
from deploypipe.plan import KeepPlan
from deploypipe.training.trainer import Trainer
from tests.toy_task import EVEN, accuracy, net, problem_of, toy_data, trained_net, trainer
from tests.toys import TOYS


def filters(n: int = 12, d: int = 27, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) / d**0.5


def test_the_temperature_runs_from_one_to_ten_thousand() -> None:
    for rise in (1.0, 10.0, 300.0):
        assert sharpness(0, 300, rise) == pytest.approx(1.0, abs=1e-6)
        assert sharpness(300, 300, rise) == pytest.approx(1e4, abs=1)
        path = [sharpness(e, 300, rise) for e in range(301)]
        assert all(later >= before for before, later in itertools.pairwise(path))


def test_the_papers_rise_is_over_after_the_first_epochs() -> None:
    assert sharpness(1, 300, 300.0) == pytest.approx(4622, abs=1)  # k = 1
    assert sharpness(5, 300, 300.0) == pytest.approx(9866, abs=1)
    assert sharpness(30, 300) < 5000 < sharpness(60, 300) < 9000  # spread over the training


def own_share(filters: Tensor, sharp: float) -> float:
    return float(likeness(filters, sharp).exp().diagonal().mean())


def test_the_papers_schedule_fuses_in_one_epoch_whatever_its_rise_and_the_even_one_all_the_time() -> None:
    f = filters(32, 288) * 2.0  # distances of trained layers are 2 to 3
    for rise in (1e-3, 1.0, 10.0, 20.0):
        assert [own_share(f, sharpness(e, 20, rise)) < 0.97 for e in range(20)].count(True) == 1
    shares = [own_share(f, even(f, e / 20)) for e in range(20)]
    assert shares == pytest.approx([0.5 + e / 40 for e in range(20)], abs=0.03)
    assert even(f, 1.0) == pytest.approx(1e4)


@pytest.mark.parametrize("n", [2, 3, 16, 64])
def test_at_the_start_a_filter_is_half_of_its_mixture_whatever_the_width_and_the_size(n: int) -> None:
    for size in (0.1, 1.0, 10.0):
        f = filters(n, 144) * size
        assert own_share(f, even(f, 0.0)) == pytest.approx(0.5, abs=0.06)
    assert own_share(filters(64, 144), 1.0) < 0.1, "the paper's T = 1 leaves little of it"
    assert even(torch.ones(8, 9), 0.0) == even(torch.ones(1, 9), 0.0) == 1e4, "nothing to tell apart"


@pytest.mark.parametrize("schedule", ["even", "paper"])
def test_the_schedule_is_what_layers_are_mixed_by(schedule: str) -> None:
    whole, layer = fused_layer()
    model, hook = nn.Sequential(layer), Fusing({"0": [0, 2, 5, 7]}, 4, schedule)
    hook.on_train_begin(model)
    f = whole.weight.detach().flatten(1)
    for epoch in range(4):
        sharp = sharpness(epoch, 4) if schedule == "paper" else even(f, epoch / 4)
        wanted = likeness(f, sharp).exp()[hook.places["0"]].float()
        torch.testing.assert_close(layer.parametrizations.weight[0].mix, wanted)
        hook.on_epoch_end(model, epoch)


@pytest.mark.parametrize("sharp", [1.0, 100.0, 1e4])
def test_rows_are_distributions_and_a_filter_is_nearest_to_itself(sharp: float) -> None:
    p = likeness(filters(), sharp).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(12, dtype=torch.float64))
    assert (p.argmax(1) == torch.arange(12)).all()


def test_the_likeness_is_written_out() -> None:
    f = filters(5)
    distances = torch.tensor([[float((a - b).norm()) for b in f] for a in f], dtype=torch.float64)
    torch.testing.assert_close(likeness(f, 3.0).exp(), torch.softmax(-3 * distances, 1), atol=1e-6, rtol=1e-5)
    p = likeness(f, 3.0).exp()
    wanted = torch.tensor([float(sum((p[k] * (p[k] / q).log()).sum() for q in p)) / 5 for k in range(5)], dtype=torch.float64)
    torch.testing.assert_close(importance(likeness(f, 3.0)), wanted)


def test_at_the_end_a_mixture_is_the_filter_itself() -> None:
    f = filters().double()
    torch.testing.assert_close(likeness(f, 1e4).exp()[[3, 7]] @ f, f[[3, 7]], atol=1e-6, rtol=0)
    assert (likeness(f, 1.0).exp()[[3, 7]] @ f - f[[3, 7]]).abs().max() > 0.01


@pytest.mark.parametrize("sharp", [100.0, 1e3, 1e4])
def test_importances_stay_numbers_and_follow_the_weights_at_every_temperature(sharp: float) -> None:
    """Written out in float32 the divergence is 0 log 0 = NaN, or the same for all filters: the ranking would be frozen."""
    f = filters()
    found = importance(likeness(f, sharp))
    assert torch.isfinite(found).all()
    moved = f.clone()
    moved[0] *= 5  # far from all others now
    assert int(importance(likeness(moved, sharp)).argmax()) == 0
    assert int(found.argmax()) != 0
    p = likeness(f, sharp).exp().float()
    naive = torch.stack([(p[k] * torch.log(p[k] / (p + 1e-7))).sum(1).mean() for k in range(len(p))])
    assert torch.isnan(naive).any() or naive.std() < 1e-3 * found.std()


def test_places_are_kept() -> None:
    assert reseated([4, 1, 9], [1, 4, 9]) == [4, 1, 9]
    assert reseated([4, 1, 9], [2, 4, 7]) == [4, 2, 7]


def fused_layer() -> tuple[nn.Conv2d, nn.Conv2d]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole, small = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 4, 3)
    fuse(small, whole.weight.detach(), whole.bias.detach(), [0, 2, 5, 7])
    return whole, small


def test_the_filters_least_like_the_others_are_mixed_and_chosen_anew_every_epoch() -> None:
    """Those that stay chosen keep their place."""
    _, layer = fused_layer()
    model, hook = nn.Sequential(layer), Fusing({"0": [0, 2, 5, 7]}, 10)
    original = layer.parametrizations.weight.original.detach()
    original[[1, 4, 9, 11]] *= 10  # far from all others, and from each other
    hook.on_train_begin(model)
    before = hook.places["0"]
    assert set(before) == {1, 4, 9, 11}
    original[1] /= 10
    original[3] *= 10
    hook.on_epoch_end(model, 0)
    assert hook.places["0"] == [3 if i == 1 else i for i in before]


@pytest.mark.parametrize(("epoch", "reached"), [(0, 12), (99, 4)])
def test_the_gradient_reaches_all_filters_while_they_are_blurred(epoch: int, reached: int) -> None:
    _, layer = fused_layer()
    model = nn.Sequential(layer)
    hook = Fusing({"0": [0, 2, 5, 7]}, 100, "paper")
    hook._mix(model, epoch)
    layer(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert int((gradient.flatten(1).norm(dim=1) > 1e-6 * gradient.abs().max()).sum()) == reached
    assert not layer.parametrizations.weight[0].mix.requires_grad
    if epoch:
        assert set(torch.nonzero(gradient.flatten(1).norm(dim=1) > 1e-6).flatten().tolist()) == set(hook.places["0"])


def test_the_settled_layer_computes_the_mixtures_and_has_no_trace_of_the_others() -> None:
    whole, layer = fused_layer()
    Fusing({"0": [0, 2, 5, 7]}, 10, "paper")._mix(nn.Sequential(layer), 3)
    x = torch.randn(2, 3, 8, 8)
    before, mix = layer(x), layer.parametrizations.weight[0].mix.clone()
    assert mix.shape == (4, 12)
    settle(layer)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer.weight.flatten(1), mix @ whole.weight.flatten(1))
    torch.testing.assert_close(layer.bias, mix @ whole.bias)
    assert type(layer) is nn.Conv2d
    assert sum(p.numel() for p in layer.parameters()) == 4 * 27 + 4


def test_the_mixtures_of_the_last_epoch_are_those_that_stay() -> None:
    _, layer = fused_layer()
    model, hook = nn.Sequential(layer), Fusing({"0": [0, 2, 5, 7]}, 3)
    hook.on_train_begin(model)
    seen = [layer.parametrizations.weight[0].mix.clone()]
    for epoch in range(3):
        hook.on_epoch_end(model, epoch)
        seen.append(layer.parametrizations.weight[0].mix.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    other = Fusing({"0": [0, 2, 5, 7]}, 3)
    other.restore(hook.state())
    assert other.places == hook.places


# --- the inverse of compaction


@pytest.mark.parametrize("net", ["plain", "residual", "depthwise", "concat", "channel_shuffle", "flatten_after_concat"])
def test_expansion_is_the_inverse_of_compaction(net: str) -> None:
    model, example = TOYS[net]()
    graph, rng = trace(model, example), np.random.default_rng(0)
    plan = KeepPlan({g.name: tuple(sorted(rng.choice(g.size, max(1, g.size // 2), replace=False))) for g in graph.prunable})
    small = compact(model, graph, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.1)
    full = expanded(small, model, graph, plan)
    assert difference(run(small, example), run(full, example)) < 1e-5
    again = compact(full, graph, plan)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))


# --- the method


def test_a_fused_network_learns_and_is_what_the_plan_cuts_out() -> None:
    task, method = problem_of(trained_net(widths=EVEN), 0.3), make("dcff", {"train_epochs": 8})
    after = replace(task, model=method.train(task, trainer(lr=0.1)))
    plan = method.plan(after)
    assert plan.certificate is not None
    assert plan.certificate.predicted <= task.budget
    small = compact(after.model, task.graph, plan)
    example = task.graph.example
    assert difference(run(after.model, example), run(small, example)) < 1e-6
    assert accuracy(small) > 0.9
    asked = method._planned(task, _start(method, task)).keep
    assert {name: len(kept) for name, kept in plan.keep.items()} == {name: len(kept) for name, kept in asked.items()}
    tighter = method.plan(replace(after, budget=0.8 * task.budget))
    assert all(set(kept) <= set(plan.keep[name]) for name, kept in tighter.keep.items())


def _start(method: Any, task: Any) -> nn.Module:
    return make("dcff", {"train_epochs": 0, "start": method.start}).train(task, trainer())


def test_it_starts_from_fresh_weights_or_from_the_users() -> None:
    task = problem_of(trained_net(widths=EVEN), 0.5)
    anew, given = (make("dcff", {"train_epochs": 0, "start": s}).train(task, trainer()) for s in ("fresh", "trained"))
    assert not torch.equal(anew[0][0].weight, task.model[0][0].weight)
    assert torch.equal(given[0][0].weight, task.model[0][0].weight)


def test_more_budget_than_fused_channels_brings_no_dead_ones_back() -> None:
    task, method = problem_of(trained_net(widths=EVEN), 0.3), make("dcff", {"train_epochs": 1})
    after = replace(task, model=method.train(task, trainer()))
    plan = method.plan(after)
    assert method.plan(replace(after, budget=1.5 * task.budget)).keep == plan.keep
    for name, kept in plan.keep.items():
        assert (after.model.get_parameter(f"{name}.weight")[list(kept)] != 0).flatten(1).any(1).all()
    assert set(plan.keep) == {"0.0", "1.0", "2.0"}


def test_what_was_fused_into_one_filter_stays_that_filter() -> None:
    """A single filter is unlike no other, and must not be taken for a group whose channels are all alike."""
    task = problem_of(trained_net(widths=EVEN), 0.4)
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model[1][0].weight[[i for i in range(len(model[1][0].weight)) if i != 6]] = 0
    plan = make("dcff").plan(replace(task, model=model))
    assert plan.keep["1.0"] == (6,)


def test_groups_that_several_layers_make_stay_whole_with_the_reason() -> None:
    model, example = TOYS["residual"]()
    graph, table = trace(model, example), MacTable(multiple=1)
    task = problem_of(trained_net(widths=EVEN))
    task = replace(task, model=model, graph=graph, table=table, budget=0.8 * table.predict(graph))
    plan = make("dcff").plan(task)
    assert set(plan.keep) == {"b1.0", "d1.0"}
    assert "2 weights make its channels" in plan.skipped["stem.0"]
    with pytest.raises(NotApplicable, match="only filters of one layer"):
        maker(task, graph.group("stem.0"))
    with pytest.raises(BudgetError, match="smallest reachable"):
        make("dcff").plan(replace(task, budget=1.0))


class Still(Trainer):
    """Goes through the epochs without a step: what fusing does alone."""

    def fit(self, model: nn.Module, epochs: int, hooks: Any = (), *args: Any, **changes: Any) -> nn.Module:
        model = copy.deepcopy(model)
        for hook in hooks:
            hook.on_train_begin(model)
            for epoch in range(epochs):
                hook.on_epoch_end(model, epoch)
        return model


SHARP: dict[tuple[str, float], Any] = {
    ("even", 10.0): lambda f: even(f, 3 / 4),
    ("paper", 1.0): lambda f: sharpness(3, 4, 1.0),
    ("paper", 100.0): lambda f: sharpness(3, 4, 100.0),
}


@pytest.mark.parametrize(("temperature", "rise"), SHARP)
def test_mixtures_are_as_sharp_as_the_options_say(temperature: str, rise: float) -> None:
    """Of filters so small that the paper's schedule blurs them, too; the norm behind them takes every scale."""
    model = copy.deepcopy(trained_net(widths=EVEN))
    f = model[0][0].weight.detach().flatten(1)
    f *= 8e-4 / torch.cdist(f, f).mean()
    method = make("dcff", {"train_epochs": 4, "start": "trained", "temperature": temperature, "rise": rise})
    after = method.train(problem_of(model, 0.3), Still(toy_data(), trainer().settings))
    found = after.get_parameter("0.0.weight").detach().flatten(1)
    found = found[(found != 0).any(1)]
    assert 1 < len(found) < 16
    off = {}
    for options, sharp in SHARP.items():
        wanted = likeness(f, sharp(f)).exp() @ f.double()
        off[options] = float((torch.cdist(found.double(), wanted).min(1).values / found.norm(dim=1)).max())
    assert off[temperature, rise] < 1e-5
    assert all(far > 1e-3 for options, far in off.items() if options != (temperature, rise)), off


def test_what_a_teacher_says_does_not_reach_the_fused_filters() -> None:
    task, method = problem_of(trained_net(widths=EVEN), 0.3), make("dcff", {"train_epochs": 1})
    settings = replace(trainer().settings, distill=0.9)
    first, second = (method.train(task, Trainer(toy_data(100), settings, teacher=net(seed))) for seed in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_filters_that_have_likes_go_first_even_if_they_are_larger() -> None:
    task = problem_of(trained_net(widths=EVEN))
    model = copy.deepcopy(task.model)
    rng = torch.Generator().manual_seed(0)
    flat = torch.cat([5 * torch.eye(144)[[0] * 8], 3 * torch.eye(144)[1:9]]) + 0.01 * torch.randn(16, 144, generator=rng)
    with torch.no_grad():
        model[1][0].weight.copy_(flat.view_as(model[1][0].weight))
    score = unlike(task, task.graph.group("1.0"), weights(model))
    assert score[:8].max() < score[8:].min()


def test_dead_filters_come_last() -> None:
    task = problem_of(trained_net(widths=EVEN))
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model[1][0].weight[[3, 9]] = 0
    score = unlike(task, task.graph.group("1.0"), weights(model))
    assert np.flatnonzero(score < 0).tolist() == [3, 9]
