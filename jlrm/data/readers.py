"""Comparisons from whatever holds them: files, prepared directories, remote urls, dataset hubs.

A source yields `(where, row)` pairs, each row a dictionary, and forms.py makes comparisons of them,
so every form can be read from every source. A row that can't be used is a `Dropped` one; a row or
a source that can't be understood stops the reading with its file and line. Nothing is guessed.

Left out: writing (comparisons.py, dataset.py), prompts and token limits (batches.py), and any use
of TensorFlow, PyTorch or JAX.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from jlrm.config import UsageError, nearest
from jlrm.data.comparisons import Comparison, Comparisons, Dropped, Where, describe_dropped
from jlrm.data.forms import (
    RENAMABLE,
    Row,
    Unusable,
    comparison,
    in_our_form,
    listed,
    our_spelling,
    renamed,
    respelled,
    there_are,
)
from jlrm.data.spreadsheets import read_cells
from jlrm.runtime.storage import local_copy

Rows = Iterator[tuple[Where, Row]]  # the place, its source left out, and what stands there

NUMBERS = ("score_1", "score_2", "score", "score_w_reference", "preference")  # in CSV: not text
MANY_ROWS = 20_000  # more than these are worth a progress bar
ALL = slice(0, None, 1)  # rows that are read, counted from 0
READ_ROWS = 1024  # at a time, where a source gives them by number
SAYS_NOTHING = "An error occurred while generating the dataset"
FORMATS = ".jsonl, .json, .csv, .tsv (each plain or .gz) or .parquet"


@dataclass(frozen=True)
class Part:
    """Rows of a part of a source, and what is needed to validate the source as a whole."""

    rows: list[Comparison]
    dropped: list[Dropped]
    lacking: set[str]  # columns to be renamed that none of these rows had
    names: list[str]  # of the columns of one of them


def read(
    source: str, *, columns: Mapping[str, str] | None = None, scores: str = "score"
) -> Comparisons:
    """Read comparisons from a file, a directory, a url, `hf:ORG/NAME` or `tfds:NAME`.

    `#SPLIT` may follow a dataset's name (default: train). `columns` maps our field names to the
    source's own; `scores` says which scores of a JudgeLM row are gold, "score" or
    "score_w_reference". Rows may be in four forms, told apart by their keys: ours, JudgeLM-100K's,
    verl's (a filled-in judge prompt with its ground truth) and TRL's (prompt, chosen, rejected).

    Reasons for a dropped row: failed_review (JudgeLM marks reviews it could not read by -1),
    no_label, no_scores, missing_text, conflicting_label, same_answers, ambiguous_prompt,
    unknown_prompt, unwritable (text that UTF-8 can't hold).

    Raises:
      UsageError: no such source or split, no rows, no usable row, or, with its line, a row that
        lacks a field or holds another type than it should.
    """
    part = read_part(source, columns=columns, scores=scores)
    check_whole(source, len(part.rows), part.dropped, part.lacking, part.names)
    return Comparisons(part.rows, part.dropped)


def read_part(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    scores: str = "score",
    every: slice = ALL,
) -> Part:
    """Read some of the rows: `every` counts them, or the lines of a file, from 0.

    What it says of a source as a whole is left to `check_whole`. Otherwise as `read`.
    """
    columns = dict(columns or {})
    for name in columns:
        if name not in RENAMABLE:
            raise UsageError(f"data.columns: unknown field '{name}'. {nearest(name, RENAMABLE)}")
    rows: list[Comparison] = []
    dropped: list[Dropped] = []
    lacking, raw = set(columns.values()), {}
    for place, raw in _with_progress(checked_rows(source, columns, every), source):
        place = place._replace(source=source)
        where = str(place)
        if not isinstance(raw, dict):
            raise UsageError(f"{where} must be a JSON object, got {type(raw).__name__}.")
        lacking -= raw.keys()
        row = respelled(renamed(raw, columns, where))
        ids = (row[key] for key in ("id", "review_id", "question_id") if row.get(key) is not None)
        identity = str(next(ids, place.number))
        try:
            rows.append(comparison(in_our_form(row, scores, where), identity, place))
        except Unusable as reason:
            dropped.append(Dropped(place, identity, str(reason)))
    return Part(rows, dropped, lacking, list(raw))


def check_whole(
    source: str, num_rows: int, dropped: Sequence[Dropped], lacking: set[str], names: list[str]
) -> None:
    """Raise if a source holds no usable row, or lacks a renamed column in all of its rows.

    Raises:
      UsageError: if either holds.
    """
    if not num_rows and not dropped:
        wanted = "one JSON object a line" if ".json" in source else "one comparison a row"
        raise UsageError(f"{source} is empty: wanted {wanted}.")
    if lacking:
        raise UsageError(f"{source} has no column {listed(lacking)}. {there_are(names)}")
    if not num_rows:
        reasons = describe_dropped(dropped)
        hint = ""
        if {row.reason for row in dropped} == {"no_label"}:
            hint = (
                " A row says which answer is better by 'preference' (1, 2, or 0 for a tie), or by "
                f"'score_1' and 'score_2'. {there_are(names)} If one of these is meant, name it, "
                "e.g. data.columns=preference=NAME."
            )
        raise UsageError(f"{source} holds no usable row: all were left out ({reasons}).{hint}")


def _open(source: str, columns: Mapping[str, str], every: slice) -> Rows:
    name, split = without_split(source)
    if "://" in name:
        path = local_copy(name)
    elif name.startswith("hf:"):
        return _numbered(_hub_rows(name.removeprefix("hf:"), split), every, _plain_row)
    elif name.startswith("tfds:"):
        return _numbered(_tfds_rows(name.removeprefix("tfds:"), split), every, _tfds_row)
    else:
        path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _directory_rows(path, split, every)
    os.stat(path)  # no such file: said before anything else
    if split:
        raise UsageError(f"{name} is a plain file, which has no splits: leave out '#{split}'.")
    return _file_rows(path, name, columns, every)


def without_split(source: str) -> tuple[str, str]:
    """Return a source's name, and the split that was asked for."""
    name, _, split = source.rpartition("#")
    is_path = os.path.exists(os.path.expanduser(source))
    return (source, "") if is_path or not name else (name, split)


def checked_rows(source: str, columns: Mapping[str, str], every: slice = ALL) -> Rows:
    """Say in one sentence whatever the file system or a library raises while it reads."""
    try:
        yield from _open(source, columns, every)
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        old = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise UsageError(
            f"{source} is not UTF-8 text: {error}. Save it as UTF-8 (spreadsheets: CSV UTF-8), or "
            f"convert it, e.g. iconv -f {old} -t utf-8 OLD > NEW."
        ) from None
    except Exception as error:  # dataset libraries and file systems raise anything
        name = without_split(source)[0]
        is_directory = os.path.isdir(os.path.expanduser(name))
        is_file = not is_directory and not name.startswith(("hf:", "tfds:"))
        what, advice = "the data file" if is_file else "the dataset", ""
        if name.startswith("hf:"):
            advice = " Check name, split and connection; a gated one needs `hf auth login`."
        elif isinstance(error, FileNotFoundError) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            advice = f" For a dataset on the Hugging Face hub write hf:{name}."
        raise UsageError(f"Cannot read {what} {source}: {_reason(error)}.{advice}") from error


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # says nothing itself
        return _reason(error.__cause__)
    text = getattr(error, "strerror", None) or str(error).strip()
    if isinstance(error, FileNotFoundError) and " " not in text:  # fsspec: the path alone
        return "No such file or directory"
    lines = [line for line in text.splitlines() if line and not line.startswith(SAYS_NOTHING)]
    if not lines:
        return type(error).__name__
    why = f" {lines[-1]}" if lines[-1].startswith("because") else ""  # after pages of columns
    return lines[0].rstrip(".") + why.rstrip(".")


def _with_progress(rows: Rows, source: str) -> Rows:
    yield from itertools.islice(rows, MANY_ROWS)
    for row in rows:  # there are more
        from tqdm import tqdm

        rest = itertools.chain([row], rows)
        yield from tqdm(rest, desc=source, unit=" rows", initial=MANY_ROWS, mininterval=1)


def _numbered(rows: Any, every: slice, convert: Callable[[Any], Any] = lambda row: row) -> Rows:
    if hasattr(rows, "__getitems__"):  # random access: the others are not even read
        chosen = _at(rows, range(len(rows))[every])
    else:
        chosen = itertools.islice(enumerate(rows), every.start, every.stop, every.step)
    return ((Where(i + 1), convert(row)) for i, row in chosen)


def _at(rows: Any, places: range) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(places), READ_ROWS):
        part = places[start : start + READ_ROWS]
        yield from zip(part, rows.__getitems__(list(part)), strict=True)


