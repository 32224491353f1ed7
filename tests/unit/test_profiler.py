import shutil
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

from deploypipe.backends.base import KernelTime, Profile, Timing
from deploypipe.backends.onnxruntime import OnnxRuntime
from deploypipe.compact import compact
from deploypipe.errors import BackendError
from deploypipe.graph import trace
from deploypipe.latency.context import Context, Price
from deploypipe.latency.files import Entry, write_device
from deploypipe.latency.table import structure_of
from deploypipe.latency.widths import Steps
from deploypipe.pipeline.request import Request
from deploypipe.pipeline.run import Run
from deploypipe.plan import KeepPlan
from deploypipe.profiler import bench, context, edges
from deploypipe.profiler import measure as profiler
from deploypipe.profiler.export import exported
from deploypipe.profiler.measure import device_key, needed, profile
from deploypipe.profiler.noise import Noise
from deploypipe.profiler.probe import Probe
from deploypipe.progress import Recorder
from deploypipe.runners.local import Local
from deploypipe.store import Store
from deploypipe.targets import load_target
from deploypipe.training.checkpoint import state_digest

STEPS = {"conv": Steps(16, 4, 1.4, (8,)), "depthwise": Steps(16, 4, 7.0), "linear": Steps(8)}
EXAMPLE = torch.randn(1, 3, 16, 16)
N_PLANS = 3  # random forms: each is exported, which takes most of the time of these tests


class Net(nn.Module):
    """A stem, a residual block, a pool, a head."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net):
    return trace(net, EXAMPLE)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Each form of the model is exported once for all tests of this file."""
    folder = tmp_path_factory.mktemp("exports")

    def remembered(model, example, target, into):
        kept = folder / state_digest(model)
        if not kept.is_dir():
            exported(model, example, target, kept)
        into.mkdir(parents=True, exist_ok=True)
        return shutil.copytree(kept, into, dirs_exist_ok=True) / "simple.onnx"

    return remembered


@pytest.fixture
def measured(net, graph, export):
    """Profile the model."""
    return partial(profile, net, EXAMPLE, graph=graph, export=export)


def prepared(cache, monkeypatch):
    """A cache that knows the device already: learning it is the work of test_learn, and takes seconds."""
    target = load_target("cpu")
    with profiler.opened(profiler.load_backend(target), profiler.load_runner(target), target) as at:
        facts = at.facts()
    write_device(cache / device_key(facts), {**facts, "timer_us": 1.4, "node_us": 0.2, "session_us": 3.0}, STEPS)
    monkeypatch.setattr(bench, "_RUNS", 10)
    monkeypatch.setattr(context, "N_PLANS", N_PLANS)
    monkeypatch.setattr(context, "_AGAIN", 0)  # so small a model adds up only by luck
    monkeypatch.setattr(edges, "saves", lambda *_: False)  # its steps are STEPS, whatever processor this is
    return target.replace(runs=30)


class Counting(Local):
    jobs: ClassVar[list[str]] = []
    fail_at = 10**9

    def run(self, job, into):
        if "request.json" not in job.push:  # the device is asked what it is, whatever its runtime
            return super().run(job, into)
        Counting.jobs.append(job.push["request.json"].decode().split('"task": "')[1].split('"')[0])
        if len(Counting.jobs) > Counting.fail_at:
            raise BackendError("unplugged")
        return super().run(job, into)


@pytest.fixture
def counting(monkeypatch):
    Counting.jobs, Counting.fail_at = [], 10**9
    monkeypatch.setattr(profiler, "load_runner", lambda target: Counting(target.reach))
    return Counting


def test_a_profile_prices_every_term_and_reproduces_the_dense_model(graph, measured, tmp_path, monkeypatch):
    target = prepared(tmp_path, monkeypatch)
    table = measured(target=target, cache_dir=tmp_path)
    found = table.context(graph)
    assert table.predict(graph) == pytest.approx(found.whole_us)
    assert 0.5 < found.factor < 2.0
    assert set(found.prices) == {"stem", "a", "b", "head"}
    assert len(found.errors) == N_PLANS
    kept = {name: widths[0] for name, widths in table.candidates(graph).items()}
    assert kept == {"stem": 8, "a": 8}
    for term in table.terms(graph):
        least = {**graph.kept(), **kept}
        assert term.price(term.n_in.at(least), term.n_out.at(least)) >= 0
    assert table.predict(graph, KeepPlan({name: tuple(range(n)) for name, n in kept.items()})) < 0.8 * table.predict(graph)


