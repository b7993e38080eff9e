"""The metrics of an evaluation with their intervals: what each is of, and what says nothing.

A metric describes some of the items: all of them, a subset, a section. Where no game of these has a
verdict, a policy's credit for failures would be all that it says, so it has no value. A metric that
is the mean credit of its items is resampled by sums over clusters; others are computed again on
each resample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlrm.evaluation.benchmark import Benchmark, Credit
from jlrm.evaluation.games import ItemVerdicts
from jlrm.evaluation.groups import Groups
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.scoring import percent
from jlrm.evaluation.statistics import intervals
from jlrm.evaluation.statistics.intervals import Clusters
from jlrm.reports.results_file import GroupResult, Interval, SubsetResult

MEAN_CREDITS = ("overall", "agreement", "micro", "correct_average")  # of most benchmarks


class Credited(NamedTuple):
    """Judged items with what they are worth: parallel sequences."""

    benchmark: Benchmark
    policy: Policy
    judged: Sequence[ItemVerdicts]
    credits: Sequence[Credit]
    clusters: Clusters

    @property
    def values(self) -> np.ndarray:
        """The items' credits, 0 to 1."""
        return np.array([credit.value for credit in self.credits])

    def part(self, places: Sequence[int]) -> Credited:
        """Return some of the items, with clusters numbered anew."""
        clusters = np.unique(self.clusters[list(places)], return_inverse=True)[1]
        judged, credits = ([each[i] for i in places] for each in (self.judged, self.credits))
        return self._replace(judged=judged, credits=credits, clusters=clusters)

    def total(self) -> dict[str, float]:
        """Return the benchmark's metrics, in percent."""
        return self.benchmark.total(self.credits, self.policy)

    def has_verdicts(self) -> bool:
        """Return whether any game has a verdict."""
        return has_verdicts(self.judged)

    def by_subset(self) -> dict[str, Credited]:
        """Return the items of each subset, subsets in the order of their names."""
        places: dict[str, list[int]] = {}
        for place, each in enumerate(self.judged):
            places.setdefault(each.item.subset, []).append(place)
        return {name: self.part(places[name]) for name in sorted(places)}


def has_verdicts(judged: Sequence[ItemVerdicts]) -> bool:
    """Return whether any game has a verdict."""
    return any(each.preference is not None for item in judged for each in item.verdicts)


def metrics(credited: Credited) -> tuple[dict[str, float | None], dict[str, Interval]]:
    """Return the metrics with their intervals; None for those that no verdict is of."""
    computed = credited.total()
    support = _support(credited, computed)
    told = {name: value for name, value in computed.items() if support[name].has_verdicts()}
    means = {name for name, value in told.items() if _is_mean(name, value, support[name])}
    ranges = {name: _of_mean(support[name]) for name in told if name in means}
    if others := [name for name in told if name not in means]:
        ranges |= _of_others(credited, others, told, support)
    values = {name: _finite(told[name]) if name in told else None for name in computed}
    return values, {name: _finite_ends(ranges[name]) for name in told}


def subsets(credited: Credited) -> dict[str, SubsetResult]:
    """Return the mean credit of each named subset; None where it has no verdict."""
    results = {}
    for name, part in credited.by_subset().items():
        if name and part.has_verdicts():
            mean = percent(part.values)
            results[name] = SubsetResult(len(part.judged), mean, _finite_ends(_of_mean(part)))
        elif name:
            results[name] = SubsetResult(len(part.judged), None)
    return results


def groups(credited: Credited, told: Groups) -> dict[str, GroupResult]:
    """Return the metrics of each group."""
    results = {}
    for name, group in told.named.items():
        share = None if math.isnan(group.share) else group.share
        owners = [told.of_subset.get(each.item.subset) for each in credited.judged]
        places = [i for i, owner in enumerate(owners) if owner == name]
        computed = metrics(credited.part(places)) if places else ({}, {})
        results[name] = GroupResult(len(places), *computed, share)
    return results


def _support(credited: Credited, computed: Mapping[str, float]) -> dict[str, Credited]:
    """Return the items that each metric describes: those of the subsets that have it alone."""
    parts = list(credited.by_subset().values())
    if len(parts) == 1:
        return dict.fromkeys(computed, credited)
    alone = [part.total() for part in parts]
    ids: dict[tuple[int, ...], Credited] = {}

    def of(name: str) -> Credited:
        having = tuple(i for i, each in enumerate(alone) if math.isfinite(each.get(name, math.nan)))
        if len(having) in (0, len(parts)):
            return credited
        if having not in ids:
            subsets = {parts[i].judged[0].item.subset for i in having}
            places = [i for i, e in enumerate(credited.judged) if e.item.subset in subsets]
            ids[having] = credited.part(places)
        return ids[having]

    return {name: of(name) for name in computed}


def _is_mean(name: str, value: float, part: Credited) -> bool:
    is_named = name in MEAN_CREDITS or name in {each.item.subset for each in part.judged}
    return is_named and abs(value - 100 * part.values.mean()) < 1e-9


def _of_mean(part: Credited) -> tuple[float, float]:
    sums, sizes = np.bincount(part.clusters, part.values), np.bincount(part.clusters)
    return intervals.of_share(sums, sizes.astype(float), most=len(part.judged))


def _of_others(
    credited: Credited,
    names: Sequence[str],
    told: Mapping[str, float],
    support: Mapping[str, Credited],
) -> dict[str, tuple[float, float]]:
    by_id = {credit.item.id: credit for credit in credited.credits}

    def total(sample: Sequence[ItemVerdicts]) -> dict[str, float]:
        credits = [by_id[each.item.id] for each in sample]
        return credited.benchmark.total(credits, credited.policy)

    draws = intervals.resampled(credited.judged, total, clusters=credited.clusters)
    ranges = {}
    for name in names:
        part = support[name]
        sizes = len(part.judged), int(part.clusters.max()) + 1
        is_percent = name not in credited.benchmark.not_percent
        ranges[name] = (
            intervals.of_metric(told[name], draws[name], *sizes)
            if is_percent
            else intervals.percentiles(draws[name])
        )
    return ranges


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_ends(interval: tuple[float, float]) -> Interval:
    low, high = interval
    return _finite(low), _finite(high)
