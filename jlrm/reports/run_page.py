"""The page and the picture of a training run, drawn from its files.

The page leads with the held-out curve and three judgements; PANELS lists the other curves. Whatever
a run has no numbers for is left out, so one page serves SFT alone, GRPO alone, both, and a run
still under way.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jlrm.config import UsageError, stage_titles
from jlrm.judgement.verdict import preferred
from jlrm.reports import charts, run_summary
from jlrm.reports.alarms import alarms
from jlrm.reports.charts import Axes, Chart, Line
from jlrm.reports.pages import write_page
from jlrm.reports.run_summary import RunSummary
from jlrm.reports.tables import duration
from jlrm.reports.tracking import read_metrics
from jlrm.runtime.storage import write_atomically

Row = dict[str, Any]
STAGES = {"start": "Start", **stage_titles()}


class Panel(NamedTuple):
    title: str
    stage: str
    metric: str  # "": the mean of every reward term
    note: str = ""
    scale: float = 1.0  # 100 turns a fraction into percent
    is_log: bool = False
    is_from_zero: bool = True


SAME_REWARDS = "All their completions earn the same reward"
GAP = "Mean difference for the same tokens; 0 is ideal"
PANELS = (
    Panel("Reward", "grpo", "reward", "Mean over completions; band: ± one std", is_from_zero=False),
    Panel("Reward by term", "grpo", "", "Terms that are always 0 are left out", is_from_zero=False),
    Panel("Completion length (tokens)", "grpo", "completions/mean_length", "Mean"),
    Panel("Cut by the token limit (%)", "grpo", "completions/clipped_ratio", "Of completions", 100),
    Panel("Prompts that teach nothing (%)", "grpo", "frac_reward_zero_std", SAME_REWARDS, 100),
    Panel("KL to the reference", "grpo", "kl", "How far the judge has moved from its start"),
    Panel("Entropy (nats per token)", "grpo", "entropy", "How undecided the sampled tokens are"),
    Panel("Log-prob gap, sampler to trainer", "grpo", "rollout/logprob_gap", GAP, is_log=True),
    Panel("GRPO gradient norm", "grpo", "grad_norm", "Before clipping"),
    Panel("DPO loss", "dpo", "loss", "Mean over pairs", is_from_zero=False),
    Panel("DPO: preferred one likelier (%)", "dpo", "rewards/accuracies", "Than at the start", 100),
    Panel("DPO margin", "dpo", "rewards/margins", "In rewards, which are beta times nats"),
    Panel("Reward model loss", "reward_model", "loss", "Mean over comparisons", is_from_zero=False),
    Panel("Reward model: right (%)", "reward_model", "accuracy", "Of a step's comparisons", 100),
    Panel("SFT loss", "sft", "loss", "Nats per token of the target judgements"),
    Panel("SFT gradient norm", "sft", "grad_norm", "Before clipping"),
)
HELDOUT_TITLE = "Held-out comparisons (%)"
NUM_JUDGEMENTS = 8


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
    title, heldout = run_dir.resolve().name, heldout_chart(rows, summary)
    panels = _panel_charts(rows)
    if overview := [*([heldout] if heldout else []), *(chart for _, chart in panels)]:
        write_atomically(run_dir / "report.png", charts.png(overview, 3, title))
    results = _results(rows, summary)
    last = list(results.values())[-1].get("agreement", np.nan) if results else np.nan
    interval = _band(np.array(last), _num_pairs(rows, summary))
    sampled, terms, judgements = _judgements(run_dir)
    write_page(
        run_dir / "report.html",
        "run.html",
        title=title,
        about=_about(rows, summary),
        alarms=alarms(rows),
        heldout=heldout,
        heldout_wide=heldout and heldout._replace(width=7.4, height=2.9),
        results=[(STAGES[stage], metrics) for stage, metrics in results.items()],
        interval=[float(end) for end in interval if end is not None],
        sampled=sampled,
        terms=terms,
        judgements=judgements,
        curves=[
            (STAGES[stage], [chart for _, chart in group])
            for stage, group in itertools.groupby(panels, key=lambda pair: pair[0].stage)
        ],
        config=config_path.read_text() if config_path.exists() else "not recorded",
    )


def picture(run_dir: pathlib.Path) -> bytes | None:
    """Return the curves of a run so far as PNG; None as long as there are none."""
    rows = read_metrics(run_dir)
    drawn = [heldout_chart(rows, RunSummary({})), *(chart for _, chart in _panel_charts(rows))]
    present = [chart for chart in drawn if chart]
    return charts.png(present, 3, run_dir.resolve().name) if present else None


# --- curves ---


def _series(rows: list[Row], stage: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a metric where it is present and finite."""
    pairs = [(row["step"], row[metric]) for row in rows if row["stage"] == stage and metric in row]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _num_steps(rows: list[Row]) -> dict[str, int]:
    return {row["stage"]: row["step"] for row in rows}


