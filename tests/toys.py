"""A zoo of small awkward models: each shows one thing that breaks naive channel pruning.

`TOYS[name]()` returns `(model, example_inputs)`. Names in `EXACT` compute, compacted, what the masked model computes;
the others have a normalisation across channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploypipe.testing.toys import NETS, cbr, conv, head

Toy = tuple[nn.Module, tuple[Any, ...]]
TOYS: dict[str, Callable[[], Toy]] = {}
INEXACT = {"layer_norm", "convnext_block", "transformer", "mixer", "group_norm_1", "norm_over_chw", "norm_of_read_size"}


def toy(make: Callable[[], Toy]) -> Callable[[], Toy]:
    def seeded() -> Toy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, example = make()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
            return model.eval(), example

    TOYS[make.__name__] = seeded
    return seeded


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size)


class Fn(nn.Module):
    """A model from named parts and a function of (parts, *inputs)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = forward

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


@toy
def plain() -> Toy:
    return NETS["plain"](), (image(),)


@toy
def residual() -> Toy:
    return NETS["residual"](), (image(),)


@toy
def depthwise() -> Toy:
    return NETS["depthwise"](), (image(),)


@toy
def depthwise_multiplier() -> Toy:
    return nn.Sequential(cbr(3, 6), cbr(6, 18, groups=6), cbr(18, 8, 1), head(8)), (image(),)


@toy
def depthwise_on_input() -> Toy:
    return nn.Sequential(cbr(3, 9, groups=3), cbr(9, 8, 1), head(8)), (image(),)


@toy
def grouped() -> Toy:
    return nn.Sequential(cbr(3, 8), cbr(8, 16, groups=4), cbr(16, 8), head(8)), (image(),)


@toy
def concat() -> Toy:
    return NETS["concat"](), (image(),)


@toy
def concat_of_concat() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        b = torch.cat([a, m.b(a)], 1)
        c = torch.cat([b, m.c(b)], 1)
        return m.head(m.out(torch.cat([c, a], dim=1)))

    return Fn(f, a=cbr(3, 6), b=cbr(6, 4), c=cbr(10, 5), out=cbr(21, 8), head=head(8)), (image(),)


@toy
def concat_with_input() -> Toy:
    return Fn(lambda m, x: m.out(torch.cat([x, m.a(x)], 1)), a=cbr(3, 6), out=conv(9, 4)), (image(),)


@toy
def flatten_after_concat() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.fc2(F.relu(m.fc1(torch.cat([m.a(x), m.b(x)], 1).flatten(1))))

    return Fn(f, a=cbr(3, 4), b=cbr(3, 5), fc1=nn.Linear(9 * 16, 12), fc2=nn.Linear(12, 4)), (image(size=4),)


@toy
def shared_module() -> Toy:
    return Fn(lambda m, x: m.head(m.mid(m.mid(m.stem(x)))), stem=cbr(3, 8), mid=cbr(8, 8), head=head(8)), (image(),)


@toy
def shared_head() -> Toy:
    def f(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        b = m.b(a)
        return m.tower(a), m.tower(b)

    return Fn(f, a=cbr(3, 8), b=cbr(8, 8, stride=2), tower=nn.Sequential(cbr(8, 6), conv(6, 4))), (image(),)


@toy
def shared_parameter() -> Toy:
    first, second = conv(8, 8), conv(8, 8)
    second.weight = first.weight
    return nn.Sequential(cbr(3, 8), first, nn.ReLU(), second, head(8)), (image(),)


@toy
def channel_shuffle() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.b(m.a(x))
        n, c, h, w = x.size()
        return m.head(m.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 12), c=cbr(12, 8), head=head(8)), (image(),)


@toy
def shufflenet_block() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, m.branch(b)), 1)
        n, c, h, w = y.shape
        return m.head(y.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2))

    branch = nn.Sequential(cbr(8, 6, 1), cbr(6, 6, groups=6), cbr(6, 8, 1))
    return Fn(f, stem=cbr(3, 16), branch=branch, head=head(16)), (image(),)


@toy
def native_shuffle() -> Toy:
    return nn.Sequential(cbr(3, 12), nn.ChannelShuffle(3), cbr(12, 8), head(8)), (image(),)


@toy
def option_a_shortcut() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return m.head(F.relu(short + m.b(m.a(x))))

    return Fn(f, stem=cbr(3, 8), a=cbr(8, 6, stride=2), b=cbr(6, 16), head=head(16)), (image(),)


@toy
def option_a_computed() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.b(m.a(x))
        extra = y.shape[1] - x.shape[1]
        return m.head(y + torch.cat([x, x.new_zeros(x.shape[0], extra, *x.shape[2:])], 1))

    return Fn(f, stem=cbr(3, 8), a=cbr(8, 6), b=cbr(6, 12), head=head(12)), (image(),)


