"""`report.html`, `tables.md` and `tables.json` of a study."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from jlrm.reports import charts, contracts
from jlrm.reports.charts import Axes, Chart, Line, Mark
from jlrm.reports.pages import write_page
from jlrm.runtime.storage import write_atomically
from jlrm.studies import groups, outcomes, scatter
from jlrm.studies.outcomes import (
    FittedGain,
    GroupedTable,
    SeedMean,
    StudiedTable,
    StudyOutcome,
    TableRow,
)
from jlrm.studies.spec import Study

PAGE, TEXT, DATA = "report.html", "tables.md", "tables.json"


def outcome(study: Study) -> StudyOutcome:
    """Read what the evaluations have written so far."""
    by_group = groups.tables(study)
    return StudyOutcome(study.title, tuple(study.seeds), outcomes.tables(study), by_group)


def write(directory: pathlib.Path, found: StudyOutcome) -> None:
    """Write the tables as data, as text, and as a page with a chart of each table."""
    directory.mkdir(parents=True, exist_ok=True)
    contracts.write(directory / DATA, found)
    write_atomically(directory / TEXT, as_text(found).encode())
    write_page(
        directory / PAGE,
        "study.html",
        title=found.title or directory.resolve().name,
        seeds=found.seeds,
        tables=[(table, _charts(table)) for table in found.tables.values()],
        by_group=[(table, _gains(table)) for table in found.by_group.values()],
        cell=cell,
        share=share,
        unfinished=any(
            value.missing
            for table in (*found.tables.values(), *found.by_group.values())
            for value in _all(table)
        ),
    )


def as_text(found: StudyOutcome) -> str:
    """Return the tables in Markdown."""
    parts = [f"# {found.title}"] if found.title else []
    for table in found.tables.values():
        rows = [["", *table.columns], ["---"] * (1 + len(table.columns))]
        rows += [
            [f"{row.label}, published" if row.is_published else row.label, *map(cell, row.values)]
            for row in table.rows
        ]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([f"## {table.title}", "", *lines]))
        parts += [table.note] if table.note else []
    for table in found.by_group.values():
        rows = [["", "items", table.across, *table.columns], ["---"] * (3 + len(table.columns))]
        for row in table.rows:
            label = f"{row.label}, published" if row.is_published else row.label
            items = "-" if row.n is None else str(row.n)
            rows.append([label, items, share(row.share), *map(cell, row.values)])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([f"## {table.title}", "", *lines]))
        parts += [f"{each.alt}." for each in _gains(table)]
        parts += [text for text in (table.missing, table.note) if text]
    seeds = len(found.seeds)
    parts.append(
        f"Means of {seeds} seed{'s' if seeds > 1 else ''}, with 95 % intervals over questions"
        + (" and seeds." if seeds > 1 else "; one seed says nothing of other seeds.")
    )
    return "\n\n".join(parts) + "\n"


def cell(value: SeedMean) -> str:
    """Return what a table shows of a value."""
    if value.mean is None:
        return "-"
    ends = "" if value.interval is None else " ({:.1f} to {:.1f})".format(*value.interval)
    seeds = len(value.seeds)
    some = f" [{seeds} of {seeds + value.missing} seeds]" if value.missing else ""
    return f"{value.mean:.2f}{ends}{some}"


def share(value: float | None) -> str:
    """Return what a table shows of a group's share."""
    return "-" if value is None else f"{value:.2f}"


def _all(table: StudiedTable | GroupedTable) -> list[SeedMean]:
    return [value for row in table.rows for value in row.values]


def _gains(table: GroupedTable) -> list[Chart]:
    """Return a chart of each pair of runs, ours and the published one on the same axes."""
    by_pair: dict[tuple[str, str], list[FittedGain]] = {}
    for gain in table.gains:
        by_pair.setdefault((gain.over, gain.of), []).append(gain)
    return [scatter.chart(gains, table.across) for gains in by_pair.values()]


def _charts(table: StudiedTable) -> list[Chart]:
    """Return a table's charts: its columns over `at`, or else one of each column."""
    if table.at:
        return [_over(table)]
    return [
        _dots(column, [(row, row.values[number]) for row in table.rows])
        for number, column in enumerate(table.columns)
        if any(row.values[number].mean is not None for row in table.rows if not row.is_published)
    ]


def _dots(column: str, rows: Sequence[tuple[TableRow, SeedMean]]) -> Chart:
    marks = [
        (
            charts.wrap(f"{row.label}, published" if row.is_published else row.label, 24),
            [
                Mark(
                    value.mean,
                    value.interval,
                    None if row.is_published else 0,
                    bool(value.missing),
                    "no value" if value.mean is None else "",
                )
            ],
        )
        for row, value in rows
    ]
    return charts.dots(column, marks)


def _over(table: StudiedTable) -> Chart:
    own = [row for row in table.rows if not row.is_published]
    x = np.array(table.at, float)
    lines = [
        Line(
            column,
            x,
            np.array(
                [np.nan if (mean := row.values[number].mean) is None else mean for row in own]
            ),
        )
        for number, column in enumerate(table.columns)
    ]
    return charts.curves(table.title, lines, Axes(table.across))
