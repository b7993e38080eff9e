"""`report.html`, `report.png` and `model_card.md` of evaluated judges, side by side.

The one idea: a page says what `results.json` says, and no more. Judges are columns, and whatever no
judge has numbers for is left out. The page is one file without scripts or network; each picture
comes in a light and a dark version. What a judge wrote is hostile text: it is escaped, and it
stands in boxes of its own.

Left out: any arithmetic on results. statistics.py made the numbers.

    python -m jlrm.scorecard RESULTS_DIR [RESULTS_DIR ...] --out DIR      renders again, compares
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from jlrm import commands, report
from jlrm.config import UsageError
from jlrm.report import DARK, LIGHT, Theme
from jlrm.tracking import write_atomically

Row = dict[str, Any]
HEADLINES = ("overall", "agreement")  # else a benchmark's first metric
MARKERS = "osD^vP"  # with the colours: judges are told apart without them
WIDTH = 4.2  # of a picture, inches: legible on a phone
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


class Judge(NamedTuple):
    name: str  # unique on the page
    about: Row
    benchmarks: dict[str, Row]


class Chart(NamedTuple):
    title: str
    height: float  # inches
    draw: Callable[[Any, Theme], None]  # into a figure of matplotlib


def write(out: pathlib.Path, results: list[Row]) -> None:
    """Write `report.html`, `report.png` and `model_card.md` into a directory.

    Each entry of `results` is the content of one `results.json`. Raises UsageError for others.
    """
    judges = _judges(results)
    names = list(dict.fromkeys(name for judge in judges for name in judge.benchmarks))
    glance = [_headline_chart(names, judges), *_order_charts(names, judges)]
    title = " and ".join(judge.name for judge in judges)
    reliability = [_reliability_chart(name, judges) for name in names]
    overview = [chart for chart in [*glance, *reliability] if chart]
    write_atomically(out / "report.png", _draw(overview, LIGHT, 3, title))
    links = " · ".join(f'<a href="#b{i}">{escape(name)}</a>' for i, name in enumerate(names))
    page = PAGE.format(
        css=report.CSS + CSS,
        title=escape(title),
        warning=_warning(names, judges),
        headline=_headline_table(names, judges),
        links=f"<nav>{links}</nav>" if len(names) > 1 else "",
        charts=_charts_html(glance),
        judges=_judges_table(judges),
        benchmarks="".join(
            f'<section id="b{i}"><h2>{escape(name)}</h2>{_benchmark_html(name, judges)}</section>'
            for i, name in enumerate(names)
        ),
    )
    write_atomically(out / "report.html", page.encode(errors="replace"))  # lone surrogates
    write_atomically(out / "model_card.md", _model_card(judges).encode(errors="replace"))


# Reading results


def _judges(results: Sequence[Row]) -> list[Judge]:
    judges: dict[str, Judge] = {}
    for number, result in enumerate(results, start=1):
        about, benchmarks = _find(result, "judge"), _find(result, "benchmarks")
        if not isinstance(about, dict) or not isinstance(benchmarks, dict):
            raise UsageError(
                f"results {number} hold no `judge` and `benchmarks`, two JSON objects. "
                "Give the results.json that jlrm.evaluate writes."
            )
        wanted = str(about.get("name") or f"judge {number}")
        alike = (f"{wanted} ({i})" for i in itertools.count(2))
        name = next(name for name in itertools.chain([wanted], alike) if name not in judges)
        judges[name] = Judge(name, about, benchmarks)
    return list(judges.values())


def _entries(name: str, judges: Sequence[Judge]) -> list[Row]:
    """Return what each judge has of a benchmark; empty where it was not run."""
    return [judge.benchmarks.get(name) or {} for judge in judges]


def _find(entry: Any, path: str) -> Any:
    for key in path.split("."):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def _number(value: Any) -> float | None:
    """Return a finite number; None for null, for NaN (a string where JSON is strict) and others."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _interval(value: Any) -> tuple[float, float] | None:
    low, high = (_number(end) for end in value or (None, None))
    return None if low is None or high is None else (low, high)


