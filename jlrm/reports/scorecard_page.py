"""The page of one or more evaluations: which judge, by how much, how sure; then each benchmark.

A page says what `results.json` says. Its only arithmetic is the lead of one judge over the next.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jlrm.reports import charts, scorecard_charts
from jlrm.reports.charts import Chart
from jlrm.reports.evaluated import (
    EvaluatedJudge,
    headline_metric,
    name_judges,
    number_text,
    policy_text,
    published_rows,
    range_text,
    results_of,
    shown_name,
    value_at,
    whole_interval,
)
from jlrm.reports.model_card import model_card
from jlrm.reports.pages import write_page
from jlrm.reports.results_file import (
    Amount,
    BenchmarkResult,
    CalibrationBin,
    Confusion,
    ItemRate,
    Lean,
    Rate,
    Results,
    WorstItem,
)
from jlrm.runtime.storage import write_atomically

DIAGNOSTICS = (  # title, path in `diagnostics`, digits of a plain number
    ("Verdicts", "", 0),
    ("Items", "items", 0),
    ("Games", "games", 0),
    ("No verdict", "parse_failures", 1),
    ("Ties, of verdicts", "ties", 1),
    ("Order", "", 0),
    ("Names the answer shown first", "first", 1),
    ("Names the answer shown second", "second", 1),
    ("Labels that name the first", "labels_first", 1),
    ("Same verdict in both orders", "consistency", 1),
    ("Lean to the first, of the other pairs", "lean_to_first", 1),
    ("Length", "", 0),
    ("Verdicts for the longer answer", "length.verdicts", 1),
    ("Labels for the longer answer", "length.labels", 1),
    ("Correlation of verdicts with length", "length.correlation.verdicts", 2),
    ("… of labels", "length.correlation.labels", 2),
    ("… of verdicts at equal labels", "length.correlation.verdicts_given_label", 2),
    ("Calibration", "", 0),
    ("Confidence stated by margins (%)", "calibration.confidence", 1),
    ("Accuracy of those verdicts (%)", "calibration.accuracy", 1),
    ("Expected calibration error (points)", "calibration.ece", 1),
    ("Brier score (0 to 1)", "calibration.brier", 3),
    ("Margin that states certainty", "calibration.span", 1),
    ("Cost", "", 0),
    ("Generated tokens a game", "cost.num_tokens", 0),
    ("Prompt tokens a game", "cost.prompt_tokens", 0),
    ("Seconds a game", "cost.seconds", 2),
    ("Generated tokens a second", "cost.tokens_per_second", 0),
)
SETTINGS = ("model", "backend", "prompt", "parser")


class Cell(NamedTuple):
    """A value of a table, and what qualifies it in small print below."""

    value: str = ""
    notes: tuple[str, ...] = ()
    is_best: bool = False


class TableRow(NamedTuple):
    """A line of a table; without cells a heading of the lines below it."""

    name: str
    cells: list[Cell]
    notes: tuple[str, ...] = ()
    is_published: bool = False


class Lead(NamedTuple):
    """The best judge on a benchmark, and its distance to the next."""

    judge: str
    margin: float  # points
    note: str
    is_sure: bool  # the interval excludes 0


def write(out: pathlib.Path, files: Sequence[Results]) -> None:
    """Write `report.html`, `report.png` and `model_card.md` of judges side by side."""
    judges = name_judges(files)
    names = list(dict.fromkeys(name for judge in judges for name in judge.benchmarks))
    headlines = [scorecard_charts.headline_chart(name, judges) for name in names]
    reliability = [scorecard_charts.reliability_chart(name, judges) for name in names]
    orders = scorecard_charts.order_charts(names, judges)
    *others, last = [judge.name for judge in judges]
    title = f"{', '.join(others)} and {last}" if others else last
    overview = [chart for chart in (*headlines, *orders, *reliability) if chart]
    write_atomically(out / "report.png", charts.png(overview, 3, title))
    leads = [_lead(name, judges) for name in names]
    write_page(
        out / "report.html",
        "scorecard.html",
        title=title,
        judges=[judge.name for judge in judges],
        incomplete=_incomplete(names, judges),
        lede=_lede(names, judges, leads),
        has_leads=any(leads),
        glance=[_glance_row(name, judges, lead) for name, lead in zip(names, leads, strict=True)],
        headlines=[chart for chart in headlines if chart],
        orders=orders,
        settings=_settings(judges),
        policies={name: _policies(name, judges) for name in names},
        sources=dict.fromkeys(row for name in names for row in published_rows(name, judges)),
        benchmarks=[
            _benchmark(name, judges, chart) for name, chart in zip(names, reliability, strict=True)
        ],
    )
    card = model_card(judges)
    write_atomically(out / "model_card.md", card.encode(errors="replace"))  # lone surrogates


# --- the first screen ---


def _incomplete(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> list[str]:
    return [
        f"{judge.name}: {name}"
        for judge in judges
        for name in names
        if judge.result(name).incomplete
    ]


def _lead(name: str, judges: Sequence[EvaluatedJudge]) -> Lead | None:
    """Return who is ahead on a benchmark: from paired items where they were compared, else from
    the intervals of both."""
    metric = headline_metric(name, judges)
    by_value = {judge.name: judge.result(name).metrics.get(metric) for judge in judges}
    ranked = sorted((-value, judge) for judge, value in by_value.items() if value is not None)
    for judge in judges:
        pair = judge.result(name).comparison
        if pair is None:
            continue
        other = shown_name(pair.other)
        if len(ranked) == 1 or {judge.name, other} == {each for _, each in ranked[:2]}:
            ends = whole_interval(pair.interval) or (float("-inf"), float("inf"))
            ends = ends if pair.difference >= 0 else (-ends[1], -ends[0])
            winner = judge.name if pair.difference >= 0 else other
            note = f"paired, {range_text(ends)}" + ("" if ends[0] > 0 else ": not settled")
            return Lead(winner, abs(pair.difference), note, ends[0] > 0)
    if len(ranked) < 2:
        return None
    best, second = (
        whole_interval(judge.result(name).intervals.get(metric))
        for _, each in ranked[:2]
        for judge in judges
        if judge.name == each
    )
    is_sure = best is not None and second is not None and best[0] > second[1]
    note = "intervals do not overlap" if is_sure else "intervals overlap: not settled"
    return Lead(ranked[0][1], ranked[1][0] - ranked[0][0], note, is_sure)


def _lede(
    names: Sequence[str], judges: Sequence[EvaluatedJudge], leads: Sequence[Lead | None]
) -> str:
    """Return the page's finding as a sentence; empty where there is nothing to compare."""
    present = [lead for lead in leads if lead]
    if len(names) == 1 and present:
        (lead,) = present
        return f"{lead.judge} leads by {lead.margin:.1f} points on {names[0]} ({lead.note})."
    if present:
        wins = {
            judge.name: [each for each in present if each.judge == judge.name] for judge in judges
        }
        parts = [
            f"{name} leads on {len(won)} of {len(present)} benchmarks"
            f" ({sum(each.is_sure for each in won)} settled)"
            for name, won in wins.items()
            if won
        ]
        return "; ".join(parts) + "."
    return ""


