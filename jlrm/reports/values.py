"""Numbers out of `results.json` as a page shows them: what is there, in which words, and no more.

Left out: any arithmetic on results. statistics.py made the numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from jlrm.config import UsageError

Row = dict[str, Any]
HEADLINES = ("overall", "agreement")  # else a benchmark's first metric


class Judge(NamedTuple):
    name: str  # unique on the page
    about: Row
    benchmarks: dict[str, Row]


def read_judges(results: Sequence[Row]) -> list[Judge]:
    """Return the judges of results.json files, each under a name of its own.

    Raises:
      UsageError: one that `jlrm.evaluate` has not written.
    """
    judges: dict[str, Judge] = {}
    for number, result in enumerate(results, start=1):
        about, benchmarks = find_value(result, "judge"), find_value(result, "benchmarks")
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


def entries_of(name: str, judges: Sequence[Judge]) -> list[Row]:
    """Return what each judge has of a benchmark; empty where it was not run."""
    return [judge.benchmarks.get(name) or {} for judge in judges]


def find_value(entry: Any, path: str) -> Any:
    for key in path.split("."):
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def as_number(value: Any) -> float | None:
    """Return a finite number; None for null, for NaN (a string where JSON is strict) and others."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def as_interval(value: Any) -> tuple[float, float] | None:
    low, high = (as_number(end) for end in value or (None, None))
    return None if low is None or high is None else (low, high)


def headline_metric(name: str, judges: Sequence[Judge]) -> str:
    metrics = list(
        dict.fromkeys(m for e in entries_of(name, judges) for m in e.get("metrics") or {})
    )
    return next((metric for metric in HEADLINES if metric in metrics), (metrics or [""])[0])


def published_rows(name: str, judges: Sequence[Judge]) -> list[Row]:
    """Return the published values of a benchmark, each once."""
    rows = [row for entry in entries_of(name, judges) for row in entry.get("published") or []]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def policy_text(entry: Row) -> str:
    policy = entry.get("policy") or {}
    return " · ".join(f"{key.replace('_', ' ')}: {value}" for key, value in policy.items())


def number_text(value: Any, digits: int = 2) -> str:
    number = as_number(value)
    return "" if number is None else f"{number:,.{digits}f}"


def range_text(interval: Any) -> str:
    ends = as_interval(interval)
    return f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else ""


def html_cell(main: str, *small: str) -> str:
    """Return a cell: a value, and what qualifies it in small print below."""
    notes = "".join(f"<br><small>{escape(note)}</small>" for note in small if note)
    return escape(main) + notes if main else ""


def diagnostic_cell(value: Any, digits: int) -> str:
    if not isinstance(value, dict):
        return html_cell(number_text(value, digits))
    n = f"n = {value['n']:,}" if "n" in value else ""
    if as_number(value.get("percent")) is not None:
        return html_cell(f"{value['percent']:.1f} %", range_text(value.get("interval")), n)
    if as_number(value.get("points")) is not None:
        return html_cell(f"{value['points']:+.1f} points", n)
    return html_cell(number_text(value.get("mean"), digits), n)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of HTML; those without a value are left out, "–" marks a single absent one."""
    kept = [row for row in rows if any(row[1:])]
    lines = ["<tr><th>" + "<th>".join(header)]
    lines += [f"<tr><th>{row[0]}{html_cells(row[1:])}" for row in kept]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if kept else ""


def html_cells(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell or '–'}" for cell in cells)


def html_names(judges: Sequence[Judge]) -> list[str]:
    return [escape(judge.name) for judge in judges]
