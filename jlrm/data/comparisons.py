"""The one row type: a question, two answers, and what is known of their quality.

A row has two scores, or a preference alone, or both if they agree. Where nothing compares with gold
(`data.gold=majority`) it may have neither. Answers that are judged at once (`AnswerList`) are a row
too. A row that can't be used becomes a `Dropped` with its place and the reason: nothing is guessed,
and nothing is lost silently. Files are read by readers.py.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import regex

from jlrm.judgement.verdict import preferred, swap_preference
from jlrm.runtime.storage import write_atomically

# Why a row is left out: the word in `dropped.jsonl`, and what people are told.
REASONS = {
    "failed_review": "with a failed review (JudgeLM marks it by a score of -1)",
    "no_label": "without a label (neither scores nor a preference)",
    "one_score": "with a score for one answer only, and no preference",
    "several_winners": "with several winners",
    "unclear_preference": "whose graded preference lies between two classes",
    "no_scores": "without the scores that are needed",
    "missing_text": "with a missing text",
    "not_text": "with a message that is no text, such as a picture",
    "no_question": "whose two conversations share no turn of the user",
    "conflicting_label": "whose preference contradicts their scores",
    "same_answers": "with two equal answers",
    "ambiguous_prompt": "with a prompt that can be taken apart in several ways",
    "unknown_prompt": "with a prompt of unknown form",
    "unwritable": "with text that UTF-8 can't hold",
    "unstorable_scores": "with scores that float32 can't hold",
    "overlong": "with a prompt that is too long",
    "no_judgement": "without a written judgement",
    "overlong_judgement": "with a written judgement that is too long",
    "tie": "in which nothing is preferred",
    "overlong_target": "with an answer or a verdict that is too long",
    "duplicate": "that repeat an earlier row",
    "contaminated_exact": "that ask a benchmark's question",
    "contaminated_whole": "whose question contains a benchmark's",
    "contaminated_ngram": "whose question is too like a benchmark's",
}


_NAMED = regex.compile(r"(?i)\b((?:assistant|answer|response)\s*#?)([12])\b")
WRITTEN = ("reasoning", "judged")  # the columns of written judgements, in `meta`
FILE_ROWS = 1 << 40  # more rows than a file has


class Where(NamedTuple):
    """The place of a row in its source."""

    number: int  # counted from 1 in its file; 0: of no source
    unit: str = "row"  # or "line"
    source: str = ""
    file: str = ""  # of a source that is a directory of files
    file_number: int = 0  # counted from 0

    def __str__(self) -> str:
        """Return e.g. "pairs.jsonl, line 12", without a source "line 12"."""
        place = f"{self.unit} {self.number}" if self.number else ""
        holder = self.file or self.source
        return f"{holder}, {place}" if holder else place

    @property
    def order(self) -> int:
        """A number that rises from row to row of a source, with gaps between its files."""
        return self.file_number * FILE_ROWS + self.number

    @property
    def name(self) -> str:
        """The id of a row that has none: its number, with its file where there are several."""
        return (
            f"{pathlib.PurePath(self.file).name}:{self.number}" if self.file else f"{self.number}"
        )


@dataclass(frozen=True)
class Comparison:
    """A question and two answers, with scores, a preference, both, or no label at all."""

    id: str
    question: str
    answer_1: str
    answer_2: str
    score_1: float | None = None
    score_2: float | None = None
    preference: int | None = None  # 1, 2, 0 = tie
    source: str = ""
    # Columns of the row that have no other meaning, for rewards of one's own; "reasoning" and
    # "judged" are a written judgement, for SFT: a text and two scores, or a text of each answer.
    meta: dict[str, Any] = field(default_factory=dict)
    is_swapped: bool = field(default=False, compare=False, repr=False)  # not in its own order
    # Named where the row is left out; no part of its value.
    where: Where = field(default=Where(0), compare=False, repr=False)

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers."""
        return self.answer_1, self.answer_2

    @property
    def scores(self) -> tuple[float, ...] | None:
        """Both gold scores, None for a row that has none."""
        if self.score_1 is None or self.score_2 is None:
            return None
        return self.score_1, self.score_2

    @property
    def label(self) -> int | None:
        """The better answer by preference, else by scores; 0 for a tie, None where both lack."""
        if self.preference is not None or self.scores is None:
            return self.preference
        return preferred(*self.scores)

    @property
    def judgement(self) -> tuple[str, tuple[float, ...]] | None:
        """A written judgement, its reasoning and its scores; None for a row without one."""
        reasoning, judged = self.meta.get("reasoning"), self.meta.get("judged", self.scores)
        is_whole = isinstance(judged, (list, tuple)) and len(judged) == len(self.answers)
        if not isinstance(reasoning, str) or not reasoning or not is_whole:
            return None
        if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in judged):
            return None
        return reasoning, tuple(judged)

    @property
    def judgement_of_one(self) -> tuple[str, tuple[float, ...]] | None:
        """A written judgement of answer 1 alone; None where `reasoning` is no list of two texts."""
        texts = self.meta.get("reasoning")
        if not (isinstance(texts, list | tuple) and len(texts) == 2):
            return None
        one = dataclasses.replace(self, meta={**self.meta, "reasoning": texts[0]}).judgement
        return (one[0], one[1][:1]) if one else None

    @property
    def reference(self) -> str:
        """A reference answer, from the column of that name; "" where there is none."""
        told = self.meta.get("reference")
        told = told.get("text") if isinstance(told, Mapping) else told  # JudgeLM has an object
        return told if isinstance(told, str) else ""

    @property
    def rubric(self) -> str:
        """A written rubric, from the column of that name; "" where there is none."""
        told = self.meta.get("rubric")
        return told if isinstance(told, str) else ""

    def gold(self, scale: tuple[int, int]) -> tuple[float, ...]:
        """Both gold scores; a preference alone is worth the whole scale, a tie its middle.

        () without a label.
        """
        (low, high), middle = scale, sum(scale) / 2
        by_label = {0: (middle, middle), 1: (high, low), 2: (low, high), None: ()}
        return self.scores or by_label[self.label]

    def record(self) -> dict[str, Any]:
        """Return the row as a plain dictionary, without its place and order."""
        ours = ("where", "is_swapped")
        return {name: value for name, value in vars(self).items() if name not in ours}

    def swapped(self) -> Comparison:
        """Return the same comparison with its answers in the other order."""
        return dataclasses.replace(
            self,
            answer_1=self.answer_2,
            answer_2=self.answer_1,
            score_1=self.score_2,
            score_2=self.score_1,
            preference=swap_preference(self.preference),
            is_swapped=not self.is_swapped,
            meta=self._swapped_meta(),
        )

    def _swapped_meta(self) -> dict[str, Any]:
        """Return `meta` without a judgement of both answers, which names them by their places.

        Judgements of each answer alone change places.
        """
        is_apart = self.judgement_of_one is not None
        written = {k: self.meta[k][::-1] for k in WRITTEN if k in self.meta} if is_apart else {}
        return {k: v for k, v in self.meta.items() if k not in WRITTEN} | written

    def mirrored(self) -> Comparison:
        """Return the row as `swapped` does, with its written judgement turned round too.

        Names of the answers in its text change places: "Assistant 1", "answer 2".
        """
        row = self.swapped()
        if self.judgement is None:
            return row
        reasoning, judged = self.judgement
        turned = _NAMED.sub(lambda hit: f"{hit[1]}{3 - int(hit[2])}", reasoning)
        written = {"reasoning": turned, "judged": list(judged[::-1])}
        return dataclasses.replace(row, meta={**row.meta, **written})

    def chance(self, seed: int, what: str) -> float:
        """Return a number from 0 to 1 by which the row is chosen for something, or is not."""
        told = json.dumps([seed, what, self.id, self.question, self.answer_1, self.answer_2])
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8]) / 2**64