def _headline(name: str, judges: Sequence[Judge]) -> str:
    metrics = list(dict.fromkeys(m for e in _entries(name, judges) for m in e.get("metrics") or {}))
    return next((metric for metric in HEADLINES if metric in metrics), (metrics or [""])[0])


def _published(name: str, judges: Sequence[Judge]) -> list[Row]:
    """Return the published values of a benchmark, each once."""
    rows = [row for entry in _entries(name, judges) for row in entry.get("published") or []]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def _policy(entry: Row) -> str:
    policy = entry.get("policy") or {}
    return " · ".join(f"{key.replace('_', ' ')}: {value}" for key, value in policy.items())


# Text


def _text(value: Any, digits: int = 2) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.{digits}f}"


def _range(interval: Any) -> str:
    ends = _interval(interval)
    return f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else ""


def _cell(main: str, *small: str) -> str:
    """Return a cell: a value, and what qualifies it in small print below."""
    notes = "".join(f"<br><small>{escape(note)}</small>" for note in small if note)
    return escape(main) + notes if main else ""


def _diagnostic(value: Any, digits: int) -> str:
    if not isinstance(value, dict):
        return _cell(_text(value, digits))
    n = f"n = {value['n']:,}" if "n" in value else ""
    if _number(value.get("percent")) is not None:
        return _cell(f"{value['percent']:.1f} %", _range(value.get("interval")), n)
    if _number(value.get("points")) is not None:
        return _cell(f"{value['points']:+.1f} points", n)
    return _cell(_text(value.get("mean"), digits), n)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of HTML; those without a value are left out, "–" marks a single absent one."""
    kept = [row for row in rows if any(row[1:])]
    lines = ["<tr><th>" + "<th>".join(header)]
    lines += [f"<tr><th>{row[0]}{_cells(row[1:])}" for row in kept]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if kept else ""


def _cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell or '–'}" for cell in cells)


def _names(judges: Sequence[Judge]) -> list[str]:
    return [escape(judge.name) for judge in judges]


# Parts of the page


def _warning(names: Sequence[str], judges: Sequence[Judge]) -> str:
    lines = [
        f"<li>{escape(judge.name)}: {escape(name)}"
        for judge in judges
        for name in names
        if (judge.benchmarks.get(name) or {}).get("incomplete")
    ]
    if not lines:
        return ""
    return (
        '<div class="warning"><strong>⚠ INCOMPLETE.</strong> These runs have not judged all games, '
        f"so their numbers are no results yet:<ul>{''.join(lines)}</ul></div>"
    )


def _metric_cell(entry: Row, metric: str) -> str:
    interval = _range((entry.get("intervals") or {}).get(metric))
    cell = _cell(_text((entry.get("metrics") or {}).get(metric)), interval)
    is_part = cell and entry.get("incomplete")
    return cell + '<br><small class="wrong">⚠ INCOMPLETE</small>' if is_part else cell


def _published_cell(rows: Sequence[Row], metric: str) -> str:
    found = [row for row in rows if row.get("metric") == metric]
    values = "<br>".join(_cell(_text(r.get("value")), str(r.get("judge", ""))) for r in found)
    return f'<span class="loose">{values}</span>' if values else ""


def _headline_table(names: Sequence[str], judges: Sequence[Judge]) -> str:
    lines = []
    for number, name in enumerate(names):
        metric, published = _headline(name, judges), _published(name, judges)
        entries = _entries(name, judges)
        cells = [_metric_cell(entry, metric) for entry in entries]
        cells.append(_published_cell(published, metric))
        n = ", ".join(dict.fromkeys(f"{e['n']:,}" for e in entries if _number(e.get("n"))))
        head = f'<a href="#b{number}">{escape(name)}</a><br><small>{escape(metric)}'
        head += f", n = {n}</small>" if n else "</small>"
        lines.append(f"<tr><th>{head}{_cells(cells)}")
        for policy in dict.fromkeys(filter(None, map(_policy, entries))):
            span = len(judges) + 2
            lines.append(
                f'<tr class="policy loose"><td colspan="{span}"><small>{escape(policy)}</small>'
            )
    if not lines:
        return "<p>No benchmark was run.</p>"
    header = "<tr><th>" + "".join(f"<th>{name}" for name in [*_names(judges), "Published"])
    return f'<div class="wide"><table class="headline">{header}{"".join(lines)}</table></div>'


def _judges_table(judges: Sequence[Judge]) -> str:
    keys = ("model", "backend", "prompt", "parser")
    rows = [[key.title(), *(escape(str(j.about.get(key) or "")) for j in judges)] for key in keys]
    options = dict.fromkeys(key for judge in judges for key in judge.about.get("decoding") or {})
    for key in options:
        found = [(judge.about.get("decoding") or {}).get(key) for judge in judges]
        rows.append([escape(str(key)), *("" if v is None else escape(str(v)) for v in found)])
    return f'<div class="loose">{_table(["", *_names(judges)], rows)}</div>'


def _benchmark_html(name: str, judges: Sequence[Judge]) -> str:
    entries, published = _entries(name, judges), _published(name, judges)
    metrics = dict.fromkeys(metric for entry in entries for metric in entry.get("metrics") or {})
    rows = [
        [escape(m), *(_metric_cell(e, m) for e in entries), _published_cell(published, m)]
        for m in metrics
    ]
    if not published:
        rows = [row[:-1] for row in rows]
    header = ["Metric (%)", *_names(judges), *(["Published"] if published else [])]
    charts = [_subset_chart(name, judges), _reliability_chart(name, judges)]
    confusions = (_confusion_html(judge, name, len(judges) > 1) for judge in judges)
    parts = [
        _warning([name], judges),
        "".join(f"<p>{escape(p)}</p>" for p in dict.fromkeys(map(_policy, entries)) if p),
        _table(header, rows),
        _published_html(published),
        _comparisons_html(name, judges),
        _charts_html(charts, *confusions),
        _bins_html(name, judges),
        "<h3>How it judges</h3>" + table if (table := _diagnostics_table(name, judges)) else "",
        _worst_html(name, judges),
    ]
    return "".join(parts)


def _published_html(published: Sequence[Row]) -> str:
    sources: dict[str, None] = {}
    for row in published:
        command = row.get("command")
        code = f"<br><code>{escape(str(command))}</code>" if command else ""
        source = escape(f"{row.get('judge', '')}: {row.get('source', '')}")
        sources[f"<li>{source}{code}"] = None
    if not sources:
        return ""
    return f"<details><summary>Published: sources</summary><ul>{''.join(sources)}</ul></details>"


def _comparisons_html(name: str, judges: Sequence[Judge]) -> str:
    parts = []
    for judge, entry in zip(judges, _entries(name, judges), strict=True):
        comparison = entry.get("comparison") or {}
        rows = [
            [
                escape(metric),
                _cell(f"{found['difference']:+.2f}", _range(found.get("interval"))),
                _text(found.get("p_value"), 4),
                _text(found.get("mcnemar_p"), 4),
            ]
            for metric, found in comparison.items()
            if isinstance(found, dict) and _number(found.get("difference")) is not None
        ]
        title = f"{judge.name} less {comparison.get('other')}, on the same items"
        header = ["", "Points", "Bootstrap p", "McNemar p"]
        parts.append(f"<h3>{escape(title)}</h3>{_table(header, rows)}" if rows else "")
    return "".join(parts)


def _confusion_html(judge: Judge, name: str, is_named: bool) -> str:
    confusion = _find(judge.benchmarks.get(name), "diagnostics.confusion")
    if not confusion:
        return ""
    said = {0: "tie", 1: "1", 2: "2", None: "none"}
    lines = ["<tr><th>" + "".join(f"<th>{said[column]}" for column in confusion["verdicts"])]
    for label, counts in zip(confusion["labels"], confusion["counts"], strict=True):
        if not sum(counts):
            continue  # no such label in this benchmark
        cells = []
        for verdict, count in zip(confusion["verdicts"], counts, strict=True):
            kind = ' class="hit"' if verdict == label else ""
            cells.append(f'<td{kind} style="--share:{count / sum(counts):.3f}">{count:,}')
        lines.append(f"<tr><th>{said[label]}{''.join(cells)}")
    return (
        f"<figure><figcaption><b>Labels (rows) by verdicts</b>"
        f"{'<br>' + escape(judge.name) if is_named else ''}</figcaption>"
        f'<table class="confusion">{"".join(lines)}</table>'
        f"<small>{confusion['n']:,} games, answers in the order of the item; shade: share of the "
        "row; none: no verdict</small></figure>"
    )


def _diagnostics_table(name: str, judges: Sequence[Judge]) -> str:
    """Tabulate the diagnostics; a group's heading stands where any of its rows does."""
    found = [entry.get("diagnostics") for entry in _entries(name, judges)]
    lines, heading = [], ""
    for title, path, digits in DIAGNOSTICS:
        if not path:
            heading = f'<tr class="group"><th colspan="{len(judges) + 1}">{title}'
            continue
        cells = [_diagnostic(_find(entry, path), digits) for entry in found]
        if any(cells):
            lines.append(f"{heading}<tr><th>{title}{_cells(cells)}")
            heading = ""
        if path == "parse_failures":
            lines += [_statuses(name, judges)]
    header = "<tr><th>" + "".join(f"<th>{judge}" for judge in _names(judges))
    table = f'<div class="wide"><table>{header}{"".join(lines)}</table></div>'
    return table if any(lines) else ""


