"""SCP (Kang and Han, ICML 2020): its falsifiable tests."""

import copy

import pytest
import torch
from torch import nn

from deploypipe.algorithms import make
from deploypipe.algorithms.base import judged
from deploypipe.algorithms.scp import Mask, SoftMasks, keep_probability, soft_mask, temperature
from deploypipe.algorithms.slimming import scale_sums
from deploypipe.compact import compact
from deploypipe.errors import NotApplicable
from deploypipe.graph import trace
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import evaluate, recalibrate
from deploypipe.training.settings import TrainHook, TrainSettings
from deploypipe.training.trainer import Trainer
from tests.toy_task import images, net, problem_of, toy_data, trained_net
from tests.toys import TOYS, Fn, cbr, head

SETTINGS = TrainSettings(lr=0.05, batch_size=50, distill=0.0)


@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 0.8), (-1.0, 0.5), (0.5, -1.2), (-0.4, -0.3)])
def test_probability_is_the_share_of_positive_values(beta: float, gamma: float) -> None:
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    positive = float((torch.relu(gamma * z + beta) > 0).float().mean())
    q = float(keep_probability(torch.tensor(beta), torch.tensor(gamma)))
    assert q == pytest.approx(positive, abs=0.005)
    wrong = 0.5 * (1 + torch.erf(torch.tensor(beta / gamma) / 2**0.5))
    assert gamma > 0 or abs(float(wrong) - positive) > 0.1, "without the absolute value negative scales are wrong"


def test_samples_keep_as_often_as_they_should_and_become_binary() -> None:
    q, n = torch.tensor([0.1, 0.5, 0.9]), 20_000
    noise = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(0))
    sampled = soft_mask(q.expand(n, 3), 0.5, noise)
    kept = (sampled > 0.5).float().mean(0)
    error = 3 * (q * (1 - q) / n).sqrt()
    assert ((kept - q).abs() <= error).all()
    cold = soft_mask(q.expand(n, 3), 1e-3, noise)
    assert float(((cold < 1e-3) | (cold > 1 - 1e-3)).float().mean()) > 0.99
    beta = torch.tensor([-9.0], requires_grad=True)  # q is at its limit of 1e-6
    q_low = keep_probability(torch.tensor([-4.7], requires_grad=True), torch.tensor([1.0]))
    assert q_low.item() < 2e-6
    shallow = torch.tensor([-4.6], requires_grad=True)
    soft_mask(keep_probability(shallow, torch.tensor([1.0])), 1.0, torch.full((2, 1), 0.5)).sum().backward()
    assert torch.isfinite(shallow.grad).all()
    assert shallow.grad > 0
    soft_mask(keep_probability(beta, torch.tensor([0.0])), 1.0, torch.full((2, 1), 0.5)).sum().backward()
    assert torch.isfinite(beta.grad).all(), "also where gamma is zero"


def test_a_small_scale_with_a_large_shift_is_alive_and_slimming_decides_the_opposite() -> None:
    model = copy.deepcopy(trained_net())
    norm = model[1][1]
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.05, 1.0
        norm.weight[7], norm.bias[7] = 1.0, -4.0
    problem = problem_of(model)
    q = Mask.of(model, problem.graph, problem.graph.group("1.0")).keep_probability(model)
    assert q[3] > 0.999
    assert q[7] < 1e-3
    gamma = scale_sums(model, problem.graph.group("1.0"))
    assert gamma[3] < gamma[7]
    kept = make("scp").plan(problem).keep["1.0"]
    assert 3 in kept
    assert 7 not in kept


def trained(reach: float, epochs: int = 20) -> nn.Module:
    method = make("scp", {"reach": reach, "train_epochs": epochs, "most": 0.0})  # fresh weights: nothing to unlearn
    return method.train(problem_of(net()), Trainer(toy_data(1200), SETTINGS))