@toy
def functional_conv() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(F.conv2d(m.stem(x), m.kernel, m.offset, padding=1)))

    return Fn(
        f, stem=cbr(3, 6), kernel=nn.Parameter(torch.randn(8, 6, 3, 3)), offset=nn.Parameter(torch.randn(8)), head=head(8)
    ), (image(),)


@toy
def functional_grouped_conv() -> Toy:
    f = lambda m, x: m.head(F.conv2d(m.stem(x), m.kernel, groups=2))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), kernel=nn.Parameter(torch.randn(8, 4, 1, 1)), head=head(8)), (image(),)


@toy
def standardised_conv() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        w = m.kernel
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return m.head(m.out(F.relu(F.conv2d(m.stem(x), w))))

    return Fn(f, stem=cbr(3, 6), kernel=nn.Parameter(torch.randn(8, 6, 3, 3)), out=cbr(8, 8), head=head(8)), (image(),)


@toy
def weight_norm() -> Toy:
    return nn.Sequential(cbr(3, 8), nn.utils.parametrizations.weight_norm(conv(8, 8)), cbr(8, 6), head(6)), (image(),)


@toy
def parameter_direct() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.head(m.out(m.stem(x) * m.scale + m.shift.view(1, -1, 1, 1)))

    return Fn(
        f,
        stem=cbr(3, 8),
        scale=nn.Parameter(torch.randn(8, 1, 1)),
        shift=nn.Parameter(torch.randn(8)),
        out=cbr(8, 6),
        head=head(6),
    ), (image(),)


@toy
def position_table() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.head(m.out(m.stem(x) + m.table))

    return Fn(f, stem=cbr(3, 8), table=nn.Parameter(torch.randn(1, 8, 8, 8)), out=cbr(8, 6), head=head(6)), (image(),)


@toy
def buffers() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.head(m.out((m.stem(x - m.pixel_mean) - m.mean) / m.std))

    return Fn(
        f,
        stem=cbr(3, 8),
        pixel_mean=torch.randn(1, 3, 1, 1),
        mean=torch.randn(1, 8, 1, 1),
        std=torch.rand(8, 1, 1) + 0.5,
        out=cbr(8, 6),
        head=head(6),
    ), (image(),)


@toy
def matmul_parameter() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        return torch.relu(y @ m.w1) @ m.w2.t()

    return Fn(f, stem=cbr(3, 8), w1=nn.Parameter(torch.randn(8, 10)), w2=nn.Parameter(torch.randn(4, 10))), (image(),)


@toy
def einsum() -> Toy:
    f = lambda m, x: m.head(torch.einsum("bchw,oc->bohw", m.stem(x), m.w))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), w=nn.Parameter(torch.randn(6, 8)), head=head(6)), (image(),)


@toy
def returns_dict() -> Toy:
    def f(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        return {"features": m.b(a), "aux": [m.c(a), {"deep": m.d(a)}]}

    return Fn(f, a=cbr(3, 8), b=cbr(8, 6), c=conv(8, 2), d=conv(8, 3)), (image(),)


@toy
def returns_tuple() -> Toy:
    def f(m: Any, x: Tensor) -> Any:
        a = m.a(x)
        return a, m.c(m.b(a))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 6), c=conv(6, 2)), (image(),)


@toy
def several_inputs() -> Toy:
    def f(m: Any, x: Tensor, y: Tensor, scale: float) -> Tensor:
        return m.head(m.c(m.a(x) + scale * m.b(y)))

    return Fn(f, a=cbr(3, 8), b=cbr(5, 8), c=cbr(8, 6), head=head(6)), (image(), image(5), 0.5)


@toy
def in_place() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        a += m.b(x)
        a.mul_(2).relu_()
        a.add_(m.c(a))
        return m.head(a)

    return Fn(f, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8), head=head(8)), (image(),)


@toy
def writes_by_position() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a, out = m.a(x), torch.zeros(x.shape[0], 14, 8, 8)
        out[:, :8] = a
        out[:, 8:] = m.b(a)
        return m.c(out)

    return Fn(f, a=conv(3, 8), b=conv(8, 6), c=conv(14, 4)), (image(),)


@toy
def se_block() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        s = x.mean((2, 3), keepdim=True)
        x = x * torch.sigmoid(m.up(F.relu(m.down(s))))
        g = m.fc2(F.relu(m.fc1(x.mean((2, 3)))))
        return m.head(x * F.hardsigmoid(g)[:, :, None, None].expand_as(x))

    parts = {"down": conv(8, 4, 1), "up": conv(4, 8, 1), "fc1": nn.Linear(8, 3), "fc2": nn.Linear(3, 8)}
    return Fn(f, stem=cbr(3, 8), **parts, head=head(8)), (image(),)


