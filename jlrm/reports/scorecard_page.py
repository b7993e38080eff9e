"""The page of one or more evaluations: which judge, by how much, how sure; then each benchmark.

A page says what `results.json` says. Its only arithmetic is the lead of one judge over the next.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jlrm.reports import charts, scorecard_charts
from jlrm.reports.charts import Chart
from jlrm.reports.evaluated import (
    EvaluatedJudge,
    headline_metric,
    name_judges,
    published_rows,
    range_text,
    results_of,
    shown_name,
    whole_interval,
)
from jlrm.reports.pages import write_page
from jlrm.reports.results_file import BenchmarkResult, Published, Results
from jlrm.runtime.storage import write_atomically


class Lead(NamedTuple):
    """The best judge on a benchmark, and its distance to the next."""

    judge: str
    margin: float  # points
    note: str
    is_settled: bool


class ComparedBenchmark(NamedTuple):
    """What all judges have of one benchmark."""

    name: str
    metric: str  # the headline's
    metrics: list[str]
    results: list[BenchmarkResult]  # in the order of the judges
    published: list[Published]
    lead: Lead | None
    headline: Chart | None
    reliability: Chart | None
    groups: Chart | None
    subsets: Chart | None


def write(out: pathlib.Path, files: Sequence[Results]) -> None:
    """Write `report.html`, `report.png` and `model_card.md` of judges side by side."""
    judges = name_judges(files)
    names = list(dict.fromkeys(name for judge in judges for name in judge.benchmarks))
    benchmarks = [_compared(name, judges) for name in names]
    orders = scorecard_charts.order_charts(names, judges)
    *others, last = [judge.name for judge in judges]
    title = f"{', '.join(others)} and {last}" if others else last
    drawn = [*(b.headline for b in benchmarks), *orders, *(b.reliability for b in benchmarks)]
    overview = charts.png([chart for chart in drawn if chart], 3, title)
    write_atomically(out / "report.png", overview)
    lede = _lede([judge.name for judge in judges], benchmarks)
    shown = {"title": title, "judges": judges, "benchmarks": benchmarks}
    write_page(out / "report.html", "scorecard.html", lede=lede, orders=orders, **shown)
    write_page(out / "model_card.md", "model_card.md", **shown)


def _compared(name: str, judges: Sequence[EvaluatedJudge]) -> ComparedBenchmark:
    results = results_of(name, judges)
    return ComparedBenchmark(
        name=name,
        metric=headline_metric(name, judges),
        metrics=list(dict.fromkeys(metric for each in results for metric in each.metrics)),
        results=results,
        published=published_rows(name, judges),
        lead=_lead(name, judges),
        headline=scorecard_charts.headline_chart(name, judges),
        reliability=scorecard_charts.reliability_chart(name, judges),
        groups=scorecard_charts.group_chart(name, judges),
        subsets=scorecard_charts.subset_chart(name, judges),
    )


def _lead(name: str, judges: Sequence[EvaluatedJudge]) -> Lead | None:
    """Return who is ahead: by items that both judged where two were compared, else by intervals."""
    metric = headline_metric(name, judges)
    by_name = {judge.name: judge.result(name) for judge in judges}
    values = {judge: each.metrics.get(metric) for judge, each in by_name.items()}
    ranked = sorted((-value, judge) for judge, value in values.items() if value is not None)
    first_two = [judge for _, judge in ranked[:2]]
    for judge, result in by_name.items():
        pair = result.comparison
        if pair and (len(ranked) == 1 or {judge, shown_name(pair.other)} == {*first_two}):
            low, high = whole_interval(pair.interval) or (-100.0, 100.0)
            winner, ends = judge, (low, high)
            if pair.difference < 0:
                winner, ends = shown_name(pair.other), (-high, -low)
            note = f"paired, {range_text(ends)}" + ("" if ends[0] > 0 else ": not settled")
            return Lead(winner, abs(pair.difference), note, ends[0] > 0)
    if len(first_two) < 2:
        return None
    best, second = (whole_interval(by_name[each].intervals.get(metric)) for each in first_two)
    is_settled = best is not None and second is not None and best[0] > second[1]
    note = "intervals do not overlap" if is_settled else "intervals overlap: not settled"
    return Lead(first_two[0], ranked[1][0] - ranked[0][0], note, is_settled)


def _lede(names: Sequence[str], benchmarks: Sequence[ComparedBenchmark]) -> str:
    """Return what the page comes to, as a sentence; empty where there is nothing to compare."""
    leads = [each.lead for each in benchmarks if each.lead]
    if len(benchmarks) == len(leads) == 1:
        (lead,) = leads
        return (
            f"{lead.judge} leads by {lead.margin:.1f} points on {benchmarks[0].name} ({lead.note})."
        )
    wins = {name: [lead for lead in leads if lead.judge == name] for name in names}
    parts = [
        f"{name} leads on {len(won)} of {len(leads)} benchmarks"
        f" ({sum(lead.is_settled for lead in won)} settled)"
        for name, won in wins.items()
        if won
    ]
    return "; ".join(parts) + ("." if parts else "")
