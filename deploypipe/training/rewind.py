"""The state of a model at an early step of its training, to go back to."""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from deploypipe.training.settings import TrainHook


class Rewind(TrainHook):
    """Remembers every parameter and buffer, batch norm statistics included, after a number of optimizer steps.

    Args:
        step: Steps of training after which the state is taken; 0 for the state before any.
    """

    def __init__(self, step: int) -> None:
        self._step, self._state = step, dict[str, Tensor]()
        self.key = f"rewind {step}"

    def on_step_end(self, model: nn.Module, step: int) -> None:
        """Take the state if this is the step."""
        if step + 1 == self._step:
            self._state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def rewound(self, start: nn.Module) -> nn.Module:
        """Return a copy of the model that training started from, in the state that was taken.

        Raises:
            RuntimeError: Training had fewer steps.
        """
        model = copy.deepcopy(start)
        if self._step:
            model.load_state_dict(self._state)
        return model

    def state(self) -> Mapping[str, Tensor]:
        """Return what was taken."""
        return self._state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self._state = dict(state)
