"""Collect what an algorithm asks for, no more: a view of the weights, and sampled inputs of layers on the selection data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from deploypipe.data.batches import count, seeded, take
from deploypipe.errors import NotApplicable, UsageError
from deploypipe.graph.outputs import copied

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Plain = Convolution | Transposed | nn.Linear  # layers whose weight reads the module's input as it is
_FORWARDS = {kind.forward for kind in (*Convolution.__args__, *Transposed.__args__, nn.Linear)}  # unless they have their own
BATCH = 128
BATCH_VALUES = 1 << 22  # input values in one batch, so that large images do not fill the memory


@dataclass(frozen=True, eq=False)
class Sample:
    """One layer at m random (image, filter, position) locations.

    Attributes:
        x: (m, S) what each input slot adds to the output there; rows sum to `y`.
        y: (m,) the layer's output there, without its bias.
    """

    x: Tensor
    y: Tensor


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator that depends on the seed and on the names alone, equal in every process."""
    return torch.Generator().manual_seed(crc32(repr((seed, *names)).encode()))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, detached: a view that no gradient follows."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter by name, detached: without buffers, such as fixed weights of a shortcut."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode, and every module back into the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def batch_size(example: Sequence[Any]) -> int:
    """Return how many inputs like the traced example go into one batch: at most 128, fewer if they are large."""
    values = prod(example[0].shape[1:]) if example and isinstance(example[0], Tensor) else 1
    return max(1, min(BATCH, BATCH_VALUES // max(values, 1)))


def images(data: Dataset[Any] | None, n_images: int, seed: int, batch: int = BATCH) -> Iterator[Tensor]:
    """Yield the inputs (B, ...) of up to `n_images` random examples of the selection data, each at most once.

    Equal arguments give equal inputs, also where the user's transforms draw: what models say about them is compared.

    Raises:
        UsageError: There is no data, or its examples cannot be put into a batch.
    """
    if data is None:
        raise UsageError(
            "this algorithm measures activations and needs data", at="--data", fix="name a data set, as in --data demo"
        )
    chosen = torch.randperm(count(data), generator=generator(seed, "images"))[:n_images]
    for start in range(0, len(chosen), batch):
        with seeded(seed + start):
            inputs = take(data, chosen[start : start + batch])[0]
        yield inputs


def layer_of(model: nn.Module, weight: str) -> nn.Module:
    """Return the convolution or linear layer that owns `weight`: what its hooks see is what the weight reads.

    Raises:
        NotApplicable: Something else owns it.
    """
    owner, _, attribute = weight.rpartition(".")
    module = dict(model.named_modules()).get(owner)
    if not isinstance(module, Plain) or type(module).forward not in _FORWARDS or attribute != "weight":
        raise NotApplicable(f"{weight} is read by no plain convolution or linear layer")
    return module


def called(model: nn.Module, example: tuple[object, ...]) -> set[nn.Module]:
    """Return the modules that a forward pass calls: of others the weights may be read, but no hook hears of it."""
    heard = set[nn.Module]()
    run_hooked(model, example, [m.register_forward_pre_hook(lambda m, args: heard.add(m)) for m in model.modules()])
    return heard


def run_hooked(model: nn.Module, example: tuple[object, ...], handles: Sequence[RemovableHandle]) -> None:
    """Run the model once in evaluation mode on copies of its inputs, and take these hooks off."""
    try:
        with evaluating(model), torch.no_grad():
            model(*copied(example))
    finally:
        for handle in handles:
            handle.remove()


def readable(model: nn.Module, weight: str) -> nn.Module:
    """Return the layer that owns `weight`, if all its outputs read all its inputs.

    Raises:
        NotApplicable: It is no plain convolution or linear layer.
    """
    if getattr(module := layer_of(model, weight), "groups", 1) != 1:
        raise NotApplicable(f"{weight} is read by no plain convolution or linear layer")
    return module


def first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer reads, given by position or by name."""
    return cast("Tensor", args[0] if args else next(iter(kwargs.values())))


class FeatureTap:
    """Inputs and outputs of chosen layers at random locations, read by forward hooks.

    Args:
        model: The model to read; left as it was.
        names: Parameter names of the layers' weights, as in "layer1.conv.weight".
        n_locations: Random (filter, position) pairs for each image and layer call.
        seed: Of the locations. Two taps with the same seed over the same batches meet the same locations.
        filters: Weight -> output channels to draw from, in order; all without it. A tap on a pruned model and one on the dense
            model with the surviving channels here meet the same filters.

    Raises:
        NotApplicable: A weight's layer cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        n_locations: int,
        seed: int,
        filters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model = model
        self._layers = {name: readable(model, name) for name in names}
        self._n_locations, self._seed, self._filters = n_locations, seed, filters or {}
        self._read: dict[str, list[Sample]] = {}

    def samples(self, data: Iterator[Tensor], stop_after: int = 0) -> Iterator[dict[str, list[Sample]]]:
        """Yield for each batch what the layers met: weight -> one sample for each call of the layer.

        Args:
            data: Batches of the model's input.
            stop_after: End each forward pass after this many calls of the layers; 0 to finish it.
        """
        device = next(self._model.parameters()).device
        for i, inputs in enumerate(data):
            self._read = {}
            self._forward(inputs.to(device), i, stop_after)
            yield self._read

    def _forward(self, inputs: Tensor, batch: int, stop_after: int) -> None:
        def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> None:
            met = self._read.setdefault(name, [])
            rng = generator(self._seed, name, batch, len(met))
            met.append(sample(layer, first(args, kwargs), out, self._n_locations, rng, self._filters.get(name)))
            if sum(map(len, self._read.values())) == stop_after:
                raise _Enough

        handles = [layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in self._layers.items()]
        try:
            with evaluating(self._model), torch.inference_mode():
                self._model(inputs)
        except _Enough:
            pass  # all that was asked for has been met
        finally:
            for handle in handles:
                handle.remove()


class _Enough(Exception):
    """Ends a forward pass early."""


def sample(layer: Any, x: Tensor, out: Tensor, n_locations: int, rng: torch.Generator, filters: Tensor | None = None) -> Sample:
    """Return what `layer` met at `n_locations` random (filter, position) pairs of each image.

    Args:
        layer: A linear layer or a convolution without groups.
        x: (N, C, ...) or, for linear layers, (N, ..., C) input.
        out: The layer's output.
        n_locations: Locations for each image.
        rng: CPU generator.
        filters: Output channels to draw from; all without it.
    """
    linear = isinstance(layer, nn.Linear)
    n_space = 0 if linear else layer.weight.dim() - 2
    if x.dim() == (1 if linear else n_space + 1):
        x, out = x[None], out[None]
    if linear:
        x, out = x.reshape(x.shape[0], -1, x.shape[-1]).mT, out.reshape(out.shape[0], -1, out.shape[-1]).mT
    m = x.shape[0] * n_locations
    image = torch.arange(x.shape[0]).repeat_interleave(n_locations)
    pool = torch.arange(out.shape[1]) if filters is None else filters.cpu()
    j = pool[torch.randint(len(pool), (m,), generator=rng)]
    place = [torch.randint(n, (m,), generator=rng) for n in out.shape[2:]]
    image, j, *place = (index.to(x.device) for index in (image, j, *place))
    y = out[(image, j, *place)]
    if layer.bias is not None:
        y = y - layer.bias[j]
    if linear:
        contributions = x[image, :, place[0]] * layer.weight[j]
    else:
        patches, kernels = _patches(layer, x, image, place), _kernels(layer, j)
        contributions = torch.einsum("mkc,mck->mc", patches, kernels)
    return Sample(contributions.double(), y.double())


def _kernels(layer: Any, j: Tensor) -> Tensor:
    """Return the (m, C, K) weights of the filters `j`."""
    flat: Tensor = layer.weight.flatten(2)
    return flat[:, j].transpose(0, 1) if isinstance(layer, Transposed.__args__) else flat[j]


def _patches(layer: Any, x: Tensor, image: Tensor, place: Sequence[Tensor]) -> Tensor:
    """Return the (m, K, C) inputs that meet the kernel at each place; zero where it hangs over the edge."""
    padding = _padding(layer)
    if not isinstance(layer, Transposed.__args__) and layer.padding_mode != "zeros":
        x = F.pad(x, [n for pair in reversed(padding) for n in pair], mode=layer.padding_mode)
        padding = [(0, 0)] * len(padding)
    n_kernel = prod(layer.kernel_size)
    flat = torch.zeros((len(image), *layer.kernel_size), dtype=torch.long, device=x.device)
    inside = torch.ones_like(flat, dtype=torch.bool)
    for d, size in enumerate(x.shape[2:]):
        taps = torch.arange(layer.kernel_size[d], device=x.device) * layer.dilation[d]
        if isinstance(layer, Transposed.__args__):
            at = place[d][:, None] + padding[d][0] - taps
            ok = (at % layer.stride[d] == 0) & (at >= 0) & (at < size * layer.stride[d])
            at = at // layer.stride[d]
        else:
            at = place[d][:, None] * layer.stride[d] - padding[d][0] + taps
            ok = (at >= 0) & (at < size)
        shape = [-1, *(layer.kernel_size[d] if i == d else 1 for i in range(len(place)))]
        flat = flat * size + at.clamp(0, size - 1).reshape(shape)
        inside = inside & ok.reshape(shape)
    values = x.flatten(2)[image[:, None], :, flat.reshape(-1, n_kernel)]
    return values * inside.reshape(-1, n_kernel, 1)


def _padding(layer: Any) -> list[tuple[int, int]]:
    """Return how much is padded before and after each spatial axis."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in layer.padding]
