"""What is confirmed around the edges of single layers, on a runtime whose layers differ and that is known exactly."""

import torch
from torch import nn

from deploypipe.graph import trace
from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.table import LatencyTable
from deploypipe.latency.widths import Steps, legal_widths, steps_of
from deploypipe.profiler.edges import confirm, own_steps, unconfirmed

KIND = {"conv": Steps(16, 4, 1.5), "depthwise": Steps(16, 4, 7.0), "linear": Steps(8)}
STEM, WIDE, WISE, HEAD = (
    "conv 3x3 stride 2x2 on 32x32",
    "conv 1x1 stride 1x1 on 16x16",
    "depthwise 3x3 stride 1x1 on 16x16",
    "linear on 1 rows",
)


class Net(nn.Sequential):
    def __init__(self):
        stem, wide = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 128, 1)
        wise = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(stem, nn.ReLU(), wide, nn.ReLU(), wise, *pool, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5))


GRAPH = trace(Net().eval(), torch.zeros(1, 3, 32, 32))


def machine(probes):
    """The stem has steps of 8 and no slow path; the wide one is slow off 4 at its inputs only; the depthwise one by 12."""

    def us(probe):
        own, off = (8, 1.0) if probe.shape.title == STEM else (16, 1.0)
        if probe.shape.title == WIDE and probe.n_in % 4:
            off = 1.3
        if probe.shape.title == WISE and probe.n_out % 4:
            off = 12.0
        return off * -(-probe.n_out // own) * own * (1 if probe.shape.tied else 3 + probe.n_in / 16)

    return {probe: Entry(probe.shape, probe.n_in, probe.n_out, us(probe), 1, 1, 9) for probe in probes}


def test_each_layer_shows_its_own_steps_and_penalty():
    found = confirm(GRAPH, KIND, machine)
    assert (found[STEM].step, found[STEM].align, found[STEM].edge) == (8, 1, 32)
    assert (found[WIDE].step, found[WIDE].align) == (16, 4)
    assert 1.25 < found[WIDE].penalty < 1.3
    assert (found[WISE].align, found[WISE].penalty) == (4, 12.0)
    assert found[HEAD].align == 1


def test_what_was_looked_at_is_not_looked_at_again():
    known = {**KIND, **confirm(GRAPH, KIND, machine)}
    assert unconfirmed(GRAPH, known) == {}

    def nothing(probes):
        raise AssertionError(probes)

    assert confirm(GRAPH, known, nothing) == {}


def test_a_layers_own_steps_come_before_its_kinds_and_decide_widths_and_prices(tmp_path):
    steps = {**KIND, **confirm(GRAPH, KIND, machine)}
    wise = next(layer for layer in GRAPH.layers if layer.kind == "depthwise")
    assert steps_of(wise, steps).penalty == 12.0
    assert steps_of(wise, KIND).penalty == 7.0
    shape = Shape.of(wise)
    entries = tuple(Entry(shape, n, n, float(n), 1, 1, 9) for n in (16, 112, 128))
    LatencyTable({}, steps, entries).save(tmp_path)
    assert LatencyTable.load(tmp_path).kernel_us(wise, 127, 127) == 12.0 * 128
    assert set(legal_widths(GRAPH, steps)["0"]) == {16, 32}, "the layer that reads it keeps the steps of its kind"


def test_a_narrow_plateau_is_no_finer_step_where_noise_could_be_one():
    of = Steps(16, 4, 1.5)
    assert own_steps({"edge": 100.0, "half": 98.0, "off": 150.0}, 512, of).step == 16
    assert own_steps({"edge": 100.0, "half": 99.0, "off": 150.0}, 64, of).step == 16
    assert own_steps({"edge": 100.0, "half": 88.0, "off": 150.0}, 64, of).step == 8
    assert own_steps({"edge": 100.0}, 64, of) == Steps(16, 4, 1.5, (), 64)