@pytest.mark.slow
def test_the_penalty_switches_channels_off_and_those_may_go_without_a_trace() -> None:
    off = {}
    for reach in (0.0, 3.0, 3.6):
        model = trained(reach)
        problem = problem_of(model)
        masks, _ = judged(problem.graph, lambda group, m=model, p=problem: Mask.of(m, p.graph, group))
        q = {name: mask.keep_probability(model).detach() for name, mask in masks.items()}
        off[reach] = float(torch.cat(list(q.values())).lt(0.05).float().mean())
        assert evaluate(recalibrate(model, toy_data().train), toy_data().test).top1 > 0.97
        n = {name: int((values < 0.05).sum()) for name, values in q.items()}
        harm = []
        for largest in (False, True):
            keep = {m: tuple(sorted(v.argsort(descending=largest)[n[m] :].tolist())) for m, v in q.items()}
            small = compact(model, problem.graph, KeepPlan(keep), check=False)
            with torch.no_grad():
                whole, cut = model(images()), small(images())
            harm.append(float((whole - cut).norm() / whole.norm()))
        # Beyond the default of 3 more channels end just below 0.05, and what is left of them adds up.
        assert harm[0] < (0.01 if reach <= 3.0 else 0.03)
        assert harm[1] > 0.2 or not any(n.values()), "as many of the most probable ones leave a trace"
    assert off[0.0] < off[3.0] < off[3.6]
    assert off[3.6] > 0.15


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_channel_that_is_nearly_decided_still_feels_a_pull(sign: float, scale: float) -> None:
    """At a probability of 1e-6 of being off, or on: the mask rises with the shift, by a finite amount."""
    beta = torch.tensor([sign * 4.7534 * scale], requires_grad=True)
    q = keep_probability(beta, torch.tensor([scale]))
    assert min(float(q.detach()), 1 - float(q.detach())) == pytest.approx(1e-6, rel=0.1)
    (gradient,) = torch.autograd.grad(soft_mask(q, 1.0, torch.full((2, 1), 0.5)).sum(), beta)
    assert 0 < float(gradient) < 1


def test_folding_the_expectation_changes_nothing_and_rounding_it_to_one_does() -> None:
    graph = problem_of(copy.deepcopy(trained_net())).graph
    masks, _ = judged(graph, lambda group: Mask.of(trained_net(), graph, group))
    model = copy.deepcopy(trained_net()).double()
    hook = SoftMasks(masks, 0.0, 10)
    masked = copy.deepcopy(model)
    hook.on_train_begin(masked)
    masked.eval()
    with torch.no_grad():
        gated = masked(images().double())
        plain = model(images().double())
        hook.on_train_end(masked)
        folded = masked(images().double())
    assert (gated - folded).abs().max() < 1e-6
    assert (gated - plain).abs().max() > 0.05 * gated.abs().max()
    assert not [module for module in masked.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_a_trunk_has_one_mask_made_from_all_that_is_added() -> None:
    def forward(m: Fn, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head(torch.relu(x + m.b2(m.b1(x))))

    norm = nn.BatchNorm2d(8)
    b2 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, bias=False), norm)
    model = Fn(forward, stem=cbr(3, 8), b1=cbr(8, 6), b2=b2, head=head(8)).eval()
    example = (torch.randn(2, 3, 8, 8),)
    graph = trace(model, example)
    with torch.no_grad():
        for module in (model.stem[1], norm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    mask = Mask.of(model, graph, graph.group("stem.0"))
    beta = model.stem[1].bias + norm.bias
    gamma = (model.stem[1].weight ** 2 + norm.weight**2).sqrt()
    torch.testing.assert_close(mask.keep_probability(model), keep_probability(beta, gamma))
    assert {n.name for n in mask.norms} == {"stem.1", "b2.1"}


def test_what_it_cannot_judge_says_why() -> None:
    model, example = TOYS["residual"]()
    graph = trace(model, example)
    with pytest.raises(NotApplicable, match="more than what passes a batch norm"):
        Mask.of(model, graph, graph.group("short"))
    parts = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 2)]
    smooth = nn.Sequential(*parts).eval()
    graph = trace(smooth, (torch.zeros(2, 3, 8, 8),))
    with pytest.raises(NotApplicable, match="not followed by a ReLU"):
        Mask.of(smooth, graph, graph.group("0"))
    plan = make("scp").plan(problem_of(net(), 0.9))
    assert not plan.skipped