def _glance_row(name: str, judges: Sequence[EvaluatedJudge], lead: Lead | None) -> TableRow:
    metric, results = headline_metric(name, judges), results_of(name, judges)
    sizes = {result.n for result in results if result.metrics}
    cells = [_metric_cell(result, metric, has_n=len(sizes) > 1) for result in results]
    values = [result.metrics.get(metric) for result in results]
    best = max((value for value in values if value is not None), default=None)
    cells = [
        cell._replace(is_best=len(judges) > 1 and value == best)
        for cell, value in zip(cells, values, strict=True)
    ]
    cells.append(Cell(f"{lead.judge} +{lead.margin:.1f}", (lead.note,)) if lead else Cell())
    size = f", n = {max(sizes):,}" if len(sizes) == 1 and max(sizes) else ""
    return TableRow(name, cells, (metric + size,))


def _metric_cell(result: BenchmarkResult, metric: str, has_n: bool = False) -> Cell:
    value = number_text(result.metrics.get(metric))
    if not value:
        return Cell("no verdicts" if result.metrics and metric in result.metrics else "")
    notes = [range_text(result.intervals.get(metric)), f"n = {result.n:,}" if has_n else ""]
    notes.append("⚠ INCOMPLETE" if result.incomplete else "")
    return Cell(value, tuple(filter(None, notes)))


