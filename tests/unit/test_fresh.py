"""Fresh weights: unlike the old ones, repeatable, drawn by each module's own rule."""

import pytest
import torch
from torch import nn

from deploypipe.training.fresh import fresh
from tests.toys import TOYS


def test_weights_are_uncorrelated_and_statistics_begin_anew() -> None:
    model, _ = TOYS["residual"]()  # made with seed 0, as a user's model may be: the same seed must not bring it back
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = fresh(model, 0)
    old, drawn = ([p.detach().flatten() for p in each.parameters() if p.dim() > 1] for each in (model, new))
    assert abs(float(torch.corrcoef(torch.stack([torch.cat(old), torch.cat(drawn)]))[0, 1])) < 0.05
    norms = [m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((n.running_mean == 0).all() and (n.running_var == 1).all() and (n.weight == 1).all() for n in norms)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_seed_alone_decides() -> None:
    model, _ = TOYS["plain"]()
    first = fresh(model, 3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second, other = fresh(model, 3), fresh(model, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0][0].weight, other[0][0].weight)
    assert float(first[0][0].weight.detach().std()) == pytest.approx((1 / 27 / 3) ** 0.5, rel=0.2)  # torch's rule for 27 inputs


def test_parameters_without_a_rule_are_shuffled_and_frozen_ones_stay() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.arange(50.0))

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Scale(), nn.Conv2d(3, 3, 1).requires_grad_(False))
    new = fresh(model, 0)
    assert torch.equal(new[1].gamma.detach().sort().values, torch.arange(50.0))
    assert not torch.equal(new[1].gamma, model[1].gamma)
    assert torch.equal(new[2].weight, model[2].weight)
    assert not torch.equal(new[0].weight, model[0].weight)
