"""The page of one or more evaluations, benchmark by benchmark."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from html import escape

from jlrm.reports import theme
from jlrm.reports.evaluated import (
    EvaluatedJudge,
    diagnostic_cell,
    headline_metric,
    html_cell,
    html_cells,
    html_names,
    html_table,
    name_judges,
    number_text,
    policy_text,
    published_rows,
    range_text,
    results_of,
    value_at,
)
from jlrm.reports.model_card import model_card
from jlrm.reports.results_file import (
    BenchmarkResult,
    PairedComparison,
    Published,
    Results,
    WorstItem,
)
from jlrm.reports.scorecard_charts import (
    charts_html,
    draw_charts,
    headline_chart,
    order_charts,
    reliability_chart,
    subset_chart,
)
from jlrm.reports.theme import LIGHT
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


def write(out: pathlib.Path, files: Sequence[Results]) -> None:
    """Write `report.html`, `report.png` and `model_card.md` of results files into a directory."""
    judges = name_judges(files)
    names = list(dict.fromkeys(name for judge in judges for name in judge.benchmarks))
    glance = [headline_chart(names, judges), *order_charts(names, judges)]
    title = " and ".join(judge.name for judge in judges)
    reliability = [reliability_chart(name, judges) for name in names]
    overview = [chart for chart in [*glance, *reliability] if chart]
    write_atomically(out / "report.png", draw_charts(overview, LIGHT, 3, title))
    links = " · ".join(f'<a href="#b{i}">{escape(name)}</a>' for i, name in enumerate(names))
    page = PAGE.format(
        css=theme.CSS + CSS,
        title=escape(title),
        warning=_warning(names, judges),
        headline=_headline_table(names, judges),
        links=f"<nav>{links}</nav>" if len(names) > 1 else "",
        charts=charts_html(glance),
        judges=_judges_table(judges),
        benchmarks="".join(
            f'<section id="b{i}"><h2>{escape(name)}</h2>{_benchmark_html(name, judges)}</section>'
            for i, name in enumerate(names)
        ),
    )
    write_atomically(out / "report.html", page.encode(errors="replace"))  # lone surrogates
    write_atomically(out / "model_card.md", model_card(judges).encode(errors="replace"))


def _warning(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> str:
    lines = [
        f"<li>{escape(judge.name)}: {escape(name)}"
        for judge in judges
        for name in names
        if judge.result(name).incomplete
    ]
    if not lines:
        return ""
    return (
        '<div class="warning"><strong>⚠ INCOMPLETE.</strong> These runs have not judged all games, '
        f"so their numbers are no results yet:<ul>{''.join(lines)}</ul></div>"
    )


def _metric_cell(result: BenchmarkResult, metric: str) -> str:
    interval = range_text(result.intervals.get(metric))
    cell = html_cell(number_text(result.metrics.get(metric)), interval)
    is_part = cell and result.incomplete
    return cell + '<br><small class="wrong">⚠ INCOMPLETE</small>' if is_part else cell


def _published_cell(rows: Sequence[Published], metric: str) -> str:
    values = "<br>".join(
        html_cell(number_text(row.value), row.judge) for row in rows if row.metric == metric
    )
    return f'<span class="loose">{values}</span>' if values else ""


def _headline_table(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> str:
    lines = []
    for number, name in enumerate(names):
        metric, published = headline_metric(name, judges), published_rows(name, judges)
        results = results_of(name, judges)
        cells = [_metric_cell(result, metric) for result in results]
        cells.append(_published_cell(published, metric))
        n = ", ".join(dict.fromkeys(f"{result.n:,}" for result in results if result.n))
        head = f'<a href="#b{number}">{escape(name)}</a><br><small>{escape(metric)}'
        head += f", n = {n}</small>" if n else "</small>"
        lines.append(f"<tr><th>{head}{html_cells(cells)}")
        for policy in dict.fromkeys(filter(None, map(policy_text, results))):
            span = len(judges) + 2
            lines.append(
                f'<tr class="policy loose"><td colspan="{span}"><small>{escape(policy)}</small>'
            )
    if not lines:
        return "<p>No benchmark was run.</p>"
    header = "<tr><th>" + "".join(f"<th>{name}" for name in [*html_names(judges), "Published"])
    return f'<div class="wide"><table class="headline">{header}{"".join(lines)}</table></div>'


def _judges_table(judges: Sequence[EvaluatedJudge]) -> str:
    keys = ("model", "backend", "prompt", "parser")
    rows = [[key.title(), *(escape(getattr(j.about, key)) for j in judges)] for key in keys]
    for key in dict.fromkeys(key for judge in judges for key in judge.about.decoding):
        values = [judge.about.decoding.get(key) for judge in judges]
        rows.append([escape(key), *("" if v is None else escape(str(v)) for v in values)])
    return f'<div class="loose">{html_table(["", *html_names(judges)], rows)}</div>'


def _benchmark_html(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    results, published = results_of(name, judges), published_rows(name, judges)
    metrics = dict.fromkeys(metric for result in results for metric in result.metrics)
    rows = [
        [escape(m), *(_metric_cell(r, m) for r in results), _published_cell(published, m)]
        for m in metrics
    ]
    if not published:
        rows = [row[:-1] for row in rows]
    header = ["Metric (%)", *html_names(judges), *(["Published"] if published else [])]
    charts = [subset_chart(name, judges), reliability_chart(name, judges)]
    confusions = (_confusion_html(judge, name, len(judges) > 1) for judge in judges)
    parts = [
        _warning([name], judges),
        "".join(f"<p>{escape(p)}</p>" for p in dict.fromkeys(map(policy_text, results)) if p),
        html_table(header, rows),
        _published_html(published),
        _comparisons_html(name, judges),
        charts_html(charts, *confusions),
        _bins_html(name, judges),
        "<h3>How it judges</h3>" + table if (table := _diagnostics_table(name, judges)) else "",
        _worst_html(name, judges),
    ]
    return "".join(parts)


def _published_html(published: Sequence[Published]) -> str:
    sources: dict[str, None] = {}
    for row in published:
        code = f"<br><code>{escape(row.command)}</code>" if row.command else ""
        sources[f"<li>{escape(f'{row.judge}: {row.source}')}{code}"] = None
    if not sources:
        return ""
    return f"<details><summary>Published: sources</summary><ul>{''.join(sources)}</ul></details>"


def _comparisons_html(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    """Show how each judge differs from the one that its evaluation was compared with."""
    return "".join(
        _comparison_html(judge.name, comparison)
        for judge in judges
        if (comparison := judge.result(name).comparison)
    )


def _comparison_html(name: str, comparison: PairedComparison) -> str:
    title = f"{name} less {comparison.other}, on the same items"
    row = [
        "Mean credit",
        html_cell(f"{comparison.difference:+.2f}", range_text(comparison.interval)),
        number_text(comparison.p_value, 4),
        number_text(comparison.mcnemar_p, 4),
        f"{comparison.n:,}",
    ]
    header = ["", "Points", "Bootstrap p", "McNemar p", "Items"]
    return f"<h3>{escape(title)}</h3>{html_table(header, [row])}"


def _confusion_html(judge: EvaluatedJudge, name: str, is_named: bool) -> str:
    confusion = judge.result(name).diagnostics.confusion
    if not confusion:
        return ""
    said = {0: "tie", 1: "1", 2: "2", None: "none"}
    lines = ["<tr><th>" + "".join(f"<th>{said[column]}" for column in confusion.verdicts)]
    for label, counts in zip(confusion.labels, confusion.counts, strict=True):
        if not sum(counts):
            continue  # no such label in this benchmark
        cells = []
        for verdict, count in zip(confusion.verdicts, counts, strict=True):
            kind = ' class="hit"' if verdict == label else ""
            cells.append(f'<td{kind} style="--share:{count / sum(counts):.3f}">{count:,}')
        lines.append(f"<tr><th>{said[label]}{''.join(cells)}")
    return (
        f"<figure><figcaption><b>Labels (rows) by verdicts</b>"
        f"{'<br>' + escape(judge.name) if is_named else ''}</figcaption>"
        f'<table class="confusion">{"".join(lines)}</table>'
        f"<small>{confusion.n:,} games, answers in the order of the item; shade: share of the "
        "row; none: no verdict</small></figure>"
    )


def _diagnostics_table(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    """Tabulate the diagnostics; a group's heading stands where any of its rows does."""
    diagnostics = [result.diagnostics for result in results_of(name, judges)]
    lines, heading = [], ""
    for title, path, digits in DIAGNOSTICS:
        if not path:
            heading = f'<tr class="group"><th colspan="{len(judges) + 1}">{title}'
            continue
        # A judge without games has counts of 0 that say nothing.
        cells = [
            diagnostic_cell(value_at(each, path), digits) if each.items else ""
            for each in diagnostics
        ]
        if any(cells):
            lines.append(f"{heading}<tr><th>{title}{html_cells(cells)}")
            heading = ""
        if path == "parse_failures":
            lines += [_statuses(name, judges)]
    header = "<tr><th>" + "".join(f"<th>{judge}" for judge in html_names(judges))
    table = f'<div class="wide"><table>{header}{"".join(lines)}</table></div>'
    return table if any(lines) else ""


