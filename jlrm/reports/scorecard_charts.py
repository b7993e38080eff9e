"""Charts of evaluated judges: results with intervals, orders, subsets, reliability.

A judge has the colour and the marker of its place on the page, in every chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jlrm.reports import charts
from jlrm.reports.charts import Axes, Bar, Chart, Line, Mark
from jlrm.reports.evaluated import (
    EvaluatedJudge,
    headline_metric,
    published_rows,
    results_of,
    whole_interval,
)
from jlrm.reports.results_file import BenchmarkResult, Interval
from jlrm.reports.theme import LIGHT, colour

CONSISTENCY_TITLE = "Same verdict in both orders (%)"
PLACES_TITLE = "Verdicts: shown first, tie, shown second (%)"
PLACES = (("first", colour(0)), ("tie", LIGHT.faint), ("second", colour(4)))


def headline_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart a benchmark's headline metric: a row for each judge and each published value, the best
    first."""
    metric = headline_metric(name, judges)
    rows = []
    for number, judge in enumerate(judges):
        result = judge.result(name)
        note = "  incomplete" if result.incomplete else ""
        mark = _point(result.metrics.get(metric), result.intervals.get(metric), number)
        if mark.value is None:
            note = "no verdicts" if name in judge.benchmarks else "not run"
        rows.append((judge.name, mark._replace(is_hollow=result.incomplete, note=note)))
    if all(mark.value is None for _, mark in rows):
        return None
    rows += [
        (row.judge, Mark(row.value)) for row in published_rows(name, judges) if row.metric == metric
    ]
    rows.sort(key=lambda row: -np.inf if row[1].value is None else row[1].value, reverse=True)
    chart = charts.dots(name, [(charts.wrap(label, 22), [mark]) for label, mark in rows])
    return chart._replace(note=f"{metric} (%)", alt=f"Results: {chart.alt}")


def _point(value: float | None, interval: Interval | None, number: int, note: str = "") -> Mark:
    return Mark(value, whole_interval(interval), number, note=note)


def order_charts(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> list[Chart]:
    """Chart what the order of the answers does: agreement of both orders, the lean to a place."""
    rows, bars = [], []
    for name in names:
        marks = [_consistency(judge.result(name), i) for i, judge in enumerate(judges)]
        if any(mark.value is not None for mark in marks):
            rows.append((charts.wrap(name, 20), marks))
        run = [judge for judge in judges if name in judge.benchmarks]
        of_benchmark = [_places(judge, name, len(judges) > 1) for judge in run]
        bars += of_benchmark if any(bar.sizes for bar in of_benchmark) else []
    drawn = []
    if rows:
        legend = [judge.name for judge in judges] if len(judges) > 1 else []
        chart = charts.dots(CONSISTENCY_TITLE, rows, legend, is_percent=True)
        drawn.append(chart._replace(note="Of pairs that were shown in both orders"))
    if bars:
        note = "A fair judge names both places about as often as the labels do"
        drawn.append(charts.stacks(PLACES_TITLE, bars, PLACES)._replace(note=note))
    return drawn


def _consistency(result: BenchmarkResult, number: int) -> Mark:
    rate = result.diagnostics.consistency
    if rate is None or rate.percent is None:
        return Mark(None, series=number, note="one order only")
    return _point(rate.percent, rate.interval, number)


def _places(judge: EvaluatedJudge, name: str, is_named: bool) -> Bar:
    label = charts.cut(name, 22) + (f"\n{charts.cut(judge.name, 22)}" if is_named else "")
    rates = judge.result(name).diagnostics.first, judge.result(name).diagnostics.second
    first, second = (None if rate is None else rate.percent for rate in rates)
    if first is None or second is None:
        return Bar(label, [], "no verdicts")
    tie = max(0.0, 100 - first - second)
    return Bar(label, [first, tie, second], f"{first:.0f} · {tie:.0f} · {second:.0f}")


def subset_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart the accuracy on a benchmark's subsets; None where it has none."""
    by_judge = [
        {part: (each.n, each.accuracy, each.interval) for part, each in result.subsets.items()}
        for result in results_of(name, judges)
    ]
    return _parts_chart("Accuracy by subset (%)", by_judge, judges)


def group_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart the headline metric on the user's groups; None where there are none."""
    metric = headline_metric(name, judges)
    by_judge = [
        {
            part: (each.n, each.metrics.get(metric), each.intervals.get(metric))
            for part, each in result.groups.items()
        }
        for result in results_of(name, judges)
    ]
    return _parts_chart(f"{metric} by group (%)", by_judge, judges)


def _parts_chart(
    title: str,
    by_judge: Sequence[Mapping[str, tuple[int, float | None, Interval | None]]],
    judges: Sequence[EvaluatedJudge],
) -> Chart | None:
    """Chart (items, percent, interval) of each part of a benchmark, for each judge."""
    rows = []
    for part in dict.fromkeys(part for parts in by_judge for part in parts):
        entries = [parts.get(part) for parts in by_judge]
        marks = [
            Mark(None, series=i)
            if each is None
            else _point(each[1], each[2], i, "no verdicts" if each[1] is None else "")
            for i, each in enumerate(entries)
        ]
        sizes = dict.fromkeys(f"{each[0]:,}" for each in entries if each is not None)
        if any(mark.value is not None for mark in marks):
            label = charts.wrap(f"{part} ({' or '.join(sizes)})", 26)
            rows.append((label, marks))
    if not rows:
        return None
    legend = [judge.name for judge in judges] if len(judges) > 1 else []
    chart = charts.dots(title, rows, legend, is_percent=True)
    return chart._replace(note="In brackets: items. Lines: 95 % intervals")


def reliability_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart how often a verdict is right against the confidence that its margin implies."""
    lines = []
    for judge, result in zip(judges, results_of(name, judges), strict=True):
        calibration = result.diagnostics.calibration
        bins = [each for each in calibration.bins if each.n] if calibration else []
        x, y, n = np.array([(b.confidence, b.accuracy, b.n) for b in bins], float).reshape(-1, 3).T
        sizes = 10 + 60 * np.sqrt(n / max([*n, 1]))
        lines.append(Line(charts.cut(judge.name, 18), x, y, is_noisy=False, sizes=sizes))
    if not any(line.x.size for line in lines):
        return None
    axes = Axes("confidence that the margin states (%)", "verdicts that are right (%)")
    note = "On the dotted line confidence is right. Larger marks: more games"
    title, layout = f"Reliability: {name}", axes._replace(is_diagonal=True)
    return charts.curves(title, lines, layout, note=note, is_named=len(judges) > 1)
