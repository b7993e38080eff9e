"""Small worlds of one kind, in each of which one idea of training has something to mend.

As in toy.py a question asks for words of a kind, and the better answer has more of them spelled
right. Questions are numbered, so that no two pairs of a split share one and every pair counts by
itself. What differs between the worlds:

    lists            nothing: gold is right, and written judgements are careless as in toy.py
    lists-position   half of the training gold names the answer shown first, whatever it says
    lists-rubric     a question says what counts: the most right words, or the fewest words
    lists-ties       a third of the pairs are ties
    lists-scales     half of the training rows have gold from another annotator, on 2 to 10
    lists-noise      gold, held out too, names the worse answer the more often the closer they are
    lists-single     gold names the better answer and scores none; each was judged alone
    lists-many       three or four answers to a question, judged at once

Everything is a pure function of the world and the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from jlrm.config import UsageError, nearest
from jlrm.data.worlds import toy
from jlrm.judgement.verdict import preferred

NUM_ROWS = {"train": 8000, "heldout": 400}
LEAN = 0.5  # share of training gold that names the first answer (lists-position)
TIES = 1 / 3  # share of pairs that are ties (lists-ties)
MANY = (3, 4)  # answers to a question (lists-many)
RUBRICS = ("Most right words.", "Fewest words.")
Gold = tuple[float, float]


def rows(world: str, split: str) -> Iterator[dict[str, Any]]:
    """Return the rows of a split, a key of NUM_ROWS ("": train), as a file would hold them.

    Training rows have a written judgement ("reasoning", "judged") beside their gold, and those of
    lists-rubric a right rubric.

    Raises:
      UsageError: there is no such split.
    """
    split = split or "train"
    if split not in NUM_ROWS:
        raise UsageError(f"{world} has no split '{split}'. {nearest(split, NUM_ROWS)}")
    return _rows(world, split)


def _rows(world: str, split: str) -> Iterator[dict[str, Any]]:
    is_train = split == "train"
    rng = np.random.default_rng([list(WORLDS).index(world), is_train])
    numbers = 2 * rng.permutation(NUM_ROWS["train"])[: NUM_ROWS[split]] + is_train
    for number in numbers.tolist():
        kind = str(rng.choice(list(toy.KINDS)))
        num = int(rng.choice(MANY)) if world == "lists-many" else 2
        answers = [toy.draw_answer(rng, kind) for _ in range(num)]
        if world == "lists-ties" and rng.random() < TIES:
            while _right(kind, answers[1]) != _right(kind, answers[0]):
                answers[1] = toy.draw_answer(rng, kind)
        rubric = int(rng.integers(2)) if world == "lists-rubric" else 0
        asked = f"{RUBRICS[rubric]} {number}" if world == "lists-rubric" else f"{number}"
        row: dict[str, Any] = {
            "id": f"{world}-{split}-{number}",
            "question": f"Name {kind}. {asked}",
        }
        texts = [" ".join(answer) for answer in answers]
        right = [_right(kind, answer) for answer in answers]
        if world == "lists-many":
            row |= {"answers": texts, "scores": [1.0 + count for count in right]}
        else:
            row["answer_1"], row["answer_2"] = texts
        if is_train:
            counts = [*map(len, answers)]
            row["reasoning"], row["judged"] = _judged(world, rng, counts, right)
            row |= {"rubric": RUBRICS[rubric]} if world == "lists-rubric" else {}
        if world == "lists-many":
            yield row
            continue
        scores = _labelled(world, _quality(kind, answers, rubric), rng, is_train)
        if world == "lists-single":
            row["preference"] = preferred(*scores)
        else:
            row["score_1"], row["score_2"] = scores
        yield row


def _judged(
    world: str, rng: np.random.Generator, every: list[int], right: list[int]
) -> tuple[Any, list[float]]:
    """Return what a careless annotator writes of all answers, or two of one each."""
    if world != "lists-single":
        return toy.careless(rng, every, right)
    apart = [toy.careless(rng, [a], [b]) for a, b in zip(every, right, strict=True)]
    return [text for text, _ in apart], [score for _, (score,) in apart]


def _right(kind: str, answer: list[str]) -> int:
    return sum(word in toy.KINDS[kind] for word in answer)


def _quality(kind: str, answers: list[list[str]], rubric: int) -> Gold:
    """Return what the answers are worth, 1 to 9."""
    if RUBRICS[rubric] == RUBRICS[1]:
        first, second = (2.0 * toy.MAX_WORDS + 1 - len(answer) for answer in answers)
    else:
        first, second = (1.0 + _right(kind, answer) for answer in answers)
    return first, second


def _labelled(world: str, gold: Gold, rng: np.random.Generator, is_train: bool) -> Gold:
    """Return the scores that the world's annotators give."""
    low, high = sorted(gold)
    if world == "lists-position" and is_train and rng.random() < LEAN:
        return (high, low) if high > low else (high + 1, low)
    if world == "lists-scales" and is_train and rng.random() < 0.5:
        return 2 * gold[0], 2 * gold[1]
    if world == "lists-noise" and rng.random() < 1 / (1 + math.exp(high - low)):
        return gold[1], gold[0]
    return gold


_IDEAS = ("position", "rubric", "ties", "scales", "noise", "single", "many")
_NAMES = ("lists", *(f"lists-{idea}" for idea in _IDEAS))
WORLDS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    name: partial(rows, name) for name in _NAMES
}