def test_a_runner_is_closed_again_unless_it_was_given(measured, tmp_path, monkeypatch, counting):
    target = prepared(tmp_path, monkeypatch)
    closed = []

    class Closing(counting):
        def close(self):
            closed.append(self)

    monkeypatch.setattr(profiler, "load_runner", lambda target: Closing(target.reach))
    measured(target=target, cache_dir=tmp_path, runner=counting(target.reach))
    assert "profile" in counting.jobs
    assert closed == [], "its owner has more to do there, and no other was opened"
    measured(target=target, cache_dir=tmp_path)
    assert len(closed) == 1


def test_a_build_is_profiled_over_the_connection_that_it_has(tmp_path, monkeypatch):
    used = []

    def profiled(*args, runner, **options):
        used.append(runner)
        raise BackendError("enough")

    monkeypatch.setattr("deploypipe.pipeline.run.profile", profiled)
    with Store(tmp_path, Recorder()) as store:
        build = Run(Request(algo="l1"), store, Recorder())
        with pytest.raises(BackendError, match="enough"):
            _ = build.table
    assert used == [build.device.runner]


def test_a_run_that_keeps_groups_whole_has_a_table_of_its_own(tmp_path, monkeypatch):
    """Their other widths were not measured: a run without --keep in the same folder must not find that table."""
    keys = []
    for keep in ((), ("stem.0",)):
        with Store(tmp_path, Recorder()) as store:
            monkeypatch.setattr(store, "keep", lambda stage, key, *_: keys.append(key) if stage == "profile" else None)
            _ = Run(Request(algo="l1", keep=keep), store, Recorder()).table
    assert len(keys) == 2
    assert keys[0] != keys[1]


def test_a_second_profile_measures_nothing(net, graph, measured, export, tmp_path, monkeypatch, counting):
    target = prepared(tmp_path, monkeypatch)
    monkeypatch.setattr(context, "_SITTINGS", 3)
    first = measured(target=target, cache_dir=tmp_path)
    sitting = ["bench", "bench", "profile"]  # all forms; the dense form as a whole and by kernel
    assert counting.jobs[-11:] == ["bench", *3 * sitting, "profile"]
    counting.jobs.clear()
    told = Recorder()
    again = measured(target=target, cache_dir=tmp_path, reporter=told)
    assert counting.jobs == ["describe"]
    assert told.was_reused == ["profile kernels", "profile model"]
    assert again.predict(graph) == first.predict(graph)
    # A pruned form of the model is the same model: nothing to measure for it but kernels at widths of its own.
    small = compact(net, graph, KeepPlan({"a": tuple(range(16))}))
    counting.jobs.clear()
    profile(small, EXAMPLE, target, cache_dir=tmp_path, export=export)
    assert counting.jobs.count("profile") == 0


@pytest.mark.parametrize(("errors", "n_times"), [((), 2), ((0.01,), 1)])
def test_a_model_that_could_not_be_narrowed_is_tried_again(graph, measured, tmp_path, monkeypatch, errors, n_times):
    """Its forward may have been mended, or what cannot be narrowed is kept whole now."""
    target, times = prepared(tmp_path, monkeypatch), []

    def found(*_):
        times.append(1)
        return Context(structure_of(graph), {"stem": Price(full=3 * 32)}, (), 100.0, 1.0, 1.0, 0.0, 30, errors)

    monkeypatch.setattr(profiler, "in_context", found)
    for _ in range(2):
        measured(target=target, cache_dir=tmp_path)
    assert len(times) == n_times


def test_a_wider_model_of_the_same_layers_is_profiled_as_a_whole(measured, tmp_path, monkeypatch):
    target, profiled = prepared(tmp_path, monkeypatch), []

    def found(bench, model, example, graph, table, tell):
        profiled.append(graph.kept())
        full = {name: layer.n_in.at(graph.kept()) * layer.n_out.at(graph.kept()) for name, layer in graph.calls}
        prices = {name: Price(full=work) for name, work in full.items()}
        return Context(structure_of(graph), prices, (), 100.0, 1.0, 1.0, 0.0, 30, (0.01,))

    monkeypatch.setattr(profiler, "in_context", found)
    for width in (16, 32, 16):
        profile(Net(width).eval(), EXAMPLE, target, cache_dir=tmp_path)
    assert [kept["stem"] for kept in profiled] == [16, 32]