class Select(nn.Module):
    """A shortcut as a convolution with fixed weights, which are no parameter."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(b, a)[:, :, None, None].contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=2)


@toy
def fixed_shortcut() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(m.short(x) + m.b(m.a(x))))

    return Fn(f, stem=cbr(3, 8), short=Select(8, 12), a=cbr(8, 8, stride=2), b=cbr(8, 12), head=head(12)), (image(),)


@toy
def spatial_gate() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x * torch.sigmoid(m.gate(x)).expand_as(x))

    return Fn(f, stem=cbr(3, 8), gate=conv(8, 1), head=head(8)), (image(),)


@toy
def cbam_gate() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.mid(m.stem(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.head(x * torch.sigmoid(m.gate(pooled)))

    return Fn(f, stem=cbr(3, 8), mid=cbr(8, 8), gate=conv(2, 1), head=head(8)), (image(),)


@toy
def gated_halves() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, dim=1)
        return m.head(F.glu(m.mid(F.silu(a) * b), dim=1))

    return Fn(f, up=conv(3, 16), mid=conv(8, 12), head=head(6)), (image(),)


@toy
def split_literal() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a, b = m.stem(x).split([3, 5], dim=1)
        return m.head(torch.cat([m.a(a), m.b(b)], 1))

    return Fn(f, stem=cbr(3, 8), a=cbr(3, 4), b=cbr(5, 4), head=head(8)), (image(),)


@toy
def split_derived() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        a, b = torch.split(y, y.shape[1] // 2, dim=1)
        return m.head(m.out(a * b))

    return Fn(f, stem=cbr(3, 12), out=cbr(6, 8), head=head(8)), (image(),)


@toy
def slice_literal() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(m.a(y[:, :4]) + m.b(y[:, 4:]))

    return Fn(f, stem=cbr(3, 8), a=cbr(4, 6), b=cbr(4, 6), head=head(6)), (image(),)


@toy
def slice_derived() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        half = y.shape[1] // 2
        return m.head(m.a(y[:, :half]) + m.b(y[:, half:]))

    return Fn(f, stem=cbr(3, 8), a=cbr(4, 6), b=cbr(4, 6), head=head(6)), (image(),)


@toy
def lenet_view() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.fc2(F.relu(m.fc1(m.b(m.a(x)).view(-1, 6 * 8 * 8))))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 6), fc1=nn.Linear(384, 10), fc2=nn.Linear(10, 4)), (image(),)


@toy
def view_by_count() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return m.fc2(F.relu(m.fc1(y.view(y.size(0), y.numel() // y.size(0)))))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 6), fc1=nn.Linear(384, 10), fc2=nn.Linear(10, 4)), (image(),)


@toy
def slice_by_share() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        some = int(y.shape[1] * 0.5)
        return m.head(torch.cat([F.relu(y[:, :some]), y[:, some:]], 1))

    return Fn(f, stem=cbr(3, 8), head=head(8)), (image(),)


def scaled_by_widths(scale: Callable[[int, int], float]) -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        return m.head(m.c(y) + m.d(z) * scale(y.shape[1], z.shape[1]))

    return Fn(f, a=cbr(3, 8), b=cbr(3, 4), c=cbr(8, 6), d=cbr(4, 6), head=head(6)), (image(),)


@toy
def scaled_by_a_share_of_a_literal() -> Toy:
    return scaled_by_widths(lambda a, b: 24 // a)


@toy
def scaled_by_a_ratio() -> Toy:
    return scaled_by_widths(lambda a, b: a // b)


@toy
def scaled_by_a_product() -> Toy:
    return scaled_by_widths(lambda a, b: a * b / 32)


@toy
def shaped_like_another() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        return m.head(m.c(y) + m.d(z.reshape(z.shape[0], y.shape[1], *z.shape[2:])))

    return Fn(f, a=cbr(3, 8), b=cbr(3, 8), c=cbr(8, 6), d=cbr(8, 6), head=head(6)), (image(),)


@toy
def dense_block() -> Toy:
    """DenseNet: every layer reads all that was made before it."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.cat([x, m.a(x)], 1)
        x = torch.cat([x, m.b(x)], 1)
        return m.head(m.out(x))

    return Fn(f, stem=cbr(3, 6), a=cbr(6, 4), b=cbr(10, 4), out=cbr(14, 8), head=head(8)), (image(),)


