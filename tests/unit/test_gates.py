"""Gates on channels behind norms of every kind: what they multiply, against factors that really stand there."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deploypipe.algorithms.base import Problem
from deploypipe.count import MacTable
from deploypipe.graph import trace
from deploypipe.ingredients.curvature import derivatives, gates
from deploypipe.types import Group
from deploypipe.worth.first_order import first_order
from tests.toys import conv, head

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "batch without scale": lambda: nn.BatchNorm2d(8, affine=False),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance without scale": lambda: nn.InstanceNorm2d(8),
    "group": lambda: nn.GroupNorm(4, 8),
    "one group": lambda: nn.GroupNorm(1, 8),
    "none": nn.Identity,
}


def net(norm: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(conv(3, 8), NORMS[norm](), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), head(8))
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
            if hasattr(module, "eps"):
                module.eps = 1e-12  # it is what a norm does not take back of a scale before it
    return model.double().eval()


def loss_of(model: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 3, 8, 8, generator=rng).double(), torch.randint(0, 4, (32,), generator=rng)
    return F.cross_entropy(model(x), y)


def by_factors(model: nn.Module, group: Group) -> Tensor:
    """Return the derivatives by factors on what the second convolution reads."""
    (reader,) = [member for member in group.members if member.role == "consumes"]
    owner, factors = torch.from_numpy(reader.owner), torch.ones(group.size, dtype=torch.float64, requires_grad=True)
    handle = model[2].register_forward_hook(lambda m, args, out: out * factors[owner][:, None, None])
    (found,) = torch.autograd.grad(loss_of(model), factors)
    handle.remove()
    return found


@pytest.mark.parametrize("norm", NORMS)
def test_the_gate_of_a_channel_is_a_factor_on_what_is_read_of_it(norm: str) -> None:
    model = net(norm)
    graph = trace(model, (torch.randn(2, 3, 8, 8).double(),))
    group = graph.group("0")
    model.train()
    expected = by_factors(model, group)
    loss_of(model).backward()
    found, skipped = derivatives(model, {"0": gates(model, graph)(group)})
    assert not skipped
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found["0"], expected, atol=1e-6, rtol=1e-5)


def test_the_gate_covers_the_bias_of_a_depthwise_layer_without_a_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        filtered = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        model = nn.Sequential(conv(3, 8), nn.ReLU(), nn.Sequential(filtered, nn.ReLU()), conv(8, 8), nn.ReLU(), head(8))
        nn.init.uniform_(filtered.bias, 0.5, 1.0)
    model = model.double().eval()
    graph = trace(model, (torch.randn(2, 3, 8, 8).double(),))
    (reader,) = [member for member in graph.group("0").members if member.role == "consumes"]
    assert reader.param == "3.weight"
    expected = by_factors(model, graph.group("0"))
    loss_of(model).backward()
    found, _ = derivatives(model, {"0": gates(model, graph)(graph.group("0"))})
    torch.testing.assert_close(found["0"], expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_norm_makes_channels_look_worthless(norm: str) -> None:
    """The trap: behind a norm the filters' own terms are zero, and the default recipe would cut such a group to the bone."""
    model = net(norm).float()
    graph, table = trace(model, (torch.randn(2, 3, 8, 8),)), MacTable(multiple=1)
    rng = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(256, 3, 8, 8, generator=rng), torch.randint(0, 4, (256,), generator=rng))
    worth = first_order(Problem(model, graph, table, table.predict(graph), data))
    assert worth["0"].sum() > 1e-3 * worth["3"].sum()
