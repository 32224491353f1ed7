"""How the kernels of one model add up: what the latency table learned from forms of the model as a whole."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Overhead:
    """Kernels of one operation that are no layers, as they ran inside the model: a constant and a part in proportion.

    `layers` feed them; they take `fixed_us`, and `per_channel_us` for each of the output channels of those layers.
    """

    op: str
    layers: tuple[str, ...]
    fixed_us: float
    per_channel_us: float = 0.0


Anchors = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Context:
    """How kernels add up in one model.

    Attributes:
        structure: Which model, by `structure_of`.
        scale: Layer -> anchors (product of its two widths, time inside the model over time alone), ascending: learned from
            several forms of the model, the last one where the dense form is. In between, the ratio is interpolated.
        overhead: All other kernels.
        whole_us: The dense model, measured as a whole without profiling.
        factor: `whole_us` over the sum of layers and overhead.
        additivity: Sum of the dense model's profiled kernels, less what profiling adds to each, over `whole_us`.
        foreign_load: Of the measurement of the whole; None if unknown.
        runs: Of the measurement of the whole.
        errors: Relative errors on whole models, each of a form that nothing was learned from when it was predicted; none if
            the model cannot be narrowed.
    """

    structure: str
    scale: Mapping[str, Anchors]
    overhead: tuple[Overhead, ...]
    whole_us: float
    factor: float
    additivity: float
    foreign_load: float | None
    runs: int
    errors: tuple[float, ...] = ()

    @property
    def error(self) -> float | None:
        """Mean absolute relative error on whole models that the table never saw; None if unchecked."""
        return sum(map(abs, self.errors)) / len(self.errors) if self.errors else None

    def ratio(self, layer: str, work: int) -> float:
        """Return the time of a layer inside the model over its time alone, at a product of widths.

        Between anchors it follows the logarithm of the product: caches are passed in octaves.
        """
        anchors = self.scale.get(layer, ((work, 1.0),))
        index = min(max(bisect_left(anchors, work, key=lambda anchor: anchor[0]), 1), len(anchors) - 1)
        if index == 0:
            return anchors[0][1]
        (low, at_low), (high, at_high) = anchors[index - 1], anchors[index]
        share = min(1.0, max(0.0, log(work / low) / log(high / low)))
        return at_low + share * (at_high - at_low)