def _panel_charts(rows: list[Row]) -> list[tuple[Panel, Chart]]:
    """Return a chart for each panel that the run has numbers for."""
    names = dict.fromkeys(name for row in rows for name in row)
    terms = [name for name in names if re.fullmatch("rewards/.+/mean", name)]
    drawn = []
    for panel in PANELS:
        metrics = [panel.metric] if panel.metric else terms
        lines = [_line(rows, panel, metric) for metric in metrics]
        # A term without weight would be one more line along 0.
        lines = [line for line in lines if line.x.size and (panel.metric or line.y.any())]
        if lines:
            label = f"{STAGES[panel.stage]} steps"
            top = 5.0 if panel.scale == 100 else 0.0
            layout = Axes(label, is_log=panel.is_log, is_from_zero=panel.is_from_zero, top=top)
            is_named = not panel.metric
            chart = charts.curves(panel.title, lines, layout, note=panel.note, is_named=is_named)
            drawn.append((panel, chart))
    return drawn


def _line(rows: list[Row], panel: Panel, metric: str) -> Line:
    x, y = _series(rows, panel.stage, metric)
    std = _series(rows, panel.stage, f"{metric}_std")[1]
    label = metric.removeprefix("rewards/").removesuffix("/mean")
    band = (y - std, y + std) if std.size == y.size else (None, None)
    return Line(label.replace("_", " "), x, y * panel.scale, *band)


def heldout_chart(rows: list[Row], summary: RunSummary) -> Chart | None:
    """Put all evaluations on one axis, a stage's steps after those before; 0 is before training."""
    num_steps, lines = _num_steps(rows), []
    for name in ("agreement", "swap_consistency", "parse_rate"):
        points = _heldout_points(rows, summary, name)
        if points:
            steps, values = np.array(sorted(points.items()), dtype=np.float64).T
            band = _band(values, _num_pairs(rows, summary)) if name == "agreement" else (None, None)
            lines.append(Line(name.replace("_", " "), steps, values, *band, is_noisy=False))
    if not lines:
        return None
    has_both = len(num_steps) > 1
    titles = [STAGES[stage] for stage in num_steps if stage in STAGES]
    label = ", then ".join(f"{title} steps" for title in titles)
    boundary = next(iter(num_steps.values())) if has_both else 0
    note = "On comparisons that training never sees"
    note += ". Band: 95 % interval" if lines[0].low is not None else ""
    layout = Axes(label, top=100, boundary=boundary)
    return charts.curves(HELDOUT_TITLE, lines, layout._replace(is_from_zero=True), note=note)


def _heldout_points(rows: list[Row], summary: RunSummary, name: str) -> dict[float, float]:
    num_steps, offset = _num_steps(rows), 0
    points: dict[float, float] = {}
    for stage in STAGES:
        value = summary.stages.get(stage, {}).get(name)
        if value is not None and np.isfinite(float(value)):
            points[offset + num_steps.get(stage, 0)] = float(value)
        steps, values = _series(rows, stage, f"eval/{name}")
        points |= zip(steps + offset, values, strict=True)
        offset += num_steps.get(stage, 0)
    return points


