"""Rows as padded token batches; which rows a batch has is a pure function of three integers.

They are the run's seed, the stage's stream and the position: the number of batches before. So a run
resumes anywhere, every host agrees on every batch, and no two stages have the rows in one order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jlrm.config import DataConfig, UsageError
from jlrm.data.comparisons import Comparison, Dropped
from jlrm.data.sharded import Places, ShardedRows
from jlrm.data.tokenizer import (
    Tokenizer,
    control_tokens,
    encode,
    prompt_template,
    question_template,
)
from jlrm.judgement import prompts

ENCODE_ROWS = 256  # rows tokenised at a time: tokenizers keep some 200 bytes a token meanwhile


@dataclass(frozen=True)
class Example:
    """One comparison ready for the model: its prompt, and what is to be learned of it, if known."""

    comparison: Comparison
    prompt: str
    prompt_ids: Sequence[int]
    target_ids: Sequence[int] = ()  # the judgement to imitate, or what is preferred
    other_ids: Sequence[int] = ()  # what it is preferred to


Encode = Callable[[Sequence[Comparison]], list[Example]]
Written = tuple[str, tuple[float, ...]]  # a written judgement: its reasoning and its scores


@dataclass(frozen=True)
class Examples:
    """Comparisons that fit, tokenised when they are taken; and those that were left out.

    A data set's token ids would be gigabytes. Here each process has tokenised its share of the rows
    once, to know their lengths, and then tokenises those of its share that a batch needs.
    """

    rows: ShardedRows
    encode: Encode
    lengths: Int[np.ndarray, "N 2"]  # tokens of the prompt, and of the target (the longer of two)
    dropped: list[Dropped]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> tuple[int, int]:
        """The longest prompt and the longest target, in tokens."""
        prompt, target = self.lengths.max(axis=0).tolist()
        return prompt, target

    def take(self, rows: Places) -> list[Example]:
        """Return some of the examples, in this order; all processes ask for the same."""
        return self.rows.collect("rows of a batch", rows, self.encode)

    def select(self, rows: Places) -> Examples:
        """Return the same with some of the rows, in this order."""
        lengths = self.lengths[np.asarray(rows, int)]
        return dataclasses.replace(self, rows=self.rows.select(rows), lengths=lengths)


def prompt_encoder(
    tokenizer: Tokenizer,
    prompt: str,
    scale: tuple[int, int] = (1, 10),
    *,
    has_reference: bool = False,
    is_single: bool = False,
) -> Encode:
    """Return what fills and tokenises the prompts of rows, however long.

    Args:
      prompt: the template's name.
      scale: written into a prompt that states one.
      has_reference: it shows the row's reference answer.
      is_single: it shows answer 1 alone.

    Raises:
      UsageError: no such template.
    """
    low, high = scale
    kind = {"has_reference": has_reference, "is_single": is_single}
    template = functools.cache(
        partial(prompt_template, tokenizer, prompt, min_score=low, max_score=high, **kind)
    )
    template(num_answers=2)  # raises before any row is read
    quote = functools.partial(prompts.quote, name=prompt, control_tokens=control_tokens(tokenizer))

    def encode_rows(rows: Sequence[Comparison]) -> list[Example]:
        texts = [
            prompts.fill(
                template(num_answers=len(row.answers)),
                question=quote(row.question),
                answer=quote(row.answer_1),
                reference=quote(row.reference),
                **{f"answer_{i}": quote(each) for i, each in enumerate(row.answers, 1)},
            )
            for row in rows
        ]
        return [Example(*each) for each in zip(rows, texts, encode(tokenizer, texts), strict=True)]

    return encode_rows


def question_encoder(tokenizer: Tokenizer) -> Encode:
    """Return what tokenises the questions of rows, as a model is asked them."""
    template, control = question_template(tokenizer), control_tokens(tokenizer)

    def encode_rows(rows: Sequence[Comparison]) -> list[Example]:
        texts = [
            prompts.fill(template, question=prompts.neutralise(row.question, control))
            for row in rows
        ]
        return [Example(*each) for each in zip(rows, texts, encode(tokenizer, texts), strict=True)]

    return encode_rows


def count_tokens(
    rows: Sequence[Comparison], encode_rows: Encode, *, progress: str = ""
) -> Int[np.ndarray, "N 2"]:
    """Count the tokens of every row's prompt and target, of two targets those of the longer."""
    lengths = np.zeros((len(rows), 2), np.int32)
    with tqdm(total=len(rows), desc=progress, disable=not progress, delay=1) as bar:
        for start in range(0, len(rows), ENCODE_ROWS):
            examples = encode_rows(rows[start : start + ENCODE_ROWS])
            counts = [
                (len(e.prompt_ids), max(len(e.target_ids), len(e.other_ids))) for e in examples
            ]
            lengths[start : start + ENCODE_ROWS] = counts
            bar.update(len(examples))
    return lengths