def _settings(judges: Sequence[EvaluatedJudge]) -> list[TableRow]:
    rows = [
        TableRow(key.title(), [Cell(shown_name(getattr(judge.about, key))) for judge in judges])
        for key in SETTINGS
    ]
    for key in dict.fromkeys(key for judge in judges for key in judge.about.decoding):
        values = [judge.about.decoding.get(key) for judge in judges]
        cells = [Cell("" if value is None else shown_name(str(value))) for value in values]
        rows.append(TableRow(str(key), cells))
    return _with_values(rows)


def _with_values(rows: Sequence[TableRow]) -> list[TableRow]:
    return [row for row in rows if any(cell.value for cell in row.cells)]


def _policies(name: str, judges: Sequence[EvaluatedJudge]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(policy_text, results_of(name, judges)))))


# --- a benchmark ---


def _benchmark(
    name: str, judges: Sequence[EvaluatedJudge], reliability: Chart | None
) -> dict[str, Any]:
    """Return what the template shows of a benchmark."""
    results = results_of(name, judges)
    subsets = scorecard_charts.subset_chart(name, judges)
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    named = list(zip([judge.name for judge in judges], results, strict=True))
    return {
        "name": name,
        "incomplete": _incomplete([name], judges),
        "metrics": metrics,
        "rows": [*_metric_rows(metrics, named), *_published_rows(metrics, name, judges)],
        "comparisons": [row for judge, each in named for row in _comparison_rows(judge, each)],
        "subsets": subsets,
        "num_subsets": len({subset for result in results for subset in result.subsets}),
        "reliability": reliability,
        "confusions": [
            (judge, each.diagnostics.confusion.n, _confusion(each.diagnostics.confusion))
            for judge, each in named
            if each.diagnostics.confusion
        ],
        "bins": [
            (judge, bins)
            for judge, each in named
            if each.diagnostics.calibration and (bins := _bins(each.diagnostics.calibration.bins))
        ],
        "diagnostics": list(_diagnostics(results)),
        "worst": [(judge, list(map(_worst, each.worst))) for judge, each in named if each.worst],
    }


def _metric_rows(
    metrics: Sequence[str], named: Sequence[tuple[str, BenchmarkResult]]
) -> list[TableRow]:
    return [
        TableRow(judge, [_metric_cell(result, metric) for metric in metrics])
        for judge, result in named
        if result.metrics
    ]


def _published_rows(
    metrics: Sequence[str], name: str, judges: Sequence[EvaluatedJudge]
) -> list[TableRow]:
    """Return a row for each published judge and source, with the metrics that are reported."""
    by_source: dict[tuple[str, str], dict[str, float]] = {}
    for row in published_rows(name, judges):
        by_source.setdefault((row.judge, row.source), {})[row.metric] = row.value
    return _with_values(
        [
            TableRow(judge, [Cell(number_text(values.get(m))) for m in metrics], (source,), True)
            for (judge, source), values in by_source.items()
        ]
    )


