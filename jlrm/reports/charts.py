"""The chart engine of every page: curves, dots with intervals, stacked bars.

A `Chart` knows how to draw itself into axes. A page shows it as SVG, which stays sharp on any
screen and is drawn once for light and dark; `png` puts several on one picture for a README or a
notebook. Texts of users and models are drawn as they are: a dollar sign begins no mathematics.

Left out: which numbers a chart shows. run_page.py, scorecard_charts.py and planning/page.py say it.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlrm.reports.theme import LIGHT, colour, darken

WIDTH = 4.2  # of a chart, inches: legible on a phone
MARKERS = "osD^vP"  # with the colours: judges are told apart without them
MANY_POINTS = 20  # beyond, a curve is smoothed and its points are no longer marked
LABEL_GAP = 0.1  # of the height of the axes: the least between two labels at the right
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Chart(NamedTuple):
    title: str
    alt: str  # what a reader who can't see it is told
    draw: Callable[[Any], None]  # into axes of matplotlib
    height: float = 2.5  # inches
    width: float = WIDTH
    note: str = ""  # what it shows, in plain words


class Line(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None  # with `high`: drawn as a band
    high: np.ndarray | None = None
    is_noisy: bool = True  # smoothed where it is long
    sizes: np.ndarray | None = None  # of its points; without, all are alike


class Axes(NamedTuple):
    """How the axes of curves are laid out."""

    x_label: str = ""
    y_label: str = ""
    is_log: bool = False
    is_from_zero: bool = False
    top: float = 0.0  # the y axis reaches at least this far
    boundary: float = 0.0  # a dotted line: where GRPO begins on an axis that begins with SFT
    is_diagonal: bool = False  # a dotted line where y is x


class Mark(NamedTuple):
    value: float | None  # None: `note` stands in its place
    interval: tuple[float, float] | None = None
    series: int | None = None  # its colour and marker; None: a published value
    is_hollow: bool = False  # of an incomplete run
    note: str = ""


class Bar(NamedTuple):
    label: str
    sizes: Sequence[float]  # of its parts, from left to right
    text: str = ""  # at its end


def picture(chart: Chart) -> tuple[str, str]:
    """Return a chart as two data URIs of SVG images: for a light page and for a dark one."""
    import matplotlib as mpl

    # Text stays text: the browser's own font is sharper, and the file is a tenth of the size.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jlrm"}):
        drawing = _draw([chart], 1, "", "svg").decode()
    drawing = re.sub(r"font-family: [^;\"]*|(?<=px )'[^;\"]*", _font, drawing)
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(each.encode()).decode()
        for each in (drawing, darken(drawing))
    )
    return light, dark


def _font(match: re.Match[str]) -> str:
    return f"font-family: {FONT}" if match[0].startswith("font-family") else FONT


def png(charts: Sequence[Chart], num_columns: int, title: str = "") -> bytes:
    """Draw charts beside each other, with their titles, and return a PNG file's bytes."""
    return _draw(charts, num_columns, title, "png")


