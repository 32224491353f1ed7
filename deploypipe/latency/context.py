"""How the kernels of one model add up: what the latency table learned from forms of the model as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ADDITIVE = (0.95, 1.05)  # where the sum of the dense model's kernels over the whole is to lie
WANTED_ERROR, MOST_ERROR = 0.03, 0.10  # mean relative error on whole models: beyond the first a doubt, beyond the other refused


@dataclass(frozen=True)
class Price:
    """What a layer takes inside the model, from what it takes alone: there, nothing that it touches is in the cache.

    Alone, a kernel finds inputs, weights and place for its output where it left them. Inside the model it fetches them from
    further away, which takes time in proportion to how much they are, not to how long the kernel computes. All parts are sums
    over pairs of widths, so that an allocator may price each pair exactly.

    Attributes:
        alone: Multiple of the time alone.
        fixed_us: Constant.
        input_us: For each input channel.
        output_us: For each output channel.
        weight_us: For each pair of an input and an output channel.
        crowded_us: At full widths, among layers that are full as well: the whole model then leaves the cache.
        crowd_power: With this power of the share of work `crowded_us` falls.
        full: Work at full widths: their product; 1 if unknown.
    """

    alone: float = 1.0
    fixed_us: float = 0.0
    input_us: float = 0.0
    output_us: float = 0.0
    weight_us: float = 0.0
    crowded_us: float = 0.0
    full: int = 1
    crowd_power: int = 8

    def us(self, alone_us: float, n_in: int, n_out: int) -> float:
        """Return the time inside the model at two widths at which the kernel takes `alone_us` alone."""
        cold = self.fixed_us + self.input_us * n_in + self.output_us * n_out + self.weight_us * n_in * n_out
        return self.alone * alone_us + cold + self.crowded_us * self.crowding(n_in, n_out)

    def crowding(self, n_in: int, n_out: int) -> float:
        """Return the part of `crowded_us` that counts at two widths: one at full widths."""
        return float((n_in * n_out / self.full) ** self.crowd_power)


@dataclass(frozen=True)
class Overhead:
    """Kernels of one operation that are no layers, as they ran inside the model: a constant and a part in proportion.

    `layers` feed them; they take `fixed_us`, and `per_channel_us` for each of the output channels of those layers. A runtime
    that keeps channels in blocks handles tensors that fill their blocks in another way than those that do not: the latter take
    `ragged_us` and `ragged_per_channel_us` more. Tensors too large for a near cache take longer for what is beyond: channels
    above `knee` take `beyond_us` more each.

    Attributes:
        block: Channels of a block, as the steps of the feeding layers show it.
    """

    op: str
    layers: tuple[str, ...]
    fixed_us: float
    per_channel_us: float = 0.0
    ragged_us: float = 0.0
    ragged_per_channel_us: float = 0.0
    block: int = 1
    beyond_us: float = 0.0
    knee: float = 0.0

    def us(self, widths: Sequence[int]) -> float:
        """Return the time when the feeding layers have these output widths."""
        fixed, slope, total = self.fixed_us, self.per_channel_us, sum(widths)
        if any(width % self.block for width in widths):
            fixed, slope = fixed + self.ragged_us, slope + self.ragged_per_channel_us
        return fixed + slope * total + self.beyond_us * max(0.0, total - self.knee)


@dataclass(frozen=True)
class Context:
    """How kernels add up in one model.

    Attributes:
        structure: Which model, by `structure_of`.
        prices: Layer -> what it takes inside the model; a layer that is not named takes what it takes alone.
        overhead: All other kernels.
        whole_us: The dense model, measured as a whole without profiling.
        factor: By what the sum of layers and overhead is multiplied, so that measured forms come out right on average.
        additivity: Sum of the dense model's profiled kernels, less what profiling adds to each, over the model as a whole in
            the same short turn of measurement; the median of several turns.
        foreign_load: Of the measurement of the whole; None if unknown.
        runs: Of the measurement of the whole.
        errors: Relative errors on whole models, each of a form that nothing was learned from when it was predicted; none if
            the model cannot be narrowed.
        held: Groups that stood still while this was learned: nothing is known of their widths.
    """

    structure: str
    prices: Mapping[str, Price]
    overhead: tuple[Overhead, ...]
    whole_us: float
    factor: float
    additivity: float
    foreign_load: float | None
    runs: int
    errors: tuple[float, ...] = ()
    held: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """Mean absolute relative error on whole models that the table never saw; None if unchecked."""
        return sum(map(abs, self.errors)) / len(self.errors) if self.errors else None

    @property
    def adds_up(self) -> bool:
        """Whether the dense model's parts come to about the whole."""
        return ADDITIVE[0] <= self.additivity <= ADDITIVE[1]

    @property
    def far_off(self) -> bool:
        """Whether the table is too wrong about whole models to choose widths by."""
        return self.error is not None and self.error > MOST_ERROR

    @property
    def doubts(self) -> tuple[str, ...]:
        """What makes predictions less trustworthy than usual, in sentences; empty if all is within the bounds."""
        found = []
        if self.error is not None and self.error > WANTED_ERROR:
            found.append(
                f"forms of the model that the table did not see are off by {self.error:.1%} on average (wanted: "
                f"{WANTED_ERROR:.0%}): predictions are less certain than usual"
            )
        if not self.adds_up:
            found.append(
                f"the parts of the dense model add up to {self.additivity:.3f} of what it takes as a whole (wanted: "
                f"{ADDITIVE[0]} to {ADDITIVE[1]}): measure again on a quiet machine, deploypipe profile --fresh"
            )
        return tuple(found)

    def covers(self, work: Mapping[str, int]) -> bool:
        """Say whether no layer is wider than in the form that this was learned from: prices end there.

        Args:
            work: By layer, the product of its widths.
        """
        full = {name: price.full for name, price in self.prices.items() if price.full > 1}
        return all(work.get(name, 0) <= most for name, most in full.items())

    def us(self, layer: str, alone_us: float, n_in: int, n_out: int) -> float:
        """Return what a layer adds to the model at two widths at which its kernel takes `alone_us` alone."""
        price = self.prices.get(layer)
        return self.factor * (price.us(alone_us, n_in, n_out) if price else alone_us)
