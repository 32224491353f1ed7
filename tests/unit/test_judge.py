"""The held-out images that judge candidates: what is trained while they judge does not see them."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from deploypipe.algorithms import make
from deploypipe.ingredients.judge import Judge
from deploypipe.testing.problems import Selection
from tests.toy_task import EVEN, problem_of, toy_data, trained_net, trainer


@pytest.mark.parametrize(("algo", "more"), [("autoslim", {}), ("autocompress", {"rounds": 2, "evaluations": 40, "rho": 0.3})])
def test_what_judges_is_not_trained_on(monkeypatch: pytest.MonkeyPatch, algo: str, more: dict[str, Any]) -> None:
    task, own, trained = problem_of(trained_net(widths=EVEN), 0.4), trainer(), set[int]()
    data = Selection(toy_data().train.tensors[0])
    fit = own.fit

    def watched(*args: Any, **named: Any) -> nn.Module:
        data.read.clear()
        found = fit(*args, **named)
        trained.update(data.read)
        return found

    own._data = replace(toy_data(), train=data)
    monkeypatch.setattr(own, "fit", watched)
    options = {"train_epochs": 2, "images": 100, "norm_images": 200, **more}
    make(algo, options).train(replace(task, data=data), own)
    judging = set(Judge(task.graph, data, 100, 200, task.seed)._held_out.indices)
    assert len(judging) == 100
    assert trained == set(range(600)) - judging
