"""A model of ours as a judge: Hugging Face weights or a run's, decoded on the devices of a mesh.

Three ways to decode. Sampling and greedy decoding are those of training (rollout.py); with beams or
a repetition penalty it is the search of the paper's own evaluation (beam.py).

What is written in a game depends on the game alone, not on when it is asked, nor on what else is
left to ask: its prompt's width is a function of its length, batches are filled up to one size so
that a width is one compiled program, and random numbers are addressed by (seed, game, vote, token).
Another batch size or mesh is another program, whose sums may differ in their last bits: there a
text differs where two ids are as good as tied.

Left out: int8 weights, swapping and voting (the benchmarks' business), progress (the caller's).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Int

from jlrm import beam, checkpoint
from jlrm.benchmarks.games import Answer, Backend, Game
from jlrm.config import DataConfig, MeshConfig, UsageError
from jlrm.data.batches import Example, encode_prompts, pad
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import (
    Tokenizer,
    check_vocabulary,
    decode,
    end_ids,
    load_tokenizer,
    token_bytes,
)
from jlrm.mesh import Layout, create_mesh, global_array, host_array, rollout_layout, training_layout
from jlrm.model import hf_config
from jlrm.model.decode import decode_params
from jlrm.model.qwen import Params, QwenConfig
from jlrm.programs import fetch, make_generator
from jlrm.rl.distribution import Distribution
from jlrm.rollout import Sampler
from jlrm.run import check_mesh, model_files, read_params
from jlrm.stops import StopTables, stop_tables

STOP = {"</answer>": 2}
SMALLEST_WIDTH = 256  # tokens of a prompt; each width is another program to compile

# write(weights, prompts, numbers that address them) -> ids of each prompt's completions
Write = Callable[[Params, Sequence[Sequence[int]], np.ndarray], list[list[list[int]]]]


def make(
    model: str,
    *,
    prompt: str,
    scale: tuple[int, int],
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    votes: int,
    num_beams: int,
    repetition_penalty: float,
    stop: bool,
    batch_size: int,
    mesh: MeshConfig,
    seed: int,
    compute_dtype: str,
) -> Backend:
    """Return a judge; its weights are read when it is first asked.

    Args:
      model: a Hugging Face directory or hub id, or RUN[@STEP].
      prompt, scale: the template's name, and the scores that it asks for if it states any.
      temperature: 0 is greedy.
      votes: completions of each prompt, drawn independently.
      num_beams, repetition_penalty: other than 1, as in beam.py; at temperature 0 only.
      stop: end with the second `</answer>`, not with an end token only.
      batch_size: games decoded together, each with all its votes or beams.

    A prompt over `max_prompt_tokens` is answered with an error, and so never cut. At most
    `len(widths(max_prompt_tokens))` programs are compiled, each when a prompt first needs it.

    Raises:
      UsageError: anything the user can mend.
    """
    _check_decoding(temperature, votes, num_beams, repetition_penalty)
    directory = model_files(model)
    config = hf_config.read_config(directory, compute_dtype=compute_dtype)
    if not checkpoint.is_run(model):  # whose weights are masters, whatever it began from
        config = dataclasses.replace(config, param_dtype=hf_config.stored_dtype(directory))
    if max_prompt_tokens + max_new_tokens > config.max_position_embeddings:
        raise UsageError(
            f"Prompt and completion together can have {max_prompt_tokens + max_new_tokens} tokens,"
            f" {model} has positions for {config.max_position_embeddings}. Lower max_prompt_tokens"
            " or max_new_tokens."
        )
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size)
    grid = create_mesh(mesh)
    check_mesh(grid, config)
    layout = rollout_layout(grid)
    tables = stop_tables(
        STOP if stop else {}, token_bytes(tokenizer) if stop else [], config.vocab_size
    )
    num_ids, ends = len(tokenizer), end_ids(tokenizer, directory)
    num_rows = -(-batch_size // layout.num_shards("P")) * layout.num_shards("P")

    @functools.cache
    def weights() -> Params:
        params = read_params(model, config, training_layout(grid))
        return jax.jit(partial(decode_params, config, layout))(params)

    @functools.cache
    def writer(width: int) -> Write:
        if num_beams > 1 or repetition_penalty != 1.0:
            search = beam.Search(num_beams, max_new_tokens, ends, repetition_penalty, num_ids)
            return _searching(config, layout, search, tables, width)
        distribution = Distribution(temperature, top_p=top_p, num_ids=num_ids)
        sampler = Sampler(distribution, max_new_tokens, ends)
        return _sampling(config, layout, sampler, tables, width, votes, seed)

    def judge(games: Sequence[Game], record: Callable[[Answer], None]) -> None:
        examples = _encode(games, tokenizer, prompt, scale)
        for example in examples:
            if len(example.prompt_ids) > max_prompt_tokens:
                record(_too_long(example, max_prompt_tokens))
        for width, batch in _batches(examples, widths(max_prompt_tokens), num_rows):
            start = time.monotonic()
            filled = [*batch, *[batch[-1]] * (num_rows - len(batch))]
            numbers = np.array([address(example.comparison.id) for example in filled], np.int32)
            prompts = [example.prompt_ids for example in filled]
            written = writer(width)(weights(), prompts, numbers)[: len(batch)]
            seconds = (time.monotonic() - start) / len(batch)
            for example, completions in zip(batch, written, strict=True):
                record(
                    Answer(
                        game=example.comparison.id,
                        outputs=tuple(decode(tokenizer, completions)),
                        prompt_tokens=len(example.prompt_ids),
                        num_tokens=sum(map(len, completions)),
                        seconds=seconds,
                    )
                )

    return judge


def widths(max_prompt_tokens: int) -> list[int]:
    """Return the widths that prompts are padded to: two an octave, so a third is padding at most.

    At most 2 log2(max_prompt_tokens / 256) + 1 of them, or one.
    """
    octaves = range(max_prompt_tokens.bit_length())
    sizes = [size << i for i in octaves for size in (SMALLEST_WIDTH, SMALLEST_WIDTH * 3 // 2)]
    return [*(size for size in sizes if size < max_prompt_tokens), max_prompt_tokens]


def address(game_id: str) -> int:
    """Return the number that a game's random numbers are addressed by, the same in every run.

    Of 31 bits: two games that share one would draw with the same numbers from different prompts.
    """
    return int.from_bytes(hashlib.sha256(game_id.encode()).digest()[:4], "big") >> 1


def _check_decoding(
    temperature: float, votes: int, num_beams: int, repetition_penalty: float
) -> None:
    if num_beams < 1 or repetition_penalty <= 0:
        raise UsageError(
            f"num_beams={num_beams}, repetition_penalty={repetition_penalty}: wanted a number of "
            "beams from 1, and a penalty above 0. Both are off at 1."
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
    config: QwenConfig,
    layout: Layout,
    sampler: Sampler,
    tables: StopTables,
    width: int,
    votes: int,
    seed: int,
) -> Write:
    generate = make_generator(config, layout, sampler, tables, seed, votes, width)

    def write(
        weights: Params, prompts: Sequence[Sequence[int]], numbers: np.ndarray
    ) -> list[list[list[int]]]:
        found = fetch(generate(weights, prompts, numbers, 0), len(prompts))
        ids = _cut(np.asarray(found.tokens), np.asarray(found.lengths))
        return [ids[i : i + votes] for i in range(0, len(ids), votes)]

    return write


def _searching(
    config: QwenConfig, layout: Layout, search: beam.Search, tables: StopTables, width: int
) -> Write:
    program = jax.jit(partial(beam.search, config, layout, search))
    stops = [global_array(array, layout.replicated()) for array in (tables.tables, tables.accept)]

    def write(
        weights: Params, prompts: Sequence[Sequence[int]], numbers: np.ndarray
    ) -> list[list[list[int]]]:
        tokens, lengths = pad(prompts, width)
        found = program(
            weights,
            global_array(tokens, layout.activation("P T")),
            global_array(lengths, layout.activation("P")),
            *stops,
        )
        return [[ids] for ids in _cut(host_array(found.tokens), host_array(found.lengths))]

    return write


def _cut(tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def _encode(
    games: Sequence[Game], tokenizer: Tokenizer, prompt: str, scale: tuple[int, int]
) -> list[Example]:
    """Fill and tokenise every game's prompt, however long."""
    if not games:
        return []
    rows = [
        Comparison(
            game.id,
            game.item.question,
            game.item.answers[game.first],
            game.item.answers[game.second],
        )
        for game in games
    ]
    form = DataConfig(train="", prompt=prompt, max_prompt_tokens=sys.maxsize)
    return encode_prompts(rows, tokenizer, form, scale).examples


def _too_long(example: Example, max_prompt_tokens: int) -> Answer:
    length = len(example.prompt_ids)
    return Answer(
        game=example.comparison.id,
        error=f"The prompt has {length} tokens, max_prompt_tokens is {max_prompt_tokens}.",
        prompt_tokens=length,
    )


def _batches(
    examples: Sequence[Example], sizes: Sequence[int], num_rows: int
) -> Iterator[tuple[int, list[Example]]]:
    """Yield batches of prompts that fit one width, with it: the longest first, memory's worst."""
    for below, width in reversed(list(zip([0, *sizes], sizes, strict=False))):
        fitting = [example for example in examples if below < len(example.prompt_ids) <= width]
        for start in range(0, len(fitting), num_rows):
            yield width, fitting[start : start + num_rows]
