"""What benchmarks of pairs share: orders, verdicts under a policy, credit and means."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jlrm.evaluation.benchmark import Credit
from jlrm.evaluation.games import Game, GameVerdict, Item, ItemVerdicts, Response
from jlrm.evaluation.policies import Policy
from jlrm.judgement.verdict import is_consistent, swap_preference


def ordered(as_given: Game, order: str, seed: int, address: str = "") -> list[Game]:
    """Return the games of two answers of an item, or of a list, in a policy's order.

    A random order depends on the seed and the pair alone: neither on other rows nor on their order.
    `address` stands for the pair where the id of its item does not.
    """
    swapped = as_given.swapped()
    if order == "both":
        return [as_given, swapped]
    is_swapped = order == "random" and _coin(f"{seed}:{address or as_given.id}")
    return [swapped if is_swapped else as_given]


def pair_games(items: Sequence[Item], policy: Policy, seed: int) -> list[Game]:
    """Return the games of items of two answers."""
    return [game for item in items for game in ordered(Game(item, 0, 1), policy.order, seed)]


def _coin(text: str) -> bool:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[0] % 2 == 1


def counted(responses: Mapping[str, Response], policy: Policy) -> Mapping[str, Response]:
    """Return the responses that a policy counts: those refused only where it says so."""
    if policy.counts_refused:
        return responses
    return {name: each for name, each in responses.items() if each.refused is None}


def label_of(verdict: GameVerdict, policy: Policy) -> int | None:
    """Return a game's verdict under a policy, as a label of the item.

    1: the answer that stands earlier in the item, 2: the other, 0: a tie, None: no verdict.
    """
    shown = verdict.preference
    if shown is None and policy.error_credit == "tie":
        shown = 0
    if shown == 0 and policy.tie_credit == "second":
        shown = 2
    return swap_preference(shown) if verdict.first > verdict.second else shown


def game_credit(said: int | None, label: int, policy: Policy) -> float:
    """Return the credit of one verdict, 0 to 1."""
    if said is None:
        return float(policy.error_credit)
    if said == label:
        return 1.0
    return float(policy.tie_credit) if said == 0 else 0.0


def combined(credits: Sequence[float], aggregation: str) -> float:
    """Return an item's credit from its games'."""
    if aggregation == "all":
        return min(credits)
    mean = sum(credits) / len(credits)
    return float(mean > 0.5) if aggregation == "majority" else mean


def pair_credit(judged: ItemVerdicts, policy: Policy) -> Credit:
    """Return the credit of an item of two answers."""
    said = tuple(label_of(verdict, policy) for verdict in judged.verdicts)
    label = judged.item.label
    assert label is not None, f"{judged.item.id} has no label"
    credits = [game_credit(each, label, policy) for each in said]
    return Credit(judged.item, combined(credits, policy.aggregation), said)


def percent(values: Iterable[float]) -> float:
    """Return the mean of values from 0 to 1 in percent."""
    listed = list(values)
    return 100 * math.fsum(listed) / len(listed)  # in this order 203 of 350 are 58, not 57.99999


def grouped(credits: Iterable[Credit]) -> dict[str, list[float]]:
    """Return the credits of each subset, subsets in the order of their names."""
    groups: dict[str, list[float]] = {}
    for credit in credits:
        groups.setdefault(credit.item.subset, []).append(credit.value)
    return {name: groups[name] for name in sorted(groups)}


def subset_percents(credits: Iterable[Credit]) -> dict[str, float]:
    """Return the mean credit of each named subset."""
    return {name: percent(values) for name, values in grouped(credits).items() if name}


def micro_total(credits: Sequence[Credit], policy: Policy) -> dict[str, float]:
    """Return the mean credit over all items and of each subset; in both orders, their agreement."""
    overall = {"overall": percent(credit.value for credit in credits)}
    return overall | swap_metrics(credits) | subset_percents(credits)


def swap_metrics(credits: Sequence[Credit]) -> dict[str, float]:
    """Return how often both orders of a pair agree; nothing where no pair was judged in both."""
    twice = [credit.verdicts for credit in credits if len(credit.verdicts) == 2]
    if not twice:
        return {}
    return {"consistency": percent(is_consistent(*said) for said in twice)}


def kappa(one: Sequence[int | None], two: Sequence[int | None]) -> float:
    """Return Cohen's kappa of two raters, -1 to 1; 1 where both always say the same one thing."""
    n = len(one)
    observed = sum(a == b for a, b in zip(one, two, strict=True)) / n
    first, second = Counter(one), Counter(two)
    expected = sum(first[c] * second[c] for c in first) / n**2
    return 1.0 if expected == 1.0 else (observed - expected) / (1 - expected)


def round_robin(num_answers: int) -> list[tuple[int, int]]:
    """Return every pair of answers once."""
    return list(itertools.combinations(range(num_answers), 2))