def _draw(charts: Sequence[Chart], num_columns: int, title: str, kind: str) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    num_columns = max(1, min(num_columns, len(charts)))
    rows = [charts[i : i + num_columns] for i in range(0, len(charts), num_columns)] or [[]]
    gap = 0.0 if kind == "svg" else 0.3  # for the title: a page shows it as text
    heights = [max([chart.height + gap for chart in row], default=1.0) for row in rows]
    width = max([chart.width for chart in charts], default=4.0) * num_columns
    size = (width, sum(heights) + (0.4 if title else 0))
    figure = Figure(size, dpi=180, layout="constrained", facecolor=LIGHT.paper)
    bold = {"weight": "bold", "color": LIGHT.ink, "ha": "left", "parse_math": False}
    if title:
        figure.suptitle(plain(title), x=0.005, **bold)
    parts = figure.subfigures(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for chart, part in zip(charts, parts.flat, strict=False):
        part.set_facecolor(LIGHT.paper)
        if kind != "svg":
            part.suptitle(plain(chart.title), x=0.01, fontsize=9, **bold)
        axes = part.add_subplot(facecolor=LIGHT.paper)
        axes.tick_params(colors=LIGHT.soft, labelsize=8.5, length=0, which="both")
        axes.set_axisbelow(True)
        axes.spines[:].set(visible=False)
        chart.draw(axes)
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(content, format=kind, metadata=metadata)
    return content.getvalue()


def plain(text: str) -> str:
    """Return text that an XML file can hold: no control characters, no lone surrogates."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", str(text))


def wrap(text: str, width: int) -> str:
    """Break a label into at most three lines; what does not fit is cut."""
    return "\n".join(textwrap.wrap(plain(text), width, max_lines=3, placeholder=" …"))


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> Any:
    style = {"color": LIGHT.ink, "fontsize": 8.5, "va": "center", "parse_math": False, **style}
    return axes.text(x, y, plain(text), **style)


# --- curves ---


def curves(
    title: str, lines: Sequence[Line], layout: Axes, *, note: str = "", is_named: bool = True
) -> Chart:
    """Chart lines over steps, each named at its right end with its last value.

    is_named: false for a single line that the title names.
    """
    told = [f"{line.label} {_last(line)}" for line in lines]
    labels = told if is_named else [_last(line) for line in lines]
    if layout.is_diagonal:  # where the value at the right end says nothing
        labels = [line.label if line.y.size else f"{line.label} none" for line in lines]
        labels = labels if is_named else [""] * len(lines)

    def draw(axes: Any) -> None:
        for number, line in enumerate(lines):
            _draw_line(axes, line, number)
        _lay_out(axes, lines, layout)
        _name_lines(axes, lines, labels)

    return Chart(title, f"{title}; last: {', '.join(told)}", draw, note=note)


def _draw_line(axes: Any, line: Line, number: int) -> None:
    hue, is_long, middle = colour(number), _is_long(line), _middle(line)
    if is_long:
        axes.plot(line.x, line.y, color=hue, lw=0.7, alpha=0.3)
    if line.low is not None and line.high is not None:
        ends = [running_mean(end) if is_long else end for end in (line.low, line.high)]
        axes.fill_between(line.x, *ends, color=hue, alpha=0.16, lw=0)
    axes.plot(line.x, middle, color=hue, lw=1.8)
    if not is_long:
        sizes = 16.0 if line.sizes is None else line.sizes
        axes.scatter(line.x, middle, s=sizes, color=hue, marker=MARKERS[number % 6], zorder=3)


def _is_long(line: Line) -> bool:
    return line.is_noisy and line.y.size > MANY_POINTS


def _middle(line: Line) -> np.ndarray:
    return running_mean(line.y) if _is_long(line) else line.y


def running_mean(y: np.ndarray) -> np.ndarray:
    """Return the mean of each value's neighbourhood, as long as `y` and at its level."""
    window = np.ones(max(5, y.size // 15))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def _lay_out(axes: Any, lines: Sequence[Line], layout: Axes) -> None:
    from matplotlib.ticker import LogLocator

    positive = np.concatenate([np.zeros(0), *(line.y[line.y > 0] for line in lines)])
    if layout.is_log and positive.size:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5)))
        digits = 2 if positive.max() > 1.5 * positive.min() else 4  # close ticks differ late
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:.{digits}g}")
    else:
        axes.yaxis.get_major_locator().set_params(nbins=5)
    if layout.is_from_zero and axes.get_yscale() == "linear":
        axes.set_ylim(0, max(axes.get_ylim()[1] * 1.05, layout.top))
    for label, name in ((axes.set_xlabel, layout.x_label), (axes.set_ylabel, layout.y_label)):
        label(name, color=LIGHT.soft, fontsize=8.5)
    if not layout.is_diagonal:
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.grid(axis="both" if layout.is_diagonal else "y", color=LIGHT.faint, lw=0.7)
    if layout.is_diagonal:
        axes.plot([50, 100], [50, 100], color=LIGHT.soft, lw=0.9, ls=":")
    if layout.boundary:
        axes.axvline(layout.boundary, color=LIGHT.soft, lw=0.9, ls=":")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        place = {"transform": axes.get_xaxis_transform(), "va": "bottom", "color": LIGHT.soft}
        _text(axes, layout.boundary, 1.01, "SFT\u00a0", ha="right", **place)
        _text(axes, layout.boundary, 1.01, "\u00a0GRPO", ha="left", **place)


def _last(line: Line) -> str:
    return short(line.y[-1]) if line.y.size else "none"


def _name_lines(axes: Any, lines: Sequence[Line], texts: Sequence[str]) -> None:
    """Write each line's text at its right end, far enough apart to be read."""
    to_axes = axes.transData + axes.transAxes.inverted()
    last = [_middle(line)[-1] if line.y.size else np.nan for line in lines]
    ends = [float(to_axes.transform((0, value))[1]) for value in last]
    ends = [end if np.isfinite(end) else 0.0 for end in ends]  # no place on a log axis
    for number, height in zip(map(int, np.argsort(ends)), spread(sorted(ends)), strict=True):
        style = {"transform": axes.transAxes, "weight": "bold", "clip_on": False}
        _text(axes, 1.025, height, texts[number], color=colour(number), **style)


def spread(heights: Sequence[float]) -> list[float]:
    """Move ascending heights apart by LABEL_GAP, within 0 to 1 as far as there is room."""
    gap = min(LABEL_GAP, 1 / max(1, len(heights) - 1))
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else 0.0))
    ceiling = 1.0
    for number in reversed(range(len(placed))):
        placed[number] = ceiling = min(placed[number], ceiling)
        ceiling -= gap
    return placed