@dataclass(frozen=True)
class AnswerList(Comparison):
    """A question and two or more answers that are judged at once; a pair's gold is not there."""

    rest: tuple[str, ...] = ()  # the answers from the third on
    # Of each answer, higher for a better one; None where it is not known, and no pair with it is.
    golds: tuple[float | None, ...] = ()
    is_ranked: bool = False  # only the order of `golds` means something

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers."""
        return self.answer_1, self.answer_2, *self.rest

    @property
    def scores(self) -> tuple[float, ...] | None:
        """The gold scores that are known, None for a list that is ranked."""
        return None if self.is_ranked else tuple(g for g in self.golds if g is not None)

    @property
    def label(self) -> int:
        """The number of the best answer, counted from 1; 0 where several are equally good."""
        best = max(gold for gold in self.golds if gold is not None)
        return self.golds.index(best) + 1 if self.golds.count(best) == 1 else 0

    def record(self) -> dict[str, Any]:
        """Return the row as a plain dictionary, its gold as `scores` or as a `ranking`."""
        known = [gold for gold in self.golds if gold is not None]
        places = [g if g is None else 1 + sum(k > g for k in known) for g in self.golds]
        gold = (None, places) if self.is_ranked else (list(self.golds), None)
        listed = {"answers": list(self.answers), "scores": gold[0], "ranking": gold[1]}
        ours = ("rest", "golds", "is_ranked")
        return {k: v for k, v in super().record().items() if k not in ours} | listed

    def pairs(self) -> dict[tuple[int, int], Comparison]:
        """Return the pairs that have gold, by the places of their answers, counted from 0."""
        known = [(i, gold) for i, gold in enumerate(self.golds) if gold is not None]
        return {(i, j): self._pair(i, j, a, b) for (i, a), (j, b) in combinations(known, 2)}

    def _pair(self, i: int, j: int, one: float, two: float) -> Comparison:
        texts = self.answers[i], self.answers[j]
        pair = Comparison(f"{self.id}:{i}-{j}", self.question, *texts, source=self.source)
        if self.is_ranked:
            return dataclasses.replace(pair, preference=preferred(one, two))
        return dataclasses.replace(pair, score_1=one, score_2=two)

    def gold(self, scale: tuple[int, int]) -> tuple[float, ...]:
        """Return all gold scores, a ranking's from the top of the scale down; () if one lacks."""
        known = tuple(gold for gold in self.golds if gold is not None)
        if len(known) < len(self.golds):
            return ()
        levels, (low, high) = sorted(set(known), reverse=True), scale
        step = (high - low) / max(len(levels) - 1, 1)
        return tuple(high - step * levels.index(g) for g in known) if self.is_ranked else known

    def swapped(self) -> AnswerList:
        """Return the same list with its answers in the reverse order."""
        first, second, *rest = reversed(self.answers)
        return dataclasses.replace(
            self,
            answer_1=first,
            answer_2=second,
            rest=tuple(rest),
            golds=self.golds[::-1],
            is_swapped=not self.is_swapped,
            meta=self._swapped_meta(),
        )


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: where it stood, its id, and why."""

    where: Where
    id: str
    reason: str  # a word to count by, one of REASONS

    @classmethod
    def of(cls, row: Comparison, reason: str) -> Dropped:
        """Leave out a row that had been read."""
        return cls(row.where, row.id, reason)


@dataclass(frozen=True)
class Comparisons:
    """Rows, and those that were left out."""

    rows: list[Comparison]
    dropped: list[Dropped]


def count_reasons(dropped: Iterable[Dropped]) -> dict[str, int]:
    """Count dropped rows by reason, in the order of reasons."""
    return dict(sorted(collections.Counter(row.reason for row in dropped).items()))


def describe_dropped(dropped: Iterable[Dropped]) -> str:
    """Return e.g. "12 without a label, 3 with a prompt that is too long", or "" for no rows."""
    return describe_reasons(count_reasons(dropped))


def describe_reasons(counts: Mapping[str, int]) -> str:
    """Return the same of rows that were counted by reason."""
    return ", ".join(f"{n} {REASONS.get(reason, reason)}" for reason, n in sorted(counts.items()))


def listed(names: Iterable[str]) -> str:
    """Return names in quotation marks, with commas, for a sentence."""
    return ", ".join(f"'{name}'" for name in names)


SWAPPED = "/swapped"  # ends the id of a row that stands beside itself in the other order


def tidy(text: str) -> str:
    """Compose characters (NFC), and make every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# A word is a run of letters, digits and their accents, or one character of a script that puts no