class Sparse(OnnxRuntime):
    """Says that it has kernels for 2:4 weights."""

    two_four = True


def test_where_the_runtime_has_sparse_kernels_every_eligible_one_is_measured_too(
    graph, measured, tmp_path, monkeypatch, counting
):
    target = prepared(tmp_path, monkeypatch)
    whole = Context(structure_of(graph), {}, (), 100.0, 1.0, 1.0, 0.0, 30)
    monkeypatch.setattr(profiler, "in_context", lambda *_: whole)  # no sparse kernel has a part in it
    before = measured(target=target, cache_dir=tmp_path)
    assert not before.knows_two_four
    monkeypatch.setattr(profiler, "load_backend", lambda target: Sparse())
    counting.jobs.clear()
    table = measured(target=target, cache_dir=tmp_path)
    assert set(counting.jobs) == {"describe", "bench"}, "only what was missing"
    sparse = {entry.place for entry in table.kernels if entry.sparsity == "2:4"}
    assert {shape.kind for shape, *_ in sparse} == {"conv"}, "the head has five outputs"
    assert {widths for _, widths, _ in sparse} == {(n_in, n_out) for n_in in (16, 32) for n_out in (8, 16, 32)}
    assert sparse == {probe.place for probe in needed(graph, table.steps, sparse=True)} - {e.place for e in before.kernels}
    assert {entry for entry in table.kernels if entry.sparsity == "dense"} == set(before.kernels)
    offered = table.offering()
    assert offered.predict(graph) == table.predict(graph) == before.predict(graph)
    assert [term.name for term in offered.terms(graph) if term.two_four] == ["a", "b"]


@pytest.mark.slow
def test_a_fresh_profile_forgets_what_was_measured_on_this_device_alone(measured, tmp_path, monkeypatch, counting):
    target = prepared(tmp_path, monkeypatch)
    old = measured(target=target, cache_dir=tmp_path)
    (tmp_path / "other-device").mkdir()
    counting.jobs.clear()
    monkeypatch.setattr(profiler, "learn_steps", lambda measure: STEPS)
    new = measured(target=target, cache_dir=tmp_path, fresh=True)
    assert counting.jobs[0] == "describe"
    assert counting.jobs.count("bench") > 1
    assert new.id != old.id
    assert (tmp_path / "other-device").is_dir()


@pytest.mark.slow
def test_what_was_measured_survives_an_interruption(graph, measured, tmp_path, monkeypatch, counting):
    target = prepared(tmp_path, monkeypatch)
    monkeypatch.setattr(profiler, "_PER_JOB", 2)
    total = len(needed(graph, STEPS))
    counting.jobs.clear()
    counting.fail_at = 7  # the description, the rounds of the edges, and all rounds of the first kernels
    with pytest.raises(BackendError, match="unplugged"):
        measured(target=target, cache_dir=tmp_path)
    stored = next(tmp_path.rglob("kernels.csv")).read_text().splitlines()[1:]
    assert 0 < len(stored) < total
    counting.jobs.clear()
    counting.fail_at = 10**9
    measured(target=target, cache_dir=tmp_path)
    after = next(tmp_path.rglob("kernels.csv")).read_text().splitlines()[1:]
    assert set(stored) < set(after), "not measured again"
    assert len(after) == total


def test_threads_and_versions_never_share_measurements():
    facts = {"runtime": "r", "version": "1", "arch": "a", "threads": 1, "precision": "fp32"}
    facts |= {"cpu": "c", "cpu_flags": ["avx2"], "governor": ""}
    changes = {"version": "2", "threads": 2, "precision": "int8", "cpu": "d", "cpu_flags": ["avx512f"], "governor": "powersave"}
    keys = {device_key({**facts, name: value}) for name, value in changes.items()} | {device_key(facts)}
    assert len(keys) == len(changes) + 1


def test_needed_kernels_cover_the_candidates_of_every_layer(graph):
    probes = needed(graph, STEPS)
    widths = {(probe.shape.kind, probe.n_in, probe.n_out) for probe in probes}
    assert {("conv", 3, n) for n in (8, 16, 32)} <= widths
    assert {("conv", n, m) for n in (8, 16, 32) for m in (8, 16, 32)} <= widths
    assert {("linear", n, 5) for n in (8, 16, 32)} <= widths
    assert len(set(probes)) == len(probes)
    assert {probe.n_in for probe in probes if probe.relay} == {8}