def _comparison_rows(judge: str, result: BenchmarkResult) -> Iterator[TableRow]:
    if pair := result.comparison:
        points = Cell(f"{pair.difference:+.2f}", tuple(filter(None, [range_text(pair.interval)])))
        p_values = [Cell(_p_text(p)) for p in (pair.p_value, pair.mcnemar_p)]
        yield TableRow(
            f"{judge} less {shown_name(pair.other)}", [points, *p_values, Cell(f"{pair.n:,}")]
        )


def _p_text(p: float | None) -> str:
    return "< 0.0001" if p is not None and p < 0.00005 else number_text(p, 4)


def _confusion(confusion: Confusion) -> list[list[tuple[str, bool, int]]]:
    """Return rows of: text, whether verdict and label agree, the shade's share in percent."""
    said = {0: "tie", 1: "1", 2: "2", None: "none"}
    lines = [[("", False, 0), *((said[verdict], False, 0) for verdict in confusion.verdicts)]]
    for label, counts in zip(confusion.labels, confusion.counts, strict=True):
        if not sum(counts):
            continue  # no such label in this benchmark
        cells = [
            (f"{count:,}", verdict == label, round(55 * count / sum(counts)))
            for verdict, count in zip(confusion.verdicts, counts, strict=True)
        ]
        lines.append([(said[label], False, 0), *cells])
    return lines


def _bins(bins: Sequence[CalibrationBin]) -> list[TableRow]:
    return [
        TableRow(
            f"{each.low:g} to {each.high:g}",
            [
                Cell(number_text(each.confidence, 1)),
                Cell(number_text(each.accuracy, 1)),
                Cell(f"{each.n:,}"),
            ],
        )
        for each in bins
        if each.n
    ]


def _diagnostics(results: Sequence[BenchmarkResult]) -> Iterator[TableRow]:
    """Tabulate the diagnostics; a group's heading stands where any of its rows does."""
    heading: list[TableRow] = []
    for title, path, digits in DIAGNOSTICS:
        if not path:
            heading = [TableRow(title, [])]
            continue
        cells = [_diagnostic_cell(value_at(each.diagnostics, path), digits) for each in results]
        rows = _with_values([TableRow(title, cells)])
        rows += _statuses(results) if path == "parse_failures" else []
        if rows:
            yield from (*heading, *rows)
            heading = []


def _statuses(results: Sequence[BenchmarkResult]) -> list[TableRow]:
    """Return a row for each way in which a judge gave no verdict."""
    kinds = dict.fromkeys(kind for each in results for kind in each.statuses if kind != "ok")
    return [
        TableRow(
            f"… {kind.replace('_', ' ')}", [Cell(f"{r.statuses.get(kind, 0):,}") for r in results]
        )
        for kind in kinds
    ]


def _diagnostic_cell(value: float | Rate | Lean | Amount | None, digits: int) -> Cell:
    if isinstance(value, Rate):
        if value.percent is None:
            return Cell()
        interval = range_text(value.interval) if isinstance(value, ItemRate) else ""
        notes = filter(None, [interval, f"n = {value.n:,}"])
        return Cell(f"{value.percent:.1f} %", tuple(notes))
    if isinstance(value, Lean):
        if value.points is None:
            return Cell()
        return Cell(f"{value.points:+.1f} points", (f"n = {value.n:,}",))
    if isinstance(value, Amount):
        return Cell(number_text(value.mean, digits), (f"n = {value.n:,}",))
    return Cell(number_text(value, digits))


def _worst(item: WorstItem) -> dict[str, Any]:
    """Return what the template shows of one of the items that were judged worst."""
    label = item.label
    scores = ", ".join("none" if s is None else f"{s[0]:g} : {s[1]:g}" for s in item.scores)
    about = [
        item.item,
        item.subset,
        "" if label is None else f"label: answer {label}" if label else "label: a tie",
        f"scores {scores}" if any(item.scores) else "no scores",
        "" if item.credit is None else f"credit {item.credit:.2f}",
    ]
    return {"item": item, "about": [each for each in about if each]}
