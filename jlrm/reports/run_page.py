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
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jlrm.config import UsageError
from jlrm.judgement.verdict import preferred
from jlrm.reports import charts, run_summary
from jlrm.reports.charts import Axes, Chart, Line
from jlrm.reports.pages import write_page
from jlrm.reports.run_summary import RunSummary
from jlrm.reports.tracking import read_metrics
from jlrm.runtime.storage import write_atomically

Row = dict[str, Any]
STAGES = {"start": "Start", "sft": "SFT", "grpo": "GRPO"}


class Panel(NamedTuple):
    title: str
    stage: str
    metric: str  # "": the mean of every reward term
    note: str = ""
    scale: float = 1.0  # 100 turns a fraction into percent
    is_log: bool = False
    is_from_zero: bool = True


PANELS = (
    Panel("Reward", "grpo", "reward", "Mean over completions; band: ± one std", is_from_zero=False),
    Panel("Reward by term", "grpo", "", "Terms that are always 0 are left out", is_from_zero=False),
    Panel("Completion length (tokens)", "grpo", "completions/mean_length", "Mean"),
    Panel("Cut by the token limit (%)", "grpo", "completions/clipped_ratio", "Of completions", 100),
    Panel(
        "Prompts that teach nothing (%)",
        "grpo",
        "frac_reward_zero_std",
        "All their completions earn the same reward",
        100,
    ),
    Panel("KL to the reference", "grpo", "kl", "How far the judge has moved from its start"),
    Panel("Entropy (nats per token)", "grpo", "entropy", "How undecided the sampled tokens are"),
    Panel(
        "Log-prob gap, sampler to trainer",
        "grpo",
        "rollout/logprob_gap",
        "Mean difference for the same tokens; 0 is ideal",
        is_log=True,
    ),
    Panel("GRPO gradient norm", "grpo", "grad_norm", "Before clipping"),
    Panel("SFT loss", "sft", "loss", "Nats per token of the target judgements"),
    Panel("SFT gradient norm", "sft", "grad_norm", "Before clipping"),
)


class Measure(NamedTuple):
    """A held-out metric as the page words it."""

    title: str
    digits: int
    meaning: str


