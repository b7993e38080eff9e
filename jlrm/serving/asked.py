"""What a judge is asked: pairs of answers, or single ones, as the games that are played of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jlrm.config import UsageError
from jlrm.evaluation.games import Game, Item, whole
from jlrm.evaluation.rubrics import Rubric
from jlrm.evaluation.scoring import ordered
from jlrm.judgement import conversations
from jlrm.judgement.labels import Unusable
from jlrm.judgement.prompts import MOST_LISTED

Orders = Literal["both", "given", "random"]
ORDERS = ("both", "given", "random")
FIELDS = ("question", "answer_1", "answer_2")


class Pair(NamedTuple):
    """A question and two answers to be judged: texts, or lists of messages {role, content}.

    reference: an answer that the judge is shown as right. is_expected: with expected scores.
    """

    question: Any
    answer_1: Any
    answer_2: Any
    id: str = ""
    reference: Any = None
    rubric: Rubric | None = None
    is_expected: bool = False


class Single(NamedTuple):
    """A question and one answer to be scored, as `Pair`."""

    question: Any
    answer: Any
    id: str = ""
    reference: Any = None
    rubric: Rubric | None = None
    is_expected: bool = False


class Listed(NamedTuple):
    """A question and answers that are judged at once, as `Pair`."""

    question: Any
    answers: Sequence[Any]
    reference: Any = None
    rubric: Rubric | None = None
    is_expected: bool = False


def games_of(number: int | str, pair: Pair, orders: str, seed: int) -> list[Game]:
    """Return the games of a pair; `number` tells pairs of one call apart.

    Raises:
      UsageError: a text that is none, or an order that there is not.
    """
    question, *answers = map(as_text, pair[:3], FIELDS)
    return _games(Item(str(number), question, tuple(answers), **_more(pair)), orders, seed)


def games_at_once(number: int | str, asked: Listed, orders: str, seed: int) -> list[Game]:
    """Return the games in which all answers are judged at once: as given, and in reverse.

    Raises:
      UsageError: as `games_of`, or a number of answers that no prompt shows.
    """
    if not 2 <= len(asked.answers) <= MOST_LISTED:
        raise UsageError(
            f"One judgement is of 2 to {MOST_LISTED} answers, got {len(asked.answers)}. With "
            "at_once=False (--no-at-once) each is compared with each."
        )
    question = as_text(asked.question, "question")
    answers = tuple(as_text(each, "an answer") for each in asked.answers)
    return _games(Item(str(number), question, answers, **_more(asked)), orders, seed)


def alone(name: str) -> str:
    """Return what to say of a judge of single answers that is to judge several at once."""
    return f"{name} was trained to judge each answer alone: no at_once."


def _games(item: Item, orders: str, seed: int) -> list[Game]:
    if orders not in ORDERS:
        raise UsageError(f"orders='{orders}': wanted one of {', '.join(ORDERS)}.")
    order = "as_given" if orders == "given" else orders  # a policy's word for it
    return ordered(whole(item), order, seed, json.dumps([item.question, *item.answers]))


def each_beside_each(
    question: Any, answers: Sequence[Any], reference: Any, *told: Any
) -> list[Pair]:
    """Return the pairs that compare answers, each with each; their ids are such as "1-3".

    told: a rubric, and whether expected scores are wanted, as of `Pair`.
    """
    return [
        Pair(question, answers[i], answers[j], f"{i + 1}-{j + 1}", reference, *told)
        for i, j in itertools.combinations(range(len(answers)), 2)
    ]


def as_text(value: Any, name: str) -> str:
    """Return a text, or a conversation written out.

    Raises:
      UsageError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not is_conversation(value):
        raise UsageError(f"{name} must be text or a list of messages, got {value!r:.60}.")
    try:
        role = "user" if name == "question" else "assistant"
        return conversations.conversation(conversations.messages(value, name, role, "a pair"))
    except Unusable as reason:
        raise UsageError(f"{name} holds {reason}: every message must have a text.") from None


def single_game(number: int | str, asked: Single) -> Game:
    """Return the game in which one answer is judged by itself.

    Raises:
      UsageError: a text that is none.
    """
    texts = as_text(asked.question, "question"), (as_text(asked.answer, "answer"),)
    return Game(Item(str(number), *texts, **_more(asked)), 0, 0)


def _more(asked: Pair | Single | Listed) -> dict[str, Any]:
    """Return what an item holds besides the texts that are judged."""
    reference = None if asked.reference is None else as_text(asked.reference, "reference")
    return {"reference": reference, "rubric": asked.rubric, "is_expected": asked.is_expected}


def is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def pair_of(row: Sequence[str] | Mapping[str, str]) -> Pair:
    """Return a row of a stream as a pair; a mapping's other keys say nothing.

    Raises:
      UsageError: not three texts.
    """
    if isinstance(row, Pair):
        return row
    texts = [row.get(name) for name in FIELDS] if isinstance(row, Mapping) else list(row)
    if len(texts) != len(FIELDS):
        raise UsageError(f"Judge.compare_each: wanted {', '.join(FIELDS)}, got {len(texts)} texts.")
    return Pair(*texts)  # pyright: ignore[reportArgumentType]  # games_of checks them


def rows_of(
    method: str, names: Sequence[str], columns: Sequence[list[Any]], reference: Any
) -> list[tuple[Any, ...]]:
    """Return the rows of columns, each with its reference, of None without references.

    Raises:
      UsageError: columns of several lengths, or one reference for many rows.
    """
    if isinstance(reference, str) or is_conversation(reference):
        raise UsageError(f"Judge.{method}: wanted a list of references, one a row, got one.")
    own = [None] * len(columns[0]) if reference is None else list(reference)
    sizes = dict(zip(names, map(len, columns), strict=True))
    sizes |= {} if reference is None else {"reference": len(own)}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise UsageError(f"Judge.{method}: wanted lists of one length, got {told}.")
    return list(zip(*columns, own, strict=True))
