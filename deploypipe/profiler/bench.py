"""Carry out a backend's measuring jobs on a target, and take off what measuring adds."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from deploypipe.backends.base import Backend, Facts, Profile, Timing
from deploypipe.device import facts_of, installed
from deploypipe.errors import BackendError
from deploypipe.latency.files import Entry
from deploypipe.profiler.export import Export, exported
from deploypipe.profiler.noise import Noise
from deploypipe.profiler.probe import IDLE_OPS, Probe, chain, small_layers
from deploypipe.runners.base import Runner
from deploypipe.targets import Target

_RUNS, _FEW_RUNS, _WARMUP = 18, 6, 3  # of one kernel in one round; few if it is long
HEAVY_MACS = 5_000_000  # multiply-adds of a long kernel
_AGAIN, _CLEARLY = 3, 1.06  # how often a doubtful time is taken again, and what counts as a difference
_SCATTER = 0.15  # of a single round: 10th to 90th percentile, as a share of the time
_LEAST_US = 0.05  # a kernel is never free, whatever noise says
_SHORT, _LONG = 10, 110  # lengths of the chains of empty kernels


@dataclass(frozen=True)
class Bench:
    """Carries out a backend's jobs, repeats or refuses disturbed ones; `timer_us` is what profiling adds to a kernel."""

    backend: Backend
    runner: Runner
    target: Target
    folder: Path
    timer_us: float = 0.0
    noise: Noise = field(default_factory=Noise)
    export: Export = exported

    def facts(self) -> Facts:
        """Return what identifies the runtime and the device."""
        found = facts_of(self.backend, self.runner, self.target, self.folder)
        return {**found, "precision": self.target.build.precision, "target": self.target.name}

    def whole(self, models: Mapping[str, Path | bytes], target: Target | None = None) -> dict[str, Timing]:
        """Time whole models in turns, without profiling."""
        chosen = target or self.target

        def take() -> dict[str, Timing]:
            return self.backend.read_bench(self.runner.run(self.backend.bench_job(models, chosen), self.folder))

        return self.noise.bounded(take, lambda found: next(iter(found.values())).foreign_load, chosen.measure.threads)

    def profiles(self, models: Mapping[str, Path | bytes], target: Target) -> dict[str, Profile]:
        """Time the kernels of models."""

        def take() -> dict[str, Profile]:
            return self.backend.read_profile(self.runner.run(self.backend.profile_job(models, target), self.folder), models)

        return self.noise.bounded(take, lambda found: next(iter(found.values())).foreign_load, target.measure.threads)

    def cost_of_measuring(self) -> tuple[float, float, float]:
        """Return what profiling adds to a kernel, what a kernel without work costs, what a run costs besides (microseconds).

        Raises:
            BackendError: The runtime joins all idle operations, so that one kernel cannot be told from another.
        """
        op = self._idle()
        models = {str(length): chain(length, op) for length in (_SHORT, _LONG)} | {"layers": small_layers(_LONG)}
        whole = self.whole(models)
        short, long = whole[str(_SHORT)].quiet_us, whole[str(_LONG)].quiet_us
        node = max(0.0, (long - short) / (_LONG - _SHORT))
        session = max(0.0, short - node * _SHORT)
        # With operands as layers have them: the more of them, the more the runtime writes down.
        profiled = self.profiles({"layers": models["layers"]}, self.target)["layers"]
        timer = max(0.0, (profiled.sum_us + session - whole["layers"].quiet_us) / len(profiled.kernels))
        return timer, node, session

    def _idle(self) -> str:
        """Return an operation that this runtime runs as a kernel of its own each time."""
        for op in IDLE_OPS:
            profiled = self.profiles({op: chain(_LONG, op)}, self.target)[op]
            if len(profiled.kernels) >= _LONG:
                return op
        raise BackendError(
            f"the runtime fuses chains of {' and of '.join(IDLE_OPS)}: what a kernel without work costs cannot be measured",
            at=f"backend {self.backend.name}",
            fix="add an operation that it does not fuse to IDLE_OPS in profiler/probe.py",
        )

    def kernels(self, probes: Sequence[Probe], again: int = _AGAIN) -> dict[Probe, Entry]:
        """Time kernels, and those that are in doubt up to `again` times more, until two rounds agree; the middle time counts.

        In doubt is a time that scatters, as when the machine was slower for a while, or that contradicts another.
        """
        rounds = {probe: [entry] for probe, entry in self._round(probes).items()}
        for _ in range(again):
            against = contradictions({probe: _middle(entries).median_us for probe, entries in rounds.items()})
            doubtful = [probe for probe, entries in rounds.items() if probe in against or not settled(entries)]
            if not doubtful:
                break
            for probe, entry in self._round(doubtful).items():
                rounds[probe].append(entry)
        return {probe: _middle(entries) for probe, entries in rounds.items()}

    def _round(self, probes: Sequence[Probe]) -> dict[Probe, Entry]:
        models = {(probe, index): model for probe in probes for index, model in enumerate(probe.models())}
        names = {key: str(number) for number, key in enumerate(models)}
        heavy = max(probe.macs for probe in probes) > HEAVY_MACS
        target = self.target.replace(runs=_FEW_RUNS if heavy else _RUNS, warmup=_WARMUP)
        found = self.whole({names[key]: model for key, model in models.items()}, target)
        return {probe: entry(probe, [found[names[probe, index]] for index in range(len(probe.models()))]) for probe in probes}


