"""`answers.jsonl`: every answer as it comes, so that no game is asked twice.

The first line is a header of all that shapes the answers; a file with another header is refused.
Each answer is one line, written whole and flushed at once. A last line that a kill has torn is cut
off by the next run. Errors are recorded too, but their games are asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from jlrm.config import UsageError
from jlrm.evaluation.games import Response


class Journal:
    """The answers of one judge on one benchmark; without a path they stay in memory."""

    def __init__(self, path: pathlib.Path | None, header: Mapping[str, Any]) -> None:
        """Read what is there, and cut off a torn last line.

        Raises:
          UsageError: the file was begun with another header, or is no such file.
        """
        self.answers: dict[str, Response] = {}
        self._path, self._file = path, None
        self._header = json.loads(json.dumps(header))
        if path is not None and path.exists():
            found, self.answers, whole = _read(path)
            if found is not None and found != self._header:
                raise UsageError(_differences(path, found, self._header))
            if whole < path.stat().st_size:
                os.truncate(path, whole)

    @property
    def done(self) -> set[str]:
        """The games that have an answer."""
        return {name for name, answer in self.answers.items() if answer.error is None}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Journal]:
        """Open the file for `record`, with its header."""
        if self._path is None:
            yield self
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if not file.tell():
                _append(file, {"header": self._header})
            self._file = file
            try:
                yield self
            finally:
                self._file = None

    def record(self, answer: Response) -> None:
        """Append an answer; it is in the file when this returns."""
        if self._file is not None:
            row = {k: v for k, v in dataclasses.asdict(answer).items() if v is not None}
            _append(self._file, row)
        self.answers[answer.game] = answer


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Response]]:
    """Return the header and the answers of a file, the last one of each game.

    Raises:
      UsageError: there is none, or it is no such file.
    """
    if not path.exists():
        raise UsageError(f"There are no answers at {path}. Name what --out of an evaluation named.")
    header, answers, _ = _read(path)
    return header or {}, answers


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    # Lone surrogates, which a judge can't help but a file can't hold, are escaped by ASCII.
    file.write(json.dumps(row) + "\n")
    file.flush()


def _read(path: pathlib.Path) -> tuple[dict[str, Any] | None, dict[str, Response], int]:
    """Return the header, the answers, and the length in bytes of the whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    header, answers = None, {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            if number == 1:
                header = row["header"]
            else:
                answer = _answer(row)
                answers[answer.game] = answer
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}, line {number} is no answer ({error}). Remove the line, or the file to "
                "start again."
            ) from None
    return header, answers, whole


def _answer(row: dict[str, Any]) -> Response:
    for key in ("outputs", "scores"):
        if row.get(key) is not None:
            row[key] = tuple(row[key])
    return Response(**row)


def _differences(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    changes = ", ".join(f"{key} {found.get(key)!r} (now {wanted.get(key)!r})" for key in names)
    return f"{path} holds answers given under {changes}. Name another --out, or delete the file."
