"""From generated text to two scores, with a status for each way in which a text is no judgement.

The parser looks at the sequence of tags. A completion begins after the prompt's `<think>`. So a
well-formed one has exactly the tags `</think>`, `<answer>`, `</answer>`, `<answer>`, `</answer>` in
this order, and a number in each answer. Any text may stand between and after them. Text that does
not parse is data: `parse` never raises, and takes time linear in the text.

Left out: what a failure costs in training (judgement/rewards.py) or in a benchmark (benchmarks/).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal[
    "ok",
    "no_think_end",  # cut short, or never stopped reasoning
    "repeated_think",  # a second </think>, or a <think> besides the prompt's
    "answer_in_reasoning",  # an answer tag before </think>
    "no_answer",
    "one_answer",
    "too_many_answers",
    "broken_answer",  # tags nested, crossed or not closed
    "not_a_number",
    "out_of_range",
    # Of reward mode judgelrm alone, which looks for the completion's begin in the text:
    "no_think_begin",  # no <think> behind the header where the authors' code cuts the text
    "no_header",  # nothing that begins an assistant's turn; the rest is well-formed
]

STATUSES: tuple[Status, ...] = get_args(Status)

Preference = Literal[0, 1, 2]  # the better answer; 0: a tie

BLOCK = ["<answer>", "</answer>"]

# Neither pattern can backtrack over more than one run of characters: both are linear.
_TAG = re.compile(r"(</?(?:think|answer)>)")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Verdict:
    score_1: float | None  # None unless `status` is "ok"
    score_2: float | None
    status: Status
    reasoning: str  # before </think>; all of the text where that is missing

    @property
    def preference(self) -> Preference | None:
        """The better answer; 0 for a tie, None without a verdict."""
        return None if self.scores is None else preferred(*self.scores)

    @property
    def scores(self) -> tuple[float, float] | None:
        """Both scores, None without a verdict."""
        if self.score_1 is None or self.score_2 is None:
            return None
        return self.score_1, self.score_2


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
    completion: str, *, min_score: float = 1, max_score: float = 10, strict: bool = True
) -> Verdict:
    """Read the two scores of a completion.

    strict: the grammar that the reward pays (the structure check of the authors'
    `reward_score/judgelrm.py`, for the text after `<think>`), with decimals allowed.
    lenient, for models that were not trained here: the first two answer blocks that hold numbers
    after the last `</think>`, or in the whole text where there is none (the rule of the authors'
    `judgelrm_inference.py`, which also turns failures into ties; here they keep their status).
    """
    if strict:
        reasoning, scores, status = _strict(completion)
    else:
        reasoning, scores, status = _lenient(completion)
    if status == "ok" and not all(min_score <= score <= max_score for score in scores):
        status = "out_of_range"
    if status != "ok":
        return Verdict(None, None, status, reasoning)
    return Verdict(scores[0], scores[1], status, reasoning)


def split_tags(text: str) -> tuple[list[str], list[str]]:
    """Cut at think and answer tags: the n tags in order, and the n + 1 texts around them."""
    parts = _TAG.split(text)
    return parts[1::2], parts[::2]


def _strict(completion: str) -> tuple[str, list[float], Status]:
    tags, texts = split_tags(completion)
    status = structure(tags)
    reasoning = completion.partition("</think>")[0].strip()
    if status != "ok":
        return reasoning, [], status
    scores = _numbers([texts[2], texts[4]])
    return reasoning, scores, "ok" if len(scores) == 2 else "not_a_number"


def structure(tags: list[str]) -> Status:
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
    few: tuple[Status, ...] = ("no_answer", "one_answer", "ok")
    return few[num_blocks] if num_blocks < len(few) else "too_many_answers"


def _lenient(completion: str) -> tuple[str, list[float], Status]:
    before, end, tail = completion.rpartition("</think>")
    reasoning = (before if end else completion).strip().removeprefix("<think>").strip()
    tags, texts = split_tags(tail)
    blocks = [texts[i + 1] for i in range(len(tags) - 1) if tags[i : i + 2] == BLOCK]
    scores = _numbers(blocks)[:2]
    if len(scores) == 2:
        return reasoning, scores, "ok"
    if len(blocks) > 1:
        return reasoning, scores, "not_a_number"
    return reasoning, scores, "one_answer" if blocks else "no_answer"


def _numbers(texts: list[str]) -> list[float]:
    """The texts that are integers or decimals; others (nan and 1e3 among them) are left out."""
    stripped = (text.strip() for text in texts)
    return [float(text) for text in stripped if _NUMBER.fullmatch(text)]
