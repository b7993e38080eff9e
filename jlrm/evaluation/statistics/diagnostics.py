"""How far the numbers of an evaluation can be trusted, and what kind of judge they describe.

Intervals resample *clusters* of items: the games of one item are correlated, and so are items that
share a question, so they are drawn together. All are 95 % intervals as intervals.py makes them. The
bootstrap has a seed of its own, so they are the same in every run.

Left out: what a benchmark makes of verdicts (benchmarks/), and how it looks
(reports/scorecard_page.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jlrm.evaluation.games import Game, GameVerdict, Item, ItemVerdicts, Response
from jlrm.evaluation.statistics.intervals import Clusters, of_share
from jlrm.judgement.verdict import implied_probability, is_consistent, preferred, swap_preference
from jlrm.reports.results_file import (
    Amount,
    Calibration,
    CalibrationBin,
    Confusion,
    Diagnostics,
    ItemRate,
    JudgingCost,
    Lean,
    LengthBias,
    LengthCorrelation,
    Rate,
)

NUM_BINS = 10


class Play(NamedTuple):
    """One game with its item: what the diagnostics count."""

    item: Item
    verdict: GameVerdict

    @property
    def label(self) -> int | None:
        """The better answer as shown (1, 2, 0 for a tie); None where the item does not say."""
        item, first, second = self.item, self.verdict.first, self.verdict.second
        if item.golds:
            return item.gold_label(first, second)
        if item.label is not None:
            return swap_preference(item.label) if first > second else item.label
        if len(item.answers) == 2 or (first < item.num_correct) == (second < item.num_correct):
            return None
        return 1 if first < item.num_correct else 2

    @property
    def length_ratio(self) -> float:
        """The log of how many times longer the first shown is, in characters."""
        first, second = (len(self.item.answers[i]) for i in self.verdict[:2])
        return math.log((1 + first) / (1 + second))


def summary(
    judged: Sequence[ItemVerdicts],
    responses: Mapping[str, Response],
    *,
    clusters: Clusters | None = None,
    span: float | None = None,
) -> Diagnostics:
    """Return the diagnostics of a judge on one benchmark; `responses` by the id of their game.

    clusters: the number of each item's; by default each item is one of its own.
    span: the margin of two scores that states certainty; by default the distance between the
    lowest and the highest score seen. Raises ValueError for a span that is not positive.
    """
    clusters = np.arange(len(judged)) if clusters is None else clusters
    if span is not None and not span > 0:
        raise ValueError(f"span={span} must be positive: the distance of the scale's ends")
    plays = list(_plays(judged))
    verdicts = [play for play in plays if play.verdict.preference is not None]
    labels = [play.label for play in plays if play.label in (1, 2)]
    consistency, lean_to_first = _swaps(judged, clusters)
    return Diagnostics(
        items=len(judged),
        games=len(plays),
        statuses=dict(Counter(play.verdict.status for play in plays).most_common()),
        parse_failures=_rate(len(plays) - len(verdicts), len(plays)),
        ties=_rate(sum(p.verdict.preference == 0 for p in verdicts), len(verdicts)),
        first=_share_naming(judged, 1, clusters),
        second=_share_naming(judged, 2, clusters),
        labels_first=_rate(labels.count(1), len(labels)),
        consistency=consistency,
        lean_to_first=lean_to_first,
        length=_length(plays),
        calibration=_calibration(plays, span),
        confusion=_confusion(plays),
        cost=_cost(plays, responses),
    )


def _plays(judged: Sequence[ItemVerdicts]) -> Iterator[Play]:
    return (Play(each.item, verdict) for each in judged for verdict in each.verdicts)


def _rate(count: float, n: int) -> Rate:
    return Rate(100 * count / n if n else None, n)


def item_rate(
    counts: Sequence[float], sizes: Sequence[int], clusters: Clusters, most: float = math.inf
) -> ItemRate:
    """Return sum(counts) / sum(sizes) over items, with its interval; `most` as in `of_share`."""
    rate = _rate(sum(counts), sum(sizes))
    if not rate.n:
        return ItemRate(None, 0)
    interval = of_share(np.bincount(clusters, counts), np.bincount(clusters, sizes), most)
    return ItemRate(rate.percent, rate.n, interval)


def _share_naming(judged: Sequence[ItemVerdicts], place: int, clusters: Clusters) -> ItemRate:
    """Return how many of all verdicts, ties among them, name the answer shown at a place."""
    said = [[o.preference for o in each.verdicts if o.preference is not None] for each in judged]
    return item_rate([row.count(place) for row in said], [len(row) for row in said], clusters)


def _swaps(
    judged: Sequence[ItemVerdicts], clusters: Clusters
) -> tuple[ItemRate | None, Lean | None]:
    """Compare the verdicts on pairs of answers that were shown in both orders.

    Consistent: both verdicts name the same answer, or both a tie; a pair with a verdict missing is
    not. Without any verdict there is no share. Of the inconsistent pairs with two verdicts, each
    leans to the answer shown first or to the one shown second, since its two verdicts do not
    cancel. Both None without such pairs.
    """
    consistent, sizes, leans, is_silent = [], [], [], True
    for each in judged:
        said = {(o.first, o.second): o.preference for o in each.verdicts}
        pairs = [
            (said[a, b], swap_preference(said[b, a]))  # both in the order of the first game
            for a, b in said
            if a < b and (b, a) in said
        ]
        sizes.append(len(pairs))
        consistent.append(sum(is_consistent(*pair) for pair in pairs))
        is_silent = is_silent and all(pair == (None, None) for pair in pairs)
        leans += [pair for pair in pairs if pair[0] != pair[1] and None not in pair]
    if not sum(sizes):
        return None, None
    # The first game showed the first answer first, the other game the second.
    num_first = sum(one == 1 or (one == 0 and two == 2) for one, two in leans)
    points = 100 * (2 * num_first - len(leans)) / len(leans) if leans else None
    lean = Lean(points, len(leans), num_first, len(leans) - num_first)
    if is_silent:
        return ItemRate(None, sum(sizes)), lean
    return item_rate(consistent, sizes, clusters, sum(sizes)), lean


def _length(plays: Sequence[Play]) -> LengthBias | None:
    """Relate verdicts to the lengths of the answers; None where no verdict can show anything.

    verdicts, labels: the share that names the longer answer; ties and answers of equal length are
    left out, and a pair shown in both orders has one label. correlation: point-biserial, of naming
    the first shown with the log of how many times longer it is, over the games where both verdict
    and label name an answer; that of the labels; and the partial one that is left of the verdicts'
    at equal labels, which is a taste for length rather than the longer answers being better.
    """
    uneven = [play for play in plays if play.length_ratio]
    named = [play for play in uneven if play.verdict.preference in (1, 2)]
    if not named:
        return None
    longer = sum((p.verdict.preference == 1) == (p.length_ratio > 0) for p in named)
    labels = {  # by item and pair
        (play.item.id, *sorted(play.verdict[:2])): (play.label == 1) == (play.length_ratio > 0)
        for play in uneven
        if play.label in (1, 2)
    }
    both = [p for p in plays if p.verdict.preference in (1, 2) and p.label in (1, 2)]
    ratio = np.array([play.length_ratio for play in both])
    verdict = np.array([play.verdict.preference == 1 for play in both], dtype=float)
    label = np.array([play.label == 1 for play in both], dtype=float)
    of_verdicts, of_labels = _correlation(verdict, ratio), _correlation(label, ratio)
    return LengthBias(
        verdicts=_rate(longer, len(named)),
        labels=_rate(sum(labels.values()), len(labels)),
        correlation=LengthCorrelation(
            verdicts=of_verdicts,
            labels=of_labels,
            verdicts_given_label=_partial(of_verdicts, _correlation(verdict, label), of_labels),
            n=len(both),
        ),
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if x.size < 2 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _partial(xy: float | None, xz: float | None, yz: float | None) -> float | None:
    """Return the correlation of x and y with z held fixed."""
    if xy is None or xz is None or yz is None:
        return None
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(left) if left > 1e-12 else None


def _calibration(plays: Sequence[Play], span: float | None) -> Calibration | None:
    """Compare the confidence that margins state with how often the higher score is right.

    A margin of 0 states 1/2, one of `span` states certainty, linear between. Games with two scores
    and a label that names an answer; tied scores prefer none and are only counted. ece: the mean
    distance of accuracy and confidence over bins, by their games, in points. brier: the mean square
    of confidence less correctness, between 0 and 1.
    """
    known = [(p.verdict.scores, p.label) for p in plays if p.verdict.scores and p.label in (1, 2)]
    told = [(pair, label) for pair, label in known if preferred(*pair)]
    if not told:
        return None
    scores = [score for play in plays for score in play.verdict.scores or ()]
    span = span or max(scores) - min(scores)
    margins = np.array([abs(one - two) for (one, two), _ in told])
    confidence = np.array([implied_probability(margin, 0.0, span) for margin in margins])
    right = np.array([preferred(*pair) == label for pair, label in told], dtype=float)
    numbers = _bin_numbers(confidence)
    bins = [
        _bin(number, confidence[numbers == number], right[numbers == number])
        for number in range(NUM_BINS)
    ]
    return Calibration(
        span=float(span),
        n=len(told),
        ties=len(known) - len(told),
        confidence=100 * float(confidence.mean()),
        accuracy=100 * float(right.mean()),
        ece=calibration_error(confidence, right),
        brier=float(((confidence - right) ** 2).mean()),
        bins=tuple(bins),
    )


def calibration_error(confidence: Float[np.ndarray, " N"], right: Float[np.ndarray, " N"]) -> float:
    """Return the mean distance of accuracy and confidence over bins, by their rows, in points.

    Ten bins of equal width from 1/2 to 1; a confidence below is in the first.
    """
    gaps = np.bincount(_bin_numbers(confidence), right - confidence, minlength=NUM_BINS)
    return 100 * float(np.abs(gaps).sum()) / len(right)


def _bin_numbers(confidence: Float[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    # An edge belongs to the bin above it, whatever rounding says.
    numbers = ((2 * confidence - 1) * NUM_BINS + 1e-9).astype(int)
    return np.clip(numbers, 0, NUM_BINS - 1)


def _bin(number: int, confidence: np.ndarray, right: np.ndarray) -> CalibrationBin:
    low, width = 50 + 50 * number / NUM_BINS, 50 / NUM_BINS
    means = [100 * float(values.mean()) if values.size else None for values in (confidence, right)]
    return CalibrationBin(low, low + width, int(right.size), *means)


def _confusion(plays: Sequence[Play]) -> Confusion | None:
    """Count the games of items with two answers and a label: label by verdict, in item order."""
    labelled = [p for p in plays if len(p.item.answers) == 2 and p.item.label is not None]
    counts = Counter((play.item.label, play.verdict.in_order) for play in labelled)
    rows, columns = (0, 1, 2), (0, 1, 2, None)
    if not labelled:
        return None
    return Confusion(
        labels=rows,
        verdicts=columns,
        counts=tuple(tuple(counts[row, column] for column in columns) for row in rows),
        n=len(labelled),
    )


def _cost(plays: Sequence[Play], responses: Mapping[str, Response]) -> JudgingCost | None:
    """Add up what the games took; each mean is over the `n` games that recorded it."""
    ids = (Game(item, verdict.first, verdict.second).id for item, verdict in plays)
    own = [responses[game] for game in ids if game in responses]
    timed = [each for each in own if each.num_tokens is not None and each.seconds]
    seconds = sum(each.seconds or 0.0 for each in timed)
    num_tokens = sum(each.num_tokens or 0 for each in timed)
    cost = JudgingCost(
        num_tokens=_amount([each.num_tokens for each in own]),
        prompt_tokens=_amount([each.prompt_tokens for each in own]),
        seconds=_amount([each.seconds for each in own]),
        tokens_per_second=num_tokens / seconds if timed else None,
    )
    return None if cost == JudgingCost() else cost


def _amount(values: Sequence[float | None]) -> Amount | None:
    known = [value for value in values if value is not None]
    return Amount(sum(known), sum(known) / len(known), len(known)) if known else None
