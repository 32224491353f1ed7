"""What is learned from forms of a model as a whole, against a device that is known exactly."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.allocation.allocate import allocate_widths
from deploypipe.backends.base import KernelTime, Profile, Timing
from deploypipe.graph import trace
from deploypipe.latency.context import Context
from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.profiler import prices
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.context import even_plan
from deploypipe.profiler.fit import DENSE, Form, learned

TIMER, SESSION = 2.0, 3.0
N_PLANS, AREA = 8, 100
WIDTHS = (64, 48, 64, 32)


@pytest.fixture(scope="module")
def graph():
    chain = [3, *WIDTHS, 5]
    layers = [nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in pairwise(chain)]
    net = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    return trace(net, torch.zeros(1, 3, 10, 10))


def alone_us(n_in, n_out):
    return 5 + 0.05 * n_in * n_out


@pytest.fixture(scope="module")
def table(graph):
    widths = (3, 4, 5, 8, 16, 32, 48, 64)
    shape = Shape.of(graph.layers[0])
    assert all(Shape.of(layer) == shape for layer in graph.layers)
    entries = [Entry(shape, *pair, alone_us(*pair), 1, 1, 9) for pair in product(widths, widths)]
    return LatencyTable({"session_us": SESSION}, {"conv": Steps(16, small=(8, 4))}, tuple(entries))


class Machine:
    """A device with cold caches, in plain arithmetic: it fetches inputs, weights and outputs, each layer in its own way.

    A pool follows every layer and is slower where 16 channels do not fill their block; channels above 40 leave a near cache and
    take it `spill` more each. The dense form takes `thrash` times what the law says, others less of that the narrower their
    layers are: with the power `fade` of a layer's share of work. Kernels that are profiled take `slower` times as long, and
    `timer` more.
    """

    def __init__(self, graph, slower=1.0, noise=0.0, timer=TIMER, thrash=1.0, fade=100, spill=0.0):
        self.graph, self.slower, self.timer, self.spill = graph, slower, timer, spill
        self.thrash, self.fade = thrash, fade
        self.random, self.noise = np.random.default_rng(3), noise
        self.own = dict(zip((layer.name for layer in graph.layers), (1.0, 1.2, 0.8, 1.1, 0.9), strict=True))

    def layer_us(self, layer, kept):
        n_in, n_out = layer.n_in.at(kept), layer.n_out.at(kept)
        cold = 2 + AREA * (0.004 * n_in + 0.002 * n_out) + 9 * 0.003 * n_in * n_out
        return 0.95 * alone_us(n_in, n_out) + self.own[layer.name] * cold

    def pool_us(self, layer, kept):
        width = layer.n_out.at(kept)
        return (2.0 + 0.2 * width if width % 16 == 0 else 8.0 + 1.0 * width) + self.spill * max(0, width - 40)

    def whole_us(self, plan=None):
        kept = self.graph.kept(plan)
        return self.plain_us(kept) * self.slowdown(kept)

    def plain_us(self, kept):
        return SESSION + sum(self.layer_us(layer, kept) + self.pool_us(layer, kept) for layer in self.graph.layers)

    def slowdown(self, kept):
        full, beyond = self.graph.kept(), 0.0
        for layer in self.graph.layers:
            share = layer.n_in.at(kept) * layer.n_out.at(kept) / (layer.n_in.at(full) * layer.n_out.at(full))
            beyond += self.layer_us(layer, full) * share**self.fade
        dense = sum(self.layer_us(layer, full) for layer in self.graph.layers)
        return 1 + (self.thrash - 1) * beyond / dense * self.plain_us(full) / self.plain_us(kept)

    def form(self, name, plan):
        kept, kernels = self.graph.kept(plan), []
        full = self.slowdown(kept)
        for layer in self.graph.layers:
            for op, weight, us in (("Conv", layer.weight, self.layer_us(layer, kept)), ("Pool", "", self.pool_us(layer, kept))):
                profiled = self.slower * full * us * self.noisy(3) + self.timer
                kernels.append(KernelTime(op + layer.name, op, weight, () if weight else (layer.weight,), profiled, 1, 1, 9))
        us = self.whole_us(plan) * self.noisy(1)
        return Form(name, kept, Timing(us, us, us, 9, 0.0), Profile(tuple(kernels)))

    def noisy(self, times):
        return 1 + times * self.noise * self.random.standard_normal()

    def forms(self, table):
        plans = random_plans(self.graph, table.candidates(self.graph), N_PLANS, 20)
        even = {f"even-{i}": even_plan(table.candidates(self.graph), share) for i, share in enumerate((0.5, 0.2))}
        named = {DENSE: KeepPlan({}), **even, **{f"random-{i}": plan for i, plan in enumerate(plans)}}
        return [self.form(name, plan) for name, plan in named.items()], plans


def errors(machine, table, plans):
    """Return relative errors of predictions against the device's own law."""
    return np.array([table.predict(machine.graph, plan) / machine.whole_us(plan) - 1 for plan in plans])


