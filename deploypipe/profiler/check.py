"""Random plans: the forms of a model that a latency table is learned from and checked on."""

from collections.abc import Mapping

import numpy as np

from deploypipe.plan import KeepPlan
from deploypipe.types import Graph

N_PLANS = 8


def random_plans(graph: Graph, candidates: Mapping[str, tuple[int, ...]], count: int, seed: int) -> list[KeepPlan]:
    """Draw plans; each has its own leaning between narrow and wide, so that latencies spread over the whole range."""
    random = np.random.default_rng(seed)
    plans = []
    for lean in np.linspace(0.4, 3.0, count):
        shares = random.beta(lean, 1.5, len(candidates))
        kept = {
            name: widths[int(share * len(widths))] for (name, widths), share in zip(candidates.items(), shares, strict=True)
        }
        plans.append(KeepPlan.of_widths(kept))
    return plans