@toy
def blurred() -> Toy:
    """Anti-aliased pooling as it is published: one fixed filter for each channel, as many groups as channels come in."""

    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.head(F.conv2d(F.pad(y, (1, 1, 1, 1), mode="reflect"), m.filt, stride=2, groups=y.shape[1]))

    made = Fn(f, stem=cbr(3, 8), head=head(8))
    made.register_buffer("filt", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])).expand(8, 1, 3, 3) / 16)
    return made, (image(),)


@toy
def split_attention() -> Toy:
    """ResNeSt: two halves, weighed against each other channel by channel."""

    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        halves = y.reshape(y.shape[0], 2, -1, *y.shape[2:])
        gap = halves.sum(1).mean((2, 3), keepdim=True)
        weights = m.fc2(F.relu(m.fc1(gap))).view(y.shape[0], 1, 2, -1).transpose(1, 2).softmax(1)
        return m.head(m.out((halves * weights.reshape(y.shape[0], 2, -1, 1, 1)).sum(1)))

    return Fn(f, a=cbr(3, 6), b=cbr(6, 16), fc1=conv(8, 4, 1), fc2=conv(4, 16, 1), out=cbr(8, 6), head=head(6)), (image(),)


@toy
def scaled_and_shifted() -> Toy:
    """FiLM: a scale and a shift for each channel, from one layer."""

    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        s = m.film(y.mean((2, 3))).view(y.shape[0], 2, -1, 1, 1)
        return m.head(F.relu(y * s[:, 0] + s[:, 1]))

    return Fn(f, a=cbr(3, 6), b=cbr(6, 8), film=nn.Linear(8, 16), head=head(8)), (image(),)


@toy
def cropped_channels() -> Toy:
    return Fn(lambda m, x: m.head(F.pad(m.stem(x), (0, 0, 0, 0, -1, -1))), stem=cbr(3, 8), head=head(6)), (image(),)


@toy
def stacked_vertically() -> Toy:
    return Fn(lambda m, x: m.head(torch.vstack([m.stem(x), m.stem(x)])), stem=cbr(3, 8), head=head(8)), (image(),)


@toy
def view_by_size() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return m.fc2(F.relu(m.fc1(y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)))))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 6), fc1=nn.Linear(384, 10), fc2=nn.Linear(10, 4)), (image(),)


@toy
def width_in_arithmetic() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.mid(m.stem(x))
        return m.head(y * y.shape[1] ** -0.5)

    return Fn(f, stem=cbr(3, 8), mid=cbr(8, 8), head=head(8)), (image(),)


@toy
def reduces_channels() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.mid(m.stem(x))
        return m.out(y / y.norm(dim=1, keepdim=True).clamp_min(1e-6))  # without it NaN: nothing would be compared

    return Fn(f, stem=cbr(3, 8), mid=cbr(8, 8), out=conv(8, 4)), (image(),)


@toy
def rolls_channels() -> Toy:
    return Fn(lambda m, x: m.out(m.mid(m.stem(x)).roll(1, 1)), stem=cbr(3, 8), mid=cbr(8, 8), out=conv(8, 4)), (image(),)


@toy
def flips_and_repeats() -> Toy:
    f = lambda m, x: m.out(m.stem(x).flip(1).repeat(1, 2, 1, 1).permute(0, 1, 3, 2))  # noqa: E731
    return Fn(f, stem=cbr(3, 6), out=conv(12, 4)), (image(),)


@toy
def residual_with_input() -> Toy:
    f = lambda m, x: m.out(x + m.b(m.a(x)))  # noqa: E731
    return Fn(f, a=cbr(3, 8), b=cbr(8, 3), out=conv(3, 4)), (image(),)


@toy
def norm_zoo() -> Toy:
    layers = [conv(3, 12), nn.GroupNorm(4, 12), nn.PReLU(12), conv(12, 8), nn.InstanceNorm2d(8, affine=True), nn.ELU()]
    layers += [
        conv(8, 6),
        nn.InstanceNorm2d(6),
        nn.Hardswish(),
        conv(6, 8),
        nn.BatchNorm2d(8, affine=False),
        nn.GELU(),
        head(8),
    ]
    return nn.Sequential(*layers), (image(),)


@toy
def group_norm_1() -> Toy:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 6), head(6)), (image(),)


@toy
def norm_over_chw() -> Toy:
    return nn.Sequential(conv(3, 8), nn.LayerNorm([8, 8, 8]), nn.ReLU(), conv(8, 6), head(6)), (image(),)


@toy
def layer_norm() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.stem(x).permute(0, 2, 3, 1))
        return m.fc2(F.gelu(m.fc1(y))).mean((1, 2))

    return Fn(f, stem=conv(3, 8), norm=nn.LayerNorm(8), fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 4)), (image(),)


