"""`--sparsity 2:4` and `--sparsity auto` by the real command line, on the stand-in for trtexec; nothing here has met hardware.

The stand-in is quicker with 2:4 weights from 64 input channels on, if `--sparsity=enable` is given (see `trtexec_standin.py`).
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trtexec_standin
from command_line import FACTORY

import deploypipe as dp
from deploypipe.cli.main import run
from deploypipe.latency.table import LatencyTable
from deploypipe.latency.widths import Steps
from deploypipe.pipeline import stages
from deploypipe.profiler import bench, context
from deploypipe.profiler import measure as profiler
from deploypipe.two_four import holds

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
NET = """import torch
from torch import nn


class Net(nn.Sequential):
    input_size = (2, 12, 12)


def net():
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 32, 3), nn.ReLU(), nn.Conv2d(32, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU()]
    net = Net(*convs, nn.Conv2d(128, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))
    with torch.no_grad():
        net[4].weight[:, ::2] *= 0.05  # a mask takes little of it
    return net
"""
TARGET = """name = "box"
run_on_hardware = false
[device]
accelerator = "nvidia-ampere"
[build]
backend = "tensorrt"
precision = "fp16"
opset = 18
[measure]
runs = 8
warmup = 1
"""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a target and a cache; TensorRT is 'installed'. How a device is learned is tested elsewhere."""
    folder = tmp_path_factory.mktemp("box")
    trtexec_standin.install(folder / "bin", (10, 3, 0))
    (folder / "small.py").write_text(NET)
    (folder / "box.toml").write_text(TARGET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        for name in ("HOME", "DEPLOYPIPE_CACHE", "DEPLOYPIPE_DATA"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setattr(profiler, "learn_steps", lambda measure: {"conv": Steps(64), "linear": Steps(32)})
        patch.setattr(bench.Bench, "cost_of_measuring", lambda self: (0.0, 2.0, 0.0))
        patch.setattr(bench, "_AGAIN", 0)
        patch.setattr(context, "_AGAIN", 0)
        patch.setattr(context, "_SITTINGS", 1)
        patch.setattr(profiler, "unconfirmed", lambda *_: {})
        patch.setattr(context, "_plans", lambda *_: {context.DENSE: dp.KeepPlan({})})
        patch.setattr(stages, "N_INPUTS", 1)
        yield folder


def built(box: Path, name: str, *more: str) -> dict[str, Any]:
    """Run a build; return its report."""
    model = ["--model", f"{box / 'small.py'}:net", "--data", f"{FACTORY}:data", "--target", str(box / "box.toml")]
    options = ["--algo", "l2", "--budget", "90%", "--epochs", "0", "--out", str(box / name)]
    assert run(["build", *model, *options, *more, "--json"]) == 0
    found: dict[str, Any] = json.loads((box / name / "report.json").read_text())
    return found


def holding(folder: Path) -> set[str]:
    """Return the layers of a run's model whose weights hold the pattern."""
    small = dp.load(folder)
    weights = {name: p.detach().numpy() for name, p in small.named_parameters() if p.dim() > 1}
    return {name.removesuffix(".weight") for name, weight in weights.items() if holds(weight) and weight.shape[1] >= 16}


def test_chosen_by_the_allocator_and_then_wherever_it_can_be(box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one run folder: the second command makes a plan of its own, and uses what does not depend on the pattern again."""
    chosen_layers_hold_the_pattern(box, built(box, "run", "--sparsity", "auto"))
    capsys.readouterr()
    forced = built(box, "run", "--sparsity", "2:4")
    err = capsys.readouterr().err
    assert re.search(r"profile.* reused", err)
    assert re.search(r"build-dense.* reused", err)
    rows = {row["name"]: row for row in forced["two_four"]["layers"]}
    held = {name for name, row in rows.items() if row["pattern"] == "2:4"}
    assert held == holding(box / "run") == {"2", "4", "6"}
    assert rows["2"]["saved_us"] == 0.0, "asked for, though it saves nothing"
    assert forced["dense"]["predicted_us"] == pytest.approx(forced["dense"]["latency"]["median_us"], rel=0.05)
    assert dp.KeepPlan.load(box / "run" / "plan.json").two_four == ()


def chosen_layers_hold_the_pattern(box: Path, auto: dict[str, Any]) -> None:
    table, plan = LatencyTable.load(box / "run" / "table"), dp.KeepPlan.load(box / "run" / "plan.json")
    assert table.knows_two_four, "the profiler measured both"
    assert {entry.runs > 0 for entry in table.kernels} == {True}
    rows = {row["name"]: row for row in auto["two_four"]["layers"]}
    chosen = {name for name, row in rows.items() if row["pattern"] == "2:4"}
    assert chosen == set(plan.two_four) == set(auto["certificate"]["two_four"]) == holding(box / "run")
    assert chosen, "a mask that takes little is cheaper than half the channels"
    assert all(rows[name]["saved_us"] > 0 for name in chosen)
    assert rows["0"]["reason"] == "2 input channels are no multiple of 16"
    assert (rows["2"]["pattern"], rows["2"]["reason"]) == ("dense", "no quicker than dense by the latency table"), "32 inputs"
    measured = auto["budget"]["rounds"][-1]
    assert measured["pruned"]["median_us"] == pytest.approx(measured["predicted_us"], rel=0.05), "measured with the masks"
    (evidence,) = auto["two_four"]["evidence"]
    assert evidence.startswith("TensorRT found")
    assert evidence.endswith(f"chose them for {len(chosen)}")
    page = (box / "run" / "report.md").read_text()
    assert "## 2:4 weights" in page
    assert "(measured)" in page.split("## 2:4 weights")[1].split("\n")[2]


def test_a_choice_needs_a_runtime_a_latency_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    cases = (
        (["--target", "cpu"], 4, "has no kernels for 2:4 weights"),
        (["--target", "jetson", "--metric", "macs"], 2, "--metric latency"),
        (["--target", "jetson", "--value", "measured"], 2, "--value scores or taylor"),
        (["--target", "jetson", "--sparsity", "1:4"], 2, "use 2:4 or auto"),
    )
    for more, code, words in cases:
        assert run(["build", "--algo", "l2", "--sparsity", "auto", *more]) == code
        assert words in capsys.readouterr().err
