"""Which items belong together: those that share a question tell less than as many different ones.

A judge is right or wrong about several answers to one question more often than by chance. PandaLM's
999 items ask 170 questions. An interval that ignores this is too narrow by a third, and a test of
two equal judges rejects three times as often as it says. So whatever draws items by chance draws
whole clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from jlrm.data.comparisons import fold
from jlrm.evaluation.games import Item

Group = Callable[[Item], Hashable]


def cluster_items(items: Sequence[Item], group: Group | None = None) -> Int[np.ndarray, " N"]:
    """Return the number of each item's cluster, from 0 in the order of their first items.

    Items are of one cluster if they share a folded question or, by a benchmark's own grouping, a
    group, and so are items that are joined through others. An item without a question, or with the
    group None, shares none.
    """
    parents: dict[Hashable, Hashable] = {}
    for number, item in enumerate(items):
        for key in _keys(item, group):
            parents[_root(parents, key)] = _root(parents, number)
    roots = [_root(parents, number) for number in range(len(items))]
    numbers = {root: number for number, root in enumerate(dict.fromkeys(roots))}
    return np.array([numbers[root] for root in roots], int)


def _keys(item: Item, group: Group | None) -> Iterable[Hashable]:
    if question := fold(item.question):
        yield "question", question
    if group and (name := group(item)) is not None:
        yield "group", name


def _root(parents: dict[Hashable, Hashable], key: Hashable) -> Hashable:
    """Return what stands for everything joined with a key, and shorten the way to it."""
    root = key
    while (above := parents.setdefault(root, root)) != root:
        root = above
    while parents[key] != root:
        parents[key], key = root, parents[key]
    return root


def design_effect(values: Float[np.ndarray, " N"], clusters: Int[np.ndarray, " N"]) -> float | None:
    """Return how many times larger the variance of a mean is than that of independent items.

    The variance over clusters is the linearised one of a ratio of sums (Kish 1965). None for one
    cluster, and where all values are equal: nothing shows how far items of a cluster go together.
    """
    if not clusters.any():
        return None
    deviations = values - values.mean()
    alone = float((deviations**2).sum())
    together = float((np.bincount(clusters, deviations) ** 2).sum())
    return together / alone if alone > 1e-12 else None
