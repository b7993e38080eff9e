"""Pairs to be judged, from anywhere that training reads from; a label is welcome but not needed.

A row that can't be judged keeps its place, with the reason: one line in, one line out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from jlrm.config import UsageError, nearest
from jlrm.data import forms, readers
from jlrm.data.comparisons import REASONS, Where
from jlrm.judgement import labels
from jlrm.judgement.labels import Unusable
from jlrm.serving.asked import as_text


class Row(NamedTuple):
    """A line of the input. error: why it can't be judged; "" if it can."""

    id: str
    question: str
    answer_1: str
    answer_2: str
    label: int | None  # the better answer, 0 for a tie, None where nobody said
    error: str = ""
    reference: str | None = None


class SingleRow(NamedTuple):
    """A line of the input with one answer. error: why it can't be judged; "" if it can."""

    id: str
    question: str
    answer: str
    error: str = ""
    reference: str | None = None


class AnyRow(Protocol):
    """What rows of every form have."""

    @property
    def error(self) -> str: ...

    def _replace(self, **changes: Any) -> Any: ...


RowT = TypeVar("RowT", bound=AnyRow)
SPELLINGS = {
    "question": forms.QUESTIONS,
    "answer": ("answer", "response", "output", "completion"),
    "id": forms.IDS,
}


def read_single(source: str, columns: Mapping[str, str], reference: str = "") -> list[SingleRow]:
    """Return every row of a source that holds a question and one answer a row, as `read`.

    Raises:
      UsageError: no such source, no row, or no row that can be judged (the first one's reason).
    """

    def row(identity: str, given: Mapping[str, Any], error: str) -> SingleRow:
        if error:
            return SingleRow(identity, "", "", error)
        return SingleRow(identity, *(as_text(given[name], name) for name in ("question", "answer")))

    return read_form(source, columns, SPELLINGS, "--single", row, reference)


def read_form(
    source: str,
    columns: Mapping[str, str],
    spellings: Mapping[str, Sequence[str]],
    flag: str,
    row: Callable[[str, Mapping[str, Any], str], RowT],
    reference: str,
) -> list[RowT]:
    """Return every row of a source whose fields go by one of some names.

    Args:
      spellings: the names of each field, one of which is "id". `columns` may say another.
      flag: by which the user has asked for rows of this form.
      row: makes one of an id, its fields, and the reason why it is none ("": it is one). It may
        raise UsageError with the reason; then it is asked again.

    Raises:
      UsageError: as `read_rows`, or `columns` names another field.
    """
    if unknown := sorted(columns.keys() - spellings.keys()):
        raise UsageError(
            f"--columns: there is no field '{unknown[0]}' with {flag}. "
            f"{nearest(unknown[0], [*spellings])}"
        )

    def read_row(raw: object, place: Where) -> RowT:
        if not isinstance(raw, dict):
            return row(place.name, {}, f"{place} {readers.no_object(raw)}")
        known = {key.strip().lower(): value for key, value in raw.items() if isinstance(key, str)}
        given = {
            ours: raw.get(columns[ours])
            if ours in columns
            else next((known[name] for name in names if known.get(name) is not None), None)
            for ours, names in spellings.items()
        }
        identity = place.name if given["id"] is None else str(given["id"])
        try:
            return row(identity, given, "")
        except UsageError as error:
            return row(identity, {}, f"{place._replace(source='')}: {error}")

    return read_rows(source, columns, read_row, reference)


def read(
    source: str, columns: Mapping[str, str], values: Mapping[str, str], reference: str = ""
) -> list[Row]:
    """Return every row of a source.

    Args:
      reference: the column with a reference answer; "": there is none.

    Raises:
      UsageError: no such source, no row, or no row that can be judged (the first one's reason).
    """
    for name in columns:
        if name not in forms.RENAMABLE:
            raise UsageError(
                f"--columns {name}={columns[name]}: there is no field '{name}'. "
                f"{nearest(name, forms.RENAMABLE)}"
            )
    known = labels.meanings(values)
    return read_rows(
        source, columns, lambda raw, place: _row(raw, place, columns, known), reference
    )


def read_rows(
    source: str,
    columns: Mapping[str, str],
    read_row: Callable[[object, Where], RowT],
    reference: str,
) -> list[RowT]:
    """Return every row of a source as `read_row` reads it, with its reference if one is named.

    Raises:
      UsageError: no such source, no row, or no row that can be judged (the first one's reason).
    """
    rows, lacking = list[RowT](), set(columns.values())
    for place, raw in readers.each_place(source, columns):
        lacking.difference_update(raw if isinstance(raw, dict) else ())
        row = read_row(raw, place._replace(source=source))
        if reference and isinstance(raw, dict) and not row.error:
            row = _with_reference(row, raw.get(reference), reference, place)
        rows.append(row)
    if rows and lacking:
        raise UsageError(f"--columns: no row of {source} has a column '{min(lacking)}'.")
    if not rows:
        raise UsageError(f"{source} has no rows.")
    if all(row.error for row in rows):
        raise UsageError(f"{source} has no row that can be judged. The first: {rows[0].error}")
    return rows


def _with_reference(row: RowT, value: object, column: str, place: Where) -> RowT:
    if value is None:
        return row._replace(error=f"{place._replace(source='')} has no reference in '{column}'.")
    try:
        return row._replace(reference=as_text(value, column))
    except UsageError as error:
        return row._replace(error=f"{place._replace(source='')}: {error}")


def _row(raw: object, place: Where, columns: Mapping[str, str], known: Mapping[str, int]) -> Row:
    where, identity = str(place), place.name
    try:
        if not isinstance(raw, dict):
            raise UsageError(f"{where} {readers.no_object(raw)}")
        row = forms.respelled(forms.renamed(raw, columns, where))
        own = next((key for key in forms.IDS if row.get(key) is not None), "id")
        identity = place.name if row.get(own) is None else str(row[own])
        row = {key: value for key, value in row.items() if key not in ("id", own)}
        row = forms.in_our_form(labels.labelled(row, where), "score", where)
        try:
            found, label = forms.comparison(row, identity, place, known), True
        except Unusable as reason:
            if str(reason) not in ("no_label", "one_score"):
                raise
            found, label = forms.comparison({**row, "preference": 0}, identity, place, {}), False
    except Unusable as reason:
        return Row(
            identity, "", "", "", None, f"{place._replace(source='')}: a row {REASONS[str(reason)]}"
        )
    except UsageError as error:
        text = str(error).replace("data.columns=", "--columns ").replace("data.", "--")
        return Row(identity, "", "", "", None, text)
    texts = found.question, found.answer_1, found.answer_2
    return Row(identity, *texts, found.label if label else None)
