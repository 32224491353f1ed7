"""What a request names, opened: the model, its data, and its graph with the groups that the user keeps whole."""

from dataclasses import dataclass

from torch import Tensor

from deploypipe.data.load import Data, load_data
from deploypipe.graph import trace
from deploypipe.models.load import Loaded, load_model
from deploypipe.pipeline.request import KEPT_BY_USER, Request
from deploypipe.pipeline.stages import real_inputs
from deploypipe.progress import Reporter
from deploypipe.types import Graph


@dataclass(frozen=True, eq=False)
class Given:
    """Model, data, some inputs of the training set for verification, and the channel graph."""

    loaded: Loaded
    data: Data
    inputs: list[tuple[Tensor, ...]]
    graph: Graph


def given(request: Request, reporter: Reporter) -> Given:
    """Open what the request names. Data of another shape than the model takes is found before anything slow.

    Raises:
        DeployPipeError: By class: see `errors`.
    """
    loaded = load_model(str(request.model), request.weights)
    data = load_data(request.data, normalise=loaded.normalise, size=loaded.input_shape, seed=request.seed, reporter=reporter)
    inputs = real_inputs(data, loaded.example)
    return Given(loaded, data, inputs, trace(loaded.model, loaded.example).keeping(request.keep, KEPT_BY_USER))