RESULTS = {
    "agreement": Measure("Agreement (%)", 1, "Verdicts that name the better answer or the tie."),
    "f1": Measure("Macro F1 (%)", 1, "Mean F1 of: first better, second better, tie."),
    "parse_rate": Measure("Parse rate (%)", 1, "Responses from which two scores can be read."),
    "swap_consistency": Measure(
        "Swap consistency (%)", 1, "Pairs that get the same verdict with the answers swapped."
    ),
    "delta_bias": Measure(
        "Lean to a place (%)", 1, "Pairs whose verdict follows the place of the answer."
    ),
    "reward": Measure("Reward", 2, "Mean training reward."),
    "mean_length": Measure("Mean length (tokens)", 0, "Of what the judge writes."),
}
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
    sampled, cards = _judgements(run_dir)
    write_page(
        run_dir / "report.html",
        "run.html",
        title=title,
        about=_about(rows, summary),
        tiles=_tiles(results),
        heldout=heldout,
        heldout_wide=heldout and heldout._replace(width=7.4, height=2.9),
        sampled=sampled,
        cards=cards,
        stages=_stage_names(results),
        results=_result_lines(rows, results),
        glossary=[
            (measure.title, measure.meaning)
            for name, measure in RESULTS.items()
            if any(name in metrics for metrics in results.values())
        ],
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
    """Put all evaluations on one axis of steps, SFT's and then GRPO's; 0 is before training."""
    num_steps, lines = _num_steps(rows), []
    for name in ("agreement", "parse_rate"):
        points = _heldout_points(rows, summary, name)
        if points:
            steps, values = np.array(sorted(points.items()), dtype=np.float64).T
            band = _band(values, _num_pairs(rows, summary)) if name == "agreement" else (None, None)
            lines.append(Line(name.replace("_", " "), steps, values, *band, is_noisy=False))
    if not lines:
        return None
    has_both = len(num_steps) > 1
    label = "SFT steps, then GRPO steps" if has_both else STAGES.get("".join(num_steps), "")
    boundary = num_steps.get("sft", 0) if has_both else 0
    note = "On comparisons that training never sees"
    note += ". Band: 95 % interval" if lines[0].low is not None else ""
    layout = Axes(label if has_both else f"{label} steps".strip(), top=100, boundary=boundary)
    return charts.curves(HELDOUT_TITLE, lines, layout._replace(is_from_zero=True), note=note)


def _heldout_points(rows: list[Row], summary: RunSummary, name: str) -> dict[float, float]:
    num_steps = _num_steps(rows)
    points: dict[float, float] = {}
    for stage, offset in {"start": 0, "sft": 0, "grpo": num_steps.get("sft", 0)}.items():
        value = summary.stages.get(stage, {}).get(name)
        if value is not None and np.isfinite(float(value)):
            points[offset + num_steps.get(stage, 0)] = float(value)
        steps, values = _series(rows, stage, f"eval/{name}")
        points |= zip(steps + offset, values, strict=True)
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


class Tile(NamedTuple):
    title: str
    value: str
    unit: str
    notes: list[str]


def _about(rows: list[Row], summary: RunSummary) -> list[str]:
    steps = [f"{STAGES[stage]} {n:,} steps" for stage, n in _num_steps(rows).items() if n]
    tokens = summary.tokens / 1e6
    if not tokens:
        return [*steps, "Under way."]
    return [*steps, f"{_duration(summary.seconds)}, {tokens:,.1f} million tokens"]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _results(rows: list[Row], summary: RunSummary) -> dict[str, Row]:
    """Return held-out metrics by stage; a stage still under way has its latest evaluation's."""
    results: dict[str, Row] = {}
    for stage in STAGES:
        latest = {
            name: _series(rows, stage, f"eval/{name}")[1][-1:] for name in (*RESULTS, "pairs")
        }
        so_far = {name: values[0] for name, values in latest.items() if values.size}
        if metrics := summary.stages.get(stage) or so_far:
            results[stage] = {name: float(v) for name, v in metrics.items() if v is not None}
    return results


def _tiles(results: dict[str, Row]) -> list[Tile]:
    """Return the figures that stand first: what the run came to, and from where."""
    if not results:
        return []
    *before, stage = results
    tiles = []
    for name in ("agreement", "swap_consistency", "parse_rate"):
        value = results[stage].get(name, np.nan)
        if not np.isfinite(value):
            continue
        notes = []
        low, high = _band(np.array(value), int(results[stage].get("pairs", 0)))
        if name == "agreement" and low is not None:
            notes.append(f"95 % interval {low:.1f} to {high:.1f}")
        if before and np.isfinite(results[before[-1]].get(name, np.nan)):
            change = value - results[before[-1]][name]
            notes.append(f"{STAGES[before[-1]]} → {STAGES[stage]}: {change:+.1f} points")
        tiles.append(Tile(RESULTS[name].title.removesuffix(" (%)"), f"{value:.1f}", "%", notes))
    return tiles


def _stage_names(results: dict[str, Row]) -> list[str]:
    names = [STAGES[stage] for stage in results]
    return [*names, *([" → ".join(names[-2:])] if len(names) > 1 else [])]


def _result_lines(rows: list[Row], results: dict[str, Row]) -> list[tuple[str, list[str]]]:
    """Return a line for each metric: its value after each stage, and the last change."""
    lines = []
    for name, measure in RESULTS.items():
        values = [result.get(name, np.nan) for result in results.values()]
        unit = " points" if "%" in measure.title else ""
        cells = [f"{value:.{measure.digits}f}" for value in values]
        cells += [f"{change:+.{measure.digits}f}{unit}" for change in np.diff(values)[-1:]]
        if np.isfinite(values).any():
            lines.append((measure.title, ["–" if "nan" in cell else cell for cell in cells]))
    num_steps = _num_steps(rows)
    steps = [f"{num_steps.get(stage, 0):,}" for stage in results]
    return [*lines, ("Steps", [*steps, *([""] if len(steps) > 1 else [])])] if results else []


# --- judgements ---


class ShownAnswer(NamedTuple):
    text: str
    note: str
    is_better: bool  # by the label


class Card(NamedTuple):
    """One sampled judgement as the page shows it."""

    outcome: str
    mark: str
    about: list[str]
    question: str
    answers: list[ShownAnswer]
    prompt: str
    response: str
    scores: list[tuple[str, list[str]]]  # gold and verdict: of both answers
    total: str
    rewards: list[tuple[str, str]]  # terms, total, advantage


def _judgements(run_dir: pathlib.Path) -> tuple[str, list[Card]]:
    """Return when the newest judgements were sampled, and some of them, of mixed outcomes."""
    paths = sorted(run_dir.glob("completions/*.parquet"), key=lambda p: ("grpo" in p.stem, p.stem))
    if not paths:
        return "", []
    import pyarrow.parquet as pq

    rows = pq.read_table(paths[-1]).to_pylist()
    num_seen, groups = Counter(), {"right": [], "wrong": [], "unparsed": []}
    for row in rows:
        num_seen[row.get("id")] += 1
        groups[_outcome(row)].append((num_seen[row.get("id")], row))
    ranked = (sorted(group, key=lambda pair: pair[0]) for group in groups.values())
    # Outcomes take turns; within one, every prompt comes before any prompt's second completion.
    mix = [pair[1] for turn in itertools.zip_longest(*ranked) for pair in turn if pair]
    terms = [name for name in rows[0] if "rewards/" in name and any(row[name] for row in rows)]
    stage, _, step = paths[-1].stem.rpartition("_")
    cards = [_card(row, terms) for row in mix[:NUM_JUDGEMENTS]]
    return f"{STAGES.get(stage, stage)}, step {int(step):,}", cards


def _outcome(row: Row) -> str:
    verdict = row.get("verdict")
    if not verdict:
        return "unparsed"
    return "right" if preferred(*verdict) == row["label"] else "wrong"


def _card(row: Row, terms: Sequence[str]) -> Card:
    outcome = _outcome(row)
    scores = []
    for name in ("gold", "verdict"):
        pair = row.get(name) or (None, None)  # no gold scores: a preference alone
        scores.append((name.title(), ["–" if v is None else f"{v:g}" for v in pair]))
    rewards = {name.removeprefix("rewards/").replace("_", " "): row[name] for name in terms}
    rewards |= {"total": row.get("reward"), "advantage": row.get("advantage")}
    about = [str(row["id"])] if row.get("id") is not None else []
    about += (
        [row["status"].replace("_", " ")] if outcome == "unparsed" and row.get("status") else []
    )
    about += ["answers swapped"] if row.get("order") == "swapped" else []
    total = row.get("reward")
    return Card(
        outcome=outcome,
        mark={"right": "✓", "wrong": "✗"}.get(outcome, "?"),
        about=about,
        question=str(row.get("question") or ""),
        answers=_answers(row),
        prompt=str(row.get("prompt") or ""),
        response=str(row.get("response") or row.get("completion") or ""),
        scores=scores,
        total="" if total is None else f"{total:+.2f}",
        rewards=[(k, f"{v:+.2f}") for k, v in rewards.items() if v is not None],
    )


def _answers(row: Row) -> list[ShownAnswer]:
    """Return both answers; none for records of before they were kept beside the prompt."""
    texts = [row.get(f"answer_{number}") for number in (1, 2)]
    if None in texts:
        return []
    tie = "a tie" if row.get("label") == 0 else ""
    notes = ["better" if row.get("label") == number else tie for number in (1, 2)]
    return [
        ShownAnswer(str(text), note, note == "better")
        for text, note in zip(texts, notes, strict=True)
    ]
