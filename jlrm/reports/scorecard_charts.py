"""Pictures of evaluated judges: results with intervals, orders, subsets, reliability.

Judges are told apart by colour and marker. Each picture is drawn in a light and a dark version.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from jlrm.reports.evaluated import (
    EvaluatedJudge,
    headline_metric,
    published_rows,
    results_of,
    whole_interval,
)
from jlrm.reports.results_file import BenchmarkResult, Interval
from jlrm.reports.theme import DARK, LIGHT, Theme

MARKERS = "osD^vP"  # with the colours: judges are told apart without them
WIDTH = 4.2  # of a picture, inches: legible on a phone


class Chart(NamedTuple):
    title: str
    height: float  # inches
    draw: Callable[[Any, Theme], None]  # into a figure of matplotlib


def charts_html(charts: Sequence[Chart | None], *others: str) -> str:
    pictures = [_picture(chart) for chart in charts if chart]
    content = "".join([*pictures, *others])
    return f'<div class="charts">{content}</div>' if content else ""


def _picture(chart: Chart) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(draw_charts([chart], theme, 1)).decode()
        for theme in (LIGHT, DARK)
    )
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(chart.title)}"></picture>'
    )


def draw_charts(charts: Sequence[Chart], theme: Theme, num_columns: int, title: str = "") -> bytes:
    """Draw charts beside each other and return a PNG file's bytes."""
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
    figure: Any, theme: Theme, judges: Sequence[EvaluatedJudge], has_published: bool = False
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


def headline_chart(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart every benchmark's headline metric with its interval, beside published ones."""
    rows: Dots = []
    published: list[list[float]] = []
    for name in names:
        metric = headline_metric(name, judges)
        points = [_metric_point(result, metric) for result in results_of(name, judges)]
        if any(points):
            mark = "\nINCOMPLETE" if any(point and point.is_part for point in points) else ""
            rows.append((_wrap(name) + mark, points))
            rows_of_all = published_rows(name, judges)
            published.append([row.value for row in rows_of_all if row.metric == metric])
    if not rows:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        axes = _dots(figure, theme, rows, len(judges))
        for number, values in enumerate(published):
            axes.plot(values, [number] * len(values), "x", color=theme.ink, ms=6)
        _legend(figure, theme, judges, any(published))

    return Chart(HEADLINE_TITLE, _dots_height(rows, len(judges)) + 0.3, draw)


def _point(value: float | None, interval: Interval | None, is_part: bool = False) -> _Point | None:
    return None if value is None else _Point(value, whole_interval(interval), is_part)


def _metric_point(result: BenchmarkResult, metric: str) -> _Point | None:
    value, interval = result.metrics.get(metric), result.intervals.get(metric)
    return _point(value, interval, result.incomplete)


def order_charts(names: Sequence[str], judges: Sequence[EvaluatedJudge]) -> list[Chart | None]:
    """Chart what the order of the answers does: agreement of both orders, the lean to a place."""
    rows: Dots = []
    bars: list[tuple[str, int, float, float]] = []  # label, judge, shares of first and second
    for name in names:
        points: list[_Point | None] = []
        for number, result in enumerate(results_of(name, judges)):
            diagnostics = result.diagnostics
            rate, first, second = diagnostics.consistency, diagnostics.first, diagnostics.second
            points.append(_point(rate.percent, rate.interval) if rate else None)
            if first and second and first.percent is not None and second.percent is not None:
                bars.append((_wrap(name), number, first.percent, second.percent))
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
    figure: Any,
    theme: Theme,
    bars: list[tuple[str, int, float, float]],
    judges: Sequence[EvaluatedJudge],
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


def subset_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart the accuracy on a benchmark's subsets; None where it has none."""
    subsets = [result.subsets for result in results_of(name, judges)]
    rows: Dots = []
    for subset in dict.fromkeys(subset for each in subsets for subset in each):
        own = [each.get(subset) for each in subsets]
        points = [_point(each.accuracy, each.interval) if each else None for each in own]
        n = next(f"  ({each.n:,})" for each in own if each)
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


def reliability_chart(name: str, judges: Sequence[EvaluatedJudge]) -> Chart | None:
    """Chart how often a verdict is right against the confidence that its margin implies."""
    calibrations = [result.diagnostics.calibration for result in results_of(name, judges)]
    bins = [[b for b in each.bins if b.n] if each else [] for each in calibrations]
    if not any(bins):
        return None
    title = f"Reliability: {name}"

    def draw(figure: Any, theme: Theme) -> None:
        grid = figure.add_gridspec(2, 1, height_ratios=(3, 1))
        curve = _axes(figure, theme, "both", grid[0])
        counts = _axes(figure, theme, "y", grid[1])
        curve.plot([50, 100], [50, 100], color=theme.ink, lw=0.8, ls=":")
        for number, own in enumerate(bins):
            colour, marker = _colour(theme, number), MARKERS[number % 6]
            x, y = [b.confidence for b in own], [b.accuracy for b in own]
            curve.plot(x, y, color=colour, marker=marker, ms=5, lw=1.5)
            width = 4 / len(bins)
            places = [b.low + 0.5 + width * (number + 0.5) for b in own]
            counts.bar(places, [b.n for b in own], width=0.9 * width, color=colour)
        curve.set_ylabel("accuracy (%)", color=theme.ink, fontsize=8)
        counts.set_ylabel("games", color=theme.ink, fontsize=8)
        counts.set_xlabel("confidence stated by the margin (%)", color=theme.ink, fontsize=8)
        for axes in (curve, counts):
            axes.set_xlim(49, 101)
        _legend(figure, theme, judges)

    return Chart(title, 3.4 + 0.1 * len(judges), draw)


HEADLINE_TITLE = "Results (%) with 95 % intervals"
CONSISTENCY_TITLE = "Same verdict in both orders (%)"
PLACES_TITLE = "Verdicts: shown first, tie, shown second (%)"
