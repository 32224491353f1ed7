"""Random plans: the forms of a model that a latency table is learned from and checked on."""

from collections.abc import Mapping

import numpy as np

from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

N_PLANS = 8
_NARROWEST, _WIDEST = 0.05, 0.75  # share of all work that the first and the last of several plans keep, roughly
_TAIL = 1.5  # second parameter of the beta distribution: the smaller, the more groups of a plan stay nearly full


def random_plans(graph: Graph, candidates: Mapping[str, tuple[int, ...]], count: int, seed: int) -> list[KeepPlan]:
    """Draw plans; each has its own leaning between narrow and wide, so that latencies spread over the whole range.

    Work goes with the square of the mean share of channels, so the squares are evenly spaced. Budgets of 60 to 90 % are asked
    for as often as smaller ones: a table that is checked on narrow plans alone says nothing about them.
    """
    random = np.random.default_rng(seed)
    plans = []
    for mean in np.sqrt(np.linspace(_NARROWEST, _WIDEST, count)):
        shares = random.beta(_TAIL * mean / (1 - mean), _TAIL, len(candidates))
        kept = {
            name: widths[int(share * len(widths))] for (name, widths), share in zip(candidates.items(), shares, strict=True)
        }
        plans.append(KeepPlan.of_widths(kept))
    return plans
