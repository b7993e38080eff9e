"""Prompts of one width, each of which enters slots (slots.py) as soon as others have ended.

A batch is idle, but for its longest completion, most of the time. Here the next prompts enter as
soon as an eighth of the slots is free (on many devices a quarter), and caches are as long as the
longest completion needs. Every process of several takes the same decisions, from what was drawn.

Where a text's keys and values lie in a cache depends on when it began, and so do the last bits of
its sums: another neighbour may change a text where two ids are as good as tied. Not in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jlrm.data.batches import pad
from jlrm.model.qwen import Params
from jlrm.runtime.mesh import global_array, host_array, replicate
from jlrm.sampling import slots
from jlrm.sampling.decode import Prompts
from jlrm.sampling.policy import TextPolicy
from jlrm.sampling.sampler import cache_sizes
from jlrm.sampling.slots import RUNNING, Entering, SlotSettings, SlotState
from jlrm.sampling.stops import StopTables

PARTS = 8  # of the slots, of which one is free before prompts enter
FILLING = 4  # times as many prompts as enter may be run with them, on many devices


@dataclass
class Text:
    """A completion that is being written; `ending`: as in slots.py."""

    prompt: int
    ids: list[int] = field(default_factory=list)
    ending: int = RUNNING


class Refill:
    """The programs of one width, and when which of them is called.

    votes: completions of each prompt, at most as many as there are slots.
    """

    def __init__(
        self,
        policy: TextPolicy,
        settings: SlotSettings,
        tables: StopTables,
        seed: int,
        votes: int,
    ) -> None:
        layout = policy.decoding
        self.settings, self.layout, self.accept = settings, layout, tables.accept
        self.seed, self.votes = seed, votes
        shards, num_prompts = layout.num_shards("P"), settings.num_slots // votes
        self.group = shards * max(num_prompts // PARTS // shards, 1)  # most that enter together
        self.least = max(num_prompts // PARTS, min(self.group // FILLING, num_prompts), 1)
        self.stops: StopTables = self._everywhere(tables)
        self.sizes = cache_sizes(settings.max_new_tokens)
        bound, width = (policy.model, layout, settings), settings.max_prompt_tokens
        self.empty = jax.jit(partial(slots.empty, *bound, num_cached=self.sizes[0]))
        self.enter = jax.jit(partial(slots.enter, *bound), donate_argnums=1)
        self.advance = jax.jit(partial(slots.advance, *bound, width), donate_argnums=1)
        self.resize = jax.jit(partial(slots.resize, layout), static_argnums=2)

    def write(
        self, weights: Params, prompts: Sequence[Sequence[int]], numbers: Int[np.ndarray, " P"]
    ) -> Iterator[dict[int, list[Text]]]:
        """Write to all prompts; yield the texts of those that end together, by the prompt's index.

        `numbers` address random numbers. The slots stay in memory until the last text has ended.
        """
        state = self.empty(self.stops)
        texts: dict[int, list[Text]] = {}  # of the prompts that are in slots
        holds: list[Text | None] = [None] * self.settings.num_slots
        num_entered = 0
        while (left := len(prompts) - num_entered) or texts:
            free = [slot for slot, held in enumerate(holds) if held is None]
            num = min(self.group, len(free) // self.votes, left)
            if left and num >= min(self.least, left):
                chosen = range(num_entered, num_entered + num)
                num_entered += num
                places = np.array(free[: num * self.votes], np.int32).reshape(num, self.votes)
                for i, own in zip(chosen, places, strict=True):
                    texts[i] = [Text(i) for _ in own]
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
                yield {i: texts.pop(i) for i in over}

    def _entering(
        self,
        chosen: Sequence[int],
        places: Int[np.ndarray, "P R"],
        prompts: Sequence[Sequence[int]],
        numbers: Int[np.ndarray, " P"],
    ) -> tuple[Prompts, Entering]:
        """Return what enters; it is filled up by the last prompt, in the same slots."""
        filled = np.minimum(np.arange(self.group), len(chosen) - 1)
        rows = [chosen[i] for i in filled]
        tokens, lengths = pad([prompts[i] for i in rows], self.settings.max_prompt_tokens)
        of_prompts = (
            global_array(tokens, self.layout.activation("P T")),
            global_array(lengths, self.layout.activation("P")),
        )
        votes, temperature = range(self.votes), self.settings.distribution.temperature
        addresses = [[(self.seed, numbers[i], vote) for vote in votes] for i in rows]
        entering = Entering(
            places[filled],
            np.full(self.group, self.settings.max_new_tokens, np.int32),
            np.full(self.group, temperature, np.float32),
            np.array(addresses, np.int64).astype(np.int32),  # a seed counts by its lower 32 bits
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
    holds: list[Text | None],
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
