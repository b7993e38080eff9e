"""The page and the picture of a training run, drawn from its files."""

from __future__ import annotations

import base64
import io
import itertools
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from jlrm.config import UsageError
from jlrm.judgement.verdict import preferred
from jlrm.reports import run_summary
from jlrm.reports.run_summary import RunSummary
from jlrm.reports.theme import CSS, DARK, LIGHT, Theme
from jlrm.reports.tracking import read_metrics
from jlrm.runtime.storage import write_atomically

Row = dict[str, Any]
STAGES = {"start": "Start", "sft": "SFT", "grpo": "GRPO"}


class Panel(NamedTuple):
    title: str
    stage: str
    metric: str  # "": the mean of every reward term
    scale: float = 1.0  # 100 turns a fraction into percent
    is_log: bool = False
    is_from_zero: bool = True
    boundary: int = 0  # where GRPO begins on an axis that begins with SFT; 0: nowhere


class Line(NamedTuple):
    label: str
    x: np.ndarray
    y: np.ndarray
    std: np.ndarray | None = None  # drawn as a band
    is_noisy: bool = True  # smoothed where it is long


Chart = tuple[Panel, list[Line]]


PANELS = (
    Panel("Reward (mean, band: ± one std)", "grpo", "reward", is_from_zero=False),
    Panel("Completion length (tokens)", "grpo", "completions/mean_length"),
    Panel("Reward by term (mean)", "grpo", "", is_from_zero=False),
    Panel("Cut by the token limit (%)", "grpo", "completions/clipped_ratio", 100),
    Panel("Prompts whose rewards are all equal (%)", "grpo", "frac_reward_zero_std", 100),
    Panel("KL to the reference", "grpo", "kl"),
    Panel("Entropy (nats per token)", "grpo", "entropy"),
    Panel("Log-prob gap, sampler to trainer", "grpo", "rollout/logprob_gap", is_log=True),
    Panel("GRPO gradient norm", "grpo", "grad_norm"),
    Panel("SFT loss", "sft", "loss"),
    Panel("SFT gradient norm", "sft", "grad_norm"),
)
RESULTS = {
    "agreement": ("Agreement (%)", 1),  # digits
    "f1": ("Macro F1 (%)", 1),
    "parse_rate": ("Parse rate (%)", 1),
    "swap_consistency": ("Swap consistency (%)", 1),
    "delta_bias": ("Lean to a place (%)", 1),
    "reward": ("Reward", 2),
    "mean_length": ("Mean length (tokens)", 0),
}
NUM_JUDGEMENTS = 8
MANY_POINTS = 20  # beyond, a curve is smoothed and its points are no longer marked


def write_report(run_dir: pathlib.Path) -> None:
    """Write `report.html` and `report.png` into a run directory, from what it holds so far.

    Raises UsageError if it holds neither `metrics.jsonl` nor `summary.json`.
    """
    rows, summary = read_metrics(run_dir), run_summary.read(run_dir)
    if not rows and summary is None:
        raise UsageError(
            f"{run_dir} holds no metrics.jsonl and no summary.json. "
            "Give the directory of a training run (run.dir of its configuration)."
        )
    summary = summary or RunSummary({})  # a run under way has none yet
    config_path = run_dir / "config.yaml"
    charts = _charts(rows, summary)
    if charts:
        write_atomically(run_dir / "report.png", _draw(charts, LIGHT, 3, run_dir.resolve().name))
    page = PAGE.format(
        css=CSS,
        name=escape(run_dir.resolve().name),
        cost=_cost(summary),
        results=_results_html(rows, summary),
        charts="".join(_chart_html(*chart) for chart in charts),
        judgements=_judgements_html(run_dir),
        config=escape(config_path.read_text() if config_path.exists() else "not recorded"),
    )
    write_atomically(run_dir / "report.html", page.encode())


def picture(run_dir: pathlib.Path) -> bytes | None:
    """Return the curves of a run so far as PNG; None as long as there are none."""
    charts = _charts(read_metrics(run_dir), RunSummary({}))
    return _draw(charts, LIGHT, 3, run_dir.resolve().name) if charts else None


