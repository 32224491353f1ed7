"""What is learned from forms of a model as a whole, against a device that is known exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deploypipe.backends.base import KernelTime, Profile, Timing
from deploypipe.graph import trace
from deploypipe.latency.context import Context, Overhead
from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.plan import KeepPlan
from deploypipe.profiler.check import random_plans
from deploypipe.profiler.context import even_plan
from deploypipe.profiler.fit import DENSE, Form, learned

TIMER, SESSION = 2.0, 3.0
N_PLANS = 8


@pytest.fixture(scope="module")
def graph():
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 48, 3), nn.ReLU(), nn.Conv2d(48, 5, 3)).eval()
    return trace(net, torch.zeros(1, 3, 10, 10))


@pytest.fixture(scope="module")
def table(graph):
    entries = [
        Entry(Shape.of(layer), n_in, n_out, 5 + 0.1 * n_in * n_out, 1, 1, 9)
        for layer in graph.layers
        for n_in in (3, 16, 32, 48, 64)
        for n_out in (5, 16, 32, 48, 64)
    ]
    return LatencyTable({"session_us": SESSION}, {"conv": Steps(16)}, tuple(entries))


class Machine:
    """A device that follows a context to the letter, times `slower`, and adds `timer` to every kernel that it profiles."""

    def __init__(self, graph, table, slower=1.0, noise=0.0, timer=TIMER):
        self.graph, self.table, self.slower, self.timer = graph, table, slower, timer
        self.random, self.noise = np.random.default_rng(3), noise
        dense = graph.kept()
        self.scale = {
            layer.name: tuple(
                (max(1, layer.n_in.at(dense) * layer.n_out.at(dense) // part), ratio)
                for part, ratio in ((16, 0.9), (4, 1.3), (1, 1.1))
            )
            for layer in graph.layers
        }
        self.pool = Overhead("Pool", ("0", "2"), 4.0, 0.25)
        self.context = Context(
            structure_of(graph), self.scale, (self.pool, Overhead("session", (), SESSION)), 1.0, 1.0, 1.0, 0.0, 9
        )

    def form(self, name, plan):
        kept = self.graph.kept(plan)
        us = self.table.with_context(self.context).predict(self.graph, plan) * (1 + self.noise * self.random.standard_normal())
        kernels = [
            KernelTime(layer.name, "Conv", layer.weight, (), self.inside(layer, kept), 1, 1, 9) for layer in self.graph.layers
        ]
        feeds = tuple(layer.weight for layer in self.graph.layers[:2])
        width = sum(layer.n_out.at(kept) for layer in self.graph.layers[:2])
        pool = self.slower * (self.pool.fixed_us + self.pool.per_channel_us * width) + self.timer
        kernels.append(KernelTime("pool", "Pool", "", feeds, pool, 1, 1, 9))
        return Form(name, kept, Timing(us, us, us, 9, 0.0), Profile(tuple(kernels)))

    def inside(self, layer, kept):
        n_in, n_out = layer.n_in.at(kept), layer.n_out.at(kept)
        alone = self.table.kernel_us(layer, n_in, n_out)
        return self.slower * self.context.ratio(layer.name, n_in * n_out) * alone + self.timer

    def forms(self):
        plans = random_plans(self.graph, self.table.candidates(self.graph), N_PLANS, 20)
        named = {DENSE: KeepPlan({}), **{f"random-{i}": plan for i, plan in enumerate(plans)}}
        return [self.form(name, plan) for name, plan in named.items()], plans


def test_a_device_that_adds_up_is_learned_to_a_per_cent(graph, table):
    machine = Machine(graph, table)
    forms, _ = machine.forms()
    found = table.with_context(learned(graph, table, forms, TIMER))
    assert found.predict(graph) == pytest.approx(forms[0].whole.median_us)
    unseen = random_plans(graph, table.candidates(graph), 30, 7)
    truth = [table.with_context(machine.context).predict(graph, plan) for plan in unseen]
    predicted = [found.predict(graph, plan) for plan in unseen]
    assert np.abs(np.array(predicted) / truth - 1).mean() < 0.02
    context = found.context(graph)
    assert context.error < 0.03
    assert context.additivity == pytest.approx(1.0)
    pool = next(kernel for kernel in context.overhead if kernel.op == "Pool")
    assert (pool.fixed_us, pool.per_channel_us) == (pytest.approx(4.0, rel=0.1), pytest.approx(0.25, rel=0.1))


def test_without_learning_that_device_would_be_mispriced(graph, table):
    """The margin above is not there by chance: kernels alone are far off."""
    machine = Machine(graph, table)
    forms, plans = machine.forms()
    alone = Context(structure_of(graph), {}, (), forms[0].whole.median_us, 1.0, 1.0, 0.0, 9)
    plain = table.with_context(alone)
    plain = plain.corrected(graph, forms[0].whole.median_us / plain.predict(graph))
    errors = [plain.predict(graph, plan) / form.whole.median_us - 1 for plan, form in zip(plans, forms[1:], strict=True)]
    assert np.abs(errors).mean() > 0.06


@pytest.mark.parametrize(("slower", "timer"), [(1.3, TIMER), (1.0, 2 * TIMER), (0.9, 0.5 * TIMER)])
def test_a_machine_that_was_slower_while_it_profiled_is_no_error(graph, table, slower, timer):
    plain, other = Machine(graph, table), Machine(graph, table, slower=slower, timer=timer)
    contexts = [learned(graph, table, machine.forms()[0], TIMER) for machine in (plain, other)]
    one, two = (table.with_context(context) for context in contexts)
    for plan in random_plans(graph, table.candidates(graph), 10, 7):
        assert two.predict(graph, plan) == pytest.approx(one.predict(graph, plan), rel=0.03)


def test_errors_are_those_of_forms_left_out(graph, table):
    """Every stored error must be the one that a table made from the other forms alone makes."""
    forms, plans = Machine(graph, table, noise=0.05).forms()
    found = learned(graph, table, forms, TIMER)
    assert len(found.errors) == N_PLANS
    assert found.error > 0.01
    for index in (0, 5):
        others = [form for form in forms if form.name != f"random-{index}"]
        without = table.with_context(learned(graph, table, others, TIMER))
        measured = forms[index + 1].whole.median_us
        assert found.errors[index] == pytest.approx(without.predict(graph, plans[index]) / measured - 1)


def test_a_model_that_cannot_be_narrowed_is_priced_as_it_is(graph, table):
    form = Machine(graph, table).form(DENSE, KeepPlan({}))
    found = learned(graph, table, [form], TIMER)
    assert table.with_context(found).predict(graph) == pytest.approx(form.whole.median_us)
    assert found.error is None


def test_a_layer_without_a_kernel_of_its_own_is_priced_alone(graph, table):
    machine = Machine(graph, table)
    forms = [
        replace(form, profile=Profile(tuple(kernel for kernel in form.profile.kernels if kernel.name != "2")))
        for form in machine.forms()[0]
    ]
    found = learned(graph, table, forms, TIMER)
    assert "2" not in found.scale
    assert table.with_context(found).predict(graph) == pytest.approx(forms[0].whole.median_us)


def test_even_forms_keep_about_the_share(graph, table):
    plan = even_plan(table.candidates(graph), 0.5)
    assert {name: len(kept) for name, kept in plan.keep.items()} == {"0": 32, "2": 16}


def test_plans_are_legal_spread_and_repeatable(graph, table):
    candidates = table.candidates(graph)
    plans = random_plans(graph, candidates, 8, 1)
    for plan in plans:
        plan.check(graph)
        assert all(len(channels) in candidates[name] for name, channels in plan.keep.items())
    alone = table.with_context(Context(structure_of(graph), {}, (), 1.0, 1.0, 1.0, 0.0, 9))
    shares = [alone.predict(graph, plan) / alone.predict(graph) for plan in plans]
    assert max(shares) - min(shares) > 0.3
    assert [p.keep for p in plans] == [p.keep for p in random_plans(graph, candidates, 8, 1)]


def test_a_layer_that_ran_with_2_4_weights_teaches_the_ratio_of_the_kernel_that_it_ran(graph, table):
    """Half the time because of the pattern is no quicker memory: dense plans must not be priced by it."""
    quick = [replace(entry, median_us=0.5 * entry.median_us, sparsity="2:4") for entry in table.kernels if entry.n_in == 64]
    both = replace(table, kernels=(*table.kernels, *quick))
    machine = Machine(graph, table, timer=0.0)
    dense, form = machine.form(DENSE, KeepPlan({})), machine.form("pruned", KeepPlan({}))
    kernels = [replace(kernel, median_us=0.5 * kernel.median_us) if kernel.weight == "2.weight" else kernel
               for kernel in form.profile.kernels]  # fmt: skip
    saved = form.profile.sum_us - sum(kernel.median_us for kernel in kernels)
    us = form.whole.median_us - saved
    masked = replace(form, whole=Timing(us, us, us, 9, 0.0), profile=Profile(tuple(kernels)), two_four=frozenset({"2"}))
    told, ignored = (
        both.with_context(learned(graph, both, [dense, pruned], 0.0)).predict(graph, KeepPlan.of_widths({"0": 32}))
        for pruned in (masked, replace(masked, two_four=frozenset()))
    )
    truth = both.with_context(learned(graph, both, [dense, form], 0.0)).predict(graph, KeepPlan.of_widths({"0": 32}))
    assert told == pytest.approx(truth, rel=0.01)
    assert abs(ignored / truth - 1) > 0.03
