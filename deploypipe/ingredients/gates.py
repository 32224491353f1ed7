"""Gates: the batch norms that scale a group's channels, read, trained, or multiplied by a factor for each channel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.hooks import RemovableHandle

from deploypipe.errors import NotApplicable
from deploypipe.ingredients.statistics import run_hooked
from deploypipe.types import Graph, Group, Member
from deploypipe.zeros import CONVOLUTIONS

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm with scale and shift on channels of one group.

    Attributes:
        name: Of the module.
        owner: (slots,) channel of the group that each slot of the norm belongs to; -1 for slots of other groups.
        size: Channels of the group.
    """

    name: str
    owner: Tensor
    size: int

    def module(self, model: nn.Module) -> _BatchNorm:
        """Return the batch norm in a model of the traced architecture."""
        found = model.get_submodule(self.name)
        assert isinstance(found, _BatchNorm), "chosen by norms_of"
        return found

    def per_channel(self, values: Tensor) -> Tensor:
        """Return the (C,) sums of a value for each slot."""
        owner = self.owner.to(values.device)
        return values.new_zeros(self.size).index_add(0, owner[owner >= 0], values[owner >= 0])

    def per_slot(self, values: Tensor, other: float) -> Tensor:
        """Return (slots,) values of the channels that own them; `other` where no channel of the group does."""
        owner = self.owner.to(values.device)
        return torch.where(owner >= 0, values[owner.clamp_min(0)], torch.full_like(values[:1], other))


def norms_of(model: nn.Module, group: Group) -> list[Norm]:
    """Return the batch norms with scale and shift that the group's channels pass.

    Raises:
        NotApplicable: There is none.
    """
    modules = dict(model.named_modules())
    found = []
    for member in group.members:
        name, _, leaf = member.param.rpartition(".")
        module = modules.get(name)
        if leaf == "weight" and isinstance(module, _BatchNorm) and module.affine:
            found.append(Norm(name, torch.from_numpy(member.owner), group.size))
    if not found:
        raise NotApplicable("no batch norm scales its channels")
    return found


def feeders(model: nn.Module, example: tuple[object, ...]) -> dict[str, str]:
    """Return for each norm that reads another module's output directly the name of that module, from one forward pass."""
    made, found, handles = dict[int, tuple[str, object]](), dict[str, str](), list[RemovableHandle]()

    def produced(name: str, out: object) -> None:
        made[id(out)] = (name, out)  # kept alive, so that no other tensor takes its id

    def read(name: str, x: object) -> None:
        if id(x) in made:
            found[name] = made[id(x)][0]

    for name, module in model.named_modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(lambda m, args, out, name=name: produced(name, out)))
        if isinstance(module, NORMS):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: read(name, args[0])))
    run_hooked(model, example, handles)
    return found


def last_norms(model: nn.Module, graph: Graph, group: Group) -> list[Norm]:
    """Return the group's batch norms that its readers see: behind depthwise layers that carry the channels on, else all.

    Raises:
        NotApplicable: There is none.
    """
    carriers = {member.param.rpartition(".")[0] for member in group.members if member.role == "carries"}
    norms, fed_by = norms_of(model, group), feeders(model, graph.example)
    behind = [norm for norm in norms if fed_by.get(norm.name) in carriers]
    return behind or norms


