"""Intervals of an evaluation's figures, and paired differences of two judges, by cluster.

A resample draws as many clusters as there are, with all their items. So a mean is a ratio of two
sums, and its resamples cost nothing per item. Resampling fails where nearly everything or nearly
nothing is right (resamples of items that are all wrong are all wrong), and where there are few
clusters. There a share gets Clopper and Pearson's exact binomial interval (1934).
Its number of trials is the effective one of Korn and Graubard (1998): as many independent items as
would have the variance that the clusters have, less the price of few degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from jlrm.evaluation.games import ItemVerdicts

PERCENTILES = (2.5, 97.5)
NUM_RESAMPLES = 1000
TAIL = 0.025  # on either side of a 95 % interval
BLOCK = 1 << 22  # numbers drawn at a time: 32 MiB
# Below these an interval is the exact one. A percentile interval of 30 values is too narrow by the
# factor that Student's t exceeds the normal quantile by, 1.04 there and 1.12 for 12; and the normal
# approximation of a share asks for five cases on either side.
FEW_CLUSTERS = 30
FEW_CASES = 5
NO_VARIANCE = 1e-15
Clusters = Int[np.ndarray, " N"]  # the number of each item's cluster


class Paired(NamedTuple):
    """Judge a against judge b on the same items; `difference` and `interval` in points."""

    difference: float  # a - b
    interval: tuple[float, float]
    p_value: float  # two-sided, of the bootstrap
    mcnemar_p: float | None  # exact and two-sided; None where its items would not be independent


def bootstrap(
    judged: Sequence[ItemVerdicts],
    score: Callable[[Sequence[ItemVerdicts]], dict[str, float]],
    *,
    clusters: Clusters | None = None,
    num: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return a 95 % percentile interval of each metric of `score`, as `resampled` draws it.

    It is (nan, nan) where no resample defines the metric. Without items there are no intervals.
    """
    draws = resampled(judged, score, clusters=clusters, num=num, seed=seed)
    return {name: percentiles(values) for name, values in draws.items()}


def resampled(
    judged: Sequence[ItemVerdicts],
    score: Callable[[Sequence[ItemVerdicts]], dict[str, float]],
    *,
    clusters: Clusters | None = None,
    num: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Float[np.ndarray, " num"]]:
    """Return each metric of `score` in resamples of whole clusters; by default each item is one.

    Clusters are drawn from the whole, not within subsets. A resample in which a metric is absent
    (it drew no item of a class or subset) has NaN: it says nothing of it.
    """
    if not judged:
        return {}
    rng = np.random.default_rng(seed)
    names = list(score(judged))
    members = _members(np.arange(len(judged)) if clusters is None else clusters)
    draws = np.full((num, len(names)), math.nan)
    for draw in draws:
        chosen = rng.integers(len(members), size=len(members)).tolist()
        resampled = score([judged[i] for cluster in chosen for i in members[cluster]])
        draw[:] = [resampled.get(name, math.nan) for name in names]
    return dict(zip(names, draws.T, strict=True))


def _members(clusters: Clusters) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(int(clusters.max()) + 1)]
    for item, cluster in enumerate(clusters.tolist()):
        members[cluster].append(item)
    return members


def of_share(
    sums: Float[np.ndarray, " K"], sizes: Float[np.ndarray, " K"], most: float = math.inf
) -> tuple[float, float]:
    """Return the interval of sum(sums) / sum(sizes), a share, in percent.

    Args:
      sums, sizes: what each cluster has of it, and of how many.
      most: independent items that the share can be worth at most. Each of two games of an item has
        its own place for the better answer, so that a share of games may be surer than as many
        independent ones; a share of items may not.
    """
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if not sizes.size:
        return math.nan, math.nan
    share = float(sums.sum() / sizes.sum())
    variance = float(((sums - share * sizes) ** 2).sum()) / float(sizes.sum()) ** 2
    num_cases = min(most, float(sizes.sum()))
    size = effective_size(share, variance, num_cases, sizes.size, most)
    is_flat = variance < NO_VARIANCE  # all clusters alike: so are all resamples
    if math.isfinite(size) and (is_flat or is_sparse(share, size, sizes.size)):
        return clopper_pearson(share, size)
    means = np.concatenate([part[:, 0] / part[:, 1] for part in _drawn(sums, sizes)])
    return percentiles(100 * means)


def of_metric(
    percent: float, draws: Float[np.ndarray, " num"], num_items: int, num_clusters: int
) -> tuple[float, float]:
    """Return the interval of a percentage that is no mean, such as F1, from its resamples."""
    low, high = percentiles(draws)
    is_at_edge = low == high == percent and percent in (0.0, 100.0)
    if not (is_at_edge or num_clusters < FEW_CLUSTERS) or not 0.0 <= percent <= 100.0:
        return low, high
    variance = float(np.nanvar(draws / 100))
    size = effective_size(percent / 100, variance, num_items, num_clusters, num_items)
    return clopper_pearson(percent / 100, size)