def _statuses(name: str, judges: Sequence[Judge]) -> str:
    """Return a row for each way in which a judge gave no verdict."""
    found = [entry.get("statuses") or {} for entry in _entries(name, judges)]
    kinds = [kind for kind in dict.fromkeys(k for each in found for k in each) if kind != "ok"]
    return "".join(
        f"<tr><th>… {escape(kind.replace('_', ' '))}"
        + "".join(f"<td>{each.get(kind, 0):,}" for each in found)
        for kind in kinds
    )


def _bins_html(name: str, judges: Sequence[Judge]) -> str:
    tables = []
    for judge, entry in zip(judges, _entries(name, judges), strict=True):
        bins = _find(entry, "diagnostics.calibration.bins") or []
        rows = [
            [
                f"{found['from']:g} to {found['to']:g}",
                _text(found["confidence"], 1),
                _text(found["accuracy"], 1),
                f"{found['n']:,}",
            ]
            for found in bins
            if found["n"]
        ]
        table = _table(["Confidence (%)", "Mean", "Accuracy (%)", "Games"], rows)
        tables.append(f"<h4>{escape(judge.name)}</h4>{table}" if table else "")
    if not any(tables):
        return ""
    return f"<details><summary>Reliability in numbers</summary>{''.join(tables)}</details>"


