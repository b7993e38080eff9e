"""A study's tables by group of items, and whether a gain follows what a group's rows are like.

Each row is a group that the evaluation's file of groups names, each column a run. A gain is what
one run has over another in a group. It is fitted over the groups' shares by least squares, each
group counting once whatever its size. Gains have no intervals; the values they come from have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from jlrm.config import UsageError, nearest
from jlrm.reports import results_file
from jlrm.reports.results_file import GroupResult
from jlrm.studies import outcomes, spec
from jlrm.studies.cells import evaluation_dir
from jlrm.studies.outcomes import FittedGain, GroupedTable, GroupRow, SeedMean
from jlrm.studies.spec import Study, StudyBreakdown

MOST_POINTS_OF_NO_LINE = 2


def tables(study: Study) -> dict[str, GroupedTable]:
    """Read what the evaluations have written so far."""
    return {name: _table(study, name, table) for name, table in study.by_group.items()}


def _table(study: Study, name: str, table: StudyBreakdown) -> GroupedTable:
    evaluation, _, metric = table.metric.partition(".")
    own = _own_rows(study, table, evaluation, metric)
    published = [
        GroupRow(
            label,
            None if n is None else int(n),
            share,
            tuple(map(SeedMean, values)),
            is_published=True,
        )
        for label, numbers in table.published.items()
        for n, share, *values in [spec.published(numbers)]
    ]
    pairs = [(table.runs.index(one), table.runs.index(two)) for one, two in table.gains]
    labels = tuple(map(study.label, table.runs))
    gains = [fitted(rows, pair, labels) for pair in pairs for rows in (own, published) if rows]
    missing = ""
    if not study.evaluations[evaluation].groups:
        missing = (
            f"No numbers of our own: evaluations.{evaluation}.groups names no file. Which items "
            "are in which group is yours to say; the README says how (Studies)."
        )
    return GroupedTable(
        table.title or name,
        table.metric,
        labels,
        tuple(_in_turn(own, published)),
        tuple(gain for gain in gains if gain is not None),
        table.across,
        table.note,
        missing,
    )


def _in_turn(own: Sequence[GroupRow], published: Sequence[GroupRow]) -> list[GroupRow]:
    """Return the rows with each published one behind ours of the same group."""
    rows, left = [], {row.label: row for row in published}
    for row in own:
        rows += [row, left.pop(row.label)] if row.label in left else [row]
    return rows + list(left.values())


def _own_rows(study: Study, table: StudyBreakdown, evaluation: str, metric: str) -> list[GroupRow]:
    found = {
        (run, seed): groups
        for run in table.runs
        for seed in study.seeds_of(run)
        if (groups := _groups(study, run, seed, evaluation))
    }
    names = dict.fromkeys(name for groups in found.values() for name in groups)
    rows = []
    for name in names:
        having = [groups[name] for groups in found.values() if name in groups]
        values = []
        for run in table.runs:
            seeds = study.seeds_of(run)
            own = [found.get((run, seed), {}).get(name) for seed in seeds]
            known = [_measured(each, metric, table.metric) for each in own if each is not None]
            measured = [each for each in known if each is not None]
            values.append(outcomes.over_seeds(measured, len(seeds) - len(measured)))
        rows.append(GroupRow(name, having[0].n, having[0].share, tuple(values)))
    return rows


def _groups(study: Study, run: str, seed: int, evaluation: str) -> Mapping[str, GroupResult]:
    """Return an evaluation's groups; none where it is not there yet."""
    directory = evaluation_dir(study, run, seed, evaluation)
    if not (directory / results_file.NAME).exists():
        return {}
    result = results_file.read(directory).benchmarks.get(study.evaluations[evaluation].benchmark)
    return {} if result is None else result.groups


def _measured(group: GroupResult, metric: str, column: str) -> outcomes.Measured | None:
    if group.metrics and metric not in group.metrics:
        known = nearest(metric, group.metrics)
        raise UsageError(f"{column}: the groups have no '{metric}'. {known}")
    value = group.metrics.get(metric)
    return None if value is None else (value, group.intervals.get(metric))


def fitted(
    rows: Sequence[GroupRow], pair: tuple[int, int], labels: Sequence[str]
) -> FittedGain | None:
    """Return the gains of a run over another, by group, with their line; None without a point.

    pair: the places of the run that is gained over, and of the one that gains.
    """
    points = []
    for row in rows:
        before, after = (row.values[place].mean for place in pair)
        if row.share is not None and before is not None and after is not None:
            points.append((row.label, row.share, after - before))
    if not points:
        return None
    groups, shares, gains = zip(*points, strict=True)
    slope = intercept = r = None
    if len(points) > MOST_POINTS_OF_NO_LINE and len(set(shares)) > 1:
        slope, intercept = statistics.linear_regression(shares, gains)
        # Sums of floats make equal gains differ a little: a correlation of noise says nothing.
        if not all(math.isclose(gain, gains[0], abs_tol=1e-9) for gain in gains):
            r = statistics.correlation(shares, gains)
    over, of = (labels[place] for place in pair)
    return FittedGain(of, over, groups, shares, gains, slope, intercept, r, rows[0].is_published)
