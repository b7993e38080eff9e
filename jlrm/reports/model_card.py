"""`model_card.md`: every metric of evaluated judges, under what rules, and what to know of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from jlrm.reports.evaluated import (
    EvaluatedJudge,
    number_text,
    policy_text,
    published_rows,
    range_text,
    value_at,
)
from jlrm.reports.results_file import BenchmarkResult


def model_card(judges: Sequence[EvaluatedJudge]) -> str:
    """Return Markdown for a model card: every metric, under what rules, and what to know of it."""
    is_named = len(judges) > 1
    columns = ["benchmark", "metric", "value (%)", "95 % interval", "n", "policy"]
    columns += ["prompt", "parser"]
    header = ["judge", *columns] if is_named else columns
    rows = [
        [judge.name, *cells] if is_named else cells
        for judge in judges
        for name, result in judge.benchmarks.items()
        for cells in _metric_rows(judge, name, result)
    ]
    lines = ["## Evaluation", "", *_markdown(header, rows), ""]
    published = [
        [name, row.judge, row.metric, number_text(row.value), row.source]
        for name in dict.fromkeys(name for judge in judges for name in judge.benchmarks)
        for row in published_rows(name, judges)
    ]
    if published:
        header = ["benchmark", "judge", "metric", "value (%)", "source"]
        lines += ["### Published values", "", *_markdown(header, published), ""]
    notes = [note for judge in judges for note in _notes(judge, is_named)]
    return "\n".join([*lines, "### Notes", "", *(f"* {note}" for note in notes + NOTES), ""])


def _metric_rows(
    judge: EvaluatedJudge, name: str, result: BenchmarkResult
) -> Iterator[list[object]]:
    mark = " (INCOMPLETE)" if result.incomplete else ""
    rules = [policy_text(result), judge.about.prompt, judge.about.parser]
    for metric, value in result.metrics.items():
        interval = range_text(result.intervals.get(metric))
        numbers = [number_text(value) or "–", interval or "–", result.n]
        yield [name + mark, metric, *numbers, *(text or "–" for text in rules)]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _plain(value: Any) -> str:
    """Return one line that Markdown shows as it is."""
    text = escape(" ".join(str("–" if value is None else value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _notes(judge: EvaluatedJudge, is_named: bool) -> Iterator[str]:
    """Say of each benchmark what its metrics do not show."""
    about = judge.about
    decoding = ", ".join(f"{name} {value}" for name, value in about.decoding.items())
    facts = {"model": about.model, "backend": about.backend, "decoding:": decoding}
    if parts := [f"{name} {value}" for name, value in facts.items() if value]:
        yield _plain(f"{judge.name}: {'; '.join(parts)}.")
    for name, result in judge.benchmarks.items():
        start = f"{judge.name}, {name}" if is_named else name
        if result.incomplete:
            yield f"**{_plain(start)}: INCOMPLETE. Not all games were judged.**"
        if parts := list(_facts(result)):
            yield _plain(f"{start}: {'; '.join(parts)}.")


def _facts(result: BenchmarkResult) -> Iterator[str]:
    for title, path in NOTED.items():
        rate = value_at(result, path)
        if rate is not None:
            yield f"{title} {rate.percent:.1f} % (n = {rate.n:,})"
    if calibration := result.diagnostics.calibration:
        yield f"calibration error {calibration.ece:.1f} points"


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
