"""A model that holds smaller ones: sub-networks of the first channels of every group, trained together.

Yu et al., Universally Slimmable Networks and Improved Training Techniques, ICCV 2019, arXiv:1903.05134: the sandwich rule and
in-place distillation, sections 3.2 and 3.3.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from deploypipe.compact import compact, kept_slots
from deploypipe.ingredients.statistics import generator
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import main_output
from deploypipe.training.layout import has_narrow_shortcut, laid_out
from deploypipe.training.settings import TrainHook
from deploypipe.types import Graph

Widths = Mapping[str, int]


class Supernet:
    """Runs sub-networks on slices of the model's own parameters, so that their gradients arrive there.

    Args:
        model: Holds the parameters.
        graph: Its channel graph.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._model, self._graph = model, graph
        self._shape = copy.deepcopy(model)  # only its structure is used: hooks that the model gets later stay out of it
        self._axes: dict[str, list[int]] = {}
        for group in graph.groups:
            for member in group.members:
                axes = self._axes.setdefault(member.param, [])
                if member.axis not in axes:
                    axes.append(member.axis)

    def __call__(self, widths: Widths, inputs: Tensor) -> Any:
        """Return the output of the sub-network that has the first `widths[group]` channels of each group.

        In training mode batch norms use the statistics of this batch, and leave no running statistics behind.
        """
        plan = KeepPlan.of_widths({name: width for name, width in widths.items() if width < self._graph.group(name).size})
        small = compact(self._shape, self._graph, plan, check=False).to(inputs.device).train(self._model.training)
        slices = self._sliced(plan)
        if has_narrow_shortcut(small):  # unlike the whole model, whose layout inputs and slices have
            plain = torch.contiguous_format
            slices, inputs = {name: laid_out(tensor, plain) for name, tensor in slices.items()}, laid_out(inputs, plain)
        return functional_call(small, slices, (inputs,))

    def _sliced(self, plan: KeepPlan) -> dict[str, Tensor]:
        sliced: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            tensor: Tensor = parameter
            for axis in self._axes.get(name, ()):
                slots = kept_slots(self._graph, plan, name, axis)
                if len(slots) < tensor.shape[axis]:
                    tensor = tensor.index_select(axis, torch.from_numpy(slots).to(tensor.device))
            sliced[name] = tensor
        return sliced


class Sandwich(TrainHook):
    """Trains the smallest and some random sub-networks beside the largest, on the same batch and in the same step.

    The largest network learns what the training loop teaches it; the others learn its output, detached, by the divergence
    `KL(softmax(z_max) || softmax(z_sub))`. Random sub-networks draw the width of every group by itself.

    Args:
        graph: Of the model that is trained.
        widths: Group -> widths to draw from, ascending; other groups stay whole.
        n_random: Random sub-networks of each step.
        seed: Of their widths.
    """

    def __init__(self, graph: Graph, widths: Mapping[str, Sequence[int]], n_random: int, seed: int) -> None:
        self._graph, self._widths, self._n_random, self._seed = graph, dict(widths), n_random, seed
        self._met: list[tuple[Tensor, Any]] = []
        self._step = 0
        self.key = repr((sorted((name, tuple(each)) for name, each in self._widths.items()), n_random, seed))

    def on_train_begin(self, model: nn.Module) -> None:
        """Make the supernet, and listen to what the largest network meets."""
        self._net = Supernet(model, self._graph)
        self._listener = model.register_forward_hook(lambda _, args, out: self._met.append((args[0], out)))

    def on_loss(self, model: nn.Module, loss: Tensor, labels: Tensor) -> Tensor:
        """Add the divergences of the smaller networks."""
        (inputs, out), self._met = self._met[-1], []
        teacher = main_output(out).detach()
        for widths in self.drawn(self._step):
            loss = loss + divergence(main_output(self._net(widths, inputs)), teacher)
        self._step += 1
        return loss

    def on_train_end(self, model: nn.Module) -> None:
        """Stop listening."""
        self._listener.remove()

    def drawn(self, step: int) -> list[dict[str, int]]:
        """Return the widths of the smaller networks of a step: the smallest first."""
        rng = generator(self._seed, "sandwich", step)
        smallest = {name: each[0] for name, each in self._widths.items()}
        draw = [
            {name: each[int(torch.randint(len(each), (), generator=rng))] for name, each in self._widths.items()}
            for _ in range(self._n_random)
        ]
        return [smallest, *draw]

    def state(self) -> Mapping[str, Tensor]:
        """Return how far the draws are."""
        return {"step": torch.tensor(self._step)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on there."""
        self._step = int(state["step"])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over the batch of `KL(softmax(teacher) || softmax(student))`, temperature 1."""
    return F.kl_div(
        F.log_softmax(student.float(), 1), F.log_softmax(teacher.float(), 1), reduction="batchmean", log_target=True
    )
