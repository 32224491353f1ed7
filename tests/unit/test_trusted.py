"""A latency table that predicts whole models badly: refused, or accepted and said so."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from deploypipe.backends import load_backend
from deploypipe.errors import TargetError
from deploypipe.graph import trace
from deploypipe.latency.context import Context
from deploypipe.latency.files import Entry, write_device, write_kernels
from deploypipe.latency.table import LatencyTable, structure_of
from deploypipe.latency.widths import Steps
from deploypipe.pipeline.commands import _summary
from deploypipe.pipeline.stages import Device
from deploypipe.plan import KeepPlan
from deploypipe.profiler import measure as profiler
from deploypipe.profiler.measure import device_key, needed, profile
from deploypipe.progress import Recorder
from deploypipe.runners import load_runner
from deploypipe.targets import load_target

STEPS = {"conv": Steps(8, 4, 1.4, (4,)), "depthwise": Steps(8, 4, 7.0), "linear": Steps(8)}
EXAMPLE = torch.randn(1, 3, 8, 8)


class Branches(nn.Module):
    """A residual block, and a concat of what it gives with what it was given."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(n, width, 3, padding=1) for n in (3, width, width))
        self.shortcut, self.both = nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, 24, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.shortcut(x) + self.b(torch.relu(self.a(x))))
        return self.both(torch.cat([x, y], 1)).mean((2, 3))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 5)).eval()


@pytest.fixture(scope="module")
def graph(net):
    return trace(net, EXAMPLE)


@pytest.fixture
def learned(graph):
    """What profiling the model learns, with a mean error of 14 % on whole forms."""
    return Context(structure_of(graph), {}, (), 100.0, 1.0, 0.91, 0.0, 30, (0.14, -0.14))


@pytest.fixture
def cache(graph, learned, tmp_path, monkeypatch):
    """A cache in which the device and all kernels are known; profiling the model comes out as `learned`."""
    target = load_target("cpu")
    with profiler.opened(load_backend(target), load_runner(target), target) as bench:
        facts = bench.facts()
    folder = tmp_path / device_key(facts)
    write_device(folder, {**facts, "timer_us": 1.4, "node_us": 0.2, "session_us": 3.0}, STEPS)
    write_kernels(folder, [Entry(p.shape, p.n_in, p.n_out, 5.0, 5.0, 5.0, 30) for p in needed(graph, STEPS)])
    monkeypatch.setattr(profiler, "unconfirmed", lambda *_: False)
    monkeypatch.setattr(profiler, "in_context", lambda *_: learned)
    return tmp_path


def test_a_table_off_by_more_than_a_tenth_is_refused_and_not_kept(net, graph, cache):
    with pytest.raises(TargetError, match="off by 14% on whole forms") as caught:
        profile(net, EXAMPLE, graph=graph, cache_dir=cache, allow_noise=False)
    assert "--allow-noise" in caught.value.fix
    assert caught.value.at
    assert not list(cache.rglob("models/*.json"))


def test_whoever_accepts_noise_gets_it_with_its_doubts_and_nobody_else_does_later(net, graph, cache, learned, monkeypatch):
    table = profile(net, EXAMPLE, graph=graph, cache_dir=cache, allow_noise=True)
    summary = _summary(Device(load_target("cpu")), table, graph)
    assert (summary["error_on_them"], summary["sum_of_kernels_over_whole"]) == (0.14, 0.91)
    assert [sentence.split(" (wanted")[0] for sentence in summary["out_of_range"]] == [
        "forms of the model that the table did not see are off by 14.0% on average",
        "the parts of the dense model add up to 0.910 of what it takes as a whole",
    ]
    told = Recorder()
    profile(net, EXAMPLE, graph=graph, cache_dir=cache, allow_noise=True, reporter=told)
    assert "profile model" in told.was_reused
    monkeypatch.setattr(profiler, "in_context", lambda *_: replace(learned, errors=(0.02, -0.02), additivity=1.0))
    better = profile(net, EXAMPLE, graph=graph, cache_dir=cache, allow_noise=False)
    assert better.context(graph).error == pytest.approx(0.02), "measured again, not taken from who accepted noise"
    assert _summary(Device(load_target("cpu")), better, graph)["out_of_range"] == []


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])  # for the latter no steps were learned
@pytest.mark.parametrize("width", [16, 32, 40, 216])
def test_an_aligned_table_offers_multiples_and_the_full_width(layer, width):
    graph = trace(nn.Sequential(layer(3, width, 3), nn.ReLU(), layer(width, 8, 3)), EXAMPLE)
    table = LatencyTable({}, {"conv": Steps(8, small=(4,))}, ())
    (before,), (found,) = table.candidates(graph).values(), table.aligned(16).candidates(graph).values()
    assert [w % 16 for w in found[:-1]] == [0] * (len(found) - 1)
    assert found[-1] == width
    assert len(found) > 1 or width == 16
    assert found[0] >= before[0], "nothing narrower than what was measured"
    assert table.aligned(8).aligned(16).candidates(graph) == table.aligned(16).candidates(graph)


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("width", [16, 24, 216])  # of the last, more multiples of 16 than of 8 fit into what is offered: 16 too
@pytest.mark.parametrize("name", ["a", "shortcut", "both"])
def test_every_width_on_offer_is_priced_by_measurement(name, width, multiple):
    """No candidate of any group leads a layer out of what profiling measures, whatever the other groups keep."""
    graph = trace(Branches(width), EXAMPLE)
    entries = tuple(Entry(p.shape, p.n_in, p.n_out, 5.0, 5.0, 5.0, 30) for p in needed(graph, STEPS))
    table = LatencyTable({}, STEPS, entries).aligned(multiple)
    candidates = table.candidates(graph)
    assert all(widths[-1] == graph.group(group).size for group, widths in candidates.items())
    layer = next(layer for layer in graph.layers if layer.name == name)
    free = [candidates[group] for group in {*layer.n_in.groups, *layer.n_out.groups}]
    for kept in product(*free):
        chosen = dict(zip({*layer.n_in.groups, *layer.n_out.groups}, kept, strict=True))
        assert table.kernel_us(layer, layer.n_in.at(chosen), layer.n_out.at(chosen)) == pytest.approx(5.0)


def test_other_widths_to_choose_from_change_no_price() -> None:
    """Half a concat may end off the coarser steps: it costs what it was measured to cost."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 40, 3), nn.Conv2d(24, 24, 3)
            self.d = nn.Conv2d(64, 64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            return self.d(torch.cat([self.b(x).relu(), self.c(x).relu()], 1)).relu()

    graph, steps = trace(Joined().eval(), torch.randn(1, 3, 12, 12)), {kind: Steps(8) for kind in ("conv", "linear")}
    probes = {probe.place: probe for probe in needed(graph, steps)}.values()
    entries = tuple(Entry(p.shape, p.n_in, p.n_out, 1 + p.n_in * p.n_out / 100, 1, 1, 9) for p in probes)
    table = LatencyTable({"node_us": 0}, steps, entries, (Context(structure_of(graph), {}, (), 1.0, 1.0, 1.0, None, 1),))
    coarse = table.aligned(16)
    offered = coarse.candidates(graph)
    for choice in product(*offered.values()):
        plan = KeepPlan.of_widths(dict(zip(offered, choice, strict=True)))
        assert coarse.predict(graph, plan) == pytest.approx(table.predict(graph, plan))
