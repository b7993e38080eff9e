"""What a study is made of: runs, how they are judged, and tables of what comes out.

`configs/study/*.yaml` are such files. A run is a config of `jlrm.train` with settings, or a model
that is judged as it is; an evaluation is a command line of `jlrm.evaluate` without its judge.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from jlrm.config import UsageError, nearest
from jlrm.evaluation.benchmarks.registry import benchmark
from jlrm.runtime import settings

# Columns of a table that are no metric of a benchmark.
DIAGNOSTICS = ("consistency", "lean", "unread", "difference", "ece")
SUBSET = "subset:"


@dataclass(frozen=True)
class StudyRun:
    label: str = ""  # in tables; the run's name where it is empty
    config: str = ""  # YAML file of the training; the study's where it is empty
    settings: list[str] = field(default_factory=list)  # section.key=value, over those of the study
    after: str = ""  # run of the same seed whose weights this one begins with
    model: str = ""  # judged as it is and not trained: a directory, hub id or heuristic
    # Flags of jlrm.evaluate in place of the evaluations' `judging`: [--backend, heuristic].
    arguments: list[str] = field(default_factory=list)
    against: str = ""  # run of the same seed that it is compared with, item by item


@dataclass(frozen=True)
class StudyEvaluation:
    benchmark: str
    data: str = ""
    arguments: list[str] = field(default_factory=list)  # flags of jlrm.evaluate: [--limit, "100"]
    judging: list[str] = field(
        default_factory=list
    )  # flags of how a model writes: [--prompt, jlrm]
    runs: list[str] = field(default_factory=list)  # which are judged; empty: all
    groups: str = ""  # file of groups of its items (evaluation/groups.py), for `by_group`


@dataclass(frozen=True)
class StudyTable:
    columns: list[str]  # EVALUATION.METRIC, or .subset:NAME, .consistency, .lean, .ece, ...
    title: str = ""
    rows: list[str] = field(default_factory=list)  # runs; empty: all
    # What others have published: {label: [a number for each column; "-" for none]}.
    published: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""
    # Draw all columns against these numbers, one for each row, named by `across`.
    at: list[float] = field(default_factory=list)
    across: str = ""


@dataclass(frozen=True)
class StudyBreakdown:
    """A table with a row for each group of an evaluation's items."""

    metric: str  # EVALUATION.METRIC
    runs: list[str]  # its columns
    title: str = ""
    across: str = "share of its rows, %"  # what the groups' shares are of
    # Pairs of these runs: what the second gains over the first is drawn over the shares.
    gains: list[list[str]] = field(default_factory=list)
    # What others have published: {group: [items, share, a number for each run]; "-" for none}.
    published: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Study:
    dir: str  # for all that the study writes
    runs: dict[str, StudyRun]
    evaluations: dict[str, StudyEvaluation]
    tables: dict[str, StudyTable]
    by_group: dict[str, StudyBreakdown] = field(default_factory=dict)
    title: str = ""
    config: str = ""  # of runs that name none
    settings: list[str] = field(default_factory=list)  # of all runs
    seeds: list[Annotated[int, 0]] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for what, names in (("runs", self.runs), ("evaluations", self.evaluations)):
            if not names:
                raise UsageError(f"The study has no {what}.")
            for name in names:
                if not name.replace("-", "").replace("_", "").isalnum():
                    raise UsageError(
                        f"{what}: {name!r} names a folder: use letters, digits, '-' and '_'."
                    )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds={self.seeds} must name each seed once, and at least one.")
        seen: set[str] = set()
        for name, run in self.runs.items():
            self._check_run(name, run, seen)
            seen.add(name)
        for name, evaluation in self.evaluations.items():
            for each in evaluation.benchmark.split(","):
                benchmark(each.strip())  # before the trainings, which take longer
            for run in evaluation.runs:
                _check_name(f"evaluations.{name}.runs", run, self.runs)
        for name, table in self.tables.items():
            self._check_table(f"tables.{name}", table)
        for name, breakdown in self.by_group.items():
            self._check_breakdown(f"by_group.{name}", breakdown)

    def _check_run(self, name: str, run: StudyRun, seen: set[str]) -> None:
        if bool(run.model) == bool(run.config or self.config) and not run.model:
            raise UsageError(f"runs.{name} has neither a config nor a model.")
        if run.model and (run.config or run.settings or run.after):
            raise UsageError(
                f"runs.{name}.model={run.model} is judged as it is: it takes no config, settings "
                "or after. To train it, set model.path among the settings."
            )
        for field_name, other in (("after", run.after), ("against", run.against)):
            if other and other not in seen:
                _check_name(f"runs.{name}.{field_name}", other, self.runs)
                raise UsageError(f"runs.{name}.{field_name}={other} must stand above it.")
        if run.after and self.runs[run.after].model:
            raise UsageError(f"runs.{name}.after={run.after} is not trained. Set model.path.")

    def _check_table(self, where: str, table: StudyTable) -> None:
        if not table.columns:
            raise UsageError(f"{where}.columns is empty.")
        for column in table.columns:
            self._check_column(f"{where}.columns", column)
        for row in table.rows:
            _check_name(f"{where}.rows", row, self.runs)
        _check_published(where, table.published, len(table.columns))
        if table.at and len(table.at) != len(table.rows or self.runs):
            raise UsageError(f"{where}.at needs a number for each of its rows.")

    def _check_column(self, where: str, column: str) -> None:
        name, dot, metric = column.partition(".")
        _check_name(where, name, self.evaluations)
        if not (dot and metric):
            raise UsageError(f"{where}: {column} is not EVALUATION.METRIC.")

    def _check_breakdown(self, where: str, table: StudyBreakdown) -> None:
        self._check_column(f"{where}.metric", table.metric)
        if not table.runs:
            raise UsageError(f"{where}.runs is empty.")
        judged = self.evaluations[table.metric.partition(".")[0]].runs or list(self.runs)
        for run in table.runs:
            _check_name(f"{where}.runs", run, dict.fromkeys(judged))
        for pair in table.gains:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise UsageError(f"{where}.gains: {pair} is not a pair of runs.")
            for run in pair:
                _check_name(f"{where}.gains", run, dict.fromkeys(table.runs))
        _check_published(where, table.published, 2 + len(table.runs))

    def seeds_of(self, name: str) -> list[int]:
        """Return the seeds of a run; a model that is not trained has one."""
        return self.seeds[:1] if self.runs[name].model else self.seeds

    def label(self, name: str) -> str:
        """Return what tables call a run."""
        return self.runs[name].label or name


def load(path: pathlib.Path) -> Study:
    """Read a study.

    Raises:
      UsageError: no such file, or it is not what stands above.
    """
    return settings.load_as(Study, path)


def published(values: list[str]) -> list[float | None]:
    """Return the numbers of a published row."""
    return [_number(value, "published") for value in values]


def _check_published(where: str, rows: Mapping[str, list[str]], num_columns: int) -> None:
    for label, values in rows.items():
        if len(values) != num_columns:
            raise UsageError(
                f"{where}.published: {label} has {len(values)} values for {num_columns} columns. "
                "A value that is not known is '-'."
            )
        for value in values:
            _number(value, f"{where}.published: {label}")


def _number(value: str, where: str) -> float | None:
    try:
        return None if value == "-" else float(value)
    except ValueError:
        raise UsageError(f"{where}: {value!r} is no number, and not '-'.") from None


def _check_name(where: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise UsageError(f"{where}: there is no '{name}'. {nearest(name, known)}")
