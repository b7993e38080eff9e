"""Comparisons from whatever holds them: files, prepared directories, urls, hubs, a built-in world.

A source yields `(where, row)` pairs, each row a dictionary, and forms.py makes comparisons of them,
so every form can be read from every source. A row that can't be used is a `Dropped` one; a row or
a source that can't be understood stops the reading with its file and line. Nothing is guessed.

Left out: writing (comparisons.py, dataset.py), prompts and token limits (batches.py), and any use
of TensorFlow, PyTorch or JAX.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlrm.config import UsageError, nearest
from jlrm.data.comparisons import (
    FILE_ROWS,
    Comparison,
    Comparisons,
    Dropped,
    Where,
    describe_dropped,
    listed,
)
from jlrm.data.dataset import NAME
from jlrm.data.files import (
    READ_ROWS,
    Rows,
    data_files,
    files_of_split,
    plain_row,
    read_file,
    shortest,
    usual_split,
    with_names,
)
from jlrm.data.forms import (
    IDS,
    RENAMABLE,
    Row,
    Unusable,
    comparison,
    in_our_form,
    our_spelling,
    renamed,
    respelled,
    there_are,
)
from jlrm.data.worlds import languages
from jlrm.judgement import labels
from jlrm.runtime.storage import local_copy

log = logging.getLogger(__name__)

NUMBERS = {"score_1", "score_2", "score", "score_w_reference", "preference"} | {
    *("score_chosen", "score_rejected")
}  # in CSV: not text
MANY_ROWS = 20_000  # more than these are worth a progress bar
ALL = slice(0, None, 1)  # rows that are read, counted from 0
SAYS_NOTHING = "An error occurred while generating the dataset"


@dataclass(frozen=True)
class Part:
    """Rows of a part of a source, and what is needed to validate the source as a whole."""

    rows: list[Comparison]
    dropped: list[Dropped]
    lacking: set[str]  # columns to be renamed that none of these rows had
    names: list[str]  # of the columns of one of them
    column: str  # the source's own name of its labels
    values: Mapping[str, int]  # what its labels mean, where that was said
    numbers: collections.Counter[str]  # rows by the number that alone labels them


def read(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    scores: str = "score",
) -> Comparisons:
    """Read comparisons from a file, a directory, a url, `hf:ORG/NAME`, `tfds:NAME` or `languages`.

    `#SPLIT` may follow a dataset's name (default: train); `languages` is the world of that name.
    `columns` maps our field names to the source's own, `values` the source's labels to ours,
    {theirs: 1, 2 or 0}; `scores` says which scores of a JudgeLM row are gold, "score" or
    "score_w_reference". Rows may be in five forms, told apart by their keys: ours, JudgeLM-100K's,
    verl's (a filled-in judge prompt with its ground truth), TRL's (prompt, chosen, rejected), and
    two conversations. Conversations may be lists of messages or transcripts ("Human: ..."). Other
    columns are kept in `Comparison.meta`.

    Reasons for a dropped row stand in comparisons.REASONS. It is said where the numbers that label
    a source look like another numbering than ours (judgement/labels.py).

    Raises:
      UsageError: no such source or split, no rows, no usable row, or, with its line, a row that
        lacks a field or holds another type than it should.
    """
    part = read_part(source, columns=columns, values=values, scores=scores)
    check_whole(source, len(part.rows), [part])
    return Comparisons(part.rows, part.dropped)


def read_part(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    scores: str = "score",
    every: slice = ALL,
) -> Part:
    """Read some of the rows: `every` counts them, or the lines of a file, from 0.

    What it says of a source as a whole is left to `check_whole`. Otherwise as `read`.
    """
    columns, known = dict(columns or {}), labels.meanings(values or {})
    for name in columns:
        if name not in RENAMABLE:
            raise UsageError(f"data.columns: unknown field '{name}'. {nearest(name, RENAMABLE)}")
    part = Part([], [], set(columns.values()), [], "preference", known, collections.Counter())
    raw: Row = {}
    for place, raw in _with_progress(checked_rows(source, columns, every), source):
        place = place._replace(source=source)
        where = str(place)
        if not isinstance(raw, dict):
            raise UsageError(f"{where} must be a JSON object, got {type(raw).__name__}.")
        part.lacking.difference_update(raw)
        row = respelled(renamed(raw, columns, where))
        own = next((key for key in IDS if row.get(key) is not None), "id")
        identity = place.name if row.get(own) is None else str(row[own])
        row = {key: value for key, value in row.items() if key not in ("id", own)}
        try:
            row = in_our_form(labels.labelled(row, where), scores, where)
            part.rows.append(comparison(row, identity, place, known))
        except Unusable as reason:
            part.dropped.append(Dropped(place, identity, str(reason)))
            continue
        if part.rows[-1].scores is None and (number := labels.numbering(row["preference"])):
            part.numbers[number] += 1
    is_winner = "preference" not in raw and "winner" in map(our_spelling, raw)
    column = columns.get("preference", "winner" if is_winner else "preference")
    return dataclasses.replace(part, names=list(raw), column=column)


def check_whole(source: str, num_rows: int, parts: Sequence[Part]) -> None:
    """Raise if a source, of which these are all parts, can't be used; warn of doubtful labels.

    Raises:
      UsageError: it holds no usable row, lacks a renamed column in all of its rows, or has labels
        of ours that would be taken for others.
    """
    names = max((part.names for part in parts), key=len)
    dropped = [row for part in parts for row in part.dropped]
    if not num_rows and not dropped:
        wanted = "one JSON object a line" if ".json" in source else "one comparison a row"
        raise UsageError(f"{source} is empty: wanted {wanted}.")
    if lacking := set.intersection(*(part.lacking for part in parts)):
        raise UsageError(f"{source} has no column {listed(lacking)}. {there_are(names)}")
    if not num_rows:
        reasons = describe_dropped(dropped)
        hint = ""
        if {row.reason for row in dropped} == {"no_label"}:
            hint = (
                " A row says which answer is better by 'preference' (1, 2, or 0 for a tie) or by "
                f"'score_1' and 'score_2'. {there_are(names)} If one of these is meant, name it, "
                "e.g. data.columns=preference=NAME."
            )
        raise UsageError(f"{source} holds no usable row: all were left out: {reasons}.{hint}")
    numbers = sum((part.numbers for part in parts), collections.Counter())
    doubts = labels.doubts(numbers, parts[0].column)
    if (parts[0].values or doubts) and _is_ours(source):
        if parts[0].values:
            raise UsageError(
                f"{source} was written by prepare, and its labels are ours: leave out data.values, "
                "which belongs to what it was prepared from."
            )
    elif doubts and not parts[0].values:
        log.warning("%s: %s", source, doubts)


def _is_ours(source: str) -> bool:
    """Return whether a source is a dataset that dataset.py has written."""
    path = _local(without_split(source)[0])
    if path is None or not (path / "dataset_info.json").is_file():
        return False
    return json.loads((path / "dataset_info.json").read_text()).get("name") == NAME


def _local(name: str) -> pathlib.Path | None:
    """Return where the files of a source lie, copied from a store if need be; None for a hub's."""
    if "://" in name:
        return local_copy(name)
    is_of_hub = name.startswith(("hf:", "tfds:"))
    return None if is_of_hub else pathlib.Path(name).expanduser()