def _file_rows(path: pathlib.Path, name: str, columns: Mapping[str, str], every: slice) -> Rows:
    kind = pathlib.Path(path.name.lower().removesuffix(".gz")).suffix
    if kind in (".jsonl", ".json"):
        return _json_rows(path, name, every, may_be_list=kind == ".json")
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, name, columns, every)
    if path.name.lower().endswith(".parquet"):
        return _parquet_rows(path, every)
    raise UsageError(f"{name} is in no format that is understood. Wanted {FORMATS}.")


def _open_text(path: pathlib.Path) -> TextIO:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")  # spreadsheets write the mark


def _json_rows(path: pathlib.Path, name: str, every: slice, may_be_list: bool) -> Rows:
    with _open_text(path) as file:
        if may_be_list and file.read(4096).lstrip().startswith("["):
            file.seek(0)
            yield from _numbered(_from_json(file.read(), name), every)
            return
        file.seek(0)
        lines = enumerate(file, 1)
        for number, line in itertools.islice(lines, every.start, every.stop, every.step):
            if line.strip():
                yield Where(number, "line"), _from_json(line, f"{name}, line {number}")


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON: {error}.") from None


def _csv_rows(path: pathlib.Path, name: str, columns: Mapping[str, str], every: slice) -> Rows:
    numbers = {columns.get(name, name) for name in NUMBERS} | {"score_chosen", "score_rejected"}

    def is_number(header: str) -> bool:
        return header in numbers or our_spelling(header) in NUMBERS

    with _open_text(path) as file:
        for number, row in read_cells(file, name, is_number, every):
            yield Where(number), row


