"""Data files, and which of them a directory means: JSON, CSV, TSV (plain or gzipped), Parquet.

The delimiter of a CSV file is read off its header: a spreadsheet in a country of decimal commas
writes `;`, and then "7,5" is a number.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from jlrm.config import UsageError
from jlrm.data.comparisons import Where, listed

log = logging.getLogger(__name__)

# The place, its source left out, and what stands there: a row, or a `Torn` one.
Rows = Iterator[tuple[Where, Any]]

DELIMITERS = (",", ";", "\t", "|")
READ_ROWS = 1024  # at a time, where a source gives them by number
FORMATS = ".jsonl, .json, .csv, .tsv (each plain or .gz) or .parquet"
# Endings of other files of rows, and how their rows become readable.
_SHEET = "Save the sheet as CSV (CSV UTF-8)."
_UNPACK = "Unpack it first."
OTHERS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), _SHEET),
    **dict.fromkeys((".zip", ".zst", ".bz2", ".xz", ".tar", ".tgz", ".7z"), _UNPACK),
    **dict.fromkeys((".arrow", ".feather"), "Name the directory that `save_to_disk` has written."),
}
# How files begin whatever their names say.
MAGIC = {
    b"\x1f\x8b": "gzipped: let its name end with .gz",
    b"PK\x03\x04": "a spreadsheet or an archive: save the sheet as CSV (CSV UTF-8), or unpack it",
    b"PAR1": "Parquet: let its name end with .parquet",
}
# Words in the names of files that tell their split, as `datasets` takes them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MESSAGE = {"role", "from"}  # keys of a turn: a list of turns is a cell, no table
ABOUT = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # no rows


class Torn(NamedTuple):
    """What stands in the place of a row that is none; the rows after it can be read."""

    reason: str  # follows the place in a sentence


def kind_of(name: str) -> str:
    """Return the kind of a data file, "json", "csv", "tsv" or "parquet", and "" of any other."""
    ending = pathlib.PurePath(name.lower().removesuffix(".gz")).suffix
    kinds = {".csv": "csv", ".tsv": "tsv"} | dict.fromkeys((".jsonl", ".ndjson", ".json"), "json")
    is_parquet = name.lower().endswith(".parquet")  # which is compressed inside
    return "parquet" if is_parquet else kinds.get(ending, "")


def read_file(
    path: pathlib.Path, name: str, is_number: Callable[[str], bool], every: slice
) -> Rows:
    """Yield the chosen rows of a file, or of its lines.

    Args:
      name: of the file in errors, and to tell its kind by.
      is_number: whether a CSV column of that header holds numbers; all others stay text.
      every: counts rows, or lines, from 0; has a start and a step.

    Raises:
      UsageError: no such format, or content that is not of its format, after which no row is found.
    """
    kind = kind_of(path.name)
    if kind == "json":
        return _json_rows(path, name, every)
    if kind in ("csv", "tsv"):
        return _csv_rows(path, name, is_number, every)
    if kind == "parquet":
        return _parquet_rows(path, every)
    advice = OTHERS.get(path.suffix.lower(), "")
    raise UsageError(
        f"{name} is in no format that is understood. Wanted {FORMATS}. {advice}".strip()
    )


def _open_text(path: pathlib.Path, name: str) -> TextIO:
    is_gzipped = path.name.lower().endswith(".gz")
    if not is_gzipped:
        with open(path, "rb") as file:
            start = file.read(4)
        for magic, what in MAGIC.items():
            if start.startswith(magic):
                raise UsageError(f"{name} is {what}.")
    opener: Any = gzip.open if is_gzipped else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")  # spreadsheets write the mark


def _json_rows(path: pathlib.Path, name: str, every: slice) -> Rows:
    """Yield the rows of a list, of a table in one object, or of lines with one object each."""
    with _open_text(path, name) as file:
        whole = _whole(file, name)
        if isinstance(whole, list):
            rows = enumerate(whole)
            for i, row in itertools.islice(rows, every.start, every.stop, every.step):
                yield Where(i + 1), row
            return
        file.seek(0)
        lines = enumerate(file, 1)
        for number, line in itertools.islice(lines, every.start, every.stop, every.step):
            if line.strip():
                yield Where(number, "line"), _line(line)


def _whole(file: TextIO, name: str) -> list[Any] | None:
    """Return the rows of a file that is one list or one object over lines, None of any other."""
    first = next(filter(str.strip, file), "")
    if not first.lstrip().startswith("["):
        try:
            row = json.loads(first)
        except (ValueError, RecursionError):
            if first.strip() != "{":
                return None  # a torn line
        else:
            return None if any(map(str.strip, file)) else _table(row)
    file.seek(0)
    given = _from_json(file.read(), name)
    return given if isinstance(given, list) else _table(given) or [given]


def _table(given: Any) -> list[Any] | None:
    """Return the rows of an object that holds a table, None of any other.

    That is {"data": [row, row]}, or, as pandas writes it, {column: [cell, cell]} or {column:
    {number: cell}}.
    """
    columns = list(given.values()) if isinstance(given, dict) else []
    lists = [column for column in columns if isinstance(column, list)]
    if len(columns) == 1 and lists:
        is_rows = all(isinstance(row, dict) and not MESSAGE & row.keys() for row in lists[0])
        return lists[0] if is_rows and lists[0] else None
    if columns and all(isinstance(column, dict) for column in columns):
        rows = list(columns[0])
        is_table = all(list(column) == rows for column in columns) and all(map(str.isdecimal, rows))
        lists = [list(column.values()) for column in columns] if is_table else []
    is_table = len(lists) == len(columns) and len({len(cells) for cells in lists}) == 1
    if not is_table or any(isinstance(cell, dict) for cells in lists for cell in cells):
        return None  # a row with conversations: lists of messages
    return [dict(zip(given, cells, strict=True)) for cells in zip(*lists, strict=True)]


def _from_json(text: str, where: str) -> Any:
    read = _line(text)
    if isinstance(read, Torn):
        raise UsageError(f"{where} {read.reason}")
    return read


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Torn(f"is not valid JSON: {error}.")


def _parquet_rows(path: pathlib.Path, every: slice) -> Rows:
    import pyarrow.parquet

    first = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        names = _class_names((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        for batch in file.iter_batches(batch_size=READ_ROWS):
            # Not `batch.take`: it has no kernel for string views, which polars writes.
            mine = range((every.start - first) % every.step, len(batch), every.step)
            rows = batch.to_pylist()
            for i in mine:
                yield Where(first + i + 1), with_names(plain_row(rows[i]), names)
            first += len(batch)


def _class_names(metadata: bytes) -> dict[str, list[str]]:
    """Return the names of classes by column, which `datasets` keeps in its Parquet files."""
    with contextlib.suppress(ValueError, AttributeError):
        features = json.loads(metadata).get("info", {}).get("features", {})
        return {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    return {}


def with_names(row: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a row with the names of its classes, {column: names}, in place of their numbers."""
    for column, known in names.items():
        number = row.get(column)
        if isinstance(number, int):
            row[column] = known[number] if 0 <= number < len(known) else None
    return row


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its values as JSON has them."""
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it. A null in an Arrow struct means that the row lacks the key."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(shortest(value.item()) if value.dtype == np.float32 else value.item())
    if isinstance(value, bytes):
        return value.decode(
            errors="surrogateescape"
        )  # seen, and dropped, if it is one of our texts
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def shortest(value: float) -> float:
    """Return the number that was stored as float32: 8.1, not 8.100000381469727."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


