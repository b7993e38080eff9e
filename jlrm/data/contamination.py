"""Training questions that are too similar to the questions of benchmarks.

A question is contaminated if a benchmark asks the same question, or if a given share of its word
n-grams occurs in benchmark questions: a copy with small edits keeps most of its n-grams. A question
shorter than one n-gram is compared as a whole. Letter case, white space and the Unicode form of a
character are ignored. In n-grams punctuation is ignored too.

Left out: answers. If a benchmark's answer stands under another question, this does not notice.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from jlrm.config import UsageError
from jlrm.data import forms, readers
from jlrm.data.comparisons import fold

log = logging.getLogger(__name__)

# A word is a run of letters and digits, or one character of a script that puts no spaces.
_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


@dataclass(frozen=True)
class Benchmarks:
    """The questions of benchmarks, and their word n-grams, each with the source that has it."""

    questions: Mapping[str, str]
    ngrams: Mapping[str, str]
    num_words: int  # of an n-gram

    def find(self, questions: Sequence[str], overlap: float) -> list[tuple[str, str]]:
        """Return for each question why it is contaminated and by which source, or two "".

        Reasons: "contaminated_exact"; "contaminated_ngram" if a share of at least `overlap` of its
        n-grams occur.
        """
        reasons = {"": ("", "")}
        for question in tqdm(questions, desc="decontaminate", delay=1):
            if question not in reasons:
                reasons[question] = self._find(question, overlap)
        return [reasons[question] for question in questions]

    def _find(self, question: str, overlap: float) -> tuple[str, str]:
        folded = fold(question)
        if folded in self.questions:
            return "contaminated_exact", self.questions[folded]
        ngrams = _ngrams(folded, self.num_words)
        sources = [self.ngrams[ngram] for ngram in ngrams if ngram in self.ngrams]
        if sources and len(sources) >= overlap * len(ngrams):
            return "contaminated_ngram", collections.Counter(sources).most_common(1)[0][0]
        return "", ""


def read_benchmarks(sources: Iterable[str], num_words: int) -> Benchmarks:
    """Read the questions of files, directories, urls or hub datasets, as `readers.read` names them.

    A row's question is what the readers would make of it, else its field `question`,
    `question_body`, `prompt`, or `instruction` and `input` together.

    Raises:
      UsageError: a source that can't be read, or without a single question.
    """
    questions: dict[str, str] = {}
    ngrams: dict[str, str] = {}
    for source in sources:
        for text in _read_questions(source):
            questions.setdefault(text, source)
            for ngram in _ngrams(text, num_words):
                ngrams.setdefault(ngram, source)
    return Benchmarks(questions, ngrams, num_words)


def _ngrams(folded: str, num_words: int) -> list[str]:
    words = _WORD.findall(folded)
    return [" ".join(words[i : i + num_words]) for i in range(len(words) - num_words + 1)]


def _read_questions(source: str) -> list[str]:
    rows = list(readers.checked_rows(source, {}))
    folded = [fold(_question(row, f"{source}, {place}")) for place, row in rows]
    questions = [text for text in folded if text]
    if not questions:
        raise UsageError(
            f"{source} has no question texts. Wanted rows with a field 'question', "
            "'question_body', 'prompt', 'instruction' or 'input'."
        )
    if num_lacking := len(rows) - len(questions):
        log.warning("%s: %d of %d rows have no question", source, num_lacking, len(rows))
    return questions


def _question(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        return ""
    try:
        return _text(forms.in_our_form(row, "score", where)["question"])
    except (UsageError, forms.Unusable, KeyError):
        pass  # a benchmark's own form, such as RM-Bench's with three answers of each kind
    for name in ("question", "question_body", "prompt"):
        if text := _text(row.get(name)):
            return text
    parts = (_text(row.get(name)) for name in ("instruction", "input"))
    return "\n".join(parts)  # folded later: no part leaves a trace of itself


def _text(value: Any) -> str:
    """Return text, or of a list of messages the text of what the user says."""
    if isinstance(value, list):
        users = (turn for turn in value if isinstance(turn, dict) and turn.get("role") == "user")
        return "\n".join(_text(turn.get("content")) for turn in users)
    return value if isinstance(value, str) else ""