def effective_size(
    share: float, variance: float, num_items: float, num_clusters: int, most: float
) -> float:
    """Return how many independent items would say as much of a share as these clusters do.

    At 0 and 1 that is one item a cluster: nothing shows that a second one says anything new.
    """
    if share <= 0.0 or share >= 1.0 or num_clusters == 1:
        return num_clusters
    size = min(share * (1 - share) / variance if variance >= NO_VARIANCE else math.inf, most)
    quantiles = special.stdtrit([num_items - 1, num_clusters - 1], 1 - TAIL)
    return size * min(1.0, float(quantiles[0] / quantiles[1])) ** 2


def is_sparse(share: float, size: float, num_clusters: int) -> bool:
    """Return whether too little is known of a share to resample it."""
    return num_clusters < FEW_CLUSTERS or size * min(share, 1 - share) < FEW_CASES


def clopper_pearson(share: float, size: float) -> tuple[float, float]:
    """Return the exact binomial interval of a share of `size` trials, in percent.

    The number of trials need not be whole. 0 of 12 has 0 to 26.5 %.
    """
    right, wrong = share * size, (1 - share) * size
    low = float(special.betaincinv(right, wrong + 1, TAIL)) if share > 0.0 else 0.0
    high = float(special.betaincinv(right + 1, wrong, 1 - TAIL)) if share < 1.0 else 1.0
    return 100 * low, 100 * high


def paired(
    credits_a: Sequence[float] | Float[np.ndarray, " N"],
    credits_b: Sequence[float] | Float[np.ndarray, " N"],
    *,
    clusters: Clusters | None = None,
    num: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare the credits (0 to 1) that two judges earn on the same items, in the same order.

    The p-value is twice the smaller share of resamples on either side of no difference, those
    without one on both sides, each share (count + 1) / (num + 1), so never 0; and no less than that
    of a sign test in which all k clusters that differ do so to one side, 2 / 2^k. Clusters that all
    differ alike have no variance: their interval is the exact one. McNemar's test is the
    exact binomial one on the items that one judge alone has right; it takes items for independent,
    so there is none where a cluster has several. All is NaN without items.
    """
    if len(credits_a) != len(credits_b):
        raise ValueError(f"{len(credits_a)} credits against {len(credits_b)}: give the same items")
    if not len(credits_a):
        return Paired(math.nan, (math.nan, math.nan), math.nan, None)
    a, b = np.asarray(credits_a, dtype=float), np.asarray(credits_b, dtype=float)
    sizes = np.ones(a.size) if clusters is None else np.bincount(clusters).astype(float)
    sums = a - b if clusters is None else np.bincount(clusters, a - b)
    parts = _drawn(np.round(sums, 12), sizes, num, seed)
    means = np.round(np.concatenate([part[:, 0] / part[:, 1] for part in parts]), 12)
    sides = min((means <= 0).sum(), (means >= 0).sum())  # rounded: 1/3 - 1/3 leaves no side
    num_different = int(np.count_nonzero(np.round(sums, 12)))
    p_value = min(1.0, max(2 * (int(sides) + 1) / (num + 1), 2 * 0.5**num_different))
    difference = float((a - b).mean())
    interval = percentiles(100 * means)
    if difference and np.ptp(sums / sizes) < 1e-9:
        low, high = clopper_pearson((difference + 1) / 2, sums.size)
        interval = (2 * low - 100, 2 * high - 100)
    is_exact = np.isin(np.concatenate([a, b]), (0, 1)).all() and sizes.max() == 1
    exact = _mcnemar(int((a > b).sum()), int((a < b).sum())) if is_exact else None
    return Paired(100 * difference, interval, p_value, exact)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.percentile(defined, PERCENTILES)
    return float(low), float(high)


def _drawn(
    sums: Float[np.ndarray, " K"],
    sizes: Float[np.ndarray, " K"],
    num: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Iterator[Float[np.ndarray, "block 2"]]:
    """Yield the sums and sizes of `num` resamples of all clusters.

    How often each distinct cluster is drawn is multinomial, which costs nothing per cluster.
    """
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    rows = max(1, BLOCK // len(distinct))
    for start in range(0, num, rows):
        block = min(rows, num - start)
        yield rng.multinomial(sums.size, counts / sums.size, block) @ distinct


def _mcnemar(num_a: int, num_b: int) -> float:
    """Return the chance of a split as uneven as this one, were either side as likely."""
    total, fewer = num_a + num_b, min(num_a, num_b)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
