"""Rows of benchmarks from files, directories and dataset hubs, with sentences for what is missing.

A row comes with its place, which errors name. Nothing is guessed: a field that is absent or of
another type stops the reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jlrm.config import UsageError, nearest
from jlrm.data import forms, readers
from jlrm.data.comparisons import Comparison, describe_dropped
from jlrm.evaluation.games import Item
from jlrm.runtime.storage import first_line

Row = dict[str, Any]
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


def files(source: str, pattern: str = "*") -> list[pathlib.Path]:
    """Return the data files of a local directory, at any depth, in the order of their names.

    Empty for what is no directory, and for a directory that a dataset library has saved, which
    `rows` reads as a whole.
    """
    directory = pathlib.Path(source).expanduser()
    known = ("state.json", "dataset_dict.json", "features.json")
    if not source or not directory.is_dir() or any((directory / name).exists() for name in known):
        return []
    paths = sorted(directory.rglob(pattern))
    return [file for file in paths if file.is_file() and file.name.endswith(SUFFIXES)]


def rows(source: str, how_to_get: str, pattern: str = "*") -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file, of all files of a directory, or of hf:ORG/NAME#SPLIT.

    The place is "FILE, line 12" or "FILE, row 12".

    Raises:
      UsageError: no such source, with how to get it; or a row that is no JSON object.
    """
    if not source:
        raise UsageError(f"There is no data to read. {how_to_get}")
    inside = files(source, pattern)
    if pathlib.Path(source).expanduser().is_dir() and not inside and pattern != "*":
        raise UsageError(f"{source} holds no file {pattern}. {how_to_get}")
    for name in [str(file) for file in inside] or [source]:
        yield from _rows(name, how_to_get)


def own_rows(source: str, how_to_get: str, **reading: Any) -> list[Comparison]:
    """Read the user's own rows as training does; those that can't be used are left out, and told.

    reading: as of `readers.read`, whose errors it raises.
    """
    if not source:
        raise UsageError(f"There is no data to read. {how_to_get}")
    found = readers.read(source, **reading)
    if found.dropped:
        text = "%s: left out %s"
        logging.getLogger(__name__).warning(text, source, describe_dropped(found.dropped))
    return found.rows


def _rows(source: str, how_to_get: str) -> Iterator[tuple[str, Row]]:
    try:
        for place, row in readers.checked_rows(source, {}):
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UsageError(f"{source}, {place} must be a JSON object, got {kind}.")
            yield f"{source}, {place}", row
    except UsageError as error:
        if isinstance(error.__cause__, FileNotFoundError) or source.startswith("hf:"):
            raise UsageError(f"{error} {how_to_get}") from error.__cause__
        raise


def hub_files(source: str, names: Sequence[str], how_to_get: str) -> str:
    """Download files of hf:ORG/NAME and return the directory that they lie in."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            source.removeprefix("hf:"), repo_type="dataset", allow_patterns=list(names)
        )
    except Exception as error:  # the client raises anything
        reason = first_line(error)
        raise UsageError(f"Cannot read the dataset {source}: {reason}. {how_to_get}") from error


def need(row: Row, key: str, where: str) -> Any:
    """Return a field that must be there."""
    if key not in row:
        there = ", ".join(f"'{name}'" for name in row)
        raise UsageError(f"{where} has no field '{key}'. There are: {there}.")
    return row[key]


def text(row: Row, key: str, where: str) -> str:
    """Return a field that must be text."""
    value = need(row, key, where)
    if not isinstance(value, str):
        raise UsageError(f"{where}: '{key}' must be text, got {value!r}.")
    return value


def texts(row: Row, key: str, where: str) -> tuple[str, ...]:
    """Return a field that must be a list of texts; a text alone is a list of one."""
    value = need(row, key, where)
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UsageError(f"{where}: '{key}' must be a list of texts, got {value!r}.")
    if not value:
        raise UsageError(f"{where}: '{key}' holds no text: wanted at least one.")
    return tuple(value)


def choice(row: Row, key: str, where: str, known: dict[Any, int]) -> int:
    """Return what a field means, of the values that are known."""
    value = need(row, key, where)
    if isinstance(value, (list, dict)) or value not in known:
        wanted = ", ".join(repr(each) for each in known)
        raise UsageError(f"{where}: '{key}' must be one of {wanted}, got {value!r}.")
    return known[value]


def conversation(value: Any, where: str) -> str:
    """Write messages as one text: a single one as it is, several under the names of their roles."""
    if isinstance(value, str):
        return value
    is_list = isinstance(value, list) and value
    if not is_list or not all(isinstance(each, dict) and "content" in each for each in value):
        raise UsageError(f"{where}: wanted text or a list of {{role, content}}, got {value!r}.")
    return forms.conversation(
        [(str(each.get("role", "")), text(each, "content", where)) for each in value]
    )


def finished(items: Sequence[Item], source: str, left_out: str = "", num: int = 0) -> list[Item]:
    """Return items with ids that are unique, and say what was left out.

    An id that occurs again gets its subset before it, and then a number behind it.
    """
    if not items:
        raise UsageError(
            f"{source} holds no item that can be asked{left_out and f' ({left_out})'}."
        )
    if num:
        logging.getLogger(__name__).warning("%s: %d rows are not asked: %s", source, num, left_out)
    often = Counter(item.id for item in items)
    names = [f"{i.subset}:{i.id}" if often[i.id] > 1 and i.subset else i.id for i in items]
    seen: Counter[str] = Counter()
    unique = []
    for item, name in zip(items, names, strict=True):
        seen[name] += 1
        name = f"{name}#{seen[name]}" if seen[name] > 1 else name
        unique.append(item if name == item.id else dataclasses.replace(item, id=name))
    return unique


def of_subset(items: list[Item], subset: str) -> list[Item]:
    """Return the items of one subset; those that name none count as its, with a warning. "": all.

    Raises:
      UsageError: no item belongs to it, with the nearest subset that there is.
    """
    if not subset:
        return items
    inside = [
        item if item.subset else dataclasses.replace(item, subset=subset)
        for item in items
        if item.subset in ("", subset)
    ]
    if not inside:
        there = {item.subset for item in items}
        raise UsageError(f"--subset {subset} has no item. {nearest(subset, there)}")
    if untold := sum(not item.subset for item in items):
        text = "%d of %d rows name no subset and are counted as '%s'"
        logging.getLogger(__name__).warning(text, untold, len(items), subset)
    return inside


def sample(items: list[Item], limit: int, seed: int) -> list[Item]:
    """Return `limit` items by lot, in their order; 0: all. A larger limit keeps them."""
    if not limit or limit >= len(items):
        return items

    def lot(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}:{item.id}".encode(errors="surrogatepass")).digest()

    drawn = {item.id for item in sorted(items, key=lot)[:limit]}
    return [item for item in items if item.id in drawn]
