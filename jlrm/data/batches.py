"""Rows as padded token batches; which rows a step takes is a pure function of (seed, step).

Position in the data is the step number alone, so a run resumes anywhere and every host agrees on
every batch.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from jlrm.config import DataConfig, UsageError
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import Tokenizer, control_tokens, encode
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
    """Examples, and how many rows were left out, by reason."""

    examples: list[Example]
    dropped: collections.Counter[str]


def encode_prompts(
    rows: Sequence[Comparison], tokenizer: Tokenizer, config: DataConfig, *, progress: str = ""
) -> Examples:
    """Fill and tokenise the prompt of every row.

    Rows over `config.max_prompt_tokens` are left out as "overlong", or refused: never cut, since
    the end of a prompt is where the assistant's turn begins.

    Raises:
      UsageError: an overlong row under `overlong: refuse`, or no row left.
    """
    control = control_tokens(tokenizer)
    examples: list[Example] = []
    longest = 0
    for start in tqdm(
        range(0, len(rows), ENCODE_ROWS),
        desc=progress,
        disable=not progress or len(rows) <= ENCODE_ROWS,
    ):
        part = rows[start : start + ENCODE_ROWS]
        texts = [
            prompts.fill(
                config.prompt,
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
    dropped = (
        collections.Counter(overlong=len(rows) - len(examples)) if len(rows) > len(examples) else {}
    )
    if not examples:
        raise UsageError(
            f"All {len(rows)} prompts are longer than "
            f"data.max_prompt_tokens={config.max_prompt_tokens} (the longest has {longest})."
        )
    return Examples(examples, collections.Counter(dropped))


def encode_targets(
    examples: Sequence[Example], tokenizer: Tokenizer, max_tokens: int, end_id: int
) -> Examples:
    """Add the written judgement of every example that has one, ended by the end token.

    Left out: "no_judgement", and "overlong_judgement" (over `max_tokens`; a cut judgement has no
    verdict).

    Raises:
      UsageError: no example left.
    """
    control = control_tokens(tokenizer)
    written = [example for example in examples if example.comparison.meta.get("reasoning")]
    texts = [
        prompts.target(
            prompts.neutralise(example.comparison.meta["reasoning"], control),
            *example.comparison.meta.get("judged", example.comparison.gold),
        )
        for example in written
    ]
    kept = [
        Example(example.comparison, example.prompt, example.prompt_ids, [*ids, end_id])
        for example, ids in zip(written, encode(tokenizer, texts), strict=True)
        if len(ids) < max_tokens
    ]
    dropped = collections.Counter(
        no_judgement=len(examples) - len(written), overlong_judgement=len(written) - len(kept)
    )
    if not kept:
        raise UsageError(
            f"SFT has nothing to imitate: of {len(examples)} rows {dropped['no_judgement']} have "
            f"no written judgement and {dropped['overlong_judgement']} are over "
            f"sft.max_target_tokens={max_tokens}."
        )
    return Examples(kept, +dropped)


def batch_rows(seed: int, step: int, batch_size: int, num_rows: int) -> Int[np.ndarray, " B"]:
    """Return the rows of a step; every epoch is a permutation, and batches run across epochs."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // num_rows):
        order = np.random.default_rng((seed, int(epoch))).permutation(num_rows)
        here = positions // num_rows == epoch
        rows[here] = order[positions[here] % num_rows]
    return rows


def pad(
    sequences: Sequence[Sequence[int]], width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return right-padded ids and their lengths."""
    tokens = np.zeros((len(sequences), width), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    return tokens, np.array([len(ids) for ids in sequences], np.int32)
