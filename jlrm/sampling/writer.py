"""Completions of many prompts on one mesh: by sampling or by beam search, in batches or in slots.

A batch lasts as long as its longest completion. In slots (refill.py) a prompt is run as soon as
others have ended.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jlrm.config import UsageError
from jlrm.data.batches import Example, pad
from jlrm.data.tokenizer import token_bytes
from jlrm.model.qwen import Params
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import global_array, host_array, replicate
from jlrm.sampling import beam
from jlrm.sampling.decode import Prompts
from jlrm.sampling.generate import fetch, make_generator
from jlrm.sampling.policy import Network, TextPolicy
from jlrm.sampling.refill import Refill
from jlrm.sampling.sampler import SamplerSettings
from jlrm.sampling.slots import STOPPED, SlotSettings
from jlrm.sampling.stops import StopTables, stop_tables

SMALLEST_WIDTH = 256  # tokens of a prompt; each width is another program to compile


@dataclass(frozen=True)
class DecodingSettings:
    """How judgements are written."""

    max_new_tokens: int
    # Prompts decoded together, each with all its votes or beams; with `refill` completions.
    batch_size: int
    seed: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    votes: int = 1  # completions of each prompt, drawn independently
    num_beams: int = 1  # other than 1, as in beam.py; at temperature 0 only
    repetition_penalty: float = 1.0  # the same
    stop_strings: Mapping[str, int] = field(default_factory=dict)
    stop_after: str = ""  # stop strings count behind the last one of this text; "": anywhere
    # Batches of few prompts are smaller: the next power of two. Each size is one more program.
    fit_batches: bool = False
    refill: bool = False  # in slots, not in batches


class Completion(NamedTuple):
    """What was written to a prompt."""

    ids: list[int]
    is_finished: bool  # False: the limit of tokens came first


class Written(NamedTuple):
    """A prompt's completions, and its part of the seconds they took."""

    example: Example
    completions: list[Completion]
    seconds: float


Ids = Sequence[int]
# write(weights laid out for decoding, prompts): yields each prompt once, the widest first
Writer = Callable[[Params, Sequence[Example]], Iterator[Written]]
# the same of one batch of prompts; the numbers address their random numbers
WriteBatch = Callable[[Params, Sequence[Ids], np.ndarray], list[list[Completion]]]
# the same of all prompts of one width: yields the completions of those that end together, by index
WriteAll = Callable[[Params, Sequence[Ids], np.ndarray], Iterator[dict[int, list[Completion]]]]