def encode_prompts(
    rows: ShardedRows,
    tokenizer: Tokenizer,
    config: DataConfig,
    scale: tuple[int, int] = (1, 10),
    *,
    together: int = 1,
    progress: str = "",
) -> Examples:
    """Return the rows whose prompts have at most `config.max_prompt_tokens`.

    Longer ones are left out as "overlong", or refused: never cut, since the end of a prompt is
    where the assistant's turn begins. Of each `together` successive rows all are left out or none,
    as one.

    Raises:
      UsageError: an overlong row under `overlong: refuse`, no row left, or no such template.
    """
    is_single = config.judging == "single"
    encode_rows = prompt_encoder(tokenizer, config.prompt, scale, is_single=is_single)
    counts = count_tokens(rows.mine, encode_rows, progress=progress)
    lengths = rows.table("lengths of prompts", counts)
    limit = config.max_prompt_tokens
    is_over = lengths[:, 0] > limit
    if config.overlong == "refuse" and is_over.any():
        first = int(is_over.argmax())
        (row,) = rows.left_out([first], "overlong")
        raise UsageError(
            f"Row {row.id}: the prompt has {lengths[first, 0]} tokens, "
            f"data.max_prompt_tokens is {limit}. Raise it, or set data.overlong=skip."
        )
    is_left_out = is_over.reshape(-1, together).any(axis=1)
    if is_left_out.all():
        both = " in one of their orders" if together > 1 else ""
        raise UsageError(
            f"All {len(rows) // together} prompts are longer than "
            f"data.max_prompt_tokens={limit}{both} "
            f"(the longest has {lengths[:, 0].max(initial=0)})."
        )
    dropped = rows.left_out(together * np.flatnonzero(is_left_out), "overlong")
    whole = Examples(rows, encode_rows, lengths, dropped)
    return whole.select(np.flatnonzero(~np.repeat(is_left_out, together)))


def encode_targets(
    examples: Examples,
    tokenizer: Tokenizer,
    max_tokens: int,
    end_id: int,
    scale: tuple[int, int] = (1, 10),
    reasoning: str = "before",
    data: DataConfig | None = None,
) -> Examples:
    """Add the written judgement of every example that has one, ended by the end token.

    `reasoning` is that of `SFTConfig`: with "none" the gold scores are a judgement. Where `data`
    asks for single answers it is the judgement of answer 1 alone, and where its prompt opens a
    rubric, the column `rubric` stands before it. Left out:
    "no_judgement", and "overlong_judgement" (over `max_tokens`; a cut judgement has no verdict).

    Raises:
      UsageError: no example left.
    """
    is_single = data is not None and data.judging == "single"
    needs_rubric = data is not None and prompts.opens_rubric(data.prompt)
    written_of = partial(
        _written, scale=scale, place=reasoning, is_single=is_single, needs_rubric=needs_rubric
    )
    is_judged = examples.rows.flags(
        "rows with a judgement", lambda row: written_of(row) is not None
    )
    if not is_judged.any():
        wanted = "a list of two texts" if is_single else "a text"
        wanted = f"a text `rubric`, and {wanted}" if needs_rubric else wanted
        if reasoning == "none" and not needs_rubric:
            raise UsageError(
                f"SFT has nothing to imitate: none of {len(examples)} rows has a label. Set "
                "sft.steps=0 to train by GRPO alone."
            )
        raise UsageError(
            f"SFT has nothing to imitate: none of {len(examples)} rows has a written judgement, "
            f"that is scores and {wanted} `reasoning` in `meta`. Set sft.reasoning=none to imitate "
            "labels alone, or sft.steps=0 to train by GRPO alone, which needs no more either."
        )
    encode_rows = _target_encoder(
        examples.encode, tokenizer, end_id, scale, written_of, is_after=reasoning == "after"
    )
    written = examples.rows.select(np.flatnonzero(is_judged))
    lengths = written.table("lengths of targets", count_tokens(written.mine, encode_rows))
    is_over = lengths[:, 1] > max_tokens
    if is_over.all():
        raise UsageError(
            f"SFT has nothing to imitate: all {len(written)} written judgements are longer than "
            f"sft.max_target_tokens={max_tokens} (the shortest has {lengths[:, 1].min()}). Raise "
            "it, or set sft.steps=0 to train by GRPO alone."
        )
    dropped = [
        *examples.rows.left_out(np.flatnonzero(~is_judged), "no_judgement"),
        *written.left_out(np.flatnonzero(is_over), "overlong_judgement"),
    ]
    whole = Examples(written, encode_rows, lengths, dropped)
    return whole.select(np.flatnonzero(~is_over))