def test_behind_a_depthwise_layer_its_own_norm_counts() -> None:
    model, example = TOYS["depthwise"]()
    graph = trace(model, example)
    mask = Mask.of(model, graph, graph.group("2.0"))
    assert [norm.name for norm in mask.seen] == ["3.1"]
    assert {norm.name for norm in mask.norms} == {"2.1", "3.1"}


def test_a_short_training_has_no_heavier_penalty_than_the_loss_can_bear() -> None:
    problem, weights = problem_of(trained_net()), {}
    masks, _ = judged(problem.graph, lambda group: Mask.of(problem.model, problem.graph, group))
    total = sum(float(mask.keep_probability(problem.model).detach().sum()) for mask in masks.values())
    for epochs, most in ((1, 0.3), (1, 0.0), (2000, 0.3)):
        seen: list[TrainHook] = []
        trainer = Trainer(toy_data(1200), SETTINGS)
        trainer.fit = lambda model, epochs, hooks=(), seen=seen, **changes: seen.extend(hooks) or model  # type: ignore[method-assign]
        make("scp", {"train_epochs": epochs, "most": most}).train(problem, trainer)
        weights[epochs, most] = float(seen[0].key.split()[1])
    assert weights[1, 0.3] * total == pytest.approx(0.3)
    assert weights[1, 0.0] == pytest.approx(3.0 / SETTINGS.travel(24))
    assert weights[1, 0.0] * total > 3, "outweighs the loss of any classifier of four classes"
    assert weights[2000, 0.3] == pytest.approx(3.0 / SETTINGS.travel(48_000))


def test_temperature_falls_at_the_end() -> None:
    assert [temperature(share) for share in (0.0, 0.6)] == [1.0, 1.0]
    assert temperature(0.8) > temperature(0.9) > temperature(1.0) == pytest.approx(0.1)


def test_layers_that_are_rarely_active_are_not_emptied_for_it() -> None:
    """In a trained network deep channels pass their ReLU more rarely than early ones: one threshold would cut them all."""
    model = copy.deepcopy(trained_net())
    with torch.no_grad():
        model[2][1].bias -= 1.0
    problem = problem_of(model)
    kept = {how: len(make("scp", {"widths": how}).plan(problem).keep["2.0"]) for how in ("shares", "threshold")}
    assert 2 * kept["threshold"] < kept["shares"]
    assert make("scp").plan(problem).keep == make("scp", {"widths": "shares"}).plan(problem).keep