def _statuses(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    """Return a row for each way in which a judge gave no verdict."""
    counts = [result.statuses for result in results_of(name, judges)]
    kinds = [kind for kind in dict.fromkeys(k for each in counts for k in each) if kind != "ok"]
    return "".join(
        f"<tr><th>… {escape(kind.replace('_', ' '))}"
        + "".join(f"<td>{each.get(kind, 0):,}" for each in counts)
        for kind in kinds
    )


def _bins_html(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    tables = []
    for judge in judges:
        calibration = judge.result(name).diagnostics.calibration
        rows = [
            [
                f"{each.low:g} to {each.high:g}",
                number_text(each.confidence, 1),
                number_text(each.accuracy, 1),
                f"{each.n:,}",
            ]
            for each in (calibration.bins if calibration else ())
            if each.n
        ]
        table = html_table(["Confidence (%)", "Mean", "Accuracy (%)", "Games"], rows)
        tables.append(f"<h4>{escape(judge.name)}</h4>{table}" if table else "")
    if not any(tables):
        return ""
    return f"<details><summary>Reliability in numbers</summary>{''.join(tables)}</details>"


def _worst_html(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    parts = []
    for judge in judges:
        if worst := judge.result(name).worst:
            cards = "".join(map(_card, worst))
            title = f"Most wrong: {judge.name}" if len(judges) > 1 else "Most wrong"
            parts.append(f"<h3>{escape(title)}</h3>{cards}")
    return "".join(parts)


def _scores_text(scores: Sequence[tuple[float, float] | None]) -> str:
    """Return the scores of each game, "8 : 5, none"; nothing where no game has any."""
    texts = [f"{pair[0]:g} : {pair[1]:g}" if pair else "none" for pair in scores]
    return ", ".join(texts) if any(scores) else ""


def _card(worst: WorstItem) -> str:
    label, scores = worst.label, _scores_text(worst.scores)
    about = [
        worst.item,
        worst.subset,
        "" if label is None else f"label: answer {label}" if label else "label: a tie",
        f"scores {scores}" if scores else "no scores",
        "" if worst.credit is None else f"credit {number_text(worst.credit)}",
    ]
    responses = "".join(f"<pre>{escape(text)}</pre>" for text in worst.responses)
    answers = "".join(
        f"<div><h4{' class=right' if number == label else ''}>Answer {number}"
        f"{' (label)' if number == label else ''}</h4><pre>{escape(answer)}</pre></div>"
        for number, answer in enumerate(worst.answers, start=1)
    )
    return (
        f"<details class=card><summary>{escape(' · '.join(filter(None, about)))}</summary>"
        f"<h4>Question</h4><pre>{escape(worst.question)}</pre>"
        f'<div class="answers">{answers}</div>'
        f"<h4>What the judge wrote</h4>{responses or '<p>Not recorded.</p>'}</details>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>
<body><h1>{title}</h1>{warning}
<h2>Results</h2><p>Percent, with 95 % intervals of a bootstrap over items. Published values follow
their own prompts and policies.</p>{headline}{links}{charts}
<h2>Judges</h2>{judges}
{benchmarks}
</body></html>
"""
CSS = """
a { color: inherit } nav { margin: 1rem 0 } h4 { margin: .75rem 0 .25rem }
.wide { overflow-x: auto; margin-bottom: 1rem } .wide table { margin-bottom: 0 }
td { vertical-align: top; white-space: nowrap }
.loose, .loose td { white-space: normal } .loose td, .loose small { overflow-wrap: anywhere }
th { vertical-align: top }
.wide tr:first-child th { overflow-wrap: anywhere; min-width: 4.2rem; vertical-align: bottom }
tr:first-child th + th { text-align: right }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  align-items: start; margin: 1rem 0; gap: 1.5rem 1rem }
.headline { width: 100% } .policy td { text-align: left; padding-top: 0 }
.headline tr:has(+ .policy) > * { border-bottom: 0 }
small.wrong { color: var(--wrong); font-weight: 700 }
.group th { padding-top: 1rem; color: var(--soft) }
.warning { border: 3px solid var(--wrong); border-radius: .5rem; padding: .75rem 1rem;
  margin: 1rem 0; color: var(--wrong) } .warning ul { margin: .25rem 0 0 }
figure { margin: 0 } figcaption { font-size: .9rem; margin-bottom: .5rem }
.confusion { margin-bottom: .5rem } .confusion td { min-width: 3.2rem;
  background: rgb(213 94 0 / calc(var(--share) * .55)) }
.confusion .hit { background: rgb(0 114 178 / calc(var(--share) * .55)); font-weight: 600 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; margin: .5rem 0 }
.card summary { padding-bottom: 0 } .card pre { unicode-bidi: isolate }
.answers { display: grid; gap: 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
@media (max-width: 45rem) { h1 { font-size: 1.5rem } .wide { font-size: .875rem }
  .wide tr:first-child th, .wide small { font-size: .75rem } small.wrong { white-space: normal }
  .headline td, .headline th { padding: .25rem; font-size: .8rem } }
"""
