"""What a benchmark is: where its items are, which games it asks for, and how it counts verdicts.

Counting has two steps, so that a bootstrap repeats only the cheap one: `credit` looks at one item's
games, `total` makes metrics of many credits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from jlrm.evaluation.games import Game, Item, ItemVerdicts
from jlrm.evaluation.policies import Policy
from jlrm.reports.results_file import Published


class Credit(NamedTuple):
    """What an item's games are worth under a policy."""

    item: Item
    value: float  # 0 to 1
    verdicts: tuple[int | None, ...] = ()  # of the games, as labels of the item
    detail: Any = None  # the benchmark's own


class Benchmark(NamedTuple):
    name: str
    policies: tuple[Policy, ...]  # the official one first
    # From a file, a directory or hf:ORG/NAME#SPLIT; with `columns`, `values` and `scores` as
    # data/readers.py takes them, if the rows are the user's own.
    read: Callable[..., list[Item]]
    games: Callable[[Sequence[Item], Policy, int], list[Game]]  # the int is a seed
    credit: Callable[[ItemVerdicts, Policy], Credit]
    total: Callable[[Sequence[Credit], Policy], dict[str, float]]  # percent
    source: str = ""  # where `read` finds it if nothing else is said; "": nowhere
    size: int = 0  # items of the official set; 0: it varies
    published: tuple[Published, ...] = ()
    # Joins items to clusters beside those that share a question; None: the item joins none.
    group: Callable[[Item], Hashable] | None = None
    not_percent: tuple[str, ...] = ()  # metrics that are no percentages
    is_own: bool = False  # the rows are the user's own
    is_listed: bool = False  # all answers of an item may be judged at once

    @property
    def policy(self) -> Policy:
        """The official policy."""
        return self.policies[0]

    def metrics(self, judged: Sequence[ItemVerdicts], policy: Policy) -> dict[str, float]:
        """Return the benchmark's metrics, in percent."""
        return self.total([self.credit(each, policy) for each in judged], policy)