def short(value: float) -> str:
    """Return a number in at most about five characters."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.2g}" if size < 0.01 else f"{value:.3g}"


# --- dots with intervals ---


def dots(
    title: str,
    rows: Sequence[tuple[str, Sequence[Mark]]],
    names: Sequence[str] = (),
    *,
    is_percent: bool = False,
) -> Chart:
    """Chart a row for each label, from the top down, with a point and interval for each series.

    names: of the series, for the legend; without, each row is one point and its value stands
    beside it. is_percent: the axis ends a little beyond 100.
    """
    num_points = max([len(points) for _, points in rows], default=1)
    height = 0.5 + len(rows) * (0.16 + 0.14 * num_points) + (0.2 * -(-len(names) // 2))

    def draw(axes: Any) -> None:
        for number, (_, points) in enumerate(rows):
            for place, point in enumerate(points):
                y = number + (place - (len(points) - 1) / 2) * 0.7 / len(points)
                _draw_point(axes, point, y, is_labelled=not names)
        _label_rows(axes, [label for label, _ in rows])
        if is_percent:
            axes.set_xlim(right=min(axes.get_xlim()[1], 101.5))
        if names:
            _legend(axes, [(name, colour(i), MARKERS[i % 6]) for i, name in enumerate(names)], 2)

    told = (f"{label}: {', '.join(map(_told, points))}" for label, points in rows)
    alt = "; ".join([title, *(" ".join(each.split()) for each in told)])
    return Chart(title, alt, draw, height)


def _told(point: Mark) -> str:
    """Return a point in words, for those who can't see it."""
    if point.value is None:
        return point.note or "none"
    ends = "" if point.interval is None else " ({:.1f} to {:.1f})".format(*point.interval)
    return f"{point.value:.1f}{ends}{point.note}"


def _draw_point(axes: Any, point: Mark, y: float, is_labelled: bool) -> None:
    is_published = point.series is None
    hue = LIGHT.soft if point.series is None else colour(point.series)
    beside = {"transform": axes.get_yaxis_transform(), "clip_on": False, "color": hue}
    if point.value is None:
        _text(axes, 0.01, y, point.note, style="italic", **beside)
        return
    if point.interval:
        axes.plot(point.interval, [y, y], color=hue, lw=2.4, alpha=0.5, solid_capstyle="butt")
    marker = "d" if point.series is None else MARKERS[point.series % 6]
    inside = LIGHT.paper if point.is_hollow or is_published else hue
    axes.plot(point.value, y, marker, color=hue, mfc=inside, ms=5.5)
    if is_labelled:
        weight = "normal" if is_published else "bold"
        _text(axes, 1.02, y, f"{point.value:.1f}{point.note}", weight=weight, **beside)


def _label_rows(axes: Any, labels: Sequence[str]) -> None:
    style = {"color": LIGHT.ink, "parse_math": False}
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels], **style)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", color=LIGHT.faint, lw=0.7)


def _legend(axes: Any, entries: Sequence[tuple[str, str, str]], num_columns: int) -> None:
    """Name colours and markers below the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=hue, marker=marker, ls="", ms=6, label=plain(name))
        for name, hue, marker in entries
    ]
    style: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8.5}
    legend = axes.figure.legend(handles=handles, ncols=num_columns, **style)
    for text in legend.get_texts():
        text.set(color=LIGHT.ink, parse_math=False)


# --- stacked bars ---


def stacks(
    title: str,
    bars: Sequence[Bar],
    parts: Sequence[tuple[str, str]],
    *,
    limit: float = 0.0,
    x_label: str = "",
    width: float = WIDTH,
) -> Chart:
    """Chart a bar for each label, of parts with a name and a colour; `limit`: a line across all."""

    def draw(axes: Any) -> None:
        for y, bar in enumerate(bars):
            starts = np.cumsum([0.0, *bar.sizes])
            for left, size, (_, hue) in zip(starts, bar.sizes, parts, strict=False):
                axes.barh(y, size, left=left, color=hue, height=0.64, edgecolor=LIGHT.paper)
            _text(axes, starts[-1], y, f"\u00a0{bar.text}" if bar.text else "")
        _label_rows(axes, [bar.label for bar in bars])
        axes.set_xlabel(x_label, color=LIGHT.soft, fontsize=8.5)
        longest = max([limit, *(sum(bar.sizes) for bar in bars)])
        axes.set_xlim(0, longest * (1.12 if any(bar.text for bar in bars) else 1.0))
        if limit:
            axes.axvline(limit, color=LIGHT.ink, lw=1.2, ls="--")
            place = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "bottom"}
            _text(axes, limit, 1.01, f"limit {limit:.2f}", **place)
        _legend(axes, [(name, hue, "s") for name, hue in parts], num_columns)

    num_columns = int(width / 1.7)
    height = 0.7 + 0.33 * len(bars) + 0.2 * -(-len(parts) // num_columns)
    told = "; ".join(f"{bar.label}: {bar.text}" for bar in bars if bar.text)
    return Chart(title, f"{title}; {told}" if told else title, draw, height, width)