def make_writer(policy: TextPolicy, decoding: DecodingSettings, sizes: Sequence[int]) -> Writer:
    """Return what writes judgements to prompts, which are padded to one of `sizes`, in tokens."""
    num_shards = policy.decoding.num_shards("P")
    num_rows = -(-decoding.batch_size // num_shards) * num_shards
    spelled = token_bytes(policy.tokenizer) if decoding.stop_strings else []
    tables = stop_tables(
        decoding.stop_strings, spelled, policy.model.vocab_size, decoding.stop_after
    )
    is_search = decoding.num_beams > 1 or decoding.repetition_penalty != 1.0

    def fitted(num_prompts: int) -> int:
        """Return how many prompts are decoded together where there are so many."""
        if not decoding.fit_batches:
            return num_rows
        shards = -(-num_prompts // num_shards)
        return min(num_shards << (shards - 1).bit_length(), num_rows)

    @functools.cache
    def in_batches(width: int) -> WriteAll:
        program = (_searching if is_search else _sampling)(policy, decoding, tables, width)

        def write(
            weights: Params, prompts: Sequence[Ids], numbers: np.ndarray
        ) -> Iterator[dict[int, list[Completion]]]:
            for start in range(0, len(prompts), num_rows):
                batch = [*range(start, min(start + num_rows, len(prompts)))]
                filled = batch + [batch[-1]] * (fitted(len(batch)) - len(batch))
                written = program(weights, [prompts[i] for i in filled], numbers[filled])
                yield dict(zip(batch, written, strict=False))

        return write

    @functools.cache
    def in_slots(width: int, num_slots: int) -> WriteAll:
        return _refilling(policy, decoding, tables, width, num_slots)

    def write(weights: Params, examples: Sequence[Example]) -> Iterator[Written]:
        for width, fitting in _by_width(examples, sizes):
            if decoding.refill:
                votes = -(-decoding.votes // num_shards) * num_shards
                write_all = in_slots(width, max(fitted(len(fitting) * decoding.votes), votes))
            else:
                write_all = in_batches(width)
            numbers = np.array([address(each.comparison.id) for each in fitting], np.int32)
            start = time.monotonic()
            for written in write_all(weights, [each.prompt_ids for each in fitting], numbers):
                seconds = (time.monotonic() - start) / len(written)
                for index, completions in written.items():
                    yield Written(fitting[index], completions, seconds)
                start = time.monotonic()

    return write


def sampler_settings(network: Network, decoding: DecodingSettings) -> SamplerSettings:
    """Return how the sampler writes, where it is no search."""
    distribution = Distribution(decoding.temperature, top_p=decoding.top_p, num_ids=network.num_ids)
    return SamplerSettings(distribution, decoding.max_new_tokens, network.end_ids)


def widths(max_prompt_tokens: int) -> list[int]:
    """Return the widths that prompts are padded to: two an octave.

    So beyond 256 tokens a third is padding at most. They are fewer than 2 log2(max_prompt_tokens /
    256) + 2, and one up to 256.
    """
    octaves = range(max_prompt_tokens.bit_length())
    sizes = [size << i for i in octaves for size in (SMALLEST_WIDTH, SMALLEST_WIDTH * 3 // 2)]
    return [*(size for size in sizes if size < max_prompt_tokens), max_prompt_tokens]


def address(game_id: str) -> int:
    """Return the number that a game's random numbers are addressed by, the same in every run.

    Of 31 bits: two games that share one would draw with the same numbers from different prompts.
    """
    name = game_id.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1


def check_decoding(decoding: DecodingSettings) -> None:
    """Refuse settings that don't go together, or that would write one text several times.

    Raises:
      UsageError: if they do.
    """
    num_beams, temperature = decoding.num_beams, decoding.temperature
    votes, repetition_penalty = decoding.votes, decoding.repetition_penalty
    if temperature < 0 or not 0 < decoding.top_p <= 1:
        raise UsageError(
            f"temperature={temperature}, top_p={decoding.top_p}: wanted a temperature of at least "
            "0, and a top_p above 0 and at most 1."
        )
    if num_beams < 1 or repetition_penalty <= 0:
        raise UsageError(
            f"num_beams={num_beams}, repetition_penalty={repetition_penalty}: wanted a number of "
            "beams from 1, and a penalty above 0. Both are off at 1."
        )
    if decoding.refill and (num_beams > 1 or repetition_penalty != 1.0):
        raise UsageError(
            f"refill with num_beams={num_beams}, repetition_penalty={repetition_penalty}: beams "
            "and the penalty are decoded batch by batch. Leave refill out, or set both of them to "
            "1."
        )
    if temperature > 0 and (num_beams > 1 or repetition_penalty != 1.0):
        raise UsageError(
            f"temperature={temperature} with num_beams={num_beams}, "
            f"repetition_penalty={repetition_penalty}: beams and the penalty go with greedy "
            "decoding only. Set temperature=0, or both of them to 1."
        )
    if temperature == 0 and votes > 1:
        raise UsageError(
            f"votes={votes} at temperature 0 would be one text {votes} times. Set votes=1, or a "
            "temperature above 0."
        )


def _sampling(
    policy: TextPolicy, decoding: DecodingSettings, tables: StopTables, width: int
) -> WriteBatch:
    settings, votes = sampler_settings(policy, decoding), decoding.votes
    generate = make_generator(policy, settings, tables, decoding.seed, votes, width)

    def write(
        weights: Params, prompts: Sequence[Sequence[int]], numbers: np.ndarray
    ) -> list[list[Completion]]:
        drawn = fetch(generate(weights, prompts, numbers, 0), len(prompts))
        rows = _cut(*map(np.asarray, (drawn.tokens, drawn.lengths, drawn.is_finished)))
        return [rows[i : i + votes] for i in range(0, len(rows), votes)]

    return write


def _refilling(
    policy: TextPolicy, decoding: DecodingSettings, tables: StopTables, width: int, num_slots: int
) -> WriteAll:
    sampled = sampler_settings(policy, decoding)
    settings = SlotSettings(
        num_slots,
        width,
        sampled.max_new_tokens,
        sampled.stop_ids,
        sampled.distribution,
        has_temperatures=False,
    )
    refill = Refill(policy, settings, tables, decoding.seed, decoding.votes)

    def write(
        weights: Params, prompts: Sequence[Ids], numbers: np.ndarray
    ) -> Iterator[dict[int, list[Completion]]]:
        for ended in refill.write(weights, prompts, numbers):
            yield {
                index: [Completion(text.ids, text.ending == STOPPED) for text in texts]
                for index, texts in ended.items()
            }

    return write


def _searching(
    policy: TextPolicy, decoding: DecodingSettings, tables: StopTables, width: int
) -> WriteBatch:
    layout = policy.decoding
    search = beam.SearchSettings(
        decoding.num_beams,
        decoding.max_new_tokens,
        policy.end_ids,
        decoding.repetition_penalty,
        policy.num_ids,
    )
    program = jax.jit(partial(beam.search, policy.model, layout, search))
    stops = StopTables._make(global_array(array, layout.replicated()) for array in tables)

    def write(
        weights: Params, prompts: Sequence[Sequence[int]], numbers: np.ndarray
    ) -> list[list[Completion]]:
        tokens, lengths = pad(prompts, width)
        best = program(
            weights,
            Prompts(
                global_array(tokens, layout.activation("P T")),
                global_array(lengths, layout.activation("P")),
            ),
            stops,
        )
        best = replicate(layout, best)
        rows = _cut(*map(host_array, (best.tokens, best.lengths, best.is_finished)))
        return [[row] for row in rows]

    return write


def _cut(
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    is_finished: Bool[np.ndarray, " B"],
) -> list[Completion]:
    rows = zip(tokens, lengths, is_finished, strict=True)
    return [Completion(row[:length].tolist(), bool(finished)) for row, length, finished in rows]


def _by_width(
    examples: Sequence[Example], sizes: Sequence[int]
) -> Iterator[tuple[int, list[Example]]]:
    """Yield the prompts that fit one width, with it: the longest first, memory's worst."""
    for below, width in reversed(list(zip([0, *sizes], sizes, strict=False))):
        fitting = [example for example in examples if below < len(example.prompt_ids) <= width]
        if fitting:
            yield width, fitting