@toy
def convnext_block() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.dw(x).permute(0, 2, 3, 1))
        return m.head(x + m.gamma[:, None, None] * m.fc2(F.gelu(m.fc1(y))).permute(0, 3, 1, 2))

    parts = {"dw": conv(8, 8, 7, groups=8), "norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)}
    return Fn(f, stem=conv(3, 8), **parts, gamma=nn.Parameter(torch.rand(8)), head=head(8)), (image(),)


@toy
def conv_1d_and_3d() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(x)))
        return m.d(F.relu(m.c(y.mean((3, 4)))))

    return Fn(f, a=nn.Conv3d(2, 6, 3), b=nn.Conv3d(6, 8, 1, padding="same"), c=nn.Conv1d(8, 6, 1), d=nn.Conv1d(6, 4, 1)), (
        torch.randn(2, 2, 5, 5, 5),
    )


@toy
def transposed() -> Toy:
    layers = [cbr(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.ConvTranspose2d(6, 6, 2, 2, groups=6)]
    layers += [nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 8, 2, groups=2), nn.ReLU(), conv(8, 4)]
    return nn.Sequential(*layers), (image(),)


@toy
def pixel_shuffle() -> Toy:
    return nn.Sequential(cbr(3, 16), nn.PixelShuffle(2), cbr(4, 6), nn.PixelUnshuffle(2), cbr(24, 6), head(6)), (image(),)


@toy
def pixel_shuffle_sum() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(m.stem(x), 2) + m.skip(F.interpolate(x, scale_factor=2.0))
        return m.head(y * torch.sigmoid(m.gate(y)))

    return Fn(f, stem=cbr(3, 16), skip=conv(3, 4), gate=conv(4, 1), head=head(4)), (image(),)


@toy
def unfolds() -> Toy:
    f = lambda m, x: m.fc(F.unfold(m.stem(x), 3).transpose(1, 2))  # noqa: E731
    return Fn(f, stem=cbr(3, 6), fc=nn.Linear(54, 4)), (image(),)


