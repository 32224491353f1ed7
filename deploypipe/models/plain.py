"""Weights that are computed anew at every pass, made plain parameters: only those can lose channels."""

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm


def fold_weights(model: nn.Module) -> tuple[str, ...]:
    """Put in place of every computed weight the value that it has now; return the names of these weights.

    Computed are parametrized weights (`torch.nn.utils.parametrizations`: weight, spectral and orthogonal norm, or the user's
    own), those of the older `torch.nn.utils.weight_norm` and `spectral_norm`, and those under a mask of `torch.nn.utils.prune`.
    In evaluation mode the model computes what it did; trained further, it trains the weights themselves.

    Args:
        model: Changed in place. It must be in evaluation mode: some norms move with each pass of training.

    Example:
        >>> net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> fold_weights(net.eval()), [name for name, _ in net.named_parameters()]
        (('weight',), ['bias', 'weight'])
    """
    folded = []
    for path, module in list(model.named_modules()):
        names = _fold_hooked(module) + _fold_parametrized(module)
        folded += [f"{path}.{name}" if path else name for name in names]
    return tuple(folded)


def _fold_hooked(module: nn.Module) -> list[str]:
    """Fold what hooks compute before each pass."""
    names = []
    for hook in list(module._forward_pre_hooks.values()):
        match hook:
            case WeightNorm(name=name):
                remove_weight_norm(module, name)
            case SpectralNorm(name=name):
                remove_spectral_norm(module, name)
            case prune.BasePruningMethod(_tensor_name=name):
                prune.remove(module, name)  # type: ignore[no-untyped-call]
            case _:
                continue
        names.append(name)
    return names


def _fold_parametrized(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    names = list(module.parametrizations)  # type: ignore[arg-type]
    for name in names:
        owned = next(module.parametrizations[name].parameters(recurse=False), None)  # type: ignore[index, union-attr]
        parametrize.remove_parametrizations(module, name)
        if owned is not None and name in module._buffers:  # torch makes buffers of what was computed from frozen parameters
            value = module._buffers.pop(name)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))  # type: ignore[arg-type]
    return names