def _parquet_rows(path: pathlib.Path, every: slice) -> Rows:
    import pyarrow.parquet

    first = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=READ_ROWS):
            chosen = np.flatnonzero(
                np.arange(first, first + len(batch)) % every.step == every.start
            )
            for i, row in zip(chosen.tolist(), batch.take(chosen).to_pylist(), strict=True):
                yield Where(first + i + 1), _plain_row(row)
            first += len(batch)


def _directory_rows(path: pathlib.Path, split: str, every: slice) -> Rows:
    if (path / "features.json").exists() and (path / "dataset_info.json").exists():
        return _numbered(_tfds_rows(path, split), every, _tfds_row)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _numbered(_saved_rows(path, split), every, _plain_row)
    return _numbered(_hub_rows(path, split), every, _plain_row)


def _tfds_rows(name: str | pathlib.Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    if isinstance(name, str):
        return tfds.data_source(name, split=split or "train")
    builder: Any = tfds.builder_from_directory(name)
    return builder.as_data_source(split or "train")


def _saved_rows(path: pathlib.Path, split: str) -> Any:
    import datasets

    saved: Any = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):  # which may know the name of its split
        saved = {str(saved.split or "train"): saved}
        split = split or next(iter(saved))
    lengths = {str(name): len(rows) for name, rows in saved.items()}
    if not split and "train" not in lengths:
        if len(lengths) > 1:
            raise UsageError(
                f"{path} has no split 'train'. {there_are(lengths)} Name one after the directory, "
                f"e.g. {path}#{next(iter(lengths))}."
            )
        split = next(iter(lengths))
    parts = datasets.ReadInstruction.from_spec(split or "train").to_absolute(lengths)
    return datasets.concatenate_datasets(
        [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _hub_rows(name: str | pathlib.Path, split: str) -> Any:
    import datasets

    path, revision, config = str(name), None, None
    if isinstance(name, pathlib.Path):
        datasets.disable_progress_bars()  # of a conversion to Arrow, over in a moment
    if isinstance(name, str):
        parts = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", name)
        if not parts:
            raise UsageError(f"hf:{name} names no dataset: wanted hf:ORG/NAME@REVISION:CONFIG.")
        path, revision, config = parts.groups()
    return datasets.load_dataset(path, config, revision=revision, split=split or "train")


def _plain_row(row: Row) -> Row:
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it. A null in an Arrow struct means that the row lacks the key."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(_shortest(value.item()) if value.dtype == np.float32 else value.item())
    if isinstance(value, bytes):
        return value.decode(
            errors="surrogateescape"
        )  # seen, and dropped, if it is one of our texts
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _tfds_row(row: Row) -> Row:
    """Read a TFDS row, in which a missing score is NaN and a missing preference -1."""
    plain = _plain_row(row)
    for name, value in plain.items():
        if isinstance(value, float):
            plain[name] = None if math.isnan(value) else _shortest(value)
        elif name == "preference" and value == -1:
            plain[name] = None
    return plain


def _shortest(value: float) -> float:
    """Return the number that was stored as float32: 8.1, not 8.100000381469727."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
