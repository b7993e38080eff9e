"""The one row type, a comparison of two answers, and its readers.

A row that can't be used is dropped for a named reason and counted; a row that can't be understood
stops the reading, with its file and line. Nothing is guessed.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import math
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jlrm.config import UsageError
from jlrm.judge.prompts import split_judgelm_text


@dataclass(frozen=True)
class Comparison:
    """A question, two answers and what is known of their quality."""

    id: str
    question: str
    answer_1: str
    answer_2: str
    score_1: float | None = None
    score_2: float | None = None
    preference: int | None = None  # 1, 2, 0 = tie
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)  # "reasoning": a written judgement, for SFT

    @property
    def gold(self) -> tuple[float, float]:
        """Both gold scores; only for rows that have them."""
        assert self.score_1 is not None and self.score_2 is not None
        return self.score_1, self.score_2

    def swapped(self) -> Comparison:
        """Return the same comparison with its answers in the other order."""
        preference = {1: 2, 2: 1}.get(self.preference or 0, self.preference)
        return dataclasses.replace(
            self,
            answer_1=self.answer_2,
            answer_2=self.answer_1,
            score_1=self.score_2,
            score_2=self.score_1,
            preference=preference,
            # A written judgement names the answers by their places.
            meta={k: v for k, v in self.meta.items() if k not in ("reasoning", "judged")},
        )


@dataclass(frozen=True)
class Comparisons:
    """Rows, and how many were left out, by reason."""

    rows: list[Comparison]
    dropped: collections.Counter[str]

    def describe_dropped(self) -> str:
        """Return e.g. "12 failed_review, 3 overlong", or "" if nothing was left out."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))


# Our names, then JudgeLM-100K's.
FIELDS = {
    "question": ("question", "question_body"),
    "answer_1": ("answer_1", "answer1_body"),
    "answer_2": ("answer_2", "answer2_body"),
}


def read_comparisons(path: str | pathlib.Path) -> Comparisons:
    """Read a JSONL file (plain or .gz) in JudgeLM-100K's form or with our own field names.

    Dropped: "failed_review" (JudgeLM marks reviews it could not read by scores of -1), "no_scores".

    Raises:
      UsageError: no such file, no rows, or, with its line, a row that is no JSON object or lacks a
        field.
    """
    path = pathlib.Path(path).expanduser()
    rows: list[Comparison] = []
    dropped: collections.Counter[str] = collections.Counter()
    for line, row in _json_lines(path):
        comparison = _comparison(row, f"{path}, line {line}", default_id=str(line))
        if comparison.score_1 is None or comparison.score_2 is None:
            dropped["no_scores"] += 1
        elif -1 in comparison.gold:
            dropped["failed_review"] += 1
        else:
            rows.append(comparison)
    if not rows and not dropped:
        raise UsageError(f"{path} is empty: wanted one JSON object a line.")
    if not rows:
        reasons = Comparisons(rows, dropped).describe_dropped()
        raise UsageError(f"{path} holds no usable row: all were left out ({reasons}).")
    return Comparisons(rows, dropped)


def write_comparisons(rows: list[Comparison], path: pathlib.Path) -> None:
    """Write rows as JSONL that `read_comparisons` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path}, line {number} is not valid JSON: {error}.") from None
                if not isinstance(row, dict):
                    raise UsageError(
                        f"{path}, line {number} must be a JSON object, got {type(row).__name__}."
                    )
                yield number, row
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"Cannot read the data file {path}: {reason}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error}.") from None


def _comparison(row: dict[str, Any], where: str, default_id: str) -> Comparison:
    texts = {}
    for name, spellings in FIELDS.items():
        found = [row[spelling] for spelling in spellings if spelling in row]
        if not found:
            raise UsageError(f"{where} has no field '{spellings[0]}' (or '{spellings[1]}').")
        if not isinstance(found[0], str):
            raise UsageError(f"{where}: '{name}' must be text, got {found[0]!r}.")
        texts[name] = found[0]
    score_1, score_2 = _scores(row, where)
    meta = row.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    if isinstance(row.get("text"), str):
        meta = {**meta, "reasoning": split_judgelm_text(row["text"])}
    identity = next(
        (row[key] for key in ("id", "review_id", "question_id") if key in row), default_id
    )
    return Comparison(
        id=str(identity),
        **texts,
        score_1=score_1,
        score_2=score_2,
        preference=row.get("preference"),
        source=str(row.get("source", "")),
        meta=meta,
    )


def _scores(row: dict[str, Any], where: str) -> tuple[float | None, float | None]:
    pair = row["score"] if "score" in row else (row.get("score_1"), row.get("score_2"))
    if pair is None or (isinstance(pair, (list, tuple)) and list(pair) == [None, None]):
        return None, None
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    numbers = [x for x in pair if isinstance(x, (int, float))] if is_pair else []
    if len(numbers) != 2 or any(isinstance(x, bool) for x in numbers):
        raise UsageError(f"{where}: the scores must be two numbers, got {pair!r}.")
    if -1 not in numbers and not all(0 <= score < math.inf for score in numbers):
        raise UsageError(f"{where}: scores must be finite and not negative, got {pair!r}.")
    return float(numbers[0]), float(numbers[1])
