"""Answer blocks of a text, and which two of them are its verdict.

What is quoted, drafted or taken back stands before the final verdict, so the last complete pair of
answer blocks counts. Numbers are read as people write them (judgement/numbers.py). Other spellings
of the tags, such as `<ANSWER>`, are read only in a text that has no pair in plain ones: what was
quoted from a judged answer can't overrule a plain verdict by being spelt otherwise.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jlrm.judgement.numbers import Pair, both, json_scores, score
from jlrm.judgement.spelling import plain

BLOCK = ["<answer>", "</answer>"]
Failure = Literal["no_answer", "one_answer", "too_few_answers", "too_many_answers", "not_a_number"]

# It cannot backtrack over more than one run of characters: it is linear.
_TAGS = re.compile(r"(</?(?:think|answer)>)")
_ANSWER_TAG = re.compile(r"<\s*+(/?+)\s*+answer\s*+>", re.IGNORECASE)
# Between the two scores of one pair: signs, and at most words such as "and Answer 2's score".
_TIGHT = re.compile(
    r"[\W_]*+(?:and[\W_]++)?+(?:the[\W_]++)?+(?:(?:answer|assistant|response|model|output)"
    r"(?:['\u2019]s)?[\W_]*+(?:2|b|two)?)?(?:[\W_]*+(?:score|rating))?[\W_]*+",
    re.IGNORECASE,
)
# An answer that is named; behind `:` and the like its number would be a score.
_NAME = re.compile(r"\b(?:answer|assistant|response|model)[\s_-]*[12]\b", re.IGNORECASE)


class AnswerBlock(NamedTuple):
    """The text between `<answer>` and `</answer>`, and the one between it and the block before."""

    text: str
    gap: str


def split_tags(text: str) -> tuple[list[str], list[str]]:
    """Cut at think and answer tags: the n tags in order, and the n + 1 texts around them."""
    parts = _TAGS.split(text)
    return parts[1::2], parts[::2]


def answer_blocks(text: str) -> list[AnswerBlock]:
    """Return the answer blocks of a text, of nested ones the innermost."""
    tags, texts = split_tags(text)
    places = [i for i in range(len(tags) - 1) if tags[i : i + 2] == BLOCK]
    ends = [0, *(place + 2 for place in places)]
    gaps = ("".join(texts[end : place + 1]) for end, place in zip(ends, places, strict=False))
    return [AnswerBlock(texts[i + 1], gap) for i, gap in zip(places, gaps, strict=True)]


def without_pair(num_blocks: int) -> Failure:
    """Return what is wrong with a text whose answer blocks hold less than two scores."""
    if num_blocks > 1:
        return "not_a_number"
    return "one_answer" if num_blocks else "no_answer"


def last_pair(text: str, most: float) -> Pair | Failure:
    """Return the scores of a text's last complete pair, or why it has none.

    most: the end of the scale, so that `8/10` can be read.
    """
    blocks = answer_blocks(text)
    outcome = _last_pair(blocks, most)
    if (
        isinstance(outcome, str)
        and (spelt := _ANSWER_TAG.sub(r"<\1answer>", plain(html.unescape(text)))) != text
    ):
        blocks = answer_blocks(spelt)
        outcome = _last_pair(blocks, most)
    return outcome if blocks else json_scores(text, most) or outcome


def last_score(text: str, most: float) -> float | Failure:
    """Return the score of a text's last block that holds a number, or why there is none."""
    spelt = _ANSWER_TAG.sub(r"<\1answer>", plain(html.unescape(text)))
    blocks = answer_blocks(text) or answer_blocks(spelt)
    for block in reversed(blocks):
        if (found := score(block.text, most)) is not None:
            return found
    return "not_a_number" if blocks else "no_answer"


def last_scores(text: str, most: float, num_scores: int) -> tuple[float, ...] | Failure:
    """Return the scores of a text's last complete verdict on a list, or why it has none.

    Each stands in a block of its own. Blocks without a number are placeholders. What is left is one
    verdict or several whole ones, or ends with one whose blocks stand close together.
    """
    spelt = _ANSWER_TAG.sub(r"<\1answer>", plain(html.unescape(text)))
    blocks = answer_blocks(text) or answer_blocks(spelt)
    kept = [block for block in blocks if _has_number(block.text, most)]
    if len(kept) < num_scores:
        return "too_few_answers" if len(kept) > 1 else without_pair(len(blocks))
    last = _runs(kept, _near)[-1]
    if len(kept) % num_scores and len(last) != num_scores:
        return "too_many_answers"
    found = [
        score(block.text, most, place) for place, block in enumerate(kept[-num_scores:], start=1)
    ]
    scores = tuple(each for each in found if each is not None)
    return scores if len(scores) == num_scores else "not_a_number"


def _last_pair(blocks: Sequence[AnswerBlock], most: float) -> Pair | Failure:
    """Blocks without a number are placeholders, such as `<answer>score of Answer 1</answer>`."""
    failure = without_pair(len(blocks))
    kept = [block for block in blocks if _has_number(block.text, most)]
    if not kept:
        return failure
    last = kept[-1].text
    at = _place_of_last_pair(kept)
    # `7,5` is a number where there is another one, and two where it stands alone. `7 6` is nothing
    # where the block before it states the score of answer 1.
    is_second = at == len(kept) - 2 and score(kept[-2].text, most, 1) is not None
    is_alone = len(kept) == 1 or (score(last, most) is None and not (is_second and _near(kept[-1])))
    if is_alone and (pair := both(last, most)):
        return pair
    if at is None:
        if len(kept) > 1:
            return "too_many_answers"
        return "not_a_number" if score(last, most) is None else failure
    one, two = score(kept[at].text, most, 1), score(kept[at + 1].text, most, 2)
    return "not_a_number" if one is None or two is None else (one, two)


def _has_number(text: str, most: float) -> bool:
    """Return whether a block states any number besides the names of the answers."""
    has_digit = any(map(str.isdecimal, _NAME.sub("", text)))
    return has_digit or score(text, most) is not None or both(text, most) is not None


def _near(block: AnswerBlock) -> bool:
    return _TIGHT.fullmatch(block.gap) is not None


def _place_of_last_pair(blocks: Sequence[AnswerBlock]) -> int | None:
    """Return the index of the first block of the last pair; None where blocks pair in two ways.

    Blocks that stand close together belong together. Of those that stand apart an even number at
    the end are pairs, and a last single one is a remark on the pair before it.
    """
    groups = _runs(blocks, _near)
    alone = 0
    while alone < len(groups) and len(groups[-1 - alone]) == 1:
        alone += 1
    if alone and alone % 2 == 0:
        return len(blocks) - 2
    if alone > 1 or alone == len(groups):
        return None
    group = groups[-1 - alone]
    if len(group) % 2:  # e.g. a quoted score in front of the pair
        closest = _runs([blocks[i] for i in group], lambda block: not block.gap.strip())
        pairs = [[group[i] for i in run] for run in closest if len(run) > 1]
        group = pairs[-1] if pairs else group
    return group[len(group) // 2 * 2 - 2]


def _runs(
    blocks: Sequence[AnswerBlock], is_close: Callable[[AnswerBlock], bool]
) -> list[list[int]]:
    """Return the indices of blocks in runs, within which each is close to the one before."""
    runs: list[list[int]] = []
    for i, block in enumerate(blocks):
        if runs and is_close(block):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs
