"""Which criteria rank channels alike, and which can tell channels apart at all.

Huang et al., Rethinking the Pruning Criteria for Convolutional Neural Network, NeurIPS 2021, arXiv:2004.11627: similarity is
the rank correlation of two criteria, applicability the spread of a criterion's scores.

Deviation: channels of coupled layers are one group and count once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, kstest, spearmanr

Scores = NDArray[np.float64]
SAME = 0.9  # criteria whose mean Spearman correlation is above this rank alike
FLAT = 0.05  # a group whose scores have a smaller coefficient of variation cannot be told apart
MOST_WEIGHTS = 2000  # of a filter, whose covariances are looked at: their number is the square
RATES = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclass(frozen=True)
class Pair:
    """How alike two criteria rank; figures are None if there is no group that both can judge.

    Attributes:
        spearman: Mean over groups of the rank correlation inside a group.
        spearman_min: The smallest of them; groups are small, so a mean hides much.
        kendall: Mean over groups of Kendall's tau.
        over_all: Spearman correlation over the channels of all groups together, as one threshold would rank them.
        overlap: Share of the channels dropped by the one that the other drops too, at 10 % ... 90 % dropped.
        n_groups: Groups that both can judge.
    """

    first: str
    second: str
    spearman: float | None
    spearman_min: float | None
    kendall: float | None
    over_all: float | None
    overlap: tuple[float, ...] | None
    n_groups: int


@dataclass(frozen=True)
class Spread:
    """How far a criterion tells the channels of groups apart.

    Attributes:
        criterion: Its name.
        variation: Mean over groups of the coefficient of variation, standard deviation / mean.
        variation_min: The smallest of them.
        gap: Mean over groups of the step between the channels on both sides of half, as a share of the mean score.
        flat: Groups that it cannot tell apart.
        n_groups: Groups that it can judge.
    """

    criterion: str
    variation: float
    variation_min: float
    gap: float
    flat: tuple[str, ...]
    n_groups: int

    @property
    def telling(self) -> bool:
        """It tells the channels of at least half of the groups apart."""
        return 2 * len(self.flat) <= self.n_groups > 0


@dataclass(frozen=True)
class Normality:
    """How close the filters of a layer come to independent samples of one normal distribution.

    Attributes:
        weight: Name of the layer's weight.
        n: Filters.
        d: Weights of each.
        mean: Mean weight, as a share of their standard deviation.
        distance: Kolmogorov-Smirnov distance of the standardised weights to the normal distribution, 0 = equal.
        off_diagonal: Mean absolute covariance of two weights, as a share of the mean variance; of 2000 evenly spaced weights
            where a filter has more.
    """

    weight: str
    n: int
    d: int
    mean: float
    distance: float
    off_diagonal: float


@dataclass(frozen=True)
class Analysis:
    """What was found, and what follows: one criterion of each cluster is enough, if it tells channels apart."""

    pairs: tuple[Pair, ...]
    spreads: tuple[Spread, ...]
    layers: tuple[Normality, ...]
    clusters: tuple[tuple[str, ...], ...]
    recommended: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def analyse(scores: Mapping[str, Mapping[str, Scores]], filters: Mapping[str, Scores]) -> Analysis:
    """Compare criteria.

    Args:
        scores: Criterion -> group -> (C,) scores, higher = keep; groups that it cannot judge are missing.
        filters: Weight -> (n, d) filters of a layer.
    """
    pairs = tuple(similarity(a, b, scores[a], scores[b]) for a, b in combinations(scores, 2))
    spreads = tuple(spread(name, found) for name, found in scores.items())
    clusters = clustered(list(scores), pairs)
    order = {s.criterion: (len(s.flat) / max(1, s.n_groups), -s.n_groups) for s in spreads}
    best = tuple(min(cluster, key=lambda name: order[name]) for cluster in clusters)
    telling = tuple(s.criterion for s in spreads if s.criterion in best and s.telling) or best
    return Analysis(pairs, spreads, tuple(normality(name, f) for name, f in filters.items()), clusters, telling)


def similarity(first: str, second: str, a: Mapping[str, Scores], b: Mapping[str, Scores]) -> Pair:
    """Return how alike two criteria rank the channels of the groups that both can judge."""
    names = [name for name in a if name in b]
    if not names:
        return Pair(first, second, None, None, None, None, None, 0)
    ranks = [_correlation(spearmanr, a[name], b[name]) for name in names]
    taus = [_correlation(kendalltau, a[name], b[name]) for name in names]
    whole = [np.concatenate([scores[name] for name in names]) for scores in (a, b)]
    overlaps = [np.mean([overlap(a[name], b[name], rate) for name in names]) for rate in RATES]
    over_all = _correlation(spearmanr, *whole)
    overlap_at = tuple(map(float, overlaps))
    return Pair(first, second, float(np.mean(ranks)), min(ranks), float(np.mean(taus)), over_all, overlap_at, len(names))


def overlap(a: Scores, b: Scores, rate: float) -> float:
    """Return the share of the channels that `a` drops at this rate which `b` drops too."""
    n = max(1, round(rate * len(a)))
    lost = [set(np.argsort(scores, kind="stable")[:n].tolist()) for scores in (a, b)]
    return len(lost[0] & lost[1]) / n


def spread(criterion: str, scores: Mapping[str, Scores]) -> Spread:
    """Return how far a criterion tells channels apart."""
    cvs = {name: variation(found) for name, found in scores.items()}
    gaps = [_gap(found) for found in scores.values() if len(found) > 1]
    flat = tuple(name for name, cv in cvs.items() if cv < FLAT)
    values = list(cvs.values()) or [0.0]
    return Spread(criterion, float(np.mean(values)), min(values), float(np.mean(gaps or [0.0])), flat, len(scores))


def variation(scores: Scores) -> float:
    """Return the coefficient of variation; 0 for scores that are all equal."""
    deviation, mean = float(scores.std()), abs(float(scores.mean()))
    return deviation / mean if mean else 0.0


def clustered(names: Sequence[str], pairs: Sequence[Pair]) -> tuple[tuple[str, ...], ...]:
    """Return groups of criteria that rank alike: chains of pairs with a correlation above 0.9."""
    cluster = {name: {name} for name in names}
    for pair in pairs:
        if pair.spearman is not None and pair.spearman > SAME and cluster[pair.first] is not cluster[pair.second]:
            joined = cluster[pair.first] | cluster[pair.second]
            for name in joined:
                cluster[name] = joined
    unique = {id(members): members for members in cluster.values()}.values()
    return tuple(tuple(name for name in names if name in members) for members in unique)


def normality(weight: str, filters: Scores) -> Normality:
    """Compare the filters (n, d) of a layer with independent normal samples."""
    deviation = float(filters.std()) or 1.0
    standard = (filters - filters.mean()) / deviation
    n, d = filters.shape
    part = filters[:, np.linspace(0, d - 1, min(d, MOST_WEIGHTS)).astype(int)]
    m = part.shape[1]
    covariance = np.cov(part, rowvar=False).reshape(m, m) if n > 1 else np.zeros((m, m))
    variance = float(np.trace(covariance)) / m
    off = (np.abs(covariance).sum() - np.trace(covariance)) / max(1, m * (m - 1))
    distance = float(kstest(standard.ravel(), "norm").statistic)
    return Normality(weight, n, d, float(filters.mean()) / deviation, distance, float(off) / variance if variance else 0.0)


def _correlation(measure: Any, a: Scores, b: Scores) -> float:
    """Return a rank correlation; 0 where one of them is constant, and so has no ranks."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(measure(a, b).statistic)


def _gap(scores: Scores) -> float:
    ordered, mean, half = np.sort(scores), abs(float(scores.mean())), len(scores) // 2
    return float(ordered[half] - ordered[half - 1]) / mean if mean else 0.0


NOTHING = "-"  # where two criteria have no group in common
SIMILARITY = ("criteria", "Spearman", "smallest", "Kendall", "all groups", "overlap at 50 %", "groups")
SPREADS = ("criterion", "variation", "smallest", "gap at 50 %", "cannot tell apart", "groups")


def similarity_rows(found: Analysis) -> list[tuple[str, ...]]:
    """Return one row for each pair, the most alike first: the columns are SIMILARITY."""
    return [
        (f"{p.first}, {p.second}", *map(_signed, (p.spearman, p.spearman_min, p.kendall, p.over_all)),
         f"{100 * p.overlap[4]:.0f} %" if p.overlap else NOTHING, str(p.n_groups))
        for p in sorted(found.pairs, key=lambda p: -inf if p.spearman is None else p.spearman, reverse=True)
    ]  # fmt: skip


def _signed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.2f}"


def spread_rows(found: Analysis) -> list[tuple[str, ...]]:
    """Return one row for each criterion: the columns are SPREADS."""
    return [
        (s.criterion, f"{s.variation:.3f}", f"{s.variation_min:.3f}", f"{s.gap:.4f}", str(len(s.flat)), str(s.n_groups))
        for s in found.spreads
    ]


def remarks(found: Analysis) -> list[tuple[str, str]]:
    """Return (word, sentence) pairs: what ranks alike, what to take."""
    alike = "; ".join(", ".join(cluster) for cluster in found.clusters if len(cluster) > 1) or "none"
    flat = ", ".join(s.criterion for s in found.spreads if not s.telling) or "none"
    return [
        ("rank alike", f"{alike} (mean Spearman above {SAME})"),
        ("not applicable", f"{flat} (variation below {FLAT} in more than half of the groups)"),
        (
            "try",
            f"{', '.join(found.recommended)}: one of each cluster, if applicable; others would choose the same channels",
        ),
    ]