def _worst_html(name: str, judges: Sequence[Judge]) -> str:
    parts = []
    for judge, entry in zip(judges, _entries(name, judges), strict=True):
        if worst := entry.get("worst"):
            cards = "".join(map(_card, worst))
            title = f"Most wrong: {judge.name}" if len(judges) > 1 else "Most wrong"
            parts.append(f"<h3>{escape(title)}</h3>{cards}")
    return "".join(parts)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif value is not None:
        yield value


def _scores_text(scores: Any) -> str:
    """Return "8 : 5" for two scores, and a list of that for those of several games."""
    if not scores or all(each is None for each in scores):
        return ""
    if all(_number(each) is not None for each in scores):
        return " : ".join(f"{float(each):g}" for each in scores)
    return ", ".join(_scores_text(each) or "none" for each in scores)


def _card(row: Row) -> str:
    label, scores = row.get("label"), _scores_text(row.get("scores"))
    about = [
        str(row.get("item", "")),
        str(row.get("subset") or ""),
        "" if label is None else f"label: answer {label}" if label else "label: a tie",
        f"scores {scores}" if scores else "no scores",
        f"credit {_text(row.get('credit'))}" if _number(row.get("credit")) is not None else "",
    ]
    outputs = "".join(f"<pre>{escape(str(text))}</pre>" for text in _leaves(row.get("outputs")))
    answers = "".join(
        f"<div><h4{' class=right' if number == label else ''}>Answer {number}"
        f"{' (label)' if number == label else ''}</h4><pre>{escape(str(answer))}</pre></div>"
        for number, answer in enumerate(row.get("answers") or (), start=1)
    )
    return (
        f"<details class=card><summary>{escape(' · '.join(filter(None, about)))}</summary>"
        f"<h4>Question</h4><pre>{escape(str(row.get('question', '')))}</pre>"
        f'<div class="answers">{answers}</div>'
        f"<h4>What the judge wrote</h4>{outputs or '<p>Not recorded.</p>'}</details>"
    )