def entry(probe: Probe, found: Sequence[Timing]) -> Entry:
    """Take the kernel's time from its pairs of models."""
    short, long = found[0], found[1]
    us = (long.quiet_us - short.quiet_us) / probe.repeats
    if len(found) > 2:
        us -= (found[3].quiet_us - found[2].quiet_us) / probe.repeats
    us = max(us, _LEAST_US)
    below, above = (abs(long.median_us - edge) / (1 + probe.repeats) for edge in (long.p10_us, long.p90_us))
    spread = (max(us - below, _LEAST_US), us + above)
    return Entry(probe.shape, probe.n_in, probe.n_out, us, *spread, long.runs, probe.sparsity)


def contradictions(us: Mapping[Probe, float]) -> list[Probe]:
    """Return the kernels that took clearly longer than one of the same shape and sparsity with no fewer channels, and those."""
    doubtful: dict[Probe, None] = {}
    for small, time in us.items():
        for large, other in us.items():
            alike = (small.shape, small.sparsity) == (large.shape, large.sparsity)
            contained = alike and small.n_in <= large.n_in and small.n_out <= large.n_out
            if contained and time > _CLEARLY * other:
                doubtful |= {small: None, large: None}
    return list(doubtful)


def settled(entries: Sequence[Entry]) -> bool:
    """Return whether two rounds agree, or the only one scatters little."""
    times = sorted(entry.median_us for entry in entries)
    if len(times) == 1:
        return entries[0].p90_us - entries[0].p10_us <= _SCATTER * times[0] + _LEAST_US
    return any(high <= _CLEARLY * low + _LEAST_US for low, high in pairwise(times))


def _middle(entries: Sequence[Entry]) -> Entry:
    return sorted(entries, key=lambda entry: entry.median_us)[(len(entries) - 1) // 2]


@contextmanager
def opened(
    backend: Backend, runner: Runner, target: Target, noise: Noise | None = None, export: Export = exported
) -> Iterator[Bench]:
    """Give a bench with a temporary folder.

    Raises:
        BackendError: The backend is not installed here, where the target is.
    """
    ready, missing = installed(backend, target)
    if runner.here and not ready:
        raise BackendError(f"backend {backend.name} is not installed", at=f"target {target.name}", fix=missing)
    with tempfile.TemporaryDirectory(prefix="deploypipe-profile-") as folder:
        # Hundreds of small models tell together what each alone would have to tell by more runs.
        target = target.replace(least_us=0.0)
        yield Bench(backend, runner, target, Path(folder), noise=noise or Noise(), export=export)