def _written(
    row: Comparison, scale: tuple[int, int], place: str, is_single: bool, needs_rubric: bool
) -> Written | None:
    """Return what SFT imitates of a row: a reasoning and the scores behind or before it."""
    if needs_rubric and not row.rubric.strip():
        return None
    if place == "none":
        gold = row.gold(scale)[: 1 if is_single else None]
        return ("", gold) if gold else None
    return row.judgement_of_one if is_single else row.judgement


def _target_encoder(
    encode_prompt: Encode,
    tokenizer: Tokenizer,
    end_id: int,
    scale: tuple[int, int],
    written_of: Callable[[Comparison], Written | None],
    is_after: bool,
) -> Encode:
    """Return what tokenises the prompts of rows and their written judgements."""
    control = control_tokens(tokenizer)

    def text(example: Example) -> str:
        written = written_of(example.comparison)
        assert written, "a row without a written judgement"
        reasoning, judged = prompts.neutralise(written[0], control), written[1]
        low, high = scale
        target = prompts.target(
            reasoning, *judged, min_score=low, max_score=high, is_after=is_after
        )
        if prompts.ends_in_rubric(example.prompt):
            target = prompts.after_rubric(example.comparison.rubric, target)
        # A prompt that opens its first tag with a line break has the target's first one already.
        return target.removeprefix("\n") if example.prompt.endswith("\n") else target

    def encode_rows(rows: Sequence[Comparison]) -> list[Example]:
        prompted = encode_prompt(rows)
        return [
            dataclasses.replace(example, target_ids=[*ids, end_id])
            for example, ids in zip(
                prompted, encode(tokenizer, [text(each) for each in prompted]), strict=True
            )
        ]

    return encode_rows


def batch_rows(
    seed: int, position: int, batch_size: int, num_rows: int, stream: int = 0
) -> Int[np.ndarray, " B"]:
    """Return the rows of the batch at a position, counted in batches.

    Every epoch is a permutation, and batches run across epochs. Each `stream` has permutations of
    its own.
    """
    places = np.arange(position * batch_size, (position + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(places // num_rows):
        # NumPy takes no notice of zeros at the end: stream 0 is the order from before streams.
        order = np.random.default_rng((seed, int(epoch), stream)).permutation(num_rows)
        here = places // num_rows == epoch
        rows[here] = order[places[here] % num_rows]
    return rows


def pair_rows(
    seed: int, position: int, batch_size: int, num_rows: int, stream: int = 0
) -> Int[np.ndarray, " B"]:
    """Return the rows of a batch of whole pairs, where row 2i+1 is row 2i in the other order."""
    pairs = batch_rows(seed, position, batch_size // 2, num_rows // 2, stream)
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


def pad(
    sequences: Sequence[Sequence[int]], width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return right-padded ids and their lengths."""
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in sequences], np.int32)
