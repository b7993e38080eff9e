"""From generated text to scores, with a status for each way in which a text is no judgement.

The parser looks at the sequence of tags. A completion begins after the prompt's `<think>`. So a
well-formed one has exactly the tags `</think>`, `<answer>`, `</answer>`, `<answer>`, `</answer>` in
this order, and a number in each answer; of one answer or a list, as many blocks as answers. Any
text may stand between and after them. Text that does not parse is data: `parse` never raises, and
takes time linear in the text.

Models that were not trained here write other forms; judgement/blocks.py and numbers.py read those.

Left out: what a failure costs in training (judgement/rewards.py) or in a benchmark (benchmarks/).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from jlrm.judgement.blocks import (
    BLOCK,
    answer_blocks,
    last_pair,
    last_score,
    last_scores,
    split_tags,
    without_pair,
)
from jlrm.judgement.numbers import PLAIN_NUMBER
from jlrm.judgement.spelling import without_end_tokens

Status = Literal[
    "ok",
    "no_rubric",  # where one is to come first: none, an empty one, or no <think> behind it
    "no_think_end",  # cut short, or never stopped reasoning
    "cut",  # the limit of tokens came before the verdict; where it is known how the text ended
    "repeated_think",  # a second </think>, or a <think> besides the prompt's
    "answer_in_reasoning",  # an answer tag before </think>
    "no_answer",
    "one_answer",
    "too_few_answers",  # of a list: more than one, but not one for each
    "too_many_answers",
    "broken_answer",  # tags nested, crossed or not closed
    "not_a_number",
    "out_of_range",
    "ambiguous",  # of letters: names both answers at once
    # Of reward mode judgelrm alone, which looks for the completion's begin in the text:
    "no_think_begin",  # no <think> behind the header where the authors' code cuts the text
    "no_header",  # nothing that begins an assistant's turn; the rest is well-formed
]

STATUSES: tuple[Status, ...] = get_args(Status)

Preference = Literal[0, 1, 2]  # the better answer; 0: a tie

_FINISHED = ".!?:;)]}>\"'`*_\u201d\u2019\u3002\uff01\uff1f\u2026"  # last characters of sentences


@dataclass(frozen=True)
class Verdict:
    score_1: float | None  # None unless `status` is "ok"
    # The same; of one answer that was judged alone None, until it is set `beside` the other's.
    score_2: float | None
    status: Status
    reasoning: str  # before </think>; all of the text where that is missing
    rest: tuple[float, ...] = ()  # of a list: the scores from the third on

    @property
    def preference(self) -> Preference | None:
        """The better answer; 0 for a tie, None without a verdict."""
        return None if self.scores is None else preferred(*self.scores)

    @property
    def scores(self) -> tuple[float, float] | None:
        """Both scores, None unless both answers have one."""
        if self.score_1 is None or self.score_2 is None:
            return None
        return self.score_1, self.score_2

    def of_pair(self, first: int, second: int) -> Verdict:
        """Return what a list's verdict says of two of its answers, counted from 0."""
        if self.scores is None:
            return self
        scores = (*self.scores, *self.rest)
        return dataclasses.replace(self, score_1=scores[first], score_2=scores[second], rest=())

    def beside(self, other: Verdict) -> Verdict:
        """Return the verdict of a pair whose answers were judged alone, the other one by `other`.

        Status and reasoning stay those of this one.
        """
        return dataclasses.replace(self, score_2=other.score_1)


def preferred(score_1: float, score_2: float) -> Preference:
    """Return which of two scores is higher."""
    return 0 if score_1 == score_2 else 1 if score_1 > score_2 else 2


def swap_preference(preference: int | None) -> int | None:
    """Return the same preference for the answers in the other order."""
    return {1: 2, 2: 1, 0: 0, None: None}[preference]


def is_consistent(one: int | None, two: int | None) -> bool:
    """Return whether two verdicts name the same answer, or both a tie.

    They are of one pair that was judged in both orders, and both are preferences for its answers as
    stored: `swap_preference` maps a swapped game's back. A missing verdict is not consistent.
    """
    return one is not None and one == two


def implied_probability(score_1: float, score_2: float, certain_margin: float) -> float:
    """Return the probability that answer 1 is better, as the margin of the scores states it.

    Linear in the margin: 1/2 without one, 1 or 0 from `certain_margin` on.
    """
    return min(max(0.5 + (score_1 - score_2) / (2.0 * certain_margin), 0.0), 1.0)


def parse(
    completion: str,
    *,
    min_score: float = 1,
    max_score: float = 10,
    strict: bool = True,
    num_scores: int = 2,
    has_rubric: bool = False,
) -> Verdict:
    """Read the two scores of a completion, or more (`num_scores`); under `strict` alone also one.

    strict: the grammar that the reward pays (the structure check of the authors'
    `reward_score/judgelrm.py`, for the text after `<think>`), with decimals allowed.
    lenient, for models that were not trained here: the last complete pair of answer blocks after
    the last `</think>`, or in the whole text where there is none (judgement/blocks.py). Of a list
    as many blocks as it has answers.

    has_rubric: the prompt has opened `<rubric>`, which the completion must close (`behind_rubric`).
    """
    if has_rubric:
        behind = behind_rubric(completion)
        if behind is None:
            return Verdict(None, None, "no_rubric", completion.strip())
        completion = behind
    read = _strict if strict else partial(_lenient, max_score)
    reasoning, scores, failure = read(completion, num_scores)
    return _verdict(scores, failure, reasoning, min_score, max_score, num_scores)


