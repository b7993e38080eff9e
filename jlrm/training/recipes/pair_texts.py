"""Pairs of texts of one prompt, the preferred one first: what DPO and reward models learn from.

Two kinds come from a comparison alone. "answers": its better answer and its worse one, as replies
to the question. "verdicts": its gold scores and the same two in the other order, as replies to the
judge's prompt, with no reasoning before them. A tie prefers nothing, and is left out. Judgements
that the policy samples itself are paired where they are sampled (training/recipes/preference.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from jlrm.config import UsageError
from jlrm.data.batches import Encode, Example, Examples, count_tokens, question_encoder
from jlrm.data.comparisons import Comparison, Dropped
from jlrm.data.sharded import ShardedRows
from jlrm.data.tokenizer import Tokenizer, control_tokens, encode
from jlrm.judgement import prompts

# Example -> the text that is preferred, and the other
Texts = Callable[[Example], tuple[str, str]]


def encode_pairs(
    examples: Examples,
    tokenizer: Tokenizer,
    kind: str,
    max_tokens: int,
    end_id: int,
    scale: tuple[int, int] = (1, 10),
    stage: str = "dpo",
) -> Examples:
    """Return the examples that prefer one text to another, each text ended by the end token.

    `target_ids` is what is preferred, `other_ids` the other. Left out: "tie", "no_label", and
    "overlong_target" (a text of more than `max_tokens`).

    Raises:
      UsageError: no example is left.
    """
    if kind == "answers":
        encode_rows = _encoder(question_encoder(tokenizer), _answers(tokenizer), tokenizer, end_id)
    else:
        encode_rows = _encoder(examples.encode, _verdicts(scale), tokenizer, end_id)
    has_winner = examples.rows.flags("rows with a winner", _has_winner(kind, scale))
    preferring = examples.rows.select(np.flatnonzero(has_winner))
    lengths = preferring.table("lengths of pairs", count_tokens(preferring.mine, encode_rows))
    is_over = lengths[:, 1] > max_tokens
    if is_over.all():  # of none, all
        raise UsageError(
            f"{stage} has nothing to compare: of {len(examples)} rows {np.sum(~has_winner)} prefer "
            f"nothing, and {np.sum(is_over)} have {kind} longer than {stage}.max_target_tokens="
            f"{max_tokens}. Raise it, or set {stage}.steps=0."
        )
    dropped = [
        *left_out_without_winner(examples.rows, has_winner),
        *preferring.left_out(np.flatnonzero(is_over), "overlong_target"),
    ]
    whole = Examples(preferring, encode_rows, lengths, dropped)
    return whole.select(np.flatnonzero(~is_over))


def left_out_without_winner(rows: ShardedRows, has_winner: Bool[np.ndarray, " N"]) -> list[Dropped]:
    """Return the rows that have no winner as those that are left out: ties, or without a label."""
    is_labelled = rows.flags("rows with a label", lambda row: row.label is not None)
    reasons = {"tie": ~has_winner & is_labelled, "no_label": ~has_winner & ~is_labelled}
    return [row for why, are in reasons.items() for row in rows.left_out(np.flatnonzero(are), why)]


def _encoder(encode_prompt: Encode, texts: Texts, tokenizer: Tokenizer, end_id: int) -> Encode:
    """Return what tokenises prompts and both of their texts."""

    def encode_rows(rows: Sequence[Comparison]) -> list[Example]:
        prompted = encode_prompt(rows)
        written = [text for each in prompted for text in texts(each)]
        ids = [[*each, end_id] for each in encode(tokenizer, written)]
        return [
            dataclasses.replace(example, target_ids=better, other_ids=worse)
            for example, better, worse in zip(prompted, ids[::2], ids[1::2], strict=True)
        ]

    return encode_rows


def _answers(tokenizer: Tokenizer) -> Texts:
    control = control_tokens(tokenizer)

    def texts(example: Example) -> tuple[str, str]:
        row = example.comparison
        first, second = (prompts.neutralise(t, control) for t in (row.answer_1, row.answer_2))
        return (first, second) if row.label == 1 else (second, first)

    return texts


def _verdicts(scale: tuple[int, int]) -> Texts:
    def texts(example: Example) -> tuple[str, str]:
        better, worse = _written(example.comparison, scale)
        # A prompt that opens its `<think>` with a line break has the target's first one already.
        begun = "\n" if example.prompt.endswith("\n") else ""
        return better.removeprefix(begun), worse.removeprefix(begun)

    return texts


def _written(row: Comparison, scale: tuple[int, int]) -> tuple[str, str]:
    """Return the verdict of gold, and the opposite; a preference alone is worth the whole scale."""
    first, second = row.gold(scale)
    write = functools.partial(prompts.target, "", min_score=scale[0], max_score=scale[1])
    return write(first, second), write(second, first)


def _has_winner(kind: str, scale: tuple[int, int]) -> Callable[[Comparison], bool]:
    """Return whether a row prefers one text; gold scores may be written alike, at an end."""

    def has_winner(row: Comparison) -> bool:
        if not row.label:
            return False
        better, worse = _written(row, scale)
        return kind == "answers" or better != worse

    return has_winner
