"""What a runtime on a device is like before any model is measured: the cost of measuring, and the steps of widths."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from deploypipe.latency.files import Entry, Shape
from deploypipe.latency.widths import Steps
from deploypipe.profiler.probe import Probe

Measure = Callable[[Sequence[Probe]], Mapping[Probe, Entry]]

_BASES = (64, 48)  # widths around which a step must show at both
_DOWN = (1, 2, 4, 8, 16, 32)  # channels fewer
_ROUNDS = 3  # of learning
_OFF = (1, 2, 4, 8)  # channels fewer, to see which of them leave the fast path
_GAIN = 0.5  # a step is real if it gains at least half of what its share of the channels promises
SLOWER = 1.08  # off alignment if it costs more than the larger whole step, by more than noise
_SMALLER = 0.9  # a width below one step is worth having if it saves a tenth


def probe_shapes() -> dict[str, Shape]:
    """Return one shape for each kind of kernel whose steps are learned: typical, and large enough to time."""
    two, one = (3, 3), (1, 1)
    conv = Shape("conv", two, one, one, one, (0, 0), (28, 28), (28, 28), 1, 0)
    depthwise = Shape("depthwise", two, one, one, one, (1, 1), (28, 28), (28, 28), 1, 0)
    linear = Shape("linear", (), (), (), (), (0, 0), (), (), 0, 128)
    return {"conv": conv, "depthwise": depthwise, "linear": linear}


def learn_steps(measure: Measure) -> dict[str, Steps]:
    """Measure around a few widths and return the steps of each kind of kernel."""
    shapes = probe_shapes()
    probes = flat(_probes(shape) for shape in shapes.values())
    # Learned once and used for long, so a disturbance must not pass for a step: several rounds, the middle one counts.
    # (Not the quickest: a time is a difference, too low when the shorter model was the disturbed one.)
    rounds = [measure(probes) for _ in range(_ROUNDS)]
    us = {probe: median(found[probe].median_us for found in rounds) for probe in probes}
    return {kind: _steps(shape, us) for kind, shape in shapes.items()}


def _probes(shape: Shape) -> list[Probe]:
    outs = [_alone(shape, base - down) for base in _BASES for down in (0, *_DOWN)]
    return [*outs, *_off(shape).values(), *_narrow(shape).values()]


def _alone(shape: Shape, n_out: int) -> Probe:
    return Probe(shape, n_out if shape.tied else _BASES[0], n_out)


def _off(shape: Shape) -> dict[int, Probe]:
    return {down: Probe(shape, _BASES[0] - down, _BASES[0] - down) for down in _OFF}


def _narrow(shape: Shape) -> dict[int, Probe]:
    if shape.tied:
        return {}
    return {width: Probe(shape, width, _BASES[0], relay=shape.rows == 0) for width in _DOWN[1:]}


def _steps(shape: Shape, us: Mapping[Probe, float]) -> Steps:
    step = step_of({base - down: us[_alone(shape, base - down)] for base in _BASES for down in (0, *_DOWN)})
    whole = us[_alone(shape, _BASES[0])]
    align, penalty = alignment(whole, {down: us[probe] for down, probe in _off(shape).items()}, step)
    below = {width: us[probe] for width, probe in _narrow(shape).items() if width <= step and width % align == 0}
    return Steps(step, align, penalty, smaller(below, step))


def step_of(by_width: Mapping[int, float]) -> int:
    """Return the smallest decrease of the width that saves time at every base width, as all larger ones do.

    One channel fewer saves a hundredth where there are no steps, and noise looks the same: what tells are eight or sixteen
    fewer, which save an eighth or a quarter there, and nothing within a step.
    """
    step = _DOWN[-1]
    for down in reversed(_DOWN):
        if not all(saves(by_width[base - down], by_width[base], down, base) for base in _BASES):
            break
        step = down
    return step


def saves(fewer_us: float, us: float, down: int, base: int) -> bool:
    """Return whether `down` of `base` channels fewer save at least half of their share of the time."""
    return fewer_us <= us * (1 - _GAIN * down / base)


def alignment(whole: float, fewer: Mapping[int, float], step: int) -> tuple[int, float]:
    """Return the alignment and what missing it costs, from the time at a whole step and at some channels fewer."""
    slow = [down for down in sorted(fewer) if down < step and fewer[down] > SLOWER * whole]
    if not slow:
        return 1, 1.0
    return min(2 * slow[-1], step), max(fewer[down] for down in slow) / whole


def smaller(by_width: Mapping[int, float], step: int) -> tuple[int, ...]:
    """Return the widths below one step that save a tenth against a whole step and against the next one, descending."""
    chosen: list[int] = []
    if step not in by_width:
        return ()
    best = by_width[step]
    for width in sorted((w for w in by_width if w < step), reverse=True):
        if by_width[width] < _SMALLER * best:
            chosen.append(width)
            best = by_width[width]
    return tuple(chosen)


def flat(values: Iterable[Iterable[Probe]]) -> list[Probe]:
    """Join lists of probes, without repetition, in order."""
    return list(dict.fromkeys(probe for part in values for probe in part))