@toy
def resizes_and_pads() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        a = m.a(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        b = F.interpolate(m.b(F.max_pool2d(a, 2)), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return m.out(F.pad(a + b, (1, 1, 1, 1), value=0.5))

    return Fn(f, a=cbr(3, 8), b=cbr(8, 8), out=nn.Conv2d(8, 4, 3)), (image(),)


@toy
def stack_and_sum() -> Toy:
    f = lambda m, x: m.head(torch.stack([m.a(x), m.b(x)]).sum(0))  # noqa: E731
    return Fn(f, a=cbr(3, 8), b=cbr(3, 8), head=head(8)), (image(),)


@toy
def max_out() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        n, c, h, w = y.shape
        return m.head(y.view(n, c // 2, 2, h, w).amax(2))

    return Fn(f, a=conv(3, 16), head=head(8)), (image(),)


@toy
def multi_head_attention() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        y = y + m.attention(y, y, y, need_weights=False)[0]
        return m.fc2(F.relu(m.fc1(y.mean(1))))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Fn(f, stem=cbr(3, 8), attention=attention, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def own_attention() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        b, n, c = y.shape
        q, k, v = m.qkv(y).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q @ k.transpose(-2, -1)) * (c // 2) ** -0.5).softmax(-1)
        return m.fc2(F.relu(m.fc1((a @ v).transpose(1, 2).reshape(b, n, c))))

    return Fn(f, stem=cbr(3, 8), qkv=nn.Linear(8, 24), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def channel_attention() -> Toy:
    """Cross-covariance attention: the scores are channels by channels."""

    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        b, n, c = y.shape
        q, k, v = m.qkv(y).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 4, 1).unbind(0)
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return m.fc2(F.relu(m.fc1(y + (a @ v).permute(0, 3, 1, 2).reshape(b, n, c))))

    return Fn(f, stem=cbr(3, 8), qkv=nn.Linear(8, 24), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def width_of_a_constant() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        return m.out(y * m.table.view(y.shape[1], 1, 1))

    model = Fn(f, stem=cbr(3, 8), out=conv(8, 4))
    model.table = torch.randn(8)
    return model, (image(),)


@toy
def fused_attention() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        q, k, v = m.q(y), m.k(y), m.v(y)
        return m.fc2(F.relu(m.fc1(F.scaled_dot_product_attention(q, k, v))))

    parts = {name: nn.Linear(8, 8) for name in "qkv"}
    return Fn(f, stem=cbr(3, 8), **parts, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def transformer() -> Toy:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    f = lambda m, x: m.fc(m.encoder(m.stem(x).flatten(2).transpose(1, 2)).mean(1))  # noqa: E731
    return Fn(f, stem=conv(3, 8), encoder=layer, fc=nn.Linear(8, 4)), (image(),)


@toy
def class_token() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        y = torch.cat([m.token.expand(y.shape[0], -1, -1), y], dim=1) + m.position
        return m.fc2(F.relu(m.fc1(y))[:, 0])

    parts = {"token": nn.Parameter(torch.randn(1, 1, 8)), "position": nn.Parameter(torch.randn(1, 65, 8))}
    return Fn(f, stem=cbr(3, 8), **parts, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def mixer() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2)
        y = y + m.token2(F.gelu(m.token1(y)))
        y = m.norm(y.transpose(1, 2))
        return m.fc2(F.gelu(m.fc1(y))).mean(1)

    parts = {"token1": nn.Linear(64, 10), "token2": nn.Linear(10, 64), "norm": nn.LayerNorm(8)}
    return Fn(f, stem=conv(3, 8), **parts, fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (image(),)


@toy
def recurrent() -> Toy:
    f = lambda m, x: m.fc(m.rnn(m.stem(x).flatten(2).transpose(1, 2))[0][:, -1])  # noqa: E731
    return Fn(f, stem=cbr(3, 8), rnn=nn.LSTM(8, 6, batch_first=True), fc=nn.Linear(6, 4)), (image(),)


@toy
def data_dependent() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.mid(m.stem(x))
        return m.head(y * 2 if float(y.mean()) > 0 else y)

    return Fn(f, stem=cbr(3, 8), mid=cbr(8, 8), head=head(8)), (image(),)


@toy
def embedding() -> Toy:
    f = lambda m, ids: m.fc2(F.relu(m.fc1(m.table(ids).mean(1))))  # noqa: E731
    return Fn(f, table=nn.Embedding(20, 8), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 4)), (torch.arange(10).view(2, 5),)


@toy
def unused_branch() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        m.dead(y)
        return m.head(y)

    return Fn(f, stem=cbr(3, 8), dead=cbr(8, 5), never=cbr(8, 7), head=head(8)), (image(),)


@toy
def padding_in_words() -> Toy:
    layers = [nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(8, 6, (5, 1), padding="same"), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(6, 8, 3, padding="valid"), head(8)), (image(),)


@toy
def fewer_chunks_than_asked() -> Toy:
    f = lambda m, x: m.head(m.out(sum(m.stem(x).chunk(4, 1))))  # noqa: E731
    return Fn(f, stem=cbr(3, 6), out=cbr(2, 8), head=head(8)), (image(),)


@toy
def larger_of_two() -> Toy:
    f = lambda m, x: m.head(torch.min(torch.max(m.a(x), m.b(x)), m.c(x)))  # noqa: E731
    return Fn(f, a=cbr(3, 8), b=cbr(3, 8), c=cbr(3, 8), head=head(8)), (image(),)


@toy
def warped() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        grid = torch.tanh(m.flow(x)).permute(0, 2, 3, 1)
        return m.head(F.grid_sample(m.stem(x), grid, align_corners=False))

    return Fn(f, stem=cbr(3, 8), flow=conv(3, 2), head=head(8)), (image(),)


@toy
def top_values() -> Toy:
    f = lambda m, x: m.fc(m.stem(x).topk(3, dim=2)[0].flatten(1))  # noqa: E731
    return Fn(f, stem=nn.Conv1d(4, 8, 3), fc=nn.Linear(24, 4)), (torch.randn(2, 4, 12),)


@toy
def norm_of_written_size() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.layer_norm(m.stem(x).mean((2, 3)), (m.width,), m.scale, m.shift))

    parts = {"scale": nn.Parameter(torch.rand(8)), "shift": nn.Parameter(torch.randn(8))}
    return Fn(f, stem=cbr(3, 8), width=8, **parts, fc=nn.Linear(8, 4)), (image(),)


@toy
def norm_of_read_size() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).mean((2, 3))
        return m.fc(F.layer_norm(y, y.shape[-1:], m.scale, m.shift))

    parts = {"scale": nn.Parameter(torch.rand(8)), "shift": nn.Parameter(torch.randn(8))}
    return Fn(f, stem=cbr(3, 8), **parts, fc=nn.Linear(8, 4)), (image(),)


@toy
def non_local() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        q, k, v = m.q(x).flatten(2).transpose(1, 2), m.k(x).flatten(2), m.v(x).flatten(2).transpose(1, 2)
        y = torch.bmm(torch.bmm(q, k).softmax(-1), v).transpose(1, 2)
        return m.head(x + m.out(y.unflatten(2, x.shape[2:])))

    parts = {"q": conv(8, 4, 1), "k": conv(8, 4, 1), "v": conv(8, 4, 1), "out": conv(4, 8, 1)}
    return Fn(f, stem=cbr(3, 8), **parts, head=head(8)), (image(),)


@toy
def attention_over_positions() -> Toy:
    """The keys carry a table of positions, so their channels are named after a parameter that is added, not multiplied."""

    def f(m: Any, x: Tensor) -> Tensor:
        q, k = m.q(x).flatten(2).transpose(1, 2), m.table + m.k(x).flatten(2)
        return m.head(m.v(x) * torch.matmul(q, k).softmax(-1).mean(1).view(x.shape[0], 1, *x.shape[2:]))

    parts = {"q": conv(3, 6, 1), "k": conv(3, 6, 1), "table": nn.Parameter(torch.randn(6, 64)), "v": cbr(3, 8)}
    return Fn(f, **parts, head=head(8)), (image(),)


@toy
def matmul_of_views() -> Toy:
    """Weights as (outputs, inputs), turned around where they are used; one is scaled on the way."""

    def f(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.stem(x)).permute(0, 2, 3, 1)
        y = F.relu(y @ m.wide.t()).mean((1, 2))
        return F.relu(y @ (m.narrow * m.scale[:, None]).T) @ m.out.mT

    weights = {"wide": (12, 8), "narrow": (10, 12), "out": (4, 10), "scale": (10,)}
    return Fn(f, stem=conv(3, 8), **{name: nn.Parameter(torch.randn(size)) for name, size in weights.items()}), (image(),)


@toy
def matmul_computed() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x).flatten(2).transpose(1, 2)
        return torch.relu(y @ (m.w1 * 0.5)) @ m.w2.t().contiguous()

    return Fn(f, stem=cbr(3, 8), w1=nn.Parameter(torch.randn(8, 10)), w2=nn.Parameter(torch.randn(4, 10))), (image(),)


@toy
def windows_of_channels() -> Toy:
    f = lambda m, x: m.fc(m.stem(x).unfold(1, 4, 4).mean((1, 2, 3)))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), fc=nn.Linear(4, 4)), (image(),)


@toy
def windows_of_space() -> Toy:
    f = lambda m, x: m.head(m.stem(x).unfold(2, 4, 4).mean(4))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), head=head(8)), (image(),)