def _num_pairs(rows: list[Row], summary: RunSummary) -> int:
    """Return how many pairs are held out; 0 for runs that did not record it."""
    counts = [row.get("eval/pairs") for row in rows]
    counts += [metrics.get("pairs") for metrics in summary.stages.values()]
    return int(next((count for count in counts if count), 0))


def _band(percents: np.ndarray, n: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the ends of Wilson's 95 % interval of shares of `n` pairs, in percent."""
    if not n:
        return None, None
    share, z = percents / 100, 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (centre - half), 100 * (centre + half)


# --- numbers ---


def _about(rows: list[Row], summary: RunSummary) -> list[str]:
    steps = [f"{STAGES[stage]} {n:,} steps" for stage, n in _num_steps(rows).items() if n]
    if not summary.tokens:
        return [*steps, "Under way."]
    is_many = summary.tokens >= 100_000
    tokens = f"{summary.tokens / 1e6:,.1f} million" if is_many else f"{summary.tokens:,}"
    return [*steps, f"{duration(summary.seconds)}, {tokens} tokens"]


def _results(rows: list[Row], summary: RunSummary) -> dict[str, Row]:
    """Return held-out metrics by stage; a stage still under way has its latest evaluation's."""
    names = {name.removeprefix("eval/") for row in rows for name in row if "eval/" in name}
    num_steps, results = _num_steps(rows), {}
    for stage in STAGES:
        latest = {name: _series(rows, stage, f"eval/{name}")[1][-1:] for name in names}
        so_far = {name: values[0] for name, values in latest.items() if values.size}
        if metrics := summary.stages.get(stage) or so_far:
            kept = {name: v for name, v in metrics.items() if v is not None and np.isfinite(v)}
            results[stage] = kept | {"steps": num_steps.get(stage, 0)}
    return results


# --- judgements ---


def _judgements(run_dir: pathlib.Path) -> tuple[str, list[str], list[tuple[str, Row]]]:
    """Return when the newest judgements were sampled, their reward terms, and some of them.

    Each comes with its outcome. Outcomes take turns; within one, every prompt comes before any
    prompt's second response. Terms that are 0 in all rows are left out.
    """
    order = [*STAGES]
    files = run_dir.glob("completions/*.parquet")
    paths = sorted(files, key=lambda p: (order.index(p.stem.rpartition("_")[0]), p.stem))
    if not paths:
        return "", [], []
    import pyarrow.parquet as pq

    rows = pq.read_table(paths[-1]).to_pylist()
    num_seen, groups = Counter(), {"right": [], "wrong": [], "unlabelled": [], "unparsed": []}
    for row in rows:
        num_seen[row.get("id")] += 1
        groups[_outcome(row)].append((num_seen[row.get("id")], _outcome(row), row))
    ranked = (sorted(group, key=lambda each: each[0]) for group in groups.values())
    mix = [each[1:] for turn in itertools.zip_longest(*ranked) for each in turn if each]
    terms = [name for name in rows[0] if "rewards/" in name and any(row[name] for row in rows)]
    stage, _, step = paths[-1].stem.rpartition("_")
    return f"{STAGES.get(stage, stage)}, step {int(step):,}", terms, mix[:NUM_JUDGEMENTS]


def _outcome(row: Row) -> str:
    verdict = row.get("verdict")
    if not verdict:
        return "unparsed"
    # One score alone is that of an answer beside which the other's was not read. Of a list, what is
    # right is a share of its pairs. Tables of older runs do not say.
    is_right = row["is_right"] if "is_right" in row else preferred(*verdict) == row["label"]
    if is_right is None:
        return "unlabelled"
    return "right" if is_right == 1 else "wrong"
