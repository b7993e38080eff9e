"""Comparisons from whatever holds them: files, prepared directories, urls, hubs, a built-in world.

A source yields `(where, row)` pairs, each row a dictionary, and forms.py makes comparisons of them,
so every form can be read from every source. A row that can't be used is a `Dropped` one; a row or
a source that can't be understood stops the reading with its file and line. Nothing is guessed.

Left out: writing (comparisons.py, dataset.py), prompts and token limits (batches.py), and any use
of TensorFlow, PyTorch or JAX.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jlrm.config import UsageError, nearest
from jlrm.data import libraries
from jlrm.data.comparisons import (
    FILE_ROWS,
    Comparison,
    Comparisons,
    Dropped,
    describe_reasons,
    listed,
)
from jlrm.data.dataset import NAME
from jlrm.data.files import (
    Rows,
    Torn,
    data_files,
    files_of_split,
    read_file,
)
from jlrm.data.forms import (
    IDS,
    RENAMABLE,
    Unusable,
    answer_list,
    comparison,
    in_our_form,
    our_spelling,
    renamed,
    respelled,
    there_are,
)
from jlrm.data.worlds import languages, lists
from jlrm.judgement import labels
from jlrm.runtime.storage import local_copy

log = logging.getLogger(__name__)

T = TypeVar("T")
NUMBERS = {"score_1", "score_2", "score", "score_w_reference", "preference"} | {
    *("score_chosen", "score_rejected")
}  # in CSV: not text
WORLDS = {"languages": languages.rows, **lists.WORLDS}  # made up here (data/worlds/)
MANY_ROWS = 20_000  # more than these are worth a progress bar
ALL = slice(0, None, 1)  # rows that are read, counted from 0
# What marks directories that a library reads.
DATASETS = ("features.json", "state.json", "dataset_dict.json")
SAYS_NOTHING = "An error occurred while generating the dataset"


@dataclass
class Seen:
    """What is needed to validate a source as a whole, of the rows of a part of it."""

    lacking: set[str]  # columns to be renamed that none of these rows had
    values: Mapping[str, int]  # what its labels mean, where that was said
    is_listed: bool = False  # every row is to hold a list of answers
    needs_label: bool = True  # a row without one is left out
    names: list[str] = field(default_factory=list)  # of the columns of one of them
    column: str = "preference"  # the source's own name of its labels
    # Rows by the number that alone labels them, and those left out by the reason.
    numbers: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    num_rows: int = 0  # that are usable


class Portion(NamedTuple):
    """A part of a source that can be read apart from the rest: one of its files, or all of it."""

    file: str = ""
    number: int = 0  # counted from 0


WHOLE = Portion()


def read(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    scores: str = "score",
    is_listed: bool = False,
) -> Comparisons:
    """Read comparisons from a file, a directory, a url, `hf:ORG/NAME`, `tfds:NAME` or a world.

    `#SPLIT` may follow a dataset's name (default: train); WORLDS has what is made up here.
    `columns` maps our field names to the source's own, `values` the source's labels to ours,
    {theirs: 1, 2 or 0}; `scores` says which scores of a JudgeLM row are gold, "score" or
    "score_w_reference". Rows may be in five forms, told apart by their keys: ours, JudgeLM-100K's,
    verl's (a filled-in judge prompt with its ground truth), TRL's (prompt, chosen, rejected), and
    two conversations. Conversations may be lists of messages or transcripts ("Human: ..."). Other
    columns are kept in `Comparison.meta`. With `is_listed` rows hold lists of answers instead.

    Reasons for a dropped row stand in comparisons.REASONS. It is said where the numbers that label
    a source look like another numbering than ours (judgement/labels.py).

    Raises:
      UsageError: no such source or split, no rows, no usable row, or, with its line, a row that
        lacks a field or holds another type than it should.
    """
    told: dict[str, Any] = {"columns": columns, "values": values, "scores": scores}
    part, seen = read_part(source, **told, is_listed=is_listed)
    check_whole(source, [seen])
    return part


def read_part(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
    scores: str = "score",
    every: slice = ALL,
    is_listed: bool = False,
    needs_label: bool = True,
) -> tuple[Comparisons, Seen]:
    """Read some of the rows: `every` counts them, or the lines of a file, from 0.

    `is_listed`: they hold lists of answers, and become AnswerLists.
    `needs_label`: those of two answers that have no label are left out.
    What it says of a source as a whole is left to `check_whole`. Otherwise as `read`.
    """
    seen = nothing_seen(columns or {}, values or {})
    seen.is_listed, seen.needs_label = is_listed, needs_label
    part = Comparisons([], [])
    for row in with_progress(each_row(source, seen, columns, scores, every=every), source):
        if isinstance(row, Dropped):
            part.dropped.append(row)
        else:
            part.rows.append(row)
    return part, seen


def nothing_seen(columns: Mapping[str, str], values: Mapping[Any, Any]) -> Seen:
    """Return what is known of a source before its first row.

    Raises:
      UsageError: a field or a label that does not exist.
    """
    for name in columns:
        if name not in RENAMABLE:
            raise UsageError(f"data.columns: unknown field '{name}'. {nearest(name, RENAMABLE)}")
    return Seen(set(columns.values()), labels.meanings(values))


def each_row(
    source: str,
    seen: Seen,
    columns: Mapping[str, str] | None = None,
    scores: str = "score",
    *,
    piece: Portion = WHOLE,
    every: slice = ALL,
) -> Iterator[Comparison | Dropped]:
    """Yield the rows of a source in their order, those that can't be used too; nothing is kept.

    What `check_whole` needs is added to `seen`. Otherwise as `read_part`.
    """
    columns, raw = columns or {}, {}
    for place, raw in _of_piece(piece, source, columns, every):
        place = place._replace(source=source)
        where = str(place)
        if not isinstance(raw, dict):
            raise UsageError(f"{where} {no_object(raw)}")
        seen.lacking.difference_update(raw)
        row = respelled(renamed(raw, columns, where))
        own = next((key for key in IDS if row.get(key) is not None), "id")
        identity = place.name if row.get(own) is None else str(row[own])
        row = {key: value for key, value in row.items() if key not in ("id", own)}
        try:
            if seen.is_listed:
                read = answer_list(row, identity, place, seen.values)
            else:
                row = in_our_form(labels.labelled(row, where), scores, where)
                read = comparison(row, identity, place, seen.values, seen.needs_label)
        except Unusable as reason:
            seen.reasons[str(reason)] += 1
            yield Dropped(place, identity, str(reason))
            continue
        if read.scores is None and (number := labels.numbering(row.get("preference"))):
            seen.numbers[number] += 1
        seen.num_rows += 1
        yield read
    is_winner = "preference" not in raw and "winner" in map(our_spelling, raw)
    seen.column = columns.get("preference", "winner" if is_winner else "preference")
    seen.names = list(raw)


def _of_piece(piece: Portion, source: str, columns: Mapping[str, str], every: slice) -> Rows:
    if not piece.file:
        yield from each_place(source, columns, every)
        return
    for place, row in each_place(piece.file, columns, every):
        yield place._replace(file=piece.file, file_number=piece.number), row


def check_whole(source: str, parts: Sequence[Seen]) -> None:
    """Raise if a source, of which these are all parts, can't be used; warn of doubtful labels.

    Raises:
      UsageError: it holds no usable row, lacks a renamed column in all of its rows, or has labels
        of ours that would be taken for others.
    """
    names = max((part.names for part in parts), key=len)
    num_rows = sum(part.num_rows for part in parts)
    dropped = sum((part.reasons for part in parts), collections.Counter())
    if not num_rows and not dropped:
        wanted = "one JSON object a line" if ".json" in source else "one comparison a row"
        raise UsageError(f"{source} is empty: wanted {wanted}.")
    if lacking := set.intersection(*(part.lacking for part in parts)):
        raise UsageError(f"{source} has no column {listed(lacking)}. {there_are(names)}")
    if not num_rows:
        reasons = describe_reasons(dropped)
        hint = ""
        if set(dropped) == {"no_label"}:
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
    if name in WORLDS:
        return libraries.numbered(WORLDS[name](split), every)
    path = _local(name)
    if path is None and name.startswith("hf:"):
        return libraries.hub_rows(name.removeprefix("hf:"), split, every)
    if path is None:
        return libraries.tfds_rows(name.removeprefix("tfds:"), split, every)
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


def no_object(raw: object) -> str:
    """Return why what stands in the place of a row is no object, as a sentence without subject."""
    if isinstance(raw, Torn):
        return raw.reason
    return f"must be a JSON object, got {type(raw).__name__}."


def checked_rows(source: str, columns: Mapping[str, str]) -> Rows:
    """Yield what `each_place` does, where every line must be whole.

    Raises:
      UsageError: a line is torn, or as `each_place`.
    """
    for place, row in each_place(source, columns):
        if isinstance(row, Torn):
            raise UsageError(f"{place._replace(source=source)} {row.reason}")
        yield place, row


def each_place(source: str, columns: Mapping[str, str], every: slice = ALL) -> Rows:
    """Yield what stands in each place of a source: rows, and `Torn` ones.

    Raises:
      UsageError: whatever the file system or a library raises while it reads, in one sentence.
    """
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


def with_progress(rows: Iterator[T], source: str) -> Iterator[T]:
    """Yield rows, with a bar once there are many."""
    yield from itertools.islice(rows, MANY_ROWS)
    for row in rows:  # there are more
        from tqdm import tqdm

        rest = itertools.chain([row], rows)
        yield from tqdm(rest, desc=source, unit=" rows", initial=MANY_ROWS, mininterval=1)


def _directory_rows(
    path: pathlib.Path, split: str, columns: Mapping[str, str], every: slice
) -> Rows:
    if (path / "features.json").exists() and (path / "dataset_info.json").exists():
        return libraries.tfds_rows(path, split, every)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return libraries.saved_rows(path, split, every)
    files = _text_files(path, split)
    if not files:
        return libraries.hub_rows(path, split, every)
    return _rows_of_files(files, columns, every)


def _text_files(path: pathlib.Path, split: str) -> list[Portion]:
    """Return the files of a directory that are read one by one; none where a library reads it."""
    files = data_files(path)
    if not files or re.search(r"[\[+(]", split):  # "train[:50%]", "train+test"
        return []
    files = files_of_split(path, files, split)
    return [Portion(str(file), number) for number, file in enumerate(files)]


def _rows_of_files(pieces: Sequence[Portion], columns: Mapping[str, str], every: slice) -> Rows:
    for piece in pieces:
        # Rows are counted on from file to file, as if each had FILE_ROWS.
        mine = slice((every.start - piece.number * FILE_ROWS) % every.step, None, every.step)
        yield from _of_piece(piece, "", columns, mine)


def pieces(source: str) -> list[Portion]:
    """Return the parts of a source that can be read apart, by `each_row`, in their order.

    Raises:
      UsageError: no such split.
    """
    name, split = without_split(source)
    path = pathlib.Path(name).expanduser()
    is_dataset = any((path / about).exists() for about in DATASETS)
    is_read = path.is_dir() and not is_dataset
    return (_text_files(path, split) if is_read else []) or [WHOLE]
