"""Prompts that enter and leave while others are decoded get what the sampler writes to each."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_config
from test_sampler import FAST, NUM_NEW, NUM_PROMPT, draw, grid_keys, random_params, random_prompts

from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import rollout_layout
from jlrm.sampling import decode, slots
from jlrm.sampling.decode import Prompts
from jlrm.sampling.slots import CUT, RUNNING, STOPPED, Entering, SlotSettings, Turns
from jlrm.sampling.stops import StopTables, ends, stop_tables

pytestmark = pytest.mark.slow  # whole models are compiled

END_IDS = tuple(range(0, 96, 12))
SHALLOW = tiny_config(num_hidden_layers=1)
SPELLED = [bytes([65 + i % 7]) for i in range(96)]


class Slots:
    """The programs of one set of slots, and the completions that they have drawn."""

    def __init__(
        self,
        num_slots: int,
        stop_ids: tuple[int, ...] = END_IDS,
        stops: StopTables | None = None,
        mesh_shape: tuple[int, int, int] = (1, 1, 1),
        max_prompt_tokens: int = NUM_PROMPT,
    ) -> None:
        layout = rollout_layout(mesh_of(*mesh_shape))
        self.stops = stop_tables({}, [], 96) if stops is None else stops
        settings = SlotSettings(
            num_slots, max_prompt_tokens, NUM_NEW, stop_ids, Distribution(), num_turns=3
        )

        def compiled(function: Any, *leading: Any, donated: tuple[int, ...] = ()) -> Any:
            bound = partial(function, SHALLOW, layout, *leading)
            return jax.jit(bound, donate_argnums=donated, compiler_options=FAST)

        params = random_params(SHALLOW, mesh_shape)
        self.weights = compiled(decode.decode_params)(params)
        self.state = compiled(slots.empty, settings)(self.stops)
        self._enter = compiled(slots.enter, settings, donated=(1,))
        self._advance = compiled(slots.advance, settings, NUM_PROMPT, donated=(1,))
        self.drawn: dict[tuple[int, int], list[int]] = {}  # of a prompt and a completion
        self.endings: dict[tuple[int, int], int] = {}
        self.holds: list[tuple[int, int] | None] = [None] * num_slots

    def enter(
        self,
        prompts: dict[int, list[list[int]]],
        ids: Any,
        lengths: Any,
        temperature: float = 1.0,
        accept: Any = None,
    ) -> None:
        """Put completions of prompts into slots: {prompt's number: [[slot, completion]]}."""
        numbers = list(prompts)
        places = np.array([prompts[number] for number in numbers], np.int32)  # P R 2
        addresses = [[(0, number, each[1]) for each in prompts[number]] for number in numbers]
        entering = Entering(
            places[..., 0],
            np.full(len(numbers), NUM_NEW, np.int32),
            np.full(len(numbers), temperature, np.float32),
            np.array(addresses, np.int32),
            np.array([self.stops.accept] * len(numbers)) if accept is None else accept,
        )
        for number in numbers:
            for slot, completion in prompts[number]:
                assert self.holds[slot] in (None, (number, completion))
                self.holds[slot] = number, completion
        chosen = Prompts(ids[numbers], lengths[numbers])
        self._take(*self._enter(self.weights, self.state, chosen, entering, self.stops))

    def advance(self) -> None:
        is_wanted = np.array([held is not None for held in self.holds])
        self._take(*self._advance(self.weights, self.state, is_wanted, self.stops))

    def _take(self, state: Any, block: Turns) -> None:
        self.state, block = state, jax.device_get(block)
        for slot, held in enumerate(self.holds):
            taken = block.tokens[slot, : block.lengths[slot]].tolist()
            if held is None:
                assert not taken
                continue
            self.drawn.setdefault(held, []).extend(taken)
            if block.endings[slot] != RUNNING:
                self.endings[held] = int(block.endings[slot])
                self.holds[slot] = None

    def free(self) -> list[int]:
        return [slot for slot, held in enumerate(self.holds) if held is None]


def play(served: Slots, ids: Any, lengths: Any, temperature: float = 1.0, votes: int = 1) -> None:
    """Let all prompts enter as slots become free, one in a call, and decode to the end."""
    waiting = list(range(len(ids)))
    while waiting or any(held is not None for held in served.holds):
        free = served.free()
        while waiting and len(free) >= votes:
            chosen, free = free[:votes], free[votes:]
            places = [[slot, completion] for completion, slot in enumerate(chosen)]
            served.enter({waiting.pop(0): places}, ids, lengths, temperature)
            free = served.free()
        served.advance()


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_completions_are_those_of_the_sampler(mesh_shape, temperature):
    ids, lengths = random_prompts()
    served = Slots(4, mesh_shape=mesh_shape)
    play(served, ids, lengths, temperature)
    wanted = draw(
        ids,
        lengths,
        grid_keys(num_rollouts=1),
        stop_ids=END_IDS,
        distribution=Distribution(temperature),
        mesh_shape=mesh_shape,
    )
    for number, (tokens, length) in enumerate(zip(wanted.tokens, wanted.lengths, strict=True)):
        assert served.drawn[number, 0] == tokens[:length].tolist()
    endings = [served.endings[number, 0] for number in range(len(ids))]
    assert endings == np.where(wanted.is_finished, STOPPED, CUT).tolist()
    assert temperature < 1 or {STOPPED, CUT} == set(endings)


def test_votes_of_a_prompt_share_its_run():
    ids, lengths = random_prompts()
    served = Slots(4)
    play(served, ids, lengths, votes=2)
    wanted = draw(ids, lengths, stop_ids=END_IDS)
    for row, (tokens, length) in enumerate(zip(wanted.tokens, wanted.lengths, strict=True)):
        assert served.drawn[divmod(row, 2)] == tokens[:length].tolist()


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_caches_grow_and_shrink_between_blocks(mesh_shape):
    """To every size that holds what is cached, and what a block may add, in a fixed order."""
    ids, lengths = random_prompts()
    served = Slots(4, mesh_shape=mesh_shape)
    resize = jax.jit(partial(slots.resize, rollout_layout(mesh_of(*mesh_shape))), static_argnums=2)
    advance, order, changes = served.advance, itertools.cycle((11, 4, 7, NUM_NEW, 5)), set()

    def resized() -> None:
        running = [len(served.drawn[held]) for held in served.holds if held]
        needed = min(max(running, default=0) + 3, NUM_NEW)
        size = next(each for each in order if each >= needed)
        changes.add(np.sign(size - served.state.num_cached))
        turn, caches = resize(served.state.turn, served.state.caches, size)
        served.state = served.state._replace(turn=turn, caches=caches)
        advance()

    served.advance = resized
    play(served, ids, lengths)
    wanted = draw(ids, lengths, grid_keys(num_rollouts=1), stop_ids=END_IDS, mesh_shape=mesh_shape)
    for number, (tokens, length) in enumerate(zip(wanted.tokens, wanted.lengths, strict=True)):
        assert served.drawn[number, 0] == tokens[:length].tolist()
    assert {-1, 1} <= changes


def test_a_prompt_that_fills_a_call_enters_once():
    ids, lengths = random_prompts()
    served = Slots(3)
    served.enter({5: [[1, 0]]}, ids, lengths)
    twice = Slots(3)
    prompts = {"tokens": ids[[5, 5]], "lengths": lengths[[5, 5]]}
    entering = Entering(
        np.array([[1], [1]], np.int32),
        np.full(2, NUM_NEW, np.int32),
        np.ones(2, np.float32),
        np.array([[[0, 5, 0]]] * 2, np.int32),
        np.zeros((2, 0), np.int16),
    )
    twice.holds[1] = 5, 0
    twice._take(
        *twice._enter(twice.weights, twice.state, Prompts(**prompts), entering, twice.stops)
    )
    for each in (served, twice):
        while each.holds[1] is not None:
            each.advance()
    assert served.drawn == twice.drawn and len(served.drawn[5, 0]) > 1


def test_a_stop_string_ends_a_completion_and_counts_anew_for_the_next():
    stops = stop_tables({"AB": 1}, SPELLED, 96)
    ids, lengths = random_prompts()
    served = Slots(2, stop_ids=(), stops=stops)
    play(served, ids, lengths)
    wanted = draw(ids, lengths, grid_keys(num_rollouts=1), stops=stops)
    for number, (tokens, length) in enumerate(zip(wanted.tokens, wanted.lengths, strict=True)):
        assert served.drawn[number, 0] == tokens[:length].tolist()
    assert STOPPED in served.endings.values()


def test_each_slot_ends_by_its_own_number_of_stop_strings():
    ids, lengths = random_prompts()
    counts, spelled = {"A": 3}, [b"AB"[i % 2 : i % 2 + 1] for i in range(96)]
    served = Slots(2, stop_ids=(), stops=stop_tables(counts, spelled, 96))
    accept = ends(counts, 3)
    served.enter({0: [[0, 0]], 1: [[1, 0]]}, ids, lengths, accept=accept[[2, 0]])
    while any(held is not None for held in served.holds):
        served.advance()
    for number, count in ((0, 3), (1, 1)):
        own = stop_tables({"A": count}, spelled, 96)
        wanted = draw(ids, lengths, grid_keys(num_rollouts=1), stops=own)
        assert served.drawn[number, 0] == wanted.tokens[number][: wanted.lengths[number]].tolist()
        assert served.endings[number, 0] == STOPPED


def test_a_narrow_block_reads_what_it_needs():
    ids, lengths = random_prompts()
    short = np.flatnonzero(lengths <= 2)[:2]
    drawn = []
    for width in (2, NUM_PROMPT):
        served = Slots(2)
        layout = rollout_layout(mesh_of(1, 1, 1))
        settings = SlotSettings(2, NUM_PROMPT, NUM_NEW, END_IDS, Distribution(), num_turns=3)
        served._advance = jax.jit(partial(slots.advance, SHALLOW, layout, settings, width))
        play(served, ids[short], lengths[short])
        drawn.append(served.drawn)
    assert drawn[0] == drawn[1]


def test_the_loop_ends_when_all_slots_are_idle():
    served = Slots(2)
    before = int(jnp.asarray(served.state.turn))
    served.advance()
    assert int(jnp.asarray(served.state.turn)) == before


def test_a_sequence_that_is_wanted_no_more_leaves_its_slot_to_another():
    ids, lengths = random_prompts()
    served = Slots(2, stop_ids=())
    served.enter({3: [[0, 0]]}, ids, lengths)
    served.enter({4: [[1, 0]]}, ids, lengths)
    served.advance()
    served.holds[0] = None  # its client has left
    served.advance()
    served.enter({6: [[0, 0]]}, ids, lengths)
    while any(held is not None for held in served.holds):
        served.advance()
    wanted = draw(ids, lengths, grid_keys(num_rollouts=1))
    assert len(served.drawn[3, 0]) == 4
    for number in (4, 6):
        assert served.drawn[number, 0] == wanted.tokens[number].tolist()


def test_entering_moves_no_prompt_of_another_slot_between_devices():
    served = Slots(8, mesh_shape=(2, 2, 2), max_prompt_tokens=4096)
    ids, lengths = random_prompts(4)
    entering = Entering(
        np.arange(4, dtype=np.int32)[:, None],
        np.full(4, NUM_NEW, np.int32),
        np.ones(4, np.float32),
        np.zeros((4, 1, 3), np.int32),
        np.zeros((4, 0), np.int16),
    )
    lowered = served._enter.lower(
        served.weights, served.state, Prompts(ids, lengths), entering, served.stops
    )
    prefix = served.state.prefix.layers[0].keys
    text = lowered.compile().as_text()
    sent = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective|reduce-sc)", text)
    sizes = [np.prod([int(each) for each in shape.split(",") if each]) for shape in sent]
    assert sizes and max(sizes) < prefix.size // prefix.sharding.num_devices
