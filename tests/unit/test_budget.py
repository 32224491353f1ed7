"""Budgets as users write them."""

import subprocess
import sys

import numpy as np
import pytest

from deploypipe.allocation.budget import parse_budget
from deploypipe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "metric", "expected"),
    [
        ("50%", "latency", 500.0),
        (" 12.5 % ", "macs", 125.0),
        ("100%", "params", 1000.0),
        (".5%", "params", 5.0),
        ("3ms", "latency", 3000.0),
        ("3 MS", "latency", 3000.0),
        ("800us", "latency", 800.0),
        ("800µs", "latency", 800.0),
        ("0.25s", "latency", 250_000.0),
        ("1.2M", "macs", 1.2e6),
        ("300k", "params", 3e5),
        ("300K", "macs", 3e5),
        ("0.5G", "macs", 5e8),
        ("1e6", "macs", 1e6),
        ("4711", "params", 4711.0),
    ],
)
def test_valid(text: str, metric: str, expected: float) -> None:
    assert parse_budget(text, metric, 1000.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("0%", "latency"),
        ("150%", "latency"),
        ("100.01%", "macs"),
        ("-3ms", "latency"),
        ("-5%", "params"),
        ("abc", "latency"),
        ("", "latency"),
        ("%", "macs"),
        ("3", "latency"),
        ("3ms", "macs"),
        ("3ms", "params"),
        ("300k", "latency"),
        ("3 m s", "latency"),
        ("nan", "macs"),
        ("inf", "macs"),
        ("1e999", "macs"),
        ("50%%", "macs"),
        ("0", "macs"),
        ("1,5M", "macs"),
        ("3xs", "latency"),
    ],
)
def test_nonsense_is_refused_with_valid_forms(text: str, metric: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text, metric, 1000.0)
    assert caught.value.exit_code == 2
    assert repr(text)[1:-1] in caught.value.message
    assert "50%" in caught.value.fix
    assert ("3ms" in caught.value.fix) == (metric == "latency")
    assert ("1.2M" in caught.value.fix) == (metric != "latency")


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'latency'") as caught:
        parse_budget("50%", "latancy", 1.0)
    assert "latancy" in caught.value.message


def test_needs_no_torch() -> None:
    code = "import sys, deploypipe.allocation.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_of_it_is_all_of_it() -> None:
    """100 % of a latency, by multiplication and division, is less than the latency itself one time in sixteen."""
    rng = np.random.default_rng(0)
    assert all(parse_budget("100%", "latency", dense) == dense for dense in rng.uniform(1, 1e4, 1000).tolist())