def _series(rows: list[Row], stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a metric where it is present and finite."""
    pairs = [(row["step"], row[metric]) for row in rows if row["stage"] == stage and metric in row]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _num_steps(rows: list[Row]) -> dict[str, int]:
    return {row["stage"]: row["step"] for row in rows}


def _charts(rows: list[Row], summary: RunSummary) -> list[Chart]:
    names = dict.fromkeys(name for row in rows for name in row)
    terms = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    charts = [_held_out_chart(rows, summary)]
    for panel in PANELS:
        lines = []
        for metric in [panel.metric] if panel.metric else terms:
            x, y = _series(rows, panel.stage, metric)
            std = _series(rows, panel.stage, f"{metric}_std")[1]
            label = metric.removeprefix("rewards/").removesuffix("/mean")
            lines.append(Line(label, x, y * panel.scale, std if std.size == y.size else None))
        charts.append((panel, lines))
    present = ((panel, [line for line in lines if line.x.size]) for panel, lines in charts)
    return [(panel, lines) for panel, lines in present if lines]


def _held_out_chart(rows: list[Row], summary: RunSummary) -> Chart:
    """Put all evaluations on one axis of steps, SFT's and then GRPO's; 0 is before training."""
    num_steps = _num_steps(rows)
    lines = []
    for name in ("agreement", "parse_rate"):
        points: dict[float, float] = {}
        for stage, offset in {"start": 0, "sft": 0, "grpo": num_steps.get("sft", 0)}.items():
            if (value := summary.stages.get(stage, {}).get(name)) is not None:
                points[offset + num_steps.get(stage, 0)] = float(value)
            x, y = _series(rows, stage, f"eval/{name}")
            points |= zip(x + offset, y, strict=True)
        x, y = np.array(sorted(points.items()), dtype=np.float64).reshape(-1, 2).T
        lines.append(Line(name.replace("_", " "), x, y, is_noisy=False))
    only = "".join(num_steps) if len(num_steps) == 1 else ""
    boundary = 0 if only else num_steps.get("sft", 0)
    return Panel("Held-out comparisons (%)", only, "", 1, False, False, boundary), lines


def _draw(charts: Sequence[Chart], theme: Theme, num_columns: int, title: str = "") -> bytes:
    from matplotlib.figure import Figure  # not pyplot: needs no display and keeps no global state

    num_columns = min(num_columns, len(charts))
    num_rows = -(-len(charts) // num_columns)
    size = (4.0 * num_columns, 2.6 * num_rows)
    figure = Figure(size, dpi=180, layout="constrained", facecolor=theme.paper)
    if title:
        figure.suptitle(title, x=0.01, ha="left", weight="bold", color=theme.ink)
    for number, (panel, lines) in enumerate(charts, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number, facecolor=theme.paper)
        for line, colour in zip(lines, itertools.cycle(theme.colours), strict=False):
            _draw_line(axes, line, colour)
        _style(axes, panel, lines, theme)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_line(axes: Any, line: Line, colour: str) -> None:
    is_long = line.is_noisy and line.y.size > MANY_POINTS
    middle = _running_mean(line.y) if is_long else line.y
    axes.plot(line.x, middle, color=colour, lw=1.8, marker="" if is_long else "o", ms=4)
    if is_long:
        axes.plot(line.x, line.y, color=colour, lw=0.7, alpha=0.35)
    if line.std is not None:
        half = _running_mean(line.std) if is_long else line.std
        axes.fill_between(line.x, middle - half, middle + half, color=colour, alpha=0.18, lw=0)


def _running_mean(y: np.ndarray) -> np.ndarray:
    window = np.ones(max(5, y.size // 15))
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def _style(axes: Any, panel: Panel, lines: Sequence[Line], theme: Theme) -> None:
    if panel.is_log and any((line.y > 0).any() for line in lines):
        axes.set_yscale("log")
    elif panel.is_from_zero:
        axes.set_ylim(0, max(axes.get_ylim()[1] * 1.05, 5 if panel.scale == 100 else 0))
    text = {"color": theme.ink, "fontsize": 9}
    stage = "SFT steps, then GRPO" if panel.boundary else STAGES.get(panel.stage, "")
    axes.set_title(panel.title, loc="left", weight="bold", **text)
    axes.set_xlabel(f"{stage} steps".strip(), **text)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0, which="both")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=theme.faint, lw=0.7)
    axes.spines[:].set(visible=False)
    if panel.boundary:
        axes.axvline(panel.boundary, color=theme.ink, lw=1, ls=":")
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    low, high = axes.get_ylim()
    named = [] if panel.metric else lines  # each at its right end, apart far enough to read
    ends = [((line.y[-1] - low) / (high - low), line.label) for line in named]
    previous = -1.0
    for (height, label), colour in sorted(zip(ends, itertools.cycle(theme.colours), strict=False)):
        previous = height = max(height, previous + 0.09)
        place = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.02, 1.05], [height, height], color=colour, lw=2.5, **place)
        axes.text(1.07, height, label, va="center", **place, **text)


def _chart_html(panel: Panel, lines: list[Line]) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(_draw([(panel, lines)], theme, 1)).decode()
        for theme in (LIGHT, DARK)
    )
    last = ", ".join(f"{line.label} {line.y[-1]:.3g}" for line in lines)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(f"{panel.title}; last: {last}")}"></picture>'
    )


def _cost(summary: RunSummary) -> str:
    hours, minutes = divmod(round(summary.seconds / 60), 60)
    tokens = summary.tokens / 1e6
    return f"{hours} h {minutes} min, {tokens:,.1f} million tokens" if tokens else "Under way."


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = ("<tr><th>" + "<td>".join(map(escape, row)) for row in rows)
    return f"<table>{''.join(cells)}</table>"


def _results_html(rows: list[Row], summary: RunSummary) -> str:
    """Tabulate held-out results; a stage still under way shows its latest evaluation."""
    results: dict[str, Row] = {}
    for stage in STAGES:
        latest = {name: _series(rows, stage, f"eval/{name}")[1][-1:] for name in RESULTS}
        so_far = {name: values[0] for name, values in latest.items() if values.size}
        if latest_or_final := summary.stages.get(stage) or so_far:
            results[stage] = {n: float(v) for n, v in latest_or_final.items() if v is not None}
    stages = [STAGES[stage] for stage in results]
    lines = [["", *stages, *([" → ".join(stages[-2:])] if len(stages) > 1 else [])]]
    for name, (title, digits) in RESULTS.items():
        values = [result.get(name, np.nan) for result in results.values()]
        unit = " points" if "%" in title else ""
        cells = [f"{value:.{digits}f}" for value in values]
        cells += [f"{change:+.{digits}f}{unit}" for change in np.diff(values)[-1:]]
        if np.isfinite(values).any():
            lines.append([title, *("–" if "nan" in cell else cell for cell in cells)])
    num_steps = _num_steps(rows)
    steps = [f"{num_steps.get(stage, 0):,}" for stage in results]
    lines.append(["Steps", *steps, *([""] if len(steps) > 1 else [])])
    return _table(lines) if results else "<p>No held-out results yet.</p>"


def _judgements_html(run_dir: pathlib.Path) -> str:
    paths = sorted(run_dir.glob("completions/*.parquet"), key=lambda p: ("grpo" in p.stem, p.stem))
    if not paths:
        return "<p>None sampled yet.</p>"
    import pyarrow.parquet as pq

    num_seen, groups = Counter(), {}
    for row in pq.read_table(paths[-1]).to_pylist():
        num_seen[row.get("id")] += 1
        groups.setdefault(_outcome(row), []).append((num_seen[row.get("id")], row))
    ranked = (sorted(group, key=lambda pair: pair[0]) for group in groups.values())
    # Outcomes take turns; within one, every prompt comes before any prompt's second completion.
    mix = [pair[1] for turn in itertools.zip_longest(*ranked) for pair in turn if pair]
    stage, _, step = paths[-1].stem.rpartition("_")
    cards = "".join(_card(row) for row in mix[:NUM_JUDGEMENTS])
    return f"<p>{STAGES.get(stage, stage)}, step {int(step):,}</p>{cards}"


def _outcome(row: Row) -> str:
    verdict = row.get("verdict")
    if not verdict:
        return "unparsed"
    return "right" if preferred(*verdict) == row["label"] else "wrong"


def _card(row: Row) -> str:
    outcome = _outcome(row)
    scores = [["", "Answer 1", "Answer 2"]]
    for name in ("gold", "verdict"):
        pair = row.get(name) or (None, None)  # no gold scores: a preference alone
        scores.append([name.title(), *("–" if v is None else f"{v:g}" for v in pair)])
    rewards = {name.removeprefix("rewards/"): v for name, v in row.items() if "rewards/" in name}
    rewards |= {"total": row.get("reward"), "advantage": row.get("advantage")}
    lines = [["", "Reward"], *([k, f"{v:+.2f}"] for k, v in rewards.items() if v is not None)]
    about = " · ".join(str(row[name]) for name in ("id", "status") if row.get(name) is not None)
    return CARD.format(
        outcome=outcome,
        mark={"right": "✓", "wrong": "✗"}.get(outcome, "?"),
        about=escape(about),
        completion=escape(str(row.get("response", row.get("completion", "")))),
        tables=_table(scores) + _table(lines),
        prompt=escape(str(row.get("prompt", ""))),
    )


CARD = """
<article><h3 class="{outcome}">{mark} {outcome} <small>{about}</small></h3>
<div class="pair"><div><pre>{completion}</pre>
<details><summary>Prompt</summary><pre>{prompt}</pre></details></div>
<div>{tables}</div></div></article>"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>
<body><h1>{name}</h1><p>{cost}</p>
<h2>Held-out results</h2>{results}
<h2>Curves</h2><div class="charts">{charts}</div>
<h2>Sampled judgements</h2>{judgements}
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{config}</pre></details>
</body></html>
"""
