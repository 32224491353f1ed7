"""Tables fitted to whole models: what was kept is used again only as what it is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploypipe.backends.base import Timing
from deploypipe.errors import TargetError
from deploypipe.graph import trace
from deploypipe.latency import files
from deploypipe.latency.table import LatencyTable
from deploypipe.profiler import whole
from deploypipe.profiler.noise import Noise
from deploypipe.progress import Silent
from deploypipe.targets import load_target
from deploypipe.types import Graph

EXAMPLE = torch.randn(1, 3, 8, 8)
FACTS = {"runtime": "x", "version": "1", "target": "cpu", "precision": "fp32"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.c, self.f = nn.Conv2d(24, 32, 3, padding=1, stride=2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))).mean((2, 3)))


class MadeUp:
    """A runtime that takes a time for each parameter; `spread` of it at random."""

    def __init__(self, folder: Path, *, accepts: bool, spread: float = 0.0) -> None:
        self.target, self.noise, self.folder, self.spread = load_target("cpu"), Noise(accepts), folder, spread
        self.backend = SimpleNamespace(channel_multiple=lambda facts: 4)
        self.rng, self.jobs = np.random.default_rng(0), 0

    def export(self, model: nn.Module, *_: object) -> int:
        return sum(p.numel() for p in model.parameters())

    def whole(self, sizes: dict[str, int], target: object = None) -> dict[str, Timing]:
        self.jobs += 1
        us = {name: (100 + n / 20) * self.rng.uniform(1 - self.spread, 1 + self.spread) for name, n in sizes.items()}
        return {name: Timing(t, t, t, 10, 0.0, None) for name, t in us.items()}


Fit = Callable[..., LatencyTable]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    model = Net().eval()

    def fitted(runtime: MadeUp, graph: Graph | None = None) -> LatencyTable:
        found: Any = graph or trace(model, EXAMPLE)
        return whole.fitted_table(runtime, model, EXAMPLE, found, FACTS, tmp_path / "root", Silent(), False)  # type: ignore[arg-type]

    return fitted


def test_what_was_measured_well_is_used_again(fit: Fit, tmp_path: Path) -> None:
    fit(MadeUp(tmp_path, accepts=False))
    again = MadeUp(tmp_path, accepts=False)
    assert fit(again).predict(trace(Net().eval(), EXAMPLE)) > 100
    assert not again.jobs


def test_a_bad_fit_that_was_accepted_once_is_not_taken_from_who_does_not_accept_it(fit: Fit, tmp_path: Path) -> None:
    graph = trace(Net().eval(), EXAMPLE)
    assert fit(MadeUp(tmp_path, accepts=True, spread=0.6)).context(graph).far_off
    accepting = MadeUp(tmp_path, accepts=True)
    assert fit(accepting).context(graph).far_off
    assert not accepting.jobs
    with pytest.raises(TargetError):
        fit(MadeUp(tmp_path, accepts=False))


def test_a_table_that_a_full_disk_cut_short_is_measured_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_kernels", full)
        with pytest.raises(OSError, match="No space"):
            fit(MadeUp(tmp_path, accepts=False))
    assert fit(MadeUp(tmp_path, accepts=False)).predict(trace(Net().eval(), EXAMPLE)) > 100


def test_nothing_is_known_of_widths_that_were_not_to_change(fit: Fit, tmp_path: Path) -> None:
    graph = trace(Net().eval(), EXAMPLE)
    still = graph.keeping(["b"], "kept")
    table = fit(MadeUp(tmp_path, accepts=True), still)
    assert "b" in table.context(still).held
    assert table.known(still)
    assert table.known(graph) is None