def _open(source: str, columns: Mapping[str, str], every: slice) -> Rows:
    name, split = without_split(source)
    if name == "languages":
        return _numbered(languages.rows(split), every)
    path = _local(name)
    if path is None and name.startswith("hf:"):
        return _of_datasets(_hub_rows(name.removeprefix("hf:"), split), every)
    if path is None:
        return _numbered(_tfds_rows(name.removeprefix("tfds:"), split), every, _tfds_row)
    if path.is_dir():
        return _directory_rows(path, split, columns, every)
    os.stat(path)  # no such file: said before anything else
    if split:
        raise UsageError(f"{name} is a plain file, which has no splits: leave out '#{split}'.")
    numbers = {columns.get(name, name) for name in NUMBERS}
    return read_file(
        path, name, lambda header: header in numbers or our_spelling(header) in NUMBERS, every
    )


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


def _of_datasets(rows: Any, every: slice) -> Rows:
    """Yield rows of the library `datasets`, with the names of their classes."""
    features = (getattr(rows, "features", None) or {}).items()
    names = {key: each.names for key, each in features if hasattr(each, "names")}
    return _numbered(rows, every, lambda row: with_names(plain_row(row), names))


def _at(rows: Any, places: range) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(places), READ_ROWS):
        part = places[start : start + READ_ROWS]
        yield from zip(part, rows.__getitems__(list(part)), strict=True)


def _directory_rows(
    path: pathlib.Path, split: str, columns: Mapping[str, str], every: slice
) -> Rows:
    if (path / "features.json").exists() and (path / "dataset_info.json").exists():
        return _numbered(_tfds_rows(path, split), every, _tfds_row)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _of_datasets(_saved_rows(path, split), every)
    files = data_files(path)
    if not files or re.search(r"[\[+(]", split):  # "train[:50%]", "train+test"
        return _of_datasets(_hub_rows(path, split), every)
    return _rows_of_files(files_of_split(path, files, split), columns, every)


def _rows_of_files(files: Sequence[pathlib.Path], columns: Mapping[str, str], every: slice) -> Rows:
    for number, file in enumerate(files):
        # Rows are counted on from file to file, as if each had FILE_ROWS.
        mine = slice((every.start - number * FILE_ROWS) % every.step, None, every.step)
        for place, row in checked_rows(str(file), columns, mine):
            yield place._replace(file=str(file), file_number=number), row


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
    split = split or usual_split(path, lengths)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
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


def _tfds_row(row: Row) -> Row:
    """Read a TFDS row, in which a missing score is NaN and a missing preference -1."""
    plain = plain_row(row)
    for name, value in plain.items():
        if isinstance(value, float):
            plain[name] = None if math.isnan(value) else shortest(value)
        elif name == "preference" and value == -1:
            plain[name] = None
    return plain
