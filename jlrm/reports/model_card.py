"""`model_card.md`: every metric of evaluated judges, under what rules, and what to know of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from jlrm.reports.values import (
    Judge,
    as_number,
    find_value,
    number_text,
    policy_text,
    published_rows,
    range_text,
)


def model_card(judges: Sequence[Judge]) -> str:
    """Return Markdown for a model card: every metric, under what rules, and what to know of it."""
    columns = ["benchmark", "metric", "value (%)", "95 % interval", "n", "policy"]
    columns += ["prompt", "parser"]
    rows = []
    for judge in judges:
        for name, entry in judge.benchmarks.items():
            for metric, value in (entry.get("metrics") or {}).items():
                mark = " (INCOMPLETE)" if entry.get("incomplete") else ""
                interval = range_text((entry.get("intervals") or {}).get(metric))
                cells = [name + mark, metric, number_text(value) or "–", interval or "–"]
                cells += [entry.get("n", "–"), policy_text(entry) or "–"]
                cells += [judge.about.get("prompt") or "–", judge.about.get("parser") or "–"]
                rows.append([judge.name, *cells] if len(judges) > 1 else cells)
    header = ["judge", *columns] if len(judges) > 1 else columns
    lines = ["## Evaluation", "", *_markdown(header, rows), ""]
    published = [
        [
            name,
            row.get("judge"),
            row.get("metric"),
            number_text(row.get("value")),
            row.get("source"),
        ]
        for name in dict.fromkeys(name for judge in judges for name in judge.benchmarks)
        for row in published_rows(name, judges)
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
            found = find_value(entry, f"diagnostics.{path}") or {}
            if as_number(found.get("percent")) is not None:
                facts.append(f"{title} {found['percent']:.1f} % (n = {found['n']:,})")
        if (ece := as_number(find_value(entry, "diagnostics.calibration.ece"))) is not None:
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
