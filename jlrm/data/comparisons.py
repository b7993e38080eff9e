"""The one row type: a question, two answers, and what is known of their quality.

A row carries two scores, or a preference alone, or both when they agree. A row that can't be used
is a `Dropped` one with its place and reason; nothing is guessed, and nothing is lost silently.
Reading files is `readers.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """A question and two answers, with scores, a preference, or both."""

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
    def scores(self) -> tuple[float, float] | None:
        """Both gold scores, None for a row that has a preference alone."""
        if self.score_1 is None or self.score_2 is None:
            return None
        return self.score_1, self.score_2

    @property
    def label(self) -> int:
        """The better answer by preference, else by scores; 0 for a tie."""
        if self.preference is not None:
            return self.preference
        assert self.scores is not None, f"row {self.id} has no label"
        first, second = self.scores
        return 0 if first == second else 1 if first > second else 2

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
class Dropped:
    """A row that was left out: where it stood, its id, and why."""

    where: str  # e.g. "pairs.jsonl, line 12"
    id: str
    reason: str  # a word to count by, e.g. "failed_review"


@dataclass(frozen=True)
class Comparisons:
    """Rows, and those that were left out."""

    rows: list[Comparison]
    dropped: list[Dropped]


def count_reasons(dropped: list[Dropped]) -> dict[str, int]:
    """Count dropped rows by reason, in the order of reasons."""
    return dict(sorted(collections.Counter(row.reason for row in dropped).items()))


def describe_dropped(dropped: list[Dropped]) -> str:
    """Return e.g. "12 failed_review, 3 overlong", or "" if nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in count_reasons(dropped).items())


def write_comparisons(rows: list[Comparison], path: pathlib.Path) -> None:
    """Write rows as JSONL that `readers.read` reads back."""
    _write_lines(rows, path)


def write_dropped(dropped: list[Dropped], path: pathlib.Path) -> None:
    """Write one JSON object for each row that was left out."""
    _write_lines(dropped, path)


def _write_lines(rows: list[Any], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
