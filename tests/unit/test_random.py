"""Random channels: a fair, repeatable baseline."""

import subprocess
import sys

import torch

from deploypipe.algorithms import make
from deploypipe.algorithms.base import Problem, Statistics
from deploypipe.count import MacTable
from deploypipe.graph import trace
from deploypipe.ingredients.statistics import generator
from deploypipe.types import Group
from tests.toys import TOYS

MODEL, EXAMPLE = TOYS["plain"]()
GRAPH = trace(MODEL.eval(), EXAMPLE)


def scores(seed: int, name: str = "g", size: int = 64) -> torch.Tensor:
    problem = Problem(MODEL, GRAPH, MacTable(), 1.0, seed=seed)
    return make("random").score(Group(name, size, ()), Statistics(problem))


def test_depends_on_seed_and_name_only() -> None:
    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(1))
    assert not torch.equal(scores(0, "g"), scores(0, "h"))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    scores(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_in_another_process() -> None:
    lines = [
        "import torch",
        "from deploypipe.ingredients.statistics import generator",
        "print(torch.rand(1, generator=generator(5, 'g')).item())",
    ]
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True, check=True)
    assert float(done.stdout) == torch.rand(1, generator=generator(5, "g")).item()


def test_every_channel_is_as_likely_as_any_other() -> None:
    first = torch.stack([scores(seed, size=8).argsort(descending=True)[:4] for seed in range(400)])
    counts = torch.bincount(first.flatten(), minlength=8) / 400
    assert (counts - 0.5).abs().max() < 0.12  # 0.5 +- 4.8 standard errors
