"""A chart of gains by group over the groups' shares, ours and published, with their lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jlrm.reports.charts import Chart, plain
from jlrm.reports.theme import LIGHT, colour
from jlrm.studies.outcomes import FittedGain

HEIGHT = 3.0  # inches


def chart(gains: Sequence[FittedGain], across: str) -> Chart:
    """Chart gains of one run over another: a point for each group, a line of least squares."""
    title = f"Gain of {gains[0].of} over {gains[0].over}"
    told = "; ".join(f"{_kind(each)}: {_points(each)}. {_line(each)}" for each in gains)

    def draw(axes: Any) -> None:
        for each in gains:
            _draw_gain(axes, each)
        axes.axhline(0.0, color=LIGHT.soft, lw=0.9, ls=":")
        axes.margins(x=0.16, y=0.14)
        axes.set_xlabel(plain(across), color=LIGHT.soft, fontsize=8.5, parse_math=False)
        axes.set_ylabel("points", color=LIGHT.soft, fontsize=8.5)
        axes.grid(color=LIGHT.faint, lw=0.7)
        style: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 8.5}
        legend = axes.figure.legend(*axes.get_legend_handles_labels(), **style)
        for text in legend.get_texts():
            text.set(color=LIGHT.ink, parse_math=False)

    note = "A point is a group of items. Lines: least squares, each group counts once"
    return Chart(title, f"{title}; {told}", draw, HEIGHT, note=note)


def _draw_gain(axes: Any, gain: FittedGain) -> None:
    hue, marker = (LIGHT.soft, "d") if gain.is_published else (colour(0), "o")
    inside = LIGHT.paper if gain.is_published else hue
    label = f"{_kind(gain)}: {_line(gain)}"
    style = {"color": hue, "ls": "", "mfc": inside, "ms": 5.5, "zorder": 3, "label": plain(label)}
    axes.plot(gain.shares, gain.gains, marker, **style)
    if gain.slope is not None and gain.intercept is not None:
        ends = [min(gain.shares), max(gain.shares)]
        heights = [gain.intercept + gain.slope * end for end in ends]
        axes.plot(ends, heights, color=hue, lw=1.4, ls="--" if gain.is_published else "-")
    below = {"textcoords": "offset points", "xytext": (0, -11 if gain.is_published else 6)}
    for name, share, value in zip(gain.groups, gain.shares, gain.gains, strict=True):
        style = {"color": hue, "fontsize": 7.5, "ha": "center", "parse_math": False, **below}
        style["bbox"] = {"facecolor": LIGHT.paper, "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
        axes.annotate(plain(name), (share, value), **style)


def _kind(gain: FittedGain) -> str:
    return "published" if gain.is_published else "ours"


def _line(gain: FittedGain) -> str:
    if gain.slope is None:
        return "no line through so few points"
    r = "" if gain.r is None else f", r = {gain.r:.3f}"
    return f"slope {gain.slope:+.2f} points a percent{r}, {len(gain.groups)} groups"


def _points(gain: FittedGain) -> str:
    pairs = zip(gain.groups, gain.shares, gain.gains, strict=True)
    return ", ".join(f"{name} {value:+.2f} at {share:g}" for name, share, value in pairs)