@toy
def diagonal_of_channels() -> Toy:
    f = lambda m, x: m.fc(m.stem(x).diagonal(0, 1, 2).mean(1))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), fc=nn.Linear(8, 4)), (image(),)


@toy
def diagonal_of_space() -> Toy:
    f = lambda m, x: m.fc(m.stem(x).diagonal(dim1=2, dim2=-1).mean(2))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), fc=nn.Linear(8, 4)), (image(),)


@toy
def tied_transpose() -> Toy:
    f = lambda m, x: m.fc(F.linear(torch.relu(m.a(x)), m.a.weight.t()))  # noqa: E731
    return Fn(f, a=nn.Linear(12, 8), fc=nn.Linear(12, 4)), (torch.randn(2, 12),)


@toy
def tied_product() -> Toy:
    f = lambda m, x: m.fc(torch.relu(m.a(x)) @ m.a.weight)  # noqa: E731
    return Fn(f, a=nn.Linear(12, 8), fc=nn.Linear(12, 4)), (torch.randn(2, 12),)


@toy
def views_in_place() -> Toy:
    """A view in place of a result, and one that another result was tied to before."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        a, b = m.a(x), m.b(x)
        return m.head((a + b) * a.unsqueeze_(1).squeeze_(1))

    return Fn(f, stem=cbr(3, 8), a=conv(8, 6), b=conv(8, 6), head=head(6)), (image(),)


@toy
def activations_in_place() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(m.mish(m.b(x.masked_fill_(x < 0, 0.1))))

    return Fn(f, a=conv(3, 8), b=conv(8, 6), mish=nn.Mish(inplace=True), head=head(6)), (image(),)


@toy
def selective_kernels() -> Toy:
    """Attention over two branches of the same channels: the softmax runs across the branches."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        branches = torch.stack([m.a(x), m.b(x)], 1)
        scores = m.fc(branches.sum(1).mean((2, 3), keepdim=True))
        scores = scores.view(len(x), 2, -1, 1, 1).softmax(1)
        return m.head((branches * scores).sum(1))

    return Fn(f, stem=cbr(3, 8), a=cbr(8, 6), b=cbr(8, 6), fc=conv(6, 12, 1), head=head(6)), (image(),)