# Pictures


def _charts_html(charts: Sequence[Chart | None], *others: str) -> str:
    pictures = [_picture(chart) for chart in charts if chart]
    content = "".join([*pictures, *others])
    return f'<div class="charts">{content}</div>' if content else ""


def _picture(chart: Chart) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(_draw([chart], theme, 1)).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(chart.title)}"></picture>'
    )


def _draw(charts: Sequence[Chart], theme: Theme, num_columns: int, title: str = "") -> bytes:
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    num_columns = max(1, min(num_columns, len(charts)))
    rows = [charts[i : i + num_columns] for i in range(0, len(charts), num_columns)] or [[]]
    heights = [max([chart.height for chart in row], default=1.0) for row in rows]
    size = (WIDTH * num_columns, sum(heights) + (0.4 if title else 0))
    figure = Figure(size, dpi=180, layout="constrained", facecolor=theme.paper)
    if title:
        style = {"weight": "bold", "color": theme.ink, "parse_math": False}
        figure.suptitle(title, x=0.005, ha="left", **style)
    parts = figure.subfigures(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for chart, part in zip(charts, parts.flat, strict=False):
        part.set_facecolor(theme.paper)
        style = {"fontsize": 9, "weight": "bold", "color": theme.ink, "parse_math": False}
        part.suptitle(chart.title, x=0.01, ha="left", **style)
        chart.draw(part, theme)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _axes(figure: Any, theme: Theme, grid: str = "x", place: Any = 111) -> Any:
    axes = figure.add_subplot(place, facecolor=theme.paper)
    axes.tick_params(colors=theme.ink, labelsize=8, length=0, which="both")
    axes.grid(axis=grid, color=theme.faint, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set(visible=False)
    return axes


def _legend(
    figure: Any, theme: Theme, judges: Sequence[Judge], has_published: bool = False
) -> None:
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"ls": "", "ms": 6}
    handles = [
        Line2D([], [], color=_colour(theme, i), marker=MARKERS[i % 6], label=judge.name, **style)
        for i, judge in enumerate(judges)
    ]
    if has_published:
        handles.append(Line2D([], [], marker="x", color=theme.ink, label="published", **style))
    if len(handles) > 1:
        place = {"loc": "outside lower left", "ncols": 2 if len(handles) > 2 else 1}
        legend = figure.legend(handles=handles, frameon=False, fontsize=8, **place)
        for text in legend.get_texts():
            text.set(color=theme.ink, parse_math=False)


def _colour(theme: Theme, number: int) -> str:
    return theme.colours[number % len(theme.colours)]


class _Point(NamedTuple):
    value: float
    interval: tuple[float, float] | None
    is_part: bool = False  # of an incomplete run: hollow


Dots = list[tuple[str, list[_Point | None]]]  # a label, a point for each judge


def _dots(figure: Any, theme: Theme, rows: Dots, num_judges: int) -> Any:
    """Draw a line of dots with intervals for each label, from the top down."""
    axes = _axes(figure, theme)
    for number, (_, points) in enumerate(rows):
        for judge, point in enumerate(points):
            if point is None:
                continue
            y = number + (judge - (num_judges - 1) / 2) * 0.6 / num_judges
            colour = _colour(theme, judge)
            if point.interval:
                axes.plot(point.interval, [y, y], color=colour, lw=2.2, alpha=0.55)
            inside = theme.paper if point.is_part else colour
            axes.plot(point.value, y, MARKERS[judge % 6], color=colour, mfc=inside, ms=5)
    labels = [label for label, _ in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False, color=theme.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    return axes


def _dots_height(rows: Dots, num_judges: int) -> float:
    return 0.75 + len(rows) * (0.17 + 0.13 * num_judges) + 0.11 * num_judges


def _cut(text: str, width: int = 22) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(text: str, width: int = 20) -> str:
    """Break a label into lines of a readable axis; a long word is cut."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])


def _headline_chart(names: Sequence[str], judges: Sequence[Judge]) -> Chart | None:
    rows: Dots = []
    published: list[list[float]] = []
    for name in names:
        metric = _headline(name, judges)
        points = [_metric_point(entry, metric) for entry in _entries(name, judges)]
        if any(points):
            mark = "\nINCOMPLETE" if any(point and point.is_part for point in points) else ""
            rows.append((_wrap(name) + mark, points))
            found = [r for r in _published(name, judges) if r.get("metric") == metric]
            published.append([v for r in found if (v := _number(r.get("value"))) is not None])
    if not rows:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        axes = _dots(figure, theme, rows, len(judges))
        for number, values in enumerate(published):
            axes.plot(values, [number] * len(values), "x", color=theme.ink, ms=6)
        _legend(figure, theme, judges, any(published))

    return Chart(HEADLINE_TITLE, _dots_height(rows, len(judges)) + 0.3, draw)


def _point(value: Any, interval: Any, is_part: bool = False) -> _Point | None:
    number = _number(value)
    return None if number is None else _Point(number, _interval(interval), is_part)


def _metric_point(entry: Row, metric: str) -> _Point | None:
    value, interval = ((entry.get(key) or {}).get(metric) for key in ("metrics", "intervals"))
    return _point(value, interval, bool(entry.get("incomplete")))


def _order_charts(names: Sequence[str], judges: Sequence[Judge]) -> list[Chart | None]:
    rows: Dots = []
    bars: list[tuple[str, int, float, float]] = []  # label, judge, shares of first and second
    for name in names:
        points: list[_Point | None] = []
        for number, entry in enumerate(_entries(name, judges)):
            rate = _find(entry, "diagnostics.consistency") or {}
            points.append(_point(rate.get("percent"), rate.get("interval")))
            first = _number(_find(entry, "diagnostics.first.percent"))
            second = _number(_find(entry, "diagnostics.second.percent"))
            if first is not None and second is not None:
                bars.append((_wrap(name), number, first, second))
        if any(points):
            rows.append((_wrap(name), points))

    def draw_consistency(figure: Any, theme: Theme) -> None:
        _dots(figure, theme, rows, len(judges)).set_xlim(right=101)
        _legend(figure, theme, judges)

    def draw_places(figure: Any, theme: Theme) -> None:
        _draw_places(figure, theme, bars, judges)

    height = 0.95 + 0.3 * len(bars)
    return [
        Chart(CONSISTENCY_TITLE, _dots_height(rows, len(judges)), draw_consistency)
        if rows
        else None,
        Chart(PLACES_TITLE, height, draw_places) if bars else None,
    ]


def _draw_places(
    figure: Any, theme: Theme, bars: list[tuple[str, int, float, float]], judges: Sequence[Judge]
) -> None:
    axes = _axes(figure, theme)
    first_colour, second_colour = theme.colours[2:4]  # the first ones are judges'
    for y, (_, _, first, second) in enumerate(bars):
        parts = [(0, first, first_colour), (first, 100 - first - second, theme.faint)]
        for left, width, colour in [*parts, (100 - second, second, second_colour)]:
            axes.barh(y, width, left=left, color=colour, height=0.7)
        ends = ((1, first, "left"), (99, second, "right"))
        for x, share, side in ends:
            if share >= 8:
                text = {"fontsize": 8, "weight": "bold", "color": LIGHT.ink}
                axes.text(x, y, f"{share:.0f}", ha=side, va="center", **text)
    axes.axvline(50, color=theme.ink, lw=0.8, ls=":")
    labels = [f"{name}\n{_cut(judges[j].name)}" if judges[1:] else name for name, j, *_ in bars]
    axes.set_yticks(range(len(bars)), labels, parse_math=False, color=theme.ink)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 100)


def _subset_chart(name: str, judges: Sequence[Judge]) -> Chart | None:
    entries = [entry.get("subsets") or {} for entry in _entries(name, judges)]
    rows: Dots = []
    for subset in dict.fromkeys(subset for each in entries for subset in each):
        found = [each.get(subset) or {} for each in entries]
        points = [_point(each.get("accuracy"), each.get("interval")) for each in found]
        n = next((f"  ({each['n']:,})" for each in found if each.get("n") is not None), "")
        if any(points):
            rows.append((_wrap(subset + n, 26), points))
    if not rows:
        return None
    title = "Accuracy by subset (%), number of items"

    def draw(figure: Any, theme: Theme) -> None:
        _draw_bars(figure, theme, rows, len(judges))
        _legend(figure, theme, judges)

    return Chart(title, _dots_height(rows, len(judges)), draw)


def _draw_bars(figure: Any, theme: Theme, rows: Dots, num_judges: int) -> None:
    axes = _axes(figure, theme)
    height = 0.75 / num_judges
    for number, (_, points) in enumerate(rows):
        for judge, point in enumerate(points):
            if point is None:
                continue
            y = number + (judge - (num_judges - 1) / 2) * height
            colour = _colour(theme, judge)
            axes.barh(y, point.value, height=0.85 * height, color=colour, alpha=0.75)
            if point.interval:
                axes.plot(point.interval, [y, y], color=theme.ink, lw=1.2)
    labels = [label for label, _ in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False, color=theme.ink)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)


def _reliability_chart(name: str, judges: Sequence[Judge]) -> Chart | None:
    calibrations = [_find(e, "diagnostics.calibration") or {} for e in _entries(name, judges)]
    bins = [[b for b in each.get("bins") or [] if b["n"]] for each in calibrations]
    if not any(bins):
        return None
    title = f"Reliability: {name}"

    def draw(figure: Any, theme: Theme) -> None:
        grid = figure.add_gridspec(2, 1, height_ratios=(3, 1))
        curve = _axes(figure, theme, "both", grid[0])
        counts = _axes(figure, theme, "y", grid[1])
        curve.plot([50, 100], [50, 100], color=theme.ink, lw=0.8, ls=":")
        for number, found in enumerate(bins):
            colour, marker = _colour(theme, number), MARKERS[number % 6]
            x, y = ([b[key] for b in found] for key in ("confidence", "accuracy"))
            curve.plot(x, y, color=colour, marker=marker, ms=5, lw=1.5)
            width = 4 / len(bins)
            places = [b["from"] + 0.5 + width * (number + 0.5) for b in found]
            counts.bar(places, [b["n"] for b in found], width=0.9 * width, color=colour)
        curve.set_ylabel("accuracy (%)", color=theme.ink, fontsize=8)
        counts.set_ylabel("games", color=theme.ink, fontsize=8)
        counts.set_xlabel("confidence stated by the margin (%)", color=theme.ink, fontsize=8)
        for axes in (curve, counts):
            axes.set_xlim(49, 101)
        _legend(figure, theme, judges)

    return Chart(title, 3.4 + 0.1 * len(judges), draw)


# Model card


def _model_card(judges: Sequence[Judge]) -> str:
    """Return Markdown for a model card: every metric, under what rules, and what to know of it."""
    columns = ["benchmark", "metric", "value (%)", "95 % interval", "n", "policy"]
    columns += ["prompt", "parser"]
    rows = []
    for judge in judges:
        for name, entry in judge.benchmarks.items():
            for metric, value in (entry.get("metrics") or {}).items():
                mark = " (INCOMPLETE)" if entry.get("incomplete") else ""
                interval = _range((entry.get("intervals") or {}).get(metric))
                cells = [name + mark, metric, _text(value) or "–", interval or "–"]
                cells += [entry.get("n", "–"), _policy(entry) or "–"]
                cells += [judge.about.get("prompt") or "–", judge.about.get("parser") or "–"]
                rows.append([judge.name, *cells] if len(judges) > 1 else cells)
    header = ["judge", *columns] if len(judges) > 1 else columns
    lines = ["## Evaluation", "", *_markdown(header, rows), ""]
    published = [
        [name, row.get("judge"), row.get("metric"), _text(row.get("value")), row.get("source")]
        for name in dict.fromkeys(name for judge in judges for name in judge.benchmarks)
        for row in _published(name, judges)
    ]
    if published:
        header = ["benchmark", "judge", "metric", "value (%)", "source"]
        lines += ["### Published values", "", *_markdown(header, published), ""]
    notes = [note for judge in judges for note in _notes(judge, len(judges) > 1)]
    return "\n".join([*lines, "### Notes", "", *(f"* {note}" for note in notes + NOTES), ""])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(value: Any) -> str:
    """Return one line that Markdown shows as it is."""
    text = escape(" ".join(str("–" if value is None else value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _notes(judge: Judge, is_named: bool) -> Iterator[str]:
    """Say of each benchmark what its metrics do not show."""
    decoding = ", ".join(f"{k} {v}" for k, v in (judge.about.get("decoding") or {}).items())
    about = [f"{k} {judge.about[k]}" for k in ("model", "backend") if judge.about.get(k)]
    if parts := [*about, *([f"decoding: {decoding}"] if decoding else [])]:
        yield _plain(f"{judge.name}: {'; '.join(parts)}.")
    for name, entry in judge.benchmarks.items():
        start = f"{judge.name}, {name}" if is_named else name
        if entry.get("incomplete"):
            yield f"**{_plain(start)}: INCOMPLETE. Not all games were judged.**"
        facts = []
        for title, path in NOTED.items():
            found = _find(entry, f"diagnostics.{path}") or {}
            if _number(found.get("percent")) is not None:
                facts.append(f"{title} {found['percent']:.1f} % (n = {found['n']:,})")
        if (ece := _number(_find(entry, "diagnostics.calibration.ece"))) is not None:
            facts.append(f"calibration error {ece:.1f} points")
        if facts:
            yield _plain(f"{start}: {'; '.join(facts)}.")


NOTED = {
    "no verdict in": "parse_failures",
    "ties": "ties",
    "names the answer shown first in": "first",
    "same verdict in both orders": "consistency",
    "prefers the longer answer in": "length.verdicts",
    "labels prefer it in": "length.labels",
}
NOTES = [
    "Intervals are 95 % percentile intervals of a bootstrap over items. They do not cover other "
    "prompts, other decoding or another choice of items.",
    "Published values follow their own prompt, decoding and policy; a difference may come from "
    "any of them.",
]
HEADLINE_TITLE = "Results (%) with 95 % intervals"
CONSISTENCY_TITLE = "Same verdict in both orders (%)"
PLACES_TITLE = "Verdicts: shown first, tie, shown second (%)"

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


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the results and write them."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.scorecard",
        description="Write report.html, report.png and model_card.md of judges side by side.",
    )
    parser.add_argument(
        "results", type=pathlib.Path, nargs="+", help="directories that hold a results.json"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where to write")
    arguments = parser.parse_args(argv)
    write(arguments.out, [_read(directory) for directory in arguments.results])
    print(arguments.out / "report.html")


def _read(directory: pathlib.Path) -> Row:
    path = directory / "results.json"
    if not path.exists():
        raise UsageError(
            f"{directory} holds no results.json. Give what --out of an evaluation named."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}. Run the evaluation again.") from error


if __name__ == "__main__":
    sys.exit(commands.run(main))