# spaces. U+30FC, the long vowel of Japanese, belongs to no script alone.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_SPACELESS}]]"
_WORD = regex.compile(rf"(?V1)[[{_SPACELESS}]&&[\p{{L}}\p{{M}}\p{{N}}]]|{_LETTERS}+")
_SPACELESS_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]")
# Signs that say something wherever they stand: + = < %, currencies, emoji; not bullets and lines.
_SIGN = r"[[\p{Sm}\p{Sc}\p{So}%&@]--[|~$\u2500-\u25ff]]"
# Others say something in some places: not equal, C#, $5, -5, 3.5.
_SIGN_IN_PLACE = r"!(?==)|(?<=\w)\#|\$(?=\s?\p{N})|(?<!\w)-(?=\p{N})|(?<=\p{N})\.(?=\p{N})"
# And others between numbers or single letters alone, as in 1-1: elsewhere they are text marks.
_OPERATOR = r"-*/^|~$"
_BEFORE = rf"(?<=(?:\p{{N}}|(?<!\w)\p{{L}})[\s)\]}}{_OPERATOR[1:]}-]*)"
_AFTER = rf"(?=[\s(\[{{{_OPERATOR[1:]}-]*(?:\p{{N}}|\p{{L}}(?!\w)))"
_TOKEN = regex.compile(rf"{_WORD.pattern}|{_SIGN}|{_SIGN_IN_PLACE}|{_BEFORE}[{_OPERATOR}]{_AFTER}")
_UNSEEN = regex.compile(r"\p{Default_Ignorable_Code_Point}")  # zero width, soft hyphens
_RAISED = regex.compile(r"[⁰¹²³⁴-⁹⁺⁻]+")
_FRACTION = regex.compile(r"[¼-¾⅐-⅞]")
_SAME_SIGNS = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-") | dict.fromkeys("⁄∕", "/"))