def gate_forward(model: nn.Module, norms: Sequence[Norm], gates: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """Multiply the outputs of batch norms by gates from now on.

    Args:
        model: In which the norms are.
        norms: Where the gates are.
        gates: Norm's name -> (C,) gates of its group, read anew at every pass.
    """

    def gated(norm: Norm, out: Tensor) -> Tensor:
        slots = norm.per_slot(gates[norm.name], 1.0)
        return out * slots.reshape(1, -1, *[1] * (out.dim() - 2)).to(out)

    return [n.module(model).register_forward_hook(lambda m, args, out, n=n: gated(n, out)) for n in norms]


@torch.no_grad()
def fold_gates(model: nn.Module, norms: Sequence[Norm], gates: Mapping[str, Tensor]) -> None:
    """Multiply scale and shift of batch norms by gates, in place: what the gated model computes, without gates."""
    for norm in norms:
        module = norm.module(model)
        for parameter in (module.weight, module.bias):
            parameter.mul_(norm.per_slot(gates[norm.name].to(parameter), 1.0))


def penalty_weight(reach: float, travel: float, total: float, most: float) -> float:
    """Return the weight of a penalty that alone can move a parameter by `reach`, unless it outweighed the loss then.

    Long trainings, as in the papers, go far with a light penalty. A short one that goes as far needs a heavy one, and unlearns
    what the weights knew.

    Args:
        reach: How far the penalty alone may move a parameter.
        travel: How far a constant gradient of 1 does (`TrainSettings.travel`).
        total: What is penalised, at the start.
        most: Most that the penalty may add to the loss at the start; 0 for no limit.

    >>> penalty_weight(1.0, 1000.0, 200.0, 0.3), penalty_weight(1.0, 10.0, 200.0, 0.3), penalty_weight(1.0, 10.0, 200.0, 0.0)
    (0.001, 0.0015, 0.1)
    """
    weight = reach / travel if travel else 0.0
    return min(weight, most / total) if most and total > 0 else weight


@dataclass(frozen=True, eq=False)
class Scaled:
    """One parameter that a gate multiplies: slot `i` along `axis` by the gate of channel `owner[i]`."""

    param: str
    axis: int
    owner: Tensor

    def per_channel(self, tensor: Tensor, size: int) -> Tensor:
        """Return the (C,) sums of a tensor of the parameter's shape over what each channel owns."""
        slots = tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1).sum(1)
        return Norm("", self.owner, size).per_channel(slots)

    def times(self, tensor: Tensor, gates: Tensor) -> Tensor:
        """Return the parameter, each slot times its gate."""
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.dim())]
        return tensor * Norm("", self.owner, len(gates)).per_slot(gates, 1.0).reshape(shape).to(tensor)


def gated_parameters(model: nn.Module, group: Group, followed: Mapping[str, str]) -> list[Scaled]:
    """Return what one gate on each channel multiplies: its norms, and the layers that make it without one behind them.

    In training mode that is a gate on what the readers of the channel see. A norm takes back every scale of what it reads, so
    that of several norms in a row (before and behind a depthwise layer) only the last one counts; and one positive factor on
    all terms of a residual sum scales the sum, also behind a ReLU. Where a norm has no scale to multiply, or runs across
    channels and takes back only a part, the gate is on the readers' weights: there nothing is taken back.

    Args:
        model: The traced model.
        group: Of its graph.
        followed: Norm -> the layer whose output it reads, from `feeders`.

    Raises:
        NotApplicable: Nothing can be scaled.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    owners = [(member, member.param.rpartition(".")[0]) for member in group.members]
    makers = {owner for member, owner in owners if member.role == "produces"}
    norms = {norm for norm, maker in followed.items() if maker in makers}
    norms |= {owner for _, owner in owners if isinstance(modules.get(owner), NORMS)}
    if all(_scales(modules[norm]) for norm in norms):
        normalised = set(followed.values())
        chosen = [m for m, owner in owners if owner in norms or (owner not in normalised and _adds(m, modules.get(owner)))]
    else:
        chosen = [member for member in group.members if member.role == "consumes"]
    found = [Scaled(m.param, m.axis, torch.from_numpy(m.owner)) for m in chosen if m.param in parameters]
    if not found:
        raise NotApplicable("no norm and no weight scales its channels")
    return found


def _adds(member: Member, owner: nn.Module | None) -> bool:
    """Say whether it is part of a layer that makes the channel, or the bias that a depthwise layer adds to it."""
    depthwise = member.role == "carries" and isinstance(owner, CONVOLUTIONS) and member.param.endswith(".bias")
    return member.role == "produces" or depthwise


def _scales(norm: nn.Module) -> bool:
    """Say whether a norm takes back what scales a channel, and then gives it a scale of its own."""
    alone = isinstance(norm, _NormBase) or (isinstance(norm, nn.GroupNorm) and norm.num_groups > 1)
    return alone and isinstance(norm.weight, nn.Parameter)
