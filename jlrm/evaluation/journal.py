"""`responses.jsonl`: every response as it comes, so that no game is asked twice.

The first line is a header of all that shapes the responses; a file with another header is refused.
Each response is one line, written whole and flushed at once. A last line that was truncated by a
kill is cut off by the next run. Errors are recorded too, but their games are asked again.
So are refused ones, as long as no policy counts them.

Evaluations of older programs hold the same file as `answers.jsonl`. It is read and continued under
that name.
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
from jlrm.runtime.lock import is_locked

NAME, OLD_NAME = "responses.jsonl", "answers.jsonl"
KEYS = {"texts": "outputs", "preference": "decision"}  # of a row, where a field's name differs
FIELDS = {key: name for name, key in KEYS.items()}


class Journal:
    """The responses of one judge on one benchmark; without a directory they stay in memory."""

    def __init__(self, directory: pathlib.Path | None, header: Mapping[str, Any]) -> None:
        """Read what is there, and cut off a truncated last line, or all if nothing is judged.

        Raises:
          UsageError: there are responses under another header, or it is no such file.
        """
        self.responses: dict[str, Response] = {}
        self._path = path = None if directory is None else path_in(directory)
        self._file, self._size = None, 0
        self._header = json.loads(json.dumps(header))
        if path is not None and path.exists():
            written, self.responses, whole = _read(path)
            if written is not None and written != self._header:
                if self.done:
                    raise UsageError(_differences(path, written, self._header))
                self.responses, whole = {}, 0  # nothing was judged that another setting could mix
            if whole < path.stat().st_size:
                os.truncate(path, whole)
            self._size = whole

    @property
    def done(self) -> set[str]:
        """The games that have a response, or were refused one."""
        return {name for name, response in self.responses.items() if response.error is None}

    @property
    def refused(self) -> set[str]:
        """The games that were refused for what is in them."""
        return {name for name, response in self.responses.items() if response.refused is not None}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Journal]:
        """Open the file for `record`, with its header; nobody else writes there meanwhile.

        Raises:
          UsageError: another process does, or has since it was read.
        """
        if self._path is None:
            yield self
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            if not is_locked(file) or file.tell() != self._size:
                raise UsageError(
                    f"{self._path} is written by another process. Wait until it ends, or name "
                    "another --out."
                )
            if not file.tell():
                _append(file, {"header": self._header})
            self._file = file
            try:
                yield self
            finally:
                self._file, self._size = None, file.tell()

    def record(self, response: Response) -> None:
        """Append a response; it is in the file when this returns."""
        if self._file is not None:
            row = as_row(response)
            _append(self._file, {key: value for key, value in row.items() if value is not None})
        self.responses[response.game] = response


def path_in(directory: pathlib.Path) -> pathlib.Path:
    """Return the journal of a directory, under its old name where an older program began it."""
    old = directory / OLD_NAME
    return old if old.exists() else directory / NAME


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Response]]:
    """Return the header and the responses of a directory's journal, the last one of each game.

    Raises:
      UsageError: there is none, or it is no such file.
    """
    path = path_in(directory)
    if not path.exists():
        raise UsageError(
            f"There are no responses at {path}. Name what --out of an evaluation named."
        )
    header, responses, _ = _read(path)
    return header or {}, responses


def as_row(response: Response) -> dict[str, Any]:
    """Return a response under the keys of the file, with None for what it does not hold."""
    row = {KEYS.get(name, name): each for name, each in dataclasses.asdict(response).items()}
    if response.expected is None:  # older programs knew none, and checksums are of these rows
        del row["expected"]
    return row


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    # Lone surrogates, which a judge can't help but a file can't hold, are escaped by ASCII.
    file.write(json.dumps(row) + "\n")
    file.flush()


def _read(path: pathlib.Path) -> tuple[dict[str, Any] | None, dict[str, Response], int]:
    """Return the header, the responses, and the length in bytes of the whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    header, responses = None, {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            if number == 1:
                header = row["header"]
            else:
                response = _response(row)
                responses[response.game] = response
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"{path}, line {number} is no response ({error}). Remove the line, or the file to "
                "start again."
            ) from None
    return header, responses, whole


def _response(row: dict[str, Any]) -> Response:
    fields = {FIELDS.get(key, key): value for key, value in row.items()}
    for name in ("texts", "scores", "endings"):
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    if fields.get("expected") is not None:
        fields["expected"] = tuple(each and tuple(each) for each in fields["expected"])
    return Response(**fields)


def _differences(path: pathlib.Path, written: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [key for key in {**written, **wanted} if written.get(key) != wanted.get(key)]
    changes = ", ".join(f"{key} {written.get(key)!r} (now {wanted.get(key)!r})" for key in names)
    return f"{path} holds responses given under {changes}. Name another --out, or delete the file."