# ------------------------------------------------------------------------------------- directories


def data_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the data files of a directory, or none where `datasets` has to choose.

    That is where they are of several kinds, or where a dataset card says which of them to read.
    """
    card = path / "README.md"
    said = card.read_text("utf-8", "replace") if card.is_file() else ""
    if re.search(r"^(configs|data_files):", said, re.MULTILINE):
        return []
    there = [file for file in sorted(path.rglob("*")) if file.is_file()]
    sheets = (file.name for file in there if OTHERS.get(file.suffix.lower()) == _SHEET)
    if others := [name for name in sheets if name[0] not in ".~"]:  # "~$": open in Excel
        log.warning("%s: not read: %s. %s", path, ", ".join(others), _SHEET)
    files = [file for file in there if kind_of(file.name)]
    inner = ((file, file.relative_to(path).parts) for file in files if file.name not in ABOUT)
    files = [file for file, parts in inner if not any(part[0] in "._" for part in parts)]
    kinds = {kind_of(file.name) for file in files}
    if len(kinds) > 1:
        log.warning(
            "%s holds files of several kinds (%s), of which one is read: name a file, or a "
            "directory for each kind",
            *(path, ", ".join(sorted(kinds))),
        )
    return files if len(kinds) == 1 else []


def files_of_split(
    path: pathlib.Path, files: Sequence[pathlib.Path], split: str
) -> list[pathlib.Path]:
    """Return the files of a split, which their names tell; where none does, all are of `train`."""
    splits: dict[str, list[pathlib.Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(path)).lower())
        told = next((SPLITS[word] for word in reversed(words) if word in SPLITS), "")
        splits.setdefault(told, []).append(file)
    untold = splits.pop("", [])
    if untold and "train" not in splits:
        splits["train"] = untold
    elif untold:
        left_out = ", ".join(file.name for file in untold)
        log.warning("%s: not read, since its name tells no split: %s", path, left_out)
    split = split or usual_split(path, splits)
    if split not in splits:
        raise UsageError(f"{path} has no split '{split}'. There are: {listed(splits)}.")
    return splits[split]


def usual_split(path: pathlib.Path, names: Iterable[str]) -> str:
    """Return "train", or the only split that there is."""
    names = list(names)
    if "train" in names:
        return "train"
    if len(names) > 1:
        raise UsageError(
            f"{path} has no split 'train'. There are: {listed(names)}. "
            f"Name one after the directory, e.g. {path}#{names[0]}."
        )
    return names[0]


# ------------------------------------------------------------------------------------ spreadsheets


def _csv_rows(
    path: pathlib.Path, name: str, is_number: Callable[[str], bool], every: slice
) -> Rows:
    """Yield the chosen rows; an empty cell is None. A row has as many cells as the header."""
    csv.field_size_limit(2**31 - 1)  # answers may be longer than the module's 128 KiB
    with _open_text(path, name) as file:
        usual = "\t" if ".tsv" in name.lower() else ","
        first = file.readline()
        if told := re.fullmatch(r"sep=(.)\s*", first):  # of Excel, no row
            delimiter = told[1]
        else:
            delimiter = choose_delimiter(first, usual)
            file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        header = _header(next(lines, []), name)
        rows = enumerate(_cells(lines, name), 1)
        for number, cells in itertools.islice(rows, every.start, every.stop, every.step):
            if not cells:
                continue
            if len(cells) != len(header):
                reason = (
                    f"has {len(cells)} cells, the header has {len(header)}. A text that holds the "
                    'delimiter or a line break must stand in quotes ("...").'
                )
                yield Where(number), Torn(reason)
                continue
            yield (
                Where(number),
                {
                    column: _cell(cell, delimiter) if is_number(column) else cell or None
                    for column, cell in zip(header, cells, strict=True)
                },
            )


def _header(names: list[str], source: str) -> list[str]:
    if any("\0" in name for name in names):
        raise UsageError(
            f"{source} is no UTF-8 text. Convert it, e.g. iconv -f utf-16le -t utf-8 OLD > NEW."
        )
    for name in names:
        if name and names.count(name) > 1:
            raise UsageError(f"{source}: two columns are called '{name}'. Rename one of them.")
    return names


def _cells(lines: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    for number in itertools.count(1):
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise UsageError(
                f"{name}, row {number} is not valid CSV: {error}. A quote within quotes is written "
                'twice (""), and each that opens is closed.'
            ) from None
        if cells is None:
            return
        yield cells


def choose_delimiter(header: str, usual: str) -> str:
    """Return the usual delimiter if it divides the header, else the only other one that does."""
    others = [mark for mark in DELIMITERS if mark in header]
    return others[0] if usual not in header and len(others) == 1 else usual


def _cell(text: str, delimiter: str) -> Any:
    """Read a number or a list of numbers; what is neither stays text, for the checks to judge."""
    if delimiter == ";" and re.fullmatch(r"-?\d+,\d+", text):
        text = text.replace(",", ".")
    try:
        return None if not text else json.loads(text) if text.startswith("[") else float(text)
    except (ValueError, RecursionError):
        return text
