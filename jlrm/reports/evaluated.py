"""Evaluated judges side by side, and their numbers as a page words them.

Left out: any arithmetic on results, which is the business of evaluation/.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlrm.reports.results_file import (
    BenchmarkResult,
    Interval,
    JudgeRecord,
    Lean,
    Published,
    Rate,
    Results,
)

HEADLINES = ("overall", "agreement")  # else a benchmark's first metric


class EvaluatedJudge(NamedTuple):
    """The results of one judge, under a name that is unique on the page."""

    name: str
    about: JudgeRecord
    benchmarks: dict[str, BenchmarkResult]

    def result(self, benchmark: str) -> BenchmarkResult:
        """Return the result of a benchmark; an empty one where it was not run."""
        return self.benchmarks.get(benchmark, BenchmarkResult())


def name_judges(files: Sequence[Results]) -> list[EvaluatedJudge]:
    """Return the judges of results files, each under a name of its own."""
    judges: dict[str, EvaluatedJudge] = {}
    for number, results in enumerate(files, start=1):
        wanted = shown_name(results.judge.name) or f"judge {number}"
        alike = (f"{wanted} ({i})" for i in itertools.count(2))
        name = next(name for name in itertools.chain([wanted], alike) if name not in judges)
        judges[name] = EvaluatedJudge(name, results.judge, results.benchmarks)
    return list(judges.values())


def results_of(name: str, judges: Sequence[EvaluatedJudge]) -> list[BenchmarkResult]:
    """Return what each judge has of a benchmark; empty results where it was not run."""
    return [judge.result(name) for judge in judges]


def value_at(result: BenchmarkResult, path: str) -> Any:
    """Return the diagnostic at a path such as `length.verdicts`; None where there is no value."""
    value: Any = result.diagnostics
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    is_empty_rate = isinstance(value, Rate) and value.percent is None
    return None if is_empty_rate or (isinstance(value, Lean) and value.points is None) else value


def headline_metric(name: str, judges: Sequence[EvaluatedJudge]) -> str:
    metrics = list(dict.fromkeys(m for each in results_of(name, judges) for m in each.metrics))
    return next((metric for metric in HEADLINES if metric in metrics), (metrics or [""])[0])


def published_rows(name: str, judges: Sequence[EvaluatedJudge]) -> list[Published]:
    """Return the published values of a benchmark, each once."""
    return list(dict.fromkeys(row for each in results_of(name, judges) for row in each.published))


def policy_text(result: BenchmarkResult) -> str:
    return " · ".join(f"{key.replace('_', ' ')}: {value}" for key, value in result.policy.items())


def whole_interval(interval: Interval | None) -> tuple[float, float] | None:
    """Return an interval both of whose ends are known."""
    if interval is None or interval[0] is None or interval[1] is None:
        return None
    return interval[0], interval[1]


def independence_text(n: int, clusters: int | None, effect: float | None) -> str:
    """Return what intervals draw, e.g. "999 items in 170 clusters of items that share a question,
    design effect 2.38"; "" where a file of an older program does not say."""
    if clusters is None:
        return ""
    items = f"{n:,} item{'s' if n != 1 else ''}"
    if clusters == n:
        return f"{items}, none of which share a question"
    name = "1 cluster" if clusters == 1 else f"{clusters:,} clusters"
    text = f"{items} in {name} of items that share a question"
    return text if effect is None else f"{text}, design effect {effect:.2f}"


def number_text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def range_text(interval: Interval | None) -> str:
    ends = whole_interval(interval)
    return f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else ""


def shown_name(name: str) -> str:
    """Return a name without the folders of a machine: the last part of an absolute path."""
    is_absolute = pathlib.PurePosixPath(name).is_absolute() or name.startswith("~")
    return pathlib.PurePosixPath(name).name if is_absolute else name