class Concat(nn.Module):
    """A batch norm behind a concat, as in DenseNet: its slots belong to two groups."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.stem, self.first, self.inner = nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.Conv2d(wide, narrow, 1)
        self.norm, self.out = nn.BatchNorm2d(wide + narrow), cbr(wide + narrow, 8)
        self.head = head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.inner(self.first(x).relu())], 1)
        return self.head(self.out(self.norm(x).relu()))


@pytest.mark.parametrize("narrow", [8, 6])
def test_in_a_norm_behind_a_concat_every_group_has_its_own_mask(narrow: int) -> None:
    torch.manual_seed(0)
    model = Concat(8, narrow).eval()
    with torch.no_grad():
        model.norm.bias.uniform_(-1, 1)
    problem = problem_of(model)
    masks, _ = judged(problem.graph, lambda group: Mask.of(model, problem.graph, group))
    stays = {name: mask.keep_probability(model).detach() for name, mask in masks.items()}
    hook, gated = SoftMasks(masks, 0.0, 10), copy.deepcopy(model)
    hook.on_train_begin(gated)
    masked = gated.eval()(images())
    hook.on_train_end(gated)
    factors = (gated.norm.weight / model.norm.weight).detach()
    torch.testing.assert_close(factors, torch.cat([stays["stem"], stays["inner"]]))
    torch.testing.assert_close(gated(images()), masked)


def test_what_is_off_stays_off_when_the_masks_are_folded() -> None:
    """Folding makes the scale of a channel that is off very small; only its ratio to the shift says how probable it is."""
    model = copy.deepcopy(trained_net())
    with torch.no_grad():
        model[1][1].weight[3], model[1][1].bias[3] = 0.05, -0.5
    problem = problem_of(model)
    masks, _ = judged(problem.graph, lambda group: Mask.of(model, problem.graph, group))
    before = masks["1.0"].keep_probability(model).detach()
    hook = SoftMasks(masks, 0.0, 10)
    hook.on_train_begin(model)
    hook.on_train_end(model)
    torch.testing.assert_close(masks["1.0"].keep_probability(model).detach(), before)


def test_what_passes_a_depthwise_layer_by_counts_as_well() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.deep, self.behind = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
            self.out, self.head = cbr(8, 8), head(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            return self.head(self.out((x + self.behind(self.deep(x))).relu()))

    model = Around().eval()
    with torch.no_grad():
        model.norm.bias.fill_(4.0)
        model.behind.bias.fill_(-3.0)
    graph = problem_of(model).graph
    mask = Mask.of(model, graph, graph.group("conv"))
    assert [norm.name for norm in mask.seen] == ["norm", "behind"]
    expected = keep_probability(torch.tensor(1.0), torch.tensor(2.0).sqrt())
    torch.testing.assert_close(mask.keep_probability(model).detach(), expected.expand(8))


def test_a_reader_may_be_called_by_name_and_one_without_a_layer_is_told() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.head = cbr(3, 8), nn.Conv2d(8, 8, 3, padding=1), head(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(input=self.first(x)).relu())

    named = Named().eval()
    graph = problem_of(named).graph
    assert Mask.of(named, graph, graph.group("first.0")).seen

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight, self.head = cbr(3, 8), nn.Parameter(torch.randn(8, 8, 3, 3)), head(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.conv2d(self.first(x), self.weight, padding=1).relu())

    bare = Bare().eval()
    graph = problem_of(bare).graph
    with pytest.raises(NotApplicable, match="no plain convolution"):
        Mask.of(bare, graph, graph.group("first.0"))


def test_while_training_all_norms_of_a_group_meet_the_same_sample() -> None:
    """Before and behind a depthwise layer: with draws of their own a channel would be on only if both let it pass."""
    torch.manual_seed(0)
    model, example = TOYS["depthwise"]()
    graph = trace(model, example)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    masks, _ = judged(graph, lambda group: Mask.of(model, graph, group))
    hook, plain, gated = SoftMasks(masks, 0.0, 10), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    names = [f"{i}.1" for i in range(4)]

    def listen(into: dict[str, torch.Tensor]) -> None:
        for name in names:
            norm = model.get_submodule(name)
            norm.register_forward_hook(lambda m, args, out, name=name: into.update({name: out.detach().clone()}))

    listen(plain)
    hook.on_train_begin(model)
    listen(gated)
    samples = list[torch.Tensor]()
    for _ in range(2):
        model.train()(torch.randn(16, 3, 8, 8))
        factors = {name: gated[name].abs().mean((0, 2, 3)) / plain[name].abs().mean((0, 2, 3)) for name in names}
        torch.testing.assert_close(factors["0.1"], factors["1.1"])
        torch.testing.assert_close(factors["2.1"], factors["3.1"])
        samples.append(factors["0.1"])
    assert (samples[0] - samples[1]).abs().max() > 0.05, "and another one in every pass"
