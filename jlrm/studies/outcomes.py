"""What a study's evaluations come to, over seeds: the cells of its tables.

Seeds judge the same items, so what the items leave open does not shrink with the number of seeds,
and what the seeds leave open does. With `h` the distance from a seed's value to an end of its
interval by clusters, `s` the deviation of n seeds and `t` Student's 97.5 % point at n - 1 degrees
of freedom, the interval of the mean reaches sqrt(mean(h^2) + t^2 s^2 / n) to that side. With
one seed it is that seed's own, and says nothing of seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from jlrm.config import UsageError, nearest
from jlrm.reports import results_file
from jlrm.reports.contracts import LEFT_OUT
from jlrm.reports.evaluated import whole_interval
from jlrm.reports.results_file import BenchmarkResult, Interval
from jlrm.studies import spec
from jlrm.studies.cells import evaluation_dir
from jlrm.studies.spec import Study, StudyTable

VERSION = 1
Measured = tuple[float, Interval | None]


@dataclass(frozen=True)
class SeedMean:
    """The mean of a column over the seeds of a run, in percent or points; None: not there yet."""

    mean: float | None
    interval: tuple[float, float] | None = None  # 95 %
    seeds: tuple[float, ...] = ()
    missing: int = 0  # seeds without a value


@dataclass(frozen=True)
class TableRow:
    """A row of a table. `is_published`: others' numbers, without intervals."""

    label: str
    values: tuple[SeedMean, ...]
    is_published: bool = False


@dataclass(frozen=True)
class StudiedTable:
    """A table of a study."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""
    at: tuple[float, ...] = field(default=(), metadata=LEFT_OUT)
    across: str = field(default="", metadata=LEFT_OUT)


@dataclass(frozen=True)
class GroupRow:
    """A group of items in a table by group: its size, its share in percent, and a value a run."""

    label: str
    n: int | None
    share: float | None
    values: tuple[SeedMean, ...]
    is_published: bool = False


@dataclass(frozen=True)
class FittedGain:
    """What a run gains over another in each group, in points, and the line over the shares."""

    of: str
    over: str
    groups: tuple[str, ...]
    shares: tuple[float, ...]  # percent
    gains: tuple[float, ...]
    slope: float | None  # points a percent; None: fewer than three groups, or one share for all
    intercept: float | None
    r: float | None  # correlation; None: no line, or all gains alike
    is_published: bool = False


@dataclass(frozen=True)
class GroupedTable:
    """A table of a study with a row for each group of items."""

    title: str
    metric: str
    columns: tuple[str, ...]  # labels of runs
    rows: tuple[GroupRow, ...]
    gains: tuple[FittedGain, ...] = ()
    across: str = ""  # what shares are of
    note: str = ""
    missing: str = ""  # why it has no rows of our own


@dataclass(frozen=True)
class StudyOutcome:
    """What `tables.json` of a study holds."""

    title: str
    seeds: tuple[int, ...]
    tables: dict[str, StudiedTable]
    by_group: dict[str, GroupedTable] = field(default_factory=dict)
    version: int = VERSION


def tables(study: Study) -> dict[str, StudiedTable]:
    """Read what the evaluations have written so far."""
    return {name: _table(study, name, table) for name, table in study.tables.items()}


def _table(study: Study, name: str, table: StudyTable) -> StudiedTable:
    rows = [
        TableRow(study.label(run), tuple(_value(study, run, column) for column in table.columns))
        for run in table.rows or study.runs
    ]
    for label, values in table.published.items():
        cells = tuple(SeedMean(number) for number in spec.published(values))
        rows.append(TableRow(label, cells, is_published=True))
    return StudiedTable(
        table.title or name,
        tuple(table.columns),
        tuple(rows),
        table.note,
        tuple(table.at),
        table.across,
    )


def _value(study: Study, run: str, column: str) -> SeedMean:
    evaluation, _, metric = column.partition(".")
    found, seeds = [], study.seeds_of(run)
    for seed in seeds:
        directory = evaluation_dir(study, run, seed, evaluation)
        if not (directory / results_file.NAME).exists():
            continue
        results = results_file.read(directory).benchmarks
        result = results.get(study.evaluations[evaluation].benchmark)
        measured = None if result is None else read_metric(result, metric, column)
        if measured is not None:
            found.append(measured)
    return over_seeds(found, len(seeds) - len(found))


def read_metric(result: BenchmarkResult, metric: str, column: str) -> Measured | None:
    """Return a column's value in one evaluation, with its interval; None where it has none.

    Raises:
      UsageError: the benchmark has no such metric.
    """
    about = result.diagnostics
    if metric.startswith(spec.SUBSET):
        name = metric.removeprefix(spec.SUBSET)
        if name not in result.subsets:
            raise UsageError(f"{column}: no such subset. {nearest(name, result.subsets)}")
        return _measured(result.subsets[name].accuracy, result.subsets[name].interval)
    if metric == "consistency":
        rate = about.consistency
        return None if rate is None else _measured(rate.percent, rate.interval)
    if metric == "lean":
        return None if about.lean_to_first is None else _measured(about.lean_to_first.points)
    if metric == "ece":
        return None if about.calibration is None else _measured(about.calibration.ece)
    if metric == "unread":
        return _measured(100.0 * result.parse_failures / about.games if about.games else None)
    if metric == "difference":
        paired = result.comparison
        return None if paired is None else _measured(paired.difference, paired.interval)
    if metric not in result.metrics:
        known = dict.fromkeys([*result.metrics, *spec.DIAGNOSTICS])
        raise UsageError(f"{column}: the benchmark has no '{metric}'. {nearest(metric, known)}")
    return _measured(result.metrics[metric], result.intervals.get(metric))


def _measured(value: float | None, interval: Interval | None = None) -> Measured | None:
    return None if value is None else (value, interval)


def over_seeds(found: Sequence[Measured], missing: int = 0) -> SeedMean:
    """Return the mean over seeds with its interval; see the head of this file."""
    if not found:
        return SeedMean(None, missing=missing)
    values = [value for value, _ in found]
    mean = statistics.mean(values)
    ends = [whole_interval(interval) for _, interval in found]
    known = [(value, each) for value, each in zip(values, ends, strict=True) if each]
    if len(known) < len(found):
        return SeedMean(mean, None, tuple(values), missing)
    of_seeds = _half_width(values)
    below = statistics.mean((value - low) ** 2 for value, (low, _) in known)
    above = statistics.mean((high - value) ** 2 for value, (_, high) in known)
    interval = (
        mean - math.hypot(math.sqrt(below), of_seeds),
        mean + math.hypot(math.sqrt(above), of_seeds),
    )
    return SeedMean(mean, interval, tuple(values), missing)


def _half_width(values: Sequence[float]) -> float:
    """Return half the width of Student's 95 % interval of the mean; 0 for one value."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return 0.0
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
