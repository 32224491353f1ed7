"""What the gradients of one batch say about channels: how the loss changes, to first order, when a channel is scaled."""

import torch
from torch import Tensor, nn

from deploypipe.errors import NotApplicable
from deploypipe.types import Group, Member

Norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def gate_gradient(model: nn.Module, group: Group) -> Tensor:
    """Return the (C,) derivatives of the loss by one factor on each channel, with the gradients that `backward` left.

    A factor z on a norm's output has `dE/dz = gamma dE/dgamma + beta dE/dbeta` at z = 1; on a layer's output it is
    `sum w dE/dw + b dE/db`. A channel made or normalised in several places has one factor for all of them: terms are added
    with their signs (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771).

    Call it in training mode. A layer that feeds a batch norm then adds nothing of its own, because the norm takes every scale
    back, so that shortcuts with and without a norm may meet in one group.

    Args:
        model: After `backward` of a mean loss, parameters not yet changed.
        group: Of the graph that was traced from the model.

    Raises:
        NotApplicable: No norm and no weight of the group has a gradient.
    """
    modules = dict(model.named_modules())
    terms = [
        _per_channel(parameter.detach() * parameter.grad, member, group.size)
        for member in group.members
        if (parameter := _gate(modules, member)) is not None and parameter.grad is not None
    ]
    if not terms:
        raise NotApplicable("no norm and no weight that makes its channels has a gradient")
    return torch.stack(terms).sum(0)


def _gate(modules: dict[str, nn.Module], member: Member) -> nn.Parameter | None:
    """Return the member's parameter if it scales the channels as a whole: of a norm, or of a layer that makes them."""
    owner, _, leaf = member.param.rpartition(".")
    module = modules.get(owner)
    parameter = getattr(module, leaf, None)
    scales = isinstance(module, Norms) or member.role == "produces"
    return parameter if scales and isinstance(parameter, nn.Parameter) else None


def _per_channel(tensor: Tensor, member: Member, size: int) -> Tensor:
    """Return the (C,) sums over what each channel owns of a parameter; slots of owner -1 are left out."""
    slots = tensor.double().movedim(member.axis, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor.double()
    owner = torch.from_numpy(member.owner).to(tensor.device)
    return slots.new_zeros(size).index_add_(0, owner[owner >= 0], slots[owner >= 0])
