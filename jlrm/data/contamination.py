"""Training questions that are too similar to the questions of benchmarks.

A question is contaminated if a benchmark asks the same question, if it contains a whole question of
a benchmark, or if a given share of its word n-grams occurs in benchmark questions: a copy with
small edits keeps most of its n-grams. The same question has the same words and signs, as
`comparisons.fold` makes them; n-grams are of words alone. A benchmark's question of fewer than
LEAST_WORDS words is compared as a whole only: "who are you?" stands in many others.

Left out: answers. If a benchmark's answer stands under another question, this does not notice.
"""

from __future__ import annotations

import collections
import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jlrm.config import UsageError
from jlrm.data import forms, readers
from jlrm.data.comparisons import count_words, fold, words

log = logging.getLogger(__name__)

LEAST_WORDS = 6  # of a question that is looked for inside others

# Hub datasets that are benchmarks, as patterns of ORG/NAME, with the part of the source that says
# so where the same dataset has rows to train on.
HUB_BENCHMARKS = (
    ("RewardBench", r"allenai/reward-bench", ""),
    ("RewardBench 2", r"allenai/reward-bench-2", ""),
    ("RM-Bench", r"thu-keg/rm-bench", ""),
    ("JudgeBench", r"scalerlab/judgebench", ""),
    ("PandaLM", r"weopenml/pandalm", "test"),
    ("LLMBar", r"princeton-nlp/llmbar", ""),
    ("PPE", r"lmarena-ai/ppe-[\w-]+", ""),
    ("RMB", r"zhou-zoey/rmb-reward-model-benchmark|ilgee/rmb-(?:pairwise|bon)", ""),
    ("HelpSteer3's validation split", r"nvidia/helpsteer3", "validation"),
    ("JudgeLM val", r"baai/judgelm-100k", "val"),
    ("MT-Bench", r"lmsys/mt_bench_human_judgments", ""),
    ("AlpacaEval's annotations", r"tatsu-lab/alpaca_eval", ""),
    ("Feedback Bench", r"prometheus-eval/feedback-bench", ""),
    ("BiGGen Bench", r"prometheus-eval/biggen-bench(?:-results)?", ""),
)


def warn_of_benchmark(source: str) -> None:
    """Warn if a source of training rows is named like a benchmark on the hub.

    That is ORG/NAME anywhere in it: hf:ORG/NAME, a url, a copy in a directory of that name, or in
    the hub's cache, which writes ORG--NAME.
    """
    named = source.lower().replace("--", "/")
    for benchmark, pattern, part in HUB_BENCHMARKS:
        match = re.search(rf"(?<![\w.-])(?:{pattern})(?![\w.-])(.*)", named)
        if match and part in match[1]:
            log.warning(
                "%s is a benchmark (%s): a judge that has trained on it can't be measured by it. "
                "Train on other data, or report no result on this benchmark.",
                *(source, benchmark),
            )


@dataclass(frozen=True)
class Benchmarks:
    """The questions of benchmarks, and their word n-grams, each with the source that has it."""

    questions: Mapping[str, str]
    ngrams: Mapping[str, str]
    num_words: int  # of an n-gram

    def find(self, questions: Sequence[str], overlap: float) -> list[tuple[str, str]]:
        """Return for each question why it is contaminated and by which source, or two "".

        Reasons, the first that holds: "contaminated_exact"; "contaminated_ngram" if a share of at
        least `overlap` of its n-grams occur; "contaminated_whole" if a whole question of a
        benchmark, long or not, stands in it.
        """
        reasons = {"": ("", "")}
        for question in questions:
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
        source = self._contained(folded.split(" "))
        return ("contaminated_whole", source) if source else ("", "")

    @functools.cached_property
    def _by_opening(self) -> dict[tuple[str, ...], list[list[str]]]:
        """The questions that are looked for inside others, by their first words and signs."""
        index: dict[tuple[str, ...], list[list[str]]] = {}
        for question in self.questions:
            if count_words(question) >= LEAST_WORDS:
                parts = question.split(" ")
                index.setdefault(tuple(parts[:LEAST_WORDS]), []).append(parts)
        return index

    def _contained(self, parts: list[str]) -> str:
        """Return the source of a question whose words and signs follow each other here, or ""."""
        for start in range(len(parts) - LEAST_WORDS + 1):
            opening = tuple(parts[start : start + LEAST_WORDS])
            for question in self._by_opening.get(opening, ()):
                if parts[start : start + len(question)] == question:
                    return self.questions[" ".join(question)]
        return ""


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
    listed = words(folded)
    return [" ".join(listed[i : i + num_words]) for i in range(len(listed) - num_words + 1)]


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
        return _text(forms.in_our_form(forms.respelled(row), "score", where)["question"])
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
