"""`--algo auto` stands for fields of the request, and for nothing that the user has asked for otherwise."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import deploypipe as dp
from deploypipe.algorithms import ALGORITHMS
from deploypipe.cli.main import run
from deploypipe.count import macs
from deploypipe.errors import UsageError
from deploypipe.graph import trace
from deploypipe.pipeline.recipe import Recipe, resolved
from deploypipe.pipeline.request import Request


def test_auto_is_another_method_in_the_same_folder() -> None:
    asked = Request(algo="auto", budget="40%", seed=3)
    found = resolved(asked)
    assert found.folder == asked.folder
    assert found.algo in ALGORITHMS
    found.check()
    values = {name: getattr(asked, name) for name in Recipe.__dataclass_fields__}
    assert found.recipe == "auto"
    assert replace(found, **values, recipe="", out=None) == asked


def test_what_the_user_asks_for_counts_more_than_the_recipe() -> None:
    assert resolved(Request(algo="auto", value="measured")).value == "measured"
    assert resolved(Request(algo="auto", value="scores")).value == "scores"
    assert resolved(Request(algo="auto", seed=7)).seed == 7


def test_a_named_method_stays_as_it_is() -> None:
    asked = Request(algo="l2", options={"x": 1})
    assert resolved(asked) is asked
    assert asked.value == "scores"


def test_a_recipe_has_no_options() -> None:
    with pytest.raises(UsageError, match="no option 'images'"):
        resolved(Request(algo="auto", options={"images": 5}))


def test_prune_judges_widths_on_the_data_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(200, 8)
    data = TensorDataset(x, model(x).argmax(1))
    graph = trace(model, x[:1])
    plan = dp.prune(model, x[:1], algo="auto", metric="macs", budget="60%", data=data)
    assert macs(graph, plan) <= 0.6 * macs(graph)
    assert plan.keep == dp.prune(model, x[:1], algo="auto", metric="macs", budget="60%", data=data).keep
    with pytest.raises(UsageError, match="judged on images"):
        dp.prune(model, x[:1], algo="auto", metric="macs")


def test_the_command_that_it_stands_for_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Request]()
    monkeypatch.setattr("deploypipe.pipeline.build", lambda request, _reporter: asked.append(request))
    monkeypatch.setattr("deploypipe.cli.build.show_report", lambda *_: None)
    assert run(Recipe().command.split()[1:]) == 0
    given = {name: int(value) for name, value in asked[0].options.items()}
    assert (asked[0].algo, given, asked[0].value) == (Recipe().algo, Recipe().options, Recipe().value)


def test_it_is_explained_and_suggested_like_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["algos", "auto"]) == 0
    assert Recipe().command in capsys.readouterr().out
    assert run(["build", "--algo", "auot"]) == 2
    assert "did you mean 'auto'" in capsys.readouterr().err
