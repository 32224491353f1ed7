"""When other programs disturb a measurement: it is repeated, and then refused, unless the user accepts the noise."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from deploypipe.errors import TargetError
from deploypipe.targets import ALLOW_NOISE, noise_accepted

T = TypeVar("T")
ACCEPTED = "accepted_foreign_load"  # fact: the most that others took in a measurement that stands all the same
# Share of our cores' time that may go to others. With one thread, processor time still tells the latency within a tenth when
# half of the core is taken; with several threads each waits for the slowest.
_MOST_ONE, _MOST_MANY = 0.5, 0.15
_PAUSES_S = (2.0, 8.0)  # before a measurement is repeated


@dataclass
class Noise:
    """Decides whether a measurement may stand.

    Attributes:
        accepted: The user wants a measurement even if others disturb it.
        worst: The largest share of our cores that others took in a measurement that stands beyond the limit; 0 if none does.
    """

    accepted: bool = field(default_factory=noise_accepted)
    worst: float = 0.0

    def bounded(self, take: Callable[[], T], load: Callable[[T], float | None], threads: int) -> T:
        """Return what `take` measures, taken again after a pause while others took too much.

        Args:
            take: Measures.
            load: Share of our cores that went to others in a measurement; None where the system does not tell.
            threads: Of the measurement.

        Raises:
            TargetError: Others took too much each time.
        """
        taken = 0.0
        limit = _MOST_ONE if threads == 1 else _MOST_MANY
        for pause in (0.0, *_PAUSES_S):
            time.sleep(pause)
            found = take()
            taken = load(found) or 0.0
            if taken <= limit:
                return found
            if self.accepted:
                self.worst = max(self.worst, taken)
                return found
        raise TargetError(
            f"other programs took {taken:.0%} of our processor cores while latency was measured, and too much in "
            f"{len(_PAUSES_S)} attempts before; more than {limit:.0%} makes the times meaningless",
            at=f"measurement with {threads} thread{'s' if threads > 1 else ''}",
            fix=f"stop other programs and run it again (it goes on where it was), or accept the noise: deploypipe profile "
            f"--allow-noise, or {ALLOW_NOISE}=1; the table then says so",
        )
