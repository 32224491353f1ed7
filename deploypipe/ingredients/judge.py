"""How well a plan does before any training: compact, renew the batch norm statistics, run on images held out for this.

For algorithms that try many plans while they choose. The part that judges is a share of the training data that nothing else of
the algorithm should look at.
"""

from torch import nn
from torch.utils.data import Dataset

from deploypipe.compact import compact
from deploypipe.data.batches import Samples, count, split
from deploypipe.ingredients.statistics import batch_size
from deploypipe.plan import KeepPlan
from deploypipe.training.evaluate import Accuracy, evaluate, recalibrate
from deploypipe.types import Graph

MOST_HELD_OUT = 0.5
BATCH = 64


class Judge:
    """Judges plans of models of one graph, always on the same images.

    Attributes:
        fit: The rest of the data.

    Args:
        graph: Of the models.
        data: Training data.
        images: Held out to judge, at most half of all.
        norm_images: Of the rest, that renew batch norm statistics; 0 leaves them as they are.
        seed: Decides which images.
    """

    def __init__(self, graph: Graph, data: Samples, images: int, norm_images: int, seed: int) -> None:
        self._graph, self._norm_images, self._seed = graph, norm_images, seed
        self._batch = batch_size(graph.example)
        self.fit: Dataset[object]
        self.fit, self._held_out = split(data, min(MOST_HELD_OUT, images / count(data)), seed)

    def __call__(self, model: nn.Module, plan: KeepPlan) -> Accuracy:
        """Return accuracy and loss of the compacted model."""
        small = compact(model, self._graph, plan, check=False)
        if self._norm_images:
            small = recalibrate(small, self.fit, self._norm_images, self._seed, batch_size=min(BATCH, self._batch))
        return evaluate(small, self._held_out, batch_size=self._batch)