def unseen(graph, table):
    return random_plans(graph, table.candidates(graph), 40, 7)


@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.01), (0.01, 0.02)])
def test_a_device_with_cold_caches_is_learned(graph, table, noise, most):
    machine = Machine(graph, noise=noise)
    forms, _ = machine.forms(table)
    found = table.with_context(learned(graph, table, forms, TIMER))
    assert found.predict(graph) == pytest.approx(forms[0].whole.median_us, rel=1e-9), "what was measured is not predicted"
    assert np.abs(errors(machine, found, unseen(graph, table))).mean() < most
    context = found.context(graph)
    assert context.error < 0.03
    assert context.additivity == pytest.approx(1.0, abs=0.01 + 5 * noise)


class Recurrent(nn.Module):
    """Runs one of its layers twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.last, self.head = (
            nn.Conv2d(n_in, n_out, 3, padding=1) for n_in, n_out in ((3, 64), (64, 64), (64, 32), (32, 5))
        )

    def forward(self, x):
        x = self.mid(torch.relu(self.mid(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.last(torch.relu(x))))


def test_a_layer_that_is_called_again_is_learned_and_priced_call_by_call(table):
    again = trace(Recurrent().eval(), torch.zeros(1, 3, 10, 10))
    assert [name for name, _ in again.calls] == ["stem", "mid", "mid#2", "last", "head"]
    machine = Machine(again)
    forms, _ = machine.forms(table)
    found = table.with_context(learned(again, table, forms, TIMER))
    assert found.predict(again) == pytest.approx(machine.whole_us())
    assert np.abs(errors(machine, found, unseen(again, table))).mean() < 0.01
    assert found.context(again).error < 0.03


def test_each_layer_is_learned_in_its_own_way(graph, table):
    machine = Machine(graph)
    found = table.with_context(learned(graph, table, machine.forms(table)[0], TIMER))
    kept = graph.kept(even_plan(table.candidates(graph), 0.6))
    for layer, term in zip(graph.layers[1:-1], found.terms(graph)[1:], strict=False):
        price = term.price(layer.n_in.at(kept), layer.n_out.at(kept))
        assert price == pytest.approx(machine.layer_us(layer, kept), rel=0.03), layer.name


def test_without_learning_that_device_would_be_mispriced(graph, table):
    """The margin above is not there by chance: kernels alone are far off."""
    machine = Machine(graph)
    plain = table.with_context(Context(structure_of(graph), {}, (), 100.0, 1.0, 1.0, 0.0, 9))
    plain = plain.corrected(graph, machine.whole_us() / plain.predict(graph))
    assert np.abs(errors(machine, plain, unseen(graph, table))).mean() > 0.06


@pytest.mark.parametrize(("slower", "timer"), [(1.3, TIMER), (1.0, 2 * TIMER), (0.9, 0.5 * TIMER)])
def test_a_machine_that_was_slower_while_it_profiled_is_no_error(graph, table, slower, timer):
    machine = Machine(graph, slower=slower, timer=timer)
    found = table.with_context(learned(graph, table, machine.forms(table)[0], TIMER))
    assert np.abs(errors(machine, found, unseen(graph, table))).mean() < 0.015


@pytest.mark.parametrize("which", [0, 1, 4, 10])
def test_a_form_that_was_slow_while_it_was_profiled_does_no_harm(graph, table, which):
    machine = Machine(graph)
    forms, _ = machine.forms(table)
    slow = tuple(kernel.times(1.16) for kernel in forms[which].profile.kernels)
    forms[which] = replace(forms[which], profile=Profile(slow))
    found = table.with_context(learned(graph, table, forms, TIMER))
    assert np.abs(errors(machine, found, unseen(graph, table))).mean() < 0.015


def test_kernels_that_are_slower_on_blocks_not_full_are_told_apart(graph, table):
    machine = Machine(graph)
    found = table.with_context(learned(graph, table, machine.forms(table)[0], TIMER))
    narrow = [KeepPlan.of_widths(dict(zip("0246", widths, strict=True))) for widths in product((8, 16), repeat=4)]
    full, half = (
        sum(machine.pool_us(layer, graph.kept(plan)) for layer in graph.layers[:4]) for plan in (narrow[-1], narrow[0])
    )
    assert half > 3 * full, "half as wide, and three times the price"
    assert np.abs(errors(machine, found, narrow)).mean() < 0.03


def test_what_leaves_a_near_cache_is_told_apart(graph, table, monkeypatch):
    machine = Machine(graph, spill=2.0)
    forms, _ = machine.forms(table)

    def off():
        found = table.with_context(learned(graph, table, forms, TIMER))
        return np.abs(errors(machine, found, unseen(graph, table))).mean()

    with_knee = off()
    monkeypatch.setattr(prices, "_KNEE", 1.0)
    assert with_knee < 0.02
    assert off() > 2 * with_knee


def test_a_dense_form_in_another_regime_is_exact_and_spoils_no_other(graph, table):
    machine = Machine(graph, thrash=1.1)
    forms, _ = machine.forms(table)
    found = table.with_context(learned(graph, table, forms, TIMER))
    assert found.predict(graph) == pytest.approx(machine.whole_us(), rel=1e-9)
    narrow = [plan for plan in unseen(graph, table) if machine.whole_us(plan) < 0.7 * machine.whole_us()]
    assert len(narrow) > 20
    assert np.abs(errors(machine, found, narrow)).mean() < 0.025


@pytest.mark.parametrize(("fade", "power"), [(8, 8), (1, 2)])
def test_how_fast_the_price_of_full_layers_falls_is_learned(graph, table, monkeypatch, fade, power):
    machine = Machine(graph, thrash=1.5, fade=fade)
    forms, _ = machine.forms(table)
    found = learned(graph, table, forms, TIMER)
    assert {price.crowd_power for price in found.prices.values()} == {power}
    off = np.abs(errors(machine, table.with_context(found), unseen(graph, table))).mean()
    monkeypatch.setattr("deploypipe.profiler.fit._POWERS", ({8: 2, 2: 8}[power],))
    other = table.with_context(learned(graph, table, forms, TIMER))
    assert np.abs(errors(machine, other, unseen(graph, table))).mean() > 1.3 * off


def test_forms_that_are_mostly_full_tell_how_the_price_of_full_layers_falls(graph, table, monkeypatch):
    """As where the heaviest layers can hardly be narrowed: on such forms one factor for all was used instead."""
    machine = Machine(graph, thrash=1.5, fade=1)
    wide = [plan for plan in random_plans(graph, table.candidates(graph), 120, 20) if is_wide(machine, plan)]
    forms = [machine.form(DENSE, KeepPlan({})), *(machine.form(f"random-{i}", plan) for i, plan in enumerate(wide[:N_PLANS]))]
    found = learned(graph, table, forms, TIMER)
    assert all(price.crowded_us > 0 for price in found.prices.values())
    others = wide[N_PLANS:]
    off = np.abs(errors(machine, table.with_context(found), others)).mean()
    monkeypatch.setattr("deploypipe.profiler.fit._ALIKE", 0.0)
    factor_alone = table.with_context(learned(graph, table, forms, TIMER))
    assert np.abs(errors(machine, factor_alone, others)).mean() > 1.3 * off


def is_wide(machine, plan):
    return machine.whole_us(plan) > 0.7 * machine.whole_us()


def test_nonsense_gives_no_negative_price(graph, table):
    """A dense form that was measured three times too fast, as on a tiny model on a busy machine."""
    forms, _ = Machine(graph, thrash=0.3).forms(table)
    found = table.with_context(learned(graph, table, forms, TIMER))
    assert found.predict(graph) == pytest.approx(forms[0].whole.median_us)
    for plan in (KeepPlan({}), *unseen(graph, table)):
        kept = graph.kept(plan)
        assert all(term.price(term.n_in.at(kept), term.n_out.at(kept)) >= 0 for term in found.terms(graph))


@pytest.mark.parametrize("thrash", [0.95, 1.0, 1.1])
def test_budgets_up_to_the_whole_model_are_kept_and_used(graph, table, thrash):
    """Exact up to the dense form, whatever lies between it and what narrower forms tell: against all choices there are."""
    forms, _ = Machine(graph, thrash=thrash).forms(table)
    found = table.with_context(learned(graph, table, forms, TIMER))
    candidates = found.candidates(graph)
    values = {name: np.sqrt(np.arange(graph.group(name).size + 1.0)) for name in candidates}
    every = [dict(zip(candidates, widths, strict=True)) for widths in product(*candidates.values())]
    prices = np.array([found.predict(graph, KeepPlan.of_widths(kept)) for kept in every])
    worth = np.array([sum(values[name][width] for name, width in kept.items()) for kept in every])
    for share in (0.7, 0.9, 0.97, 0.999, 1.0):
        budget = share * found.predict(graph)
        kept, certificate = allocate_widths(graph, values, found, budget, gap=1e-9)
        assert certificate.predicted == found.predict(graph, KeepPlan.of_widths(kept)) <= budget
        assert certificate.value == pytest.approx(worth[prices <= budget].max())


def test_errors_are_those_of_forms_left_out(graph, table):
    """Every stored error must be the one that a table made from the other forms alone makes."""
    forms, plans = Machine(graph, noise=0.05).forms(table)
    found = learned(graph, table, forms, TIMER)
    assert len(found.errors) == N_PLANS
    assert found.error > 0.01
    for index in (0, 5):
        others = [form for form in forms if form.name != f"random-{index}"]
        without = table.with_context(learned(graph, table, others, TIMER))
        measured = next(form for form in forms if form.name == f"random-{index}").whole.median_us
        assert found.errors[index] == pytest.approx(without.predict(graph, plans[index]) / measured - 1)


def test_additivity_is_that_of_most_turns(graph, table):
    """Drift meets both sides of a turn; one turn in which it did not is outvoted."""
    machine = Machine(graph)
    forms, _ = machine.forms(table)
    whole, profile = forms[0].whole, forms[0].profile
    turns = []
    for drift in (0.8, 1.0, 1.3):
        slow = tuple(replace(kernel, median_us=drift * (kernel.median_us - TIMER) + TIMER) for kernel in profile.kernels)
        turns.append((replace(whole, median_us=drift * whole.median_us), Profile(slow)))
    turns.append((replace(whole, median_us=1.5 * whole.median_us), profile))
    assert learned(graph, table, forms, TIMER, turns).additivity == pytest.approx(1.0, abs=0.02)


def test_a_model_that_cannot_be_narrowed_is_priced_as_it_is(graph, table):
    form = Machine(graph).form(DENSE, KeepPlan({}))
    found = learned(graph, table, [form], TIMER)
    assert table.with_context(found).predict(graph) == pytest.approx(form.whole.median_us)
    assert found.error is None


def test_two_forms_are_both_reproduced(graph, table):
    """As when the owner of a device sends back what the dense and the pruned model took there."""
    machine = Machine(graph)
    plan = even_plan(table.candidates(graph), 0.5)
    forms = [machine.form(DENSE, KeepPlan({})), machine.form("pruned", plan)]
    found = table.with_context(learned(graph, table, forms, 0.0))
    assert found.predict(graph) == pytest.approx(machine.whole_us())
    assert found.predict(graph, plan) == pytest.approx(machine.whole_us(plan))


def test_a_layer_without_a_kernel_of_its_own_is_priced_alone(graph, table):
    machine = Machine(graph)
    forms = [
        replace(form, profile=Profile(tuple(kernel for kernel in form.profile.kernels if kernel.name != "Conv2")))
        for form in machine.forms(table)[0]
    ]
    found = learned(graph, table, forms, TIMER)
    term = next(term for term in table.with_context(found).terms(graph) if term.name == "2")
    assert term.price(32, 16) == pytest.approx(found.factor * alone_us(32, 16))
    assert table.with_context(found).predict(graph) == pytest.approx(forms[0].whole.median_us)


def test_even_forms_keep_about_the_share(graph, table):
    plan = even_plan(table.candidates(graph), 0.5)
    assert {name: len(kept) for name, kept in plan.keep.items()} == {"0": 32, "2": 16, "4": 32, "6": 16}


def test_plans_are_legal_spread_and_repeatable(graph, table):
    candidates = table.candidates(graph)
    plans = random_plans(graph, candidates, 8, 1)
    for plan in plans:
        plan.check(graph)
        assert all(len(channels) in candidates[name] for name, channels in plan.keep.items())
    machine = Machine(graph)
    shares = [machine.whole_us(plan) / machine.whole_us() for plan in plans]
    assert min(shares) < 0.3
    assert max(shares) > 0.7, "budgets near the whole are asked for, too"
    assert [p.keep for p in plans] == [p.keep for p in random_plans(graph, candidates, 8, 1)]


def test_a_layer_that_ran_with_2_4_weights_teaches_the_price_of_the_kernel_that_it_ran(graph, table):
    """Half the time because of the pattern is no quicker memory: dense plans must not be priced by it."""
    quick = [replace(entry, median_us=0.5 * entry.median_us, sparsity="2:4") for entry in table.kernels if entry.n_in == 64]
    both, machine = replace(table, kernels=(*table.kernels, *quick)), Machine(graph, timer=0.0)
    plan = KeepPlan.of_widths({"6": 16})
    dense, form = machine.form(DENSE, KeepPlan({})), machine.form("pruned", plan)
    saved = 0.95 * 0.5 * alone_us(64, 48)
    kernels = [replace(k, median_us=k.median_us - saved * (k.weight == "2.weight")) for k in form.profile.kernels]
    us = form.whole.median_us - saved
    masked = replace(form, whole=Timing(us, us, us, 9, 0.0), profile=Profile(tuple(kernels)), two_four=frozenset({"2"}))
    truth, told, ignored = (
        learned(graph, both, [dense, pruned], 0.0).us("2", alone_us(64, 48), 64, 48)
        for pruned in (form, masked, replace(masked, two_four=frozenset()))
    )
    assert abs(ignored / truth - 1) > 0.01
    assert abs(told - truth) < 0.3 * abs(ignored - truth)


def test_what_was_learned_while_groups_stood_still_is_not_taken_where_they_may_change(graph, table):
    held = graph.groups[0].name
    groups = tuple(replace(group, fixed="kept whole") if group.name == held else group for group in graph.groups)
    still = replace(graph, groups=groups)
    forms, _ = Machine(still).forms(table)
    found = table.with_context(learned(still, table, forms, TIMER))
    assert found.known(still)
    assert found.known(graph) is None, "its width never changed"
    forms, _ = Machine(graph).forms(table)
    whole = table.with_context(learned(graph, table, forms, TIMER))
    assert whole.known(graph)
    assert whole.known(still)