def words(text: str) -> list[str]:
    """Return the words of a text; of scripts that put no spaces, the characters."""
    return _WORD.findall(text)


def count_words(text: str) -> float:
    """Return how many words a text has; a character of a script without spaces is half a word."""
    listed = words(text)
    return len(listed) - sum(map(len, map(_SPACELESS_WORD.findall, listed))) / 2


def fold(text: str) -> str:
    """Return what two texts have in common that ask the same question: the words, and the signs.

    Letter case, white space, punctuation, text marks such as `**`, the width of characters, their
    Unicode form and what has no width are left out. Signs that change a meaning stay: `1+1`, `1-1`
    and `1 1` differ, as do C, C++ and C#, 5 and -5, 3² and 32. A text without a word, such as "?!",
    is compared as it is but for white space. The split of training data, the search for
    benchmarks' questions and the clusters of intervals all go by this.
    """
    text = _FRACTION.sub(r" \g<0> ", _RAISED.sub(r"^\g<0>", _UNSEEN.sub("", text)))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate(_SAME_SIGNS)
    return " ".join(_TOKEN.findall(text)) if _WORD.search(text) else tidy(text)


def fold_as_text(text: str) -> str:
    """Return the text tidied and in lower case, punctuation and all: the rule of older runs."""
    return tidy(text.lower())


FOLDINGS = {"words": fold, "text": fold_as_text}  # by the name in `data.folding`


def question_key(question: str, folding: str = "words") -> int:
    """Return 64 bits of the hash of a folded question.

    To hold out the questions with the lowest keys is a choice that more data changes little.
    """
    return folded_key(FOLDINGS[folding](question))


def folded_key(folded: str) -> int:
    """Return the key of a question that is folded already."""
    return int.from_bytes(hashlib.sha256(folded.encode()).digest()[:8])


def write_comparisons(rows: Sequence[Comparison], path: pathlib.Path) -> None:
    """Write rows as JSONL that `readers.read` reads back."""
    write_atomically(path, "".join(_line(row.record()) for row in rows).encode())


def write_dropped(dropped: Iterable[Dropped], path: pathlib.Path) -> None:
    """Write one JSON object for each row that was left out."""
    write_atomically(path, "".join(map(dropped_line, dropped)).encode())


def dropped_line(row: Dropped) -> str:
    """Return a row that was left out as a line of JSON."""
    return _line({**vars(row), "where": str(row.where)})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