@toy
def weights_that_are_added() -> Toy:
    """Branches merged into one weight in every pass, as while a re-parameterised network is trained."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = F.conv2d(x, m.w3 + F.pad(m.w1, [1, 1, 1, 1]), padding=1).relu()
        return m.out(F.conv2d(x, m.a.weight + m.b.weight).relu().mean((2, 3)))

    parts = {"w3": nn.Parameter(torch.randn(6, 8, 3, 3)), "w1": nn.Parameter(torch.randn(6, 8, 1, 1))}
    return Fn(f, **parts, stem=cbr(3, 8), a=conv(6, 4, 1), b=conv(6, 4, 1), out=nn.Linear(4, 3)), (image(),)


@toy
def low_rank_addition() -> Toy:
    f = lambda m, x: m.fc(F.linear(m.a(x).relu(), m.b.weight + m.up @ m.down).relu())  # noqa: E731
    parts = {"up": nn.Parameter(torch.randn(10, 2)), "down": nn.Parameter(torch.randn(2, 12))}
    return Fn(f, **parts, a=nn.Linear(8, 12), b=nn.Linear(12, 10), fc=nn.Linear(10, 4)), (torch.randn(2, 8),)


@toy
def shape_of_another() -> Toy:
    """A norm over flattened positions, brought back into the shape that they had."""

    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2).transpose(1, 2)
        return m.fc(m.norm(x.flatten(0, 1)).reshape_as(x).relu().mean(1))

    return Fn(f, stem=conv(3, 8), norm=nn.BatchNorm1d(8), fc=nn.Linear(8, 4)), (image(),)


@toy
def keeps_its_size() -> Toy:
    def f(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        m.seen = x.shape[2:]
        return m.head(F.interpolate(m.out(x), size=tuple(m.seen)))

    return Fn(f, stem=cbr(3, 8), out=cbr(8, 6), head=head(6)), (image(),)


class ReadsWidth(nn.Module):
    """A convolution whose integers are read off its weight."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3))
        self.norm = nn.BatchNorm2d(n_out)

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, padding=1))


@toy
def widths_are_read() -> Toy:
    f = lambda m, x: m.head(m.b(m.a(x).relu()).relu())  # noqa: E731
    return Fn(f, a=ReadsWidth(3, 8), b=ReadsWidth(8, 6), head=head(6)), (image(),)


@toy
def writes_into_its_input() -> Toy:
    f = lambda m, x: m.head(m.stem(x.sub_(0.5).div_(0.2)))  # noqa: E731
    return Fn(f, stem=cbr(3, 8), head=head(8)), (image(),)


@dataclass
class Found:
    """What a model of its own kind returns: no container to torch."""

    logits: Tensor
    more: dict[str, Tensor]


@toy
def returns_an_object() -> Toy:
    def f(m: Any, x: Tensor) -> Found:
        x = m.stem(x)
        return Found(m.head(x), {"features": m.out(x)})

    return Fn(f, stem=cbr(3, 8), out=conv(8, 6), head=head(8)), (image(),)


class C2f(nn.Module):
    """YOLO's split block: halves, a chain of bottlenecks, everything concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = cbr(c1, c2, 1), cbr((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(nn.Sequential(cbr(self.c, self.c), cbr(self.c, self.c)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            y.append(y[-1] + block(y[-1]))
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    """YOLO's pooling pyramid."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.pool = cbr(c, c // 2, 1), cbr(c * 2, c, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        return self.cv2(torch.cat(y, 1))


@toy
def yolo() -> Toy:
    def f(m: Any, x: Tensor) -> Any:
        p3 = m.c3(m.stem(x))
        p4 = m.sppf(m.c4(m.down4(p3)))
        n3 = m.n3(torch.cat([m.up(p4), p3], 1))
        n4 = m.n4(torch.cat([m.down(n3), p4], 1))
        raw = [torch.cat([m.box[i](p), m.cls[i](p)], 1) for i, p in enumerate((n3, n4))]
        flat = torch.cat([r.view(r.shape[0], 7, -1) for r in raw], 2)
        box, cls = flat.split((4, 3), 1)
        return torch.cat([box * 2, cls.sigmoid()], 1), raw

    def tower(n: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Sequential(cbr(c, 6), cbr(6, 6, groups=6), conv(6, n, 1)) for c in (8, 16))

    parts = {"stem": cbr(3, 8, stride=2), "c3": C2f(8, 8), "down4": cbr(8, 16, stride=2), "c4": C2f(16, 16), "sppf": SPPF(16)}
    parts |= {"up": nn.Upsample(scale_factor=2), "n3": C2f(24, 8), "down": cbr(8, 8, stride=2), "n4": C2f(24, 16)}
    return Fn(f, **parts, box=tower(4), cls=tower(3)), (image(size=32, batch=1),)


EXACT = [name for name in TOYS if name not in INEXACT]
