"""Completions of many prompts on one mesh: by sampling or by beam search, in batches or in slots.

A batch lasts as long as its longest completion. In slots (slots.py) the next prompts of a width are
run as soon as an eighth of the slots is free (of many devices a quarter). Where a text's keys and
values lie in a cache then depends on when it began, and so do the last bits of its sums: another
neighbour may change a text where two ids are as good as tied. In batches it can't.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jlrm.config import UsageError
from jlrm.data.batches import Example, pad
from jlrm.data.tokenizer import token_bytes
from jlrm.model.qwen import Params
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import global_array, host_array, replicate
from jlrm.sampling import beam, slots
from jlrm.sampling.decode import Prompts
from jlrm.sampling.generate import fetch, make_generator
from jlrm.sampling.policy import Network, TextPolicy
from jlrm.sampling.sampler import SamplerSettings, cache_sizes
from jlrm.sampling.slots import RUNNING, STOPPED, Entering, SlotSettings, SlotState
from jlrm.sampling.stops import StopTables, stop_tables

SMALLEST_WIDTH = 256  # tokens of a prompt; each width is another program to compile
PARTS = 8  # of the slots, of which one is free before prompts enter
FILLING = 4  # times as many prompts as enter may be run with them, on many devices


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
        return _SlotPrograms(policy, decoding, tables, width, num_slots).write

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


@dataclass
class _Text:
    """A completion that is being written in a slot."""

    prompt: int
    ids: list[int] = field(default_factory=list)
    ending: int = RUNNING


class _SlotPrograms:
    """What `WriteAll` needs in slots: the programs of one width, and when which is called."""

    def __init__(
        self,
        policy: TextPolicy,
        decoding: DecodingSettings,
        tables: StopTables,
        width: int,
        num_slots: int,
    ) -> None:
        layout, sampled = policy.decoding, sampler_settings(policy, decoding)
        settings = SlotSettings(
            num_slots,
            width,
            sampled.max_new_tokens,
            sampled.stop_ids,
            sampled.distribution,
            has_temperatures=False,
        )
        shards, num_prompts = layout.num_shards("P"), num_slots // decoding.votes
        self.group = shards * max(num_prompts // PARTS // shards, 1)  # most that enter together
        self.least = max(num_prompts // PARTS, min(self.group // FILLING, num_prompts), 1)
        self.settings, self.decoding, self.layout = settings, decoding, layout
        self.accept = tables.accept
        self.stops: StopTables = self._everywhere(tables)
        self.sizes = cache_sizes(settings.max_new_tokens)
        bound = policy.model, layout, settings
        self.empty = jax.jit(partial(slots.empty, *bound, num_cached=self.sizes[0]))
        self.enter = jax.jit(partial(slots.enter, *bound), donate_argnums=1)
        self.advance = jax.jit(partial(slots.advance, *bound, width), donate_argnums=1)
        self.resize = jax.jit(partial(slots.resize, layout), static_argnums=2)

    def write(
        self, weights: Params, prompts: Sequence[Ids], numbers: np.ndarray
    ) -> Iterator[dict[int, list[Completion]]]:
        """Let prompts enter as slots become free, and decode until all have ended."""
        votes, state = self.decoding.votes, self.empty(self.stops)
        texts: dict[int, list[_Text]] = {}  # of the prompts that are in slots
        holds: list[_Text | None] = [None] * self.settings.num_slots
        num_entered = 0
        while (left := len(prompts) - num_entered) or texts:
            free = [slot for slot, held in enumerate(holds) if held is None]
            num = min(self.group, len(free) // votes, left)
            if left and num >= min(self.least, left):
                chosen = [*range(num_entered, num_entered + num)]
                num_entered += num
                places = np.array(free[: num * votes], np.int32).reshape(num, votes)
                for i, own in zip(chosen, places, strict=True):
                    texts[i] = [_Text(i) for _ in range(votes)]
                    for slot, text in zip(own, texts[i], strict=True):
                        holds[slot] = text
                # The caches stay outside: their size is no matter of this program.
                caches, state = state.caches, state._replace(caches=[])
                entering = self._entering(chosen, places, prompts, numbers)
                state, block = self.enter(weights, state, *entering, self.stops)
                state = state._replace(caches=caches)
            else:
                state = self._fitted(state, max(len(text.ids) for text in holds if text))
                is_wanted = self._everywhere(np.array([text is not None for text in holds]))
                state, block = self.advance(weights, state, is_wanted, self.stops)
            ended = sorted(_take(holds, *map(host_array, replicate(self.layout, block))))
            over = [i for i in ended if all(text.ending != RUNNING for text in texts[i])]
            if over:
                yield {i: _completions(texts.pop(i)) for i in over}

    def _entering(
        self,
        chosen: Sequence[int],
        places: Int[np.ndarray, "P R"],
        prompts: Sequence[Ids],
        numbers: np.ndarray,
    ) -> tuple[Prompts, Entering]:
        """Return what enters; it is filled up by the last prompt, in the same slots."""
        filled = np.minimum(np.arange(self.group), len(chosen) - 1)
        rows = [chosen[i] for i in filled]
        tokens, lengths = pad([prompts[i] for i in rows], self.settings.max_prompt_tokens)
        of_prompts = (
            global_array(tokens, self.layout.activation("P T")),
            global_array(lengths, self.layout.activation("P")),
        )
        seed, votes = self.decoding.seed, range(self.decoding.votes)
        entering = Entering(
            places[filled],
            np.full(self.group, self.settings.max_new_tokens, np.int32),
            np.full(self.group, self.decoding.temperature, np.float32),
            # Wider first: a seed above 2**31 means what its lower 32 bits do.
            np.array([[(seed, numbers[i], vote) for vote in votes] for i in rows]).astype(np.int32),
            np.tile(self.accept, (self.group, 1)),
        )
        return Prompts(*of_prompts), self._everywhere(entering)

    def _fitted(self, state: SlotState, longest: int) -> SlotState:
        """Return the state with the smallest caches that hold what the next block may draw."""
        needed = min(longest + self.settings.num_turns, self.sizes[-1])
        size = next(size for size in self.sizes if size >= needed)
        if state.num_cached == size:
            return state
        turn, caches = self.resize(state.turn, state.caches, size)
        return state._replace(turn=turn, caches=caches)

    def _everywhere(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: global_array(x, self.layout.replicated()), tree)


def _take(
    holds: list[_Text | None],
    tokens: Int[np.ndarray, "P turns"],
    lengths: Int[np.ndarray, " P"],
    endings: Int[np.ndarray, " P"],
) -> set[int]:
    """Give each text what was drawn for it; return the prompts of those that have ended."""
    ended = set()
    for slot, text in enumerate(holds):
        if text is not None:
            text.ids += tokens[slot, : lengths[slot]].tolist()
            text.ending = int(endings[slot])
            if text.ending != RUNNING:
                holds[slot] = None
                ended.add(text.prompt)
    return ended


def _completions(texts: Sequence[_Text]) -> list[Completion]:
    return [Completion(text.ids, text.ending == STOPPED) for text in texts]


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
