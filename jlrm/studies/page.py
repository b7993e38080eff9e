"""`report.html`, `tables.md` and `tables.json` of a study."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from jlrm.reports import charts, contracts
from jlrm.reports.charts import Axes, Chart, Line, Mark
from jlrm.reports.pages import write_page
from jlrm.runtime.storage import write_atomically
from jlrm.studies.outcomes import SeedMean, StudiedTable, StudyOutcome, TableRow

PAGE, TEXT, DATA = "report.html", "tables.md", "tables.json"


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
        cell=cell,
        unfinished=any(value.missing for table in found.tables.values() for value in _all(table)),
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


def _all(table: StudiedTable) -> list[SeedMean]:
    return [value for row in table.rows for value in row.values]


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
