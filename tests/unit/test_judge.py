"""The held-out images that judge candidates: what is trained while they judge does not see them."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from deploypipe.algorithms import make
from deploypipe.ingredients.judge import Judge
from deploypipe.plan import KeepPlan
from deploypipe.testing.problems import Selection
from tests.toy_task import EVEN, net, problem_of, toy_data, trained_net, trainer


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


class InOrder(Selection):
    """Selection data that remembers in which order it was read."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__(inputs)
        self.order = list[int]()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.order.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("norm_images", [0, 128])
def test_norms_are_renewed_on_the_rest_and_only_what_is_held_out_judges(norm_images: int) -> None:
    task, data = problem_of(net(widths=EVEN)), InOrder(toy_data().train.tensors[0])
    judge = Judge(task.graph, data, 100, norm_images, 0)
    rest = [judge.fit[i][0] for i in range(500)]  # type: ignore[index]
    fit = set(data.order[-500:])
    assert len(rest) == len(fit) == 500
    data.order.clear()
    found = judge(task.model, KeepPlan({}))
    renewing, judging = data.order[:norm_images], data.order[norm_images:]
    assert found.n == len(judging) == 100
    assert set(judging) == set(range(600)) - fit
    assert len(set(renewing)) == norm_images
    assert set(renewing) <= fit
