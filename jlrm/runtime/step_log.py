"""A log of a run: one JSON object a line, a line a step, in the order of time.

Going back to a checkpoint means cutting the log there, and so does a kill in the middle of a line.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jlrm.config import UsageError
from jlrm.runtime import storage
from jlrm.runtime.storage import first_line, write_atomically


def append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Add a line. A disk that stays full raises OSError."""
    storage.append(path, json.dumps(row) + "\n")


def read(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line stands, for errors, and what it holds; a torn last line is left out.

    Raises:
      UsageError: a line is not the JSON object of a step of a stage.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise UsageError(f"{where} is no JSON: {first_line(error)}. Remove it.") from None
        is_object = isinstance(row, dict)
        if not (is_object and isinstance(row.get("stage"), str) and type(row.get("step")) is int):
            raise UsageError(f"{where} names no stage and step. Remove it.")
        yield where, row


def go_back(
    path: pathlib.Path,
    stage: str,
    last_step: int,
    forget: Callable[[dict[str, Any]], object] = lambda row: None,
    keep_later: bool = False,
) -> None:
    """Cut off the rows behind a step of a stage, and those of later stages.

    Args:
      keep_later: leave those of later stages: they go on, from this stage's last step.
      forget: removes what belongs to such a row, before the log, which alone knows of it.
    """
    rows = [row for _, row in read(path)]
    begin = next((i for i, row in enumerate(rows) if row["stage"] == stage), len(rows))
    end = begin + sum(row["stage"] == stage and row["step"] <= last_step for row in rows)
    kept = [row for row in rows[end:] if keep_later and row["stage"] != stage]
    for row in rows[end:]:
        if row not in kept:
            forget(row)
    if path.exists():  # a torn last line goes too: the next would join it
        text = "".join(json.dumps(row) + "\n" for row in [*rows[:end], *kept])
        write_atomically(path, text.encode())
