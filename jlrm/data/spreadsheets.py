"""Rows of CSV and TSV files, as spreadsheets and exports write them.

The delimiter is read off the header: a spreadsheet in a country of decimal commas writes `;` into
a `.csv` file, and then "7,5" is a number.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from jlrm.config import UsageError

DELIMITERS = (",", ";", "\t")


def read_cells(
    file: TextIO, name: str, is_number: Callable[[str], bool], every: slice
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the chosen rows as (number from 1, row); an empty cell is None.

    is_number: whether a column of that header holds numbers; all others stay text.

    Raises:
      UsageError: a row has more or fewer cells than the header.
    """
    csv.field_size_limit(2**31 - 1)  # answers may be longer than the module's 128 KiB
    delimiter = choose_delimiter(file.readline(), "\t" if ".tsv" in name.lower() else ",")
    file.seek(0)
    lines = csv.reader(file, delimiter=delimiter, strict=True)
    header = next(lines, [])
    rows = enumerate(lines, 1)
    for number, cells in itertools.islice(rows, every.start, every.stop, every.step):
        if not cells:
            continue
        if len(cells) != len(header):
            raise UsageError(
                f"{name}, row {number} has {len(cells)} cells, the header has {len(header)}. "
                'A text that holds the delimiter or a line break must stand in quotes ("...").'
            )
        yield (
            number,
            {
                column: _cell(cell, delimiter) if is_number(column) else cell or None
                for column, cell in zip(header, cells, strict=True)
            },
        )


def choose_delimiter(header: str, usual: str) -> str:
    """Return the usual delimiter if it divides the header, else the only other one that does."""
    others = [mark for mark in DELIMITERS if mark in header]
    return others[0] if usual not in header and len(others) == 1 else usual


def _cell(text: str, delimiter: str) -> Any:
    """Read a number or a list of numbers; what is neither stays text, for the checks to refuse."""
    if delimiter == ";" and re.fullmatch(r"-?\d+,\d+", text):
        text = text.replace(",", ".")
    try:
        return None if not text else json.loads(text) if text.startswith("[") else float(text)
    except (ValueError, RecursionError):
        return text
