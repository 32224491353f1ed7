"""Measured latencies as values: of one model, and of the plans that were tried before training."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any


@dataclass(frozen=True)
class Latency:
    """Measured time of one forward pass, in microseconds: median, spread and number of runs.

    Attributes:
        foreign_load: Share of our cores' time that other programs took meanwhile; None if unknown.
        scatter: Of the medians of several sittings, each a process of its own: their standard deviation as a share of the mean,
            for a model that was measured in turns with another, of its share of that one's time. 0 if there was one sitting.
    """

    median_us: float
    p10_us: float
    p90_us: float
    n_runs: int
    foreign_load: float | None = None
    scatter: float = 0.0

    @property
    def relative_error(self) -> float:
        """Standard error of the median as a share of it, taking the runs as normal and independent."""
        return 1.2533 * (self.p90_us - self.p10_us) / 2.5631 / sqrt(self.n_runs) / self.median_us


# Student's t for 95 % on one side with two degrees of freedom, since three sittings tell their own scatter poorly. A plan is
# measured in three, and once it is trained in three others: the two means differ by sqrt(2/3) of it.
SURE = 2.92 * sqrt(2 / 3)


@dataclass(frozen=True)
class Round:
    """A plan that was built and measured before training, to see whether the latency table holds for it.

    Attributes:
        factor: What the table's prices were multiplied by when the plan was made; 1 in the first round.
        budget_us: The budget in the table's microseconds.
        predicted_us: Of the plan, by the table so corrected, before it was measured.
        limit_us: The most that is allowed, by the dense model as measured now.
        pruned: Measured in turns with ...
        dense: ... the dense model.
        absolute: Whether the limit is a time, not a share of the dense model's.
    """

    factor: float
    budget_us: float
    predicted_us: float
    limit_us: float
    pruned: Latency
    dense: Latency
    absolute: bool = False

    @property
    def upper_us(self) -> float:
        """What the pruned model will hardly exceed when it is measured again: with 95 % of certainty."""
        within = hypot(self.pruned.relative_error, self.dense.relative_error)
        scatter = hypot(self.pruned.scatter, self.dense.scatter) if self.absolute else self.pruned.scatter
        return self.pruned.median_us * (1 + hypot(2 * within, SURE * scatter))

    @property
    def fits(self) -> bool:
        """Whether the plan surely keeps the budget."""
        return self.upper_us <= self.limit_us

    @property
    def next_factor(self) -> float:
        """The factor with which the table would have been right about this plan."""
        return self.factor * (self.upper_us / self.limit_us) * (self.budget_us / self.predicted_us)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Round":
        """Read what `dataclasses.asdict` gave."""
        return cls(**{**state, "pruned": Latency(**state["pruned"]), "dense": Latency(**state["dense"])})
