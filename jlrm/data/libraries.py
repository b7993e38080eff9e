"""Rows that libraries hold: TFDS, `datasets` and its hub. They are imported where they are used."""

from __future__ import annotations

import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from jlrm.config import UsageError
from jlrm.data.comparisons import Where
from jlrm.data.files import READ_ROWS, Rows, plain_row, shortest, usual_split, with_names


def numbered(rows: Any, every: slice, convert: Callable[[Any], Any] = lambda row: row) -> Rows:
    """Yield the chosen rows, each with its number; `every` counts them from 0."""
    if hasattr(rows, "__getitems__"):  # random access: the others are not even read
        chosen = _at(rows, range(len(rows))[every])
    else:
        chosen = itertools.islice(enumerate(rows), every.start, every.stop, every.step)
    return ((Where(i + 1), convert(row)) for i, row in chosen)


def _of_datasets(rows: Any, every: slice) -> Rows:
    """Yield rows of the library `datasets`, with the names of their classes."""
    features = (getattr(rows, "features", None) or {}).items()
    names = {key: each.names for key, each in features if hasattr(each, "names")}
    return numbered(rows, every, lambda row: with_names(plain_row(row), names))


def _at(rows: Any, places: range) -> Iterator[tuple[int, Any]]:
    for start in range(0, len(places), READ_ROWS):
        part = places[start : start + READ_ROWS]
        yield from zip(part, rows.__getitems__(list(part)), strict=True)


def tfds_rows(name: str | pathlib.Path, split: str, every: slice) -> Rows:
    """Yield rows of a TFDS data set, by its name or its directory."""
    import tensorflow_datasets as tfds

    if isinstance(name, str):
        return numbered(tfds.data_source(name, split=split or "train"), every, _tfds_row)
    builder: Any = tfds.builder_from_directory(name)
    return numbered(builder.as_data_source(split or "train"), every, _tfds_row)


def saved_rows(path: pathlib.Path, split: str, every: slice) -> Rows:
    """Yield rows of a directory that `datasets` has saved."""
    import datasets

    saved: Any = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):  # which may know the name of its split
        saved = {str(saved.split or "train"): saved}
        split = split or next(iter(saved))
    lengths = {str(name): len(rows) for name, rows in saved.items()}
    split = split or usual_split(path, lengths)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    chosen = [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return _of_datasets(datasets.concatenate_datasets(chosen), every)


def hub_rows(name: str | pathlib.Path, split: str, every: slice) -> Rows:
    """Yield rows that `datasets` loads, of the hub or of the files of a directory."""
    import datasets

    path, revision, config = str(name), None, None
    if isinstance(name, pathlib.Path):
        datasets.disable_progress_bars()  # of a conversion to Arrow, over in a moment
    if isinstance(name, str):
        parts = re.fullmatch(r"([^@:]+)(?:@([^@:]+))?(?::([^@:]+))?", name)
        if not parts:
            raise UsageError(f"hf:{name} names no dataset: wanted hf:ORG/NAME@REVISION:CONFIG.")
        path, revision, config = parts.groups()
    loaded = datasets.load_dataset(path, config, revision=revision, split=split or "train")
    return _of_datasets(loaded, every)


def _tfds_row(row: dict[str, Any]) -> dict[str, Any]:
    """Read a TFDS row, in which a missing score is NaN and a missing preference -1."""
    plain = plain_row(row)
    for name, value in plain.items():
        if isinstance(value, float):
            plain[name] = None if math.isnan(value) else shortest(value)
        elif name == "preference" and value == -1:
            plain[name] = None
    return plain
