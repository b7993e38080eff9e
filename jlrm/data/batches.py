"""Rows as padded token batches; which rows a batch has is a pure function of (seed, position).

The position is one integer, the number of batches before, so a run resumes anywhere and every host
agrees on every batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jlrm.config import DataConfig, UsageError
from jlrm.data.comparisons import Comparison, Dropped
from jlrm.data.tokenizer import Tokenizer, control_tokens, encode, prompt_template
from jlrm.judge import prompts

ENCODE_ROWS = 2048  # rows tokenised at a time, for a progress bar that moves


@dataclass(frozen=True)
class Example:
    """One comparison ready for the model: its prompt, and for SFT the judgement to imitate."""

    comparison: Comparison
    prompt: str
    prompt_ids: Sequence[int]
    target_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Examples:
    """Examples, and the rows that were left out."""

    examples: list[Example]
    dropped: list[Dropped]


def encode_prompts(
    rows: Sequence[Comparison],
    tokenizer: Tokenizer,
    config: DataConfig,
    scale: tuple[int, int] = (1, 10),
    *,
    progress: str = "",
) -> Examples:
    """Fill and tokenise the prompt of every row.

    Rows over `config.max_prompt_tokens` are left out as "overlong", or refused: never cut, since
    the end of a prompt is where the assistant's turn begins. `scale` is written into a prompt that
    states one.

    Raises:
      UsageError: an overlong row under `overlong: refuse`, no row left, or no such template.
    """
    template = prompt_template(tokenizer, config.prompt, min_score=scale[0], max_score=scale[1])
    # Think tags too where they are ordinary text: a judge that quotes an answer and is then cut off
    # would otherwise end with that answer's idea of a verdict.
    control = control_tokens(tokenizer) | set(prompts.THINK_TAGS)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    longest = 0
    for start in tqdm(
        range(0, len(rows), ENCODE_ROWS),
        desc=progress,
        disable=not progress or len(rows) <= ENCODE_ROWS,
    ):
        part = rows[start : start + ENCODE_ROWS]
        texts = [
            prompts.fill(
                template,
                question=prompts.neutralise(row.question, control),
                answer_1=prompts.neutralise(row.answer_1, control),
                answer_2=prompts.neutralise(row.answer_2, control),
            )
            for row in part
        ]
        for row, text, ids in zip(part, texts, encode(tokenizer, texts), strict=True):
            longest = max(longest, len(ids))
            if len(ids) <= config.max_prompt_tokens:
                examples.append(Example(row, text, ids))
            elif config.overlong == "refuse":
                raise UsageError(
                    f"Row {row.id}: the prompt has {len(ids)} tokens, data.max_prompt_tokens is "
                    f"{config.max_prompt_tokens}. Raise it, or set data.overlong=skip."
                )
            else:
                dropped.append(Dropped.of(row, "overlong"))
    if not examples:
        raise UsageError(
            f"All {len(rows)} prompts are longer than "
            f"data.max_prompt_tokens={config.max_prompt_tokens} (the longest has {longest})."
        )
    return Examples(examples, dropped)


def encode_targets(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_tokens: int,
    end_id: int,
    scale: tuple[int, int] = (1, 10),
) -> Examples:
    """Add the written judgement of every example that has one, ended by the end token.

    Left out: "no_judgement", and "overlong_judgement" (over `max_tokens`; a cut judgement has no
    verdict).

    Raises:
      UsageError: no example left.
    """
    control = control_tokens(tokenizer)
    written: list[Example] = []
    texts: list[str] = []
    dropped: list[Dropped] = []
    for example in examples:
        row = example.comparison
        judged = row.meta.get("judged", row.scores)
        if not row.meta.get("reasoning") or judged is None:
            dropped.append(Dropped.of(row, "no_judgement"))
            continue
        reasoning = prompts.neutralise(row.meta["reasoning"], control)
        text = prompts.target(reasoning, *judged, min_score=scale[0], max_score=scale[1])
        written.append(example)
        # A prompt that opens its `<think>` with a line break has the target's first one already.
        texts.append(text.removeprefix("\n") if example.prompt.endswith("\n") else text)
    kept: list[Example] = []
    for example, ids in zip(written, encode(tokenizer, texts), strict=True):
        if len(ids) < max_tokens:
            kept.append(dataclasses.replace(example, target_ids=[*ids, end_id]))
        else:
            dropped.append(Dropped.of(example.comparison, "overlong_judgement"))
    if not kept:
        raise UsageError(
            f"SFT has nothing to imitate: of {len(examples)} rows "
            f"{len(examples) - len(written)} have no written judgement and {len(written)} are over "
            f"sft.max_target_tokens={max_tokens}."
        )
    return Examples(kept, dropped)


def batch_rows(seed: int, position: int, batch_size: int, num_rows: int) -> Int[np.ndarray, " B"]:
    """Return the rows of the batch at a position, counted in batches.

    Every epoch is a permutation, and batches run across epochs.
    """
    places = np.arange(position * batch_size, (position + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(places // num_rows):
        order = np.random.default_rng((seed, int(epoch))).permutation(num_rows)
        here = places // num_rows == epoch
        rows[here] = order[places[here] % num_rows]
    return rows


def pair_rows(seed: int, position: int, batch_size: int, num_rows: int) -> Int[np.ndarray, " B"]:
    """Return the rows of a batch of whole pairs, where row 2i+1 is row 2i in the other order."""
    pairs = batch_rows(seed, position, batch_size // 2, num_rows // 2)
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)


def pad(
    sequences: Sequence[Sequence[int]], width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return right-padded ids and their lengths."""
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in sequences], np.int32)