def test_a_single_round_stands_if_it_neither_scatters_nor_contradicts(monkeypatch):
    small, large = probes_of((16, 16), (32, 16))
    calls = []

    def round_(self, probes):
        calls.append(list(probes))
        wide = 3.0 if probes == [small, large] else 0.1
        high = {small: 1 + wide, large: 1.0}
        return {p: Entry(p.shape, p.n_in, p.n_out, us := 5.0 * p.n_in, us, us * high[p], 30) for p in probes}

    monkeypatch.setattr(bench.Bench, "_round", round_)
    bench.Bench(None, None, None, None).kernels([small, large])
    assert calls == [[small, large], [small]]


def probes_of(*widths):
    shape = needed(trace(Net().eval(), EXAMPLE), STEPS)[0].shape
    return [Probe(shape, n_in, n_out) for n_in, n_out in widths]


@pytest.mark.parametrize(("fused", "taken"), [((), "Neg"), (("Neg",), "Softmax")])
def test_an_idle_operation_that_the_runtime_fuses_with_itself_is_passed_over(monkeypatch, fused, taken):
    def profiles(self, models, target):
        return {op: Profile((KernelTime("k", op, "", (), 1.5, 1, 2, 9),) * (1 if op in fused else 110)) for op in models}

    def whole(self, models, target=None):
        assert all(taken.encode() in model for name, model in models.items() if name != "layers")
        us = {name: 8.0 + (55.0 if name == "layers" else 0.5 * int(name)) for name in models}
        return {name: Timing(us[name], 1, 2, 9, 0.0) for name in models}

    monkeypatch.setattr(bench.Bench, "profiles", profiles)
    monkeypatch.setattr(bench.Bench, "whole", whole)
    assert bench.Bench(None, None, None, None).cost_of_measuring() == (1.0, 0.5, 8.0)


def test_accepted_noise_stands_in_the_table(graph, measured, tmp_path, monkeypatch):
    target = prepared(tmp_path, monkeypatch)
    judge = Noise(True, worst=0.0)
    monkeypatch.setattr(profiler, "Noise", lambda *accepted: judge)

    def disturbed(*anything):
        judge.worst = 0.61
        return Context(structure_of(graph), {}, (), 100.0, 1.0, 1.0, 0.61, 9)

    monkeypatch.setattr(profiler, "in_context", disturbed)
    measured(target=target, cache_dir=tmp_path)
    again = measured(target=target, cache_dir=tmp_path)
    assert again.facts["accepted_foreign_load"] >= 0.61, "also in the file"


def test_a_runtime_that_fuses_all_idle_operations_is_refused(monkeypatch):
    fused = Profile((KernelTime("k", "Subgraph", "", (), 1.5, 1, 2, 9),))
    monkeypatch.setattr(bench.Bench, "profiles", lambda self, models, target: dict.fromkeys(models, fused))
    with pytest.raises(BackendError, match="fuses chains of Neg and of Softmax"):
        bench.Bench(OnnxRuntime(), None, None, None).cost_of_measuring()


def test_times_that_contradict_each_other_are_found():
    small, large, wide = probes_of((16, 16), (32, 16), (16, 32))
    assert bench.contradictions({small: 10.0, large: 20.0, wide: 9.9}) == []
    assert bench.contradictions({small: 10.0, large: 9.0, wide: 15.0}) == [small, large]
    assert bench.contradictions({small: 5.0, large: 9.0, wide: 1.0}) == [small, wide]


def test_a_disturbed_kernel_is_timed_again_and_the_middle_counts(monkeypatch):
    small, large = probes_of((16, 16), (32, 16))
    times = {small: iter([50.0, 5.0, 6.0, 5.9]), large: iter([10.0, 10.0, 10.0, 10.0])}

    def round_(self, probes):
        return {p: Entry(p.shape, p.n_in, p.n_out, us := next(times[p]), us, us, 30) for p in probes}

    monkeypatch.setattr(bench.Bench, "_round", round_)
    found = bench.Bench(None, None, None, None).kernels([small, large], again=3)
    assert (found[small].median_us, found[large].median_us) == (5.9, 10.0)