def behind_rubric(completion: str) -> str | None:
    """Return what follows `<rubric>...</rubric><think>`; None without such a rubric.

    Its criteria are any text without think and answer tags, but some text.
    """
    rubric, _, rest = completion.partition("</rubric>")
    tags, _ = split_tags(rubric)
    before, opened, behind = rest.partition("<think>")
    is_rubric = bool(rubric.strip()) and not tags and bool(opened) and not before.strip()
    return behind if is_rubric else None


def parse_single(
    completion: str, *, min_score: float = 1, max_score: float = 10
) -> tuple[float | None, Status]:
    """Read the one score of a completion that judges one answer, leniently; None with a status.

    It is the last answer block with a number behind the last `</think>`, or in the whole text where
    there is none.
    """
    _, tail = _parts(completion)
    outcome = last_score(without_end_tokens(tail), max_score)
    if isinstance(outcome, str):
        return None, outcome
    return (outcome, "ok") if min_score <= outcome <= max_score else (None, "out_of_range")


def parse_authors(completion: str) -> Verdict:
    """Read scores of any size by the rule of the authors' `judgelrm_inference.py`.

    The first two answer blocks that hold numbers after the last `</think>`, or in the whole text
    where there is none. The authors turn failures into ties; here they keep their status.
    """
    reasoning, tail = _parts(completion)
    blocks = [block.text for block in answer_blocks(tail)]
    failure = without_pair(len(blocks))
    largest = sys.float_info.max  # 400 digits are no number that a file of results could hold
    return _verdict(_numbers(blocks)[:2], failure, reasoning, -largest, largest)


def breaks_off(completion: str) -> bool:
    """Return whether a text without `</think>` goes on after its last answer block and stops short.

    Then the block was a draft. It is a guess, for texts of which nobody recorded how they ended: a
    finished text ends with a verdict or with a sentence.
    """
    if "</think>" in completion:
        return False
    rest = without_end_tokens(completion.rpartition("</answer>")[2])
    return any(map(str.isalpha, rest)) and rest[-1] not in _FINISHED


def structure(tags: list[str], num_scores: int = 2) -> Status:
    """Return "ok" for the one sequence of tags that is well-formed after the prompt's `<think>`."""
    if "</think>" not in tags:
        return "no_think_end"
    if tags.count("</think>") > 1 or "<think>" in tags:
        return "repeated_think"
    if tags[0] != "</think>":
        return "answer_in_reasoning"
    num_blocks = len(tags) // 2
    if tags[1:] != BLOCK * num_blocks:
        return "broken_answer"
    if num_blocks >= num_scores:
        return "ok" if num_blocks == num_scores else "too_many_answers"
    few: tuple[Status, ...] = ("no_answer", "one_answer")
    return few[num_blocks] if num_blocks < len(few) else "too_few_answers"


def _strict(completion: str, num_scores: int) -> tuple[str, Sequence[float], Status]:
    tags, texts = split_tags(completion)
    status = structure(tags, num_scores)
    reasoning = completion.partition("</think>")[0].strip()
    scores = _numbers(texts[2:-1:2]) if status == "ok" else []
    return reasoning, scores, "not_a_number" if status == "ok" else status


def _lenient(
    max_score: float, completion: str, num_scores: int
) -> tuple[str, Sequence[float], Status]:
    reasoning, tail = _parts(completion)
    tail = without_end_tokens(tail)
    is_pair = num_scores == 2
    outcome = last_pair(tail, max_score) if is_pair else last_scores(tail, max_score, num_scores)
    return (reasoning, [], outcome) if isinstance(outcome, str) else (reasoning, outcome, "ok")


def _parts(completion: str) -> tuple[str, str]:
    """Return the reasoning, and what follows the last `</think>` or all where there is none."""
    before, end, tail = completion.rpartition("</think>")
    return (before if end else completion).strip().removeprefix("<think>").strip(), tail


def _verdict(
    scores: Sequence[float],
    failure: Status,
    reasoning: str,
    low: float,
    high: float,
    num_scores: int = 2,
) -> Verdict:
    if len(scores) != num_scores:
        return Verdict(None, None, failure, reasoning)
    if not all(low <= score <= high for score in scores):
        return Verdict(None, None, "out_of_range", reasoning)
    second = scores[1] if num_scores > 1 else None
    return Verdict(scores[0], second, "ok", reasoning, tuple(scores[2:]))


def _numbers(texts: Iterable[str]) -> list[float]:
    """The texts that are integers or decimals; others (nan and 1e3 among them) are left out."""
    stripped = (text.strip() for text in texts)
    return [float(text) for text in stripped if PLAIN_NUMBER.fullmatch(text)]
