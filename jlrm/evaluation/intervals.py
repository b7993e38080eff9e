"""Bootstrap intervals, and paired differences of two judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jlrm.evaluation.games import ItemVerdicts

PERCENTILES = (2.5, 97.5)
NUM_RESAMPLES = 1000
TAIL = 0.025  # on either side of a 95 % interval
BLOCK = 1 << 22  # numbers drawn at a time: 32 MiB


class Paired(NamedTuple):
    """Judge a against judge b on the same items; `difference` and `interval` in points."""

    difference: float  # a - b
    interval: tuple[float, float]
    p_value: float  # two-sided, of the bootstrap
    mcnemar_p: float | None  # exact and two-sided; None where a credit is neither 0 nor 1


def bootstrap(
    judged: Sequence[ItemVerdicts],
    score: Callable[[Sequence[ItemVerdicts]], dict[str, float]],
    *,
    num: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return a 95 % percentile interval of each metric of `score`, resampling items.

    Items are drawn from the whole, not within subsets. A resample in which a metric is NaN or
    absent (it drew no item of a class or subset) says nothing of it, so that metric's interval is
    of the other resamples: given that it is defined. It is (nan, nan) where none defines it.
    Without items there are no intervals.
    """
    if not judged:
        return {}
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in score(judged)}
    for _ in range(num):
        chosen = rng.integers(len(judged), size=len(judged)).tolist()
        resampled = score([judged[i] for i in chosen])
        for name, values in draws.items():
            values.append(resampled.get(name, math.nan))
    return {name: percentiles(np.array(values, dtype=float)) for name, values in draws.items()}


def paired(
    credits_a: Sequence[float], credits_b: Sequence[float], *, num: int = 10_000, seed: int = 0
) -> Paired:
    """Compare the credits (0 to 1) that two judges earn on the same items, in the same order.

    The p-value is twice the smaller share of resamples on either side of no difference, those
    without one on both sides, each share (count + 1) / (num + 1), so never 0. McNemar's test is the
    exact binomial one on the items that one judge alone has right. All is NaN without items.
    """
    if len(credits_a) != len(credits_b):
        raise ValueError(f"{len(credits_a)} credits against {len(credits_b)}: give the same items")
    if not len(credits_a):
        return Paired(math.nan, (math.nan, math.nan), math.nan, None)
    a, b = np.asarray(credits_a, dtype=float), np.asarray(credits_b, dtype=float)
    means = np.round(_resampled_means(a - b, num, seed), 12)  # 1/3 - 1/3 leaves no side
    sides = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (int(sides) + 1) / (num + 1))
    is_binary = np.isin(np.concatenate([a, b]), (0, 1)).all()
    exact = _mcnemar(int((a > b).sum()), int((a < b).sum())) if is_binary else None
    return Paired(100 * float((a - b).mean()), percentiles(100 * means), p_value, exact)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.percentile(defined, PERCENTILES)
    return float(low), float(high)


def with_width(interval: tuple[float, float], n: int) -> tuple[float, float]:
    """Return the interval of a percentage over `n` items; at 0 and 100 % the exact binomial one.

    Resamples of items that are all wrong are all wrong: a bootstrap would be certain of it after
    three items. Clopper and Pearson's interval (1934) of 0 of 12 is 0 to 26.5 %.
    """
    share = 100 * TAIL ** (1 / n) if n else 0.0
    if interval == (0.0, 0.0):
        return 0.0, 100.0 - share
    return (share, 100.0) if interval == (100.0, 100.0) else interval


def _resampled_means(values: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return the mean of each of `num` resamples.

    How often each distinct value is drawn is multinomial, which costs nothing per item.
    """
    rng, size = np.random.default_rng(seed), values.size
    distinct, counts = np.unique(values, return_counts=True)
    rows = max(1, BLOCK // distinct.size)
    sizes = [min(rows, num - start) for start in range(0, num, rows)]
    blocks = [rng.multinomial(size, counts / size, block) @ distinct for block in sizes]
    return np.concatenate(blocks) / size


def _mcnemar(num_a: int, num_b: int) -> float:
    """Return the chance of a split as uneven as this one, were either side as likely."""
    total, fewer = num_a + num_b, min(num_a, num_b)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
