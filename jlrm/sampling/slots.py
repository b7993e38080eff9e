"""Decoding that prompts enter and leave while it goes on.

So a server decodes, and a judge of thousands of games (refill.py): the sampler's batch (sampler.py)
begins and ends as one, and most of it is idle until its longest completion ends. Here a fixed
number of slots decodes on and on. `enter` runs new prompts and puts them into slots that are free;
`advance` draws a block of tokens in all slots. Between two of these calls the host looks at what
was drawn, and decides who comes next. A completion that ends inside a block leaves its slot idle
until the block's end.

What is drawn is what the sampler draws: the same decoding step, stop tables, and random numbers
addressed by (seed, number of the prompt, completion, token). Each slot has a temperature of its own
and its own number of stop strings that end it; the other cut-offs are the program's.

The state is donated to both programs, so that they change it in place.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import Layout
from jlrm.sampling import decode
from jlrm.sampling.decode import KeysValues, NextTokens, Prefix, Prompts
from jlrm.sampling.sampler import rollout_key, sample
from jlrm.sampling.stops import StopTables, follow, has_ended

RUNNING, STOPPED, CUT = 0, 1, 2  # how a completion stands after a block


@dataclass(frozen=True)
class SlotSettings:
    """What the programs are compiled for."""

    num_slots: int
    max_prompt_tokens: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    distribution: Distribution  # of temperature 1 where each slot has one of its own
    num_turns: int = 8  # tokens of a block
    has_temperatures: bool = True  # of its own; else all slots have that of the distribution


class Sequences(NamedTuple):
    """What is drawn in each slot; `count` 0: the slot is idle."""

    token: Int[Array, " P"]  # drawn last, and not yet run through the model
    count: Int[Array, " P"]  # tokens drawn
    limit: Int[Array, " P"]  # most tokens
    temperature: Float[Array, " P"]  # 0: greedy
    address: Int[Array, "P 3"]  # of random numbers: seed, prompt's number, completion's number
    stop_states: Int[Array, "A P 1"]
    accept: Int[Array, "A P"]  # states of stop strings that end it


class SlotState(NamedTuple):
    """The prompts, the tokens so far and their caches, of all slots."""

    turn: Int[Array, ""]  # place in the caches that the next decoding step writes
    sequences: Sequences
    prefix: Prefix
    caches: list[KeysValues]

    @property
    def num_cached(self) -> int:
        """Tokens of a sequence that the caches hold."""
        return self.caches[0].values.shape[3]


class Entering(NamedTuple):
    """For each of P prompts, the R slots that its completions are drawn in, and how.

    NumPy arrays on the host, JAX arrays inside a program.
    """

    slots: Int[Any, "P R"]
    limits: Int[Any, " P"]
    temperatures: Float[Any, " P"]
    addresses: Int[Any, "P R 3"]
    accept: Int[Any, "P A"]


class Turns(NamedTuple):
    """What a call has drawn in each slot: the first `lengths` of `tokens`."""

    tokens: Int[Array, "P turns"]
    lengths: Int[Array, " P"]
    endings: Int[Array, " P"]  # RUNNING, STOPPED by an end, or CUT by its limit


def empty(
    config: QwenConfig,
    layout: Layout,
    settings: SlotSettings,
    stops: StopTables,
    num_cached: int = 0,
) -> SlotState:
    """Return the state in which all slots are idle.

    num_cached: tokens that the caches hold; 0: the longest completion's. See `resize`.
    """
    num = settings.num_slots
    shape = (num, config.num_key_value_heads, settings.max_prompt_tokens, config.head_dim)
    zeros = jnp.zeros(num, jnp.int32)
    keys = layout.shard(jnp.zeros(shape, config.compute_dtype), "P K T H")
    mask = jnp.zeros((num, settings.max_prompt_tokens), bool)
    states = jnp.zeros((len(stops.tables), num, 1), stops.tables.dtype)
    addresses = jnp.zeros((num, 3), jnp.int32)
    state = SlotState(
        jnp.int32(0),
        Sequences(
            *(zeros, zeros, zeros, zeros.astype(jnp.float32)), addresses, states, states[..., 0]
        ),
        Prefix([KeysValues(keys, keys)] * config.num_hidden_layers, zeros, mask),
        decode.empty_caches(config, layout, (num, 1), num_cached or settings.max_new_tokens),
    )
    return _placed(layout, state)


def resize(
    layout: Layout, turn: Int[Array, ""], caches: list[KeysValues], num_cached: int
) -> tuple[Int[Array, ""], list[KeysValues]]:
    """Return turn and caches of a state where the caches hold `num_cached` tokens.

    They must be as many as any slot will have drawn when it is resized next: what does not fit is
    lost. A step reads the caches whole, so they are best no longer than the longest one needs.
    """
    before = caches[0].values.shape[3]
    kept = min(before, num_cached)

    def cut(x: Array, axis: int) -> Array:
        # The token written last comes to the end, and the oldest ones go.
        x = jnp.roll(x, before - turn, axis)
        return jax.lax.slice_in_dim(x, before - kept, before, axis=axis)

    rolled = [KeysValues(cut(each.keys, 4), cut(each.values, 3)) for each in caches]
    turn = layout.shard(jnp.int32(kept % num_cached), "")
    return turn, decode.grow_caches(layout, rolled, num_cached)


def enter(
    config: QwenConfig,
    layout: Layout,
    settings: SlotSettings,
    params: Params,
    state: SlotState,
    prompts: Prompts,
    entering: Entering,
    stops: StopTables,
) -> tuple[SlotState, Turns]:
    """Run prompts, each once, put them into their slots, and draw their first tokens.

    A slot may stand twice in `entering`, with the same prompt: so a call is filled up to a size
    that is compiled. The block returned has one turn; slots that did not enter have length 0.
    """
    num_completions = entering.slots.shape[1]
    ends, new = decode.run_prompts(config, layout, params, prompts)
    slots = entering.slots.reshape(-1)

    def each(x: Array) -> Array:
        """Repeat what prompts have for all completions of each."""
        return jnp.repeat(x, num_completions, axis=0)

    def put(old: Array, values: Array) -> Array:
        return old.at[slots].set(values.astype(old.dtype))

    width = prompts.tokens.shape[1]
    mask = jnp.arange(settings.max_prompt_tokens)[None] < new.lengths[:, None]
    prefix = Prefix(
        [
            KeysValues(
                *(
                    layout.shard(old.at[slots, :, :width].set(each(part)), "P K T H")
                    for old, part in zip(mine, theirs, strict=True)
                )
            )
            for mine, theirs in zip(state.prefix.layers, new.layers, strict=True)
        ],
        put(state.prefix.lengths, each(new.lengths)),
        put(state.prefix.mask, each(mask)),
    )
    addresses = entering.addresses.reshape(-1, 3)
    temperatures = each(entering.temperatures)
    old = state.sequences
    sequences = Sequences(
        old.token,
        put(old.count, jnp.zeros_like(slots)),
        put(old.limit, each(entering.limits)),
        put(old.temperature, temperatures),
        put(old.address, addresses),
        old.stop_states.at[:, slots].set(0),
        old.accept.at[:, slots].set(each(entering.accept).T),
    )
    logits = decode.logits(config, layout, params, each(ends))
    drawn = _draw(layout, settings, logits, temperatures, addresses, jnp.zeros_like(slots))
    is_new = jnp.zeros_like(old.count, bool).at[slots].set(True)
    sequences, block = _record(settings, sequences, put(old.token, drawn), is_new, stops)
    return _placed(layout, state._replace(sequences=sequences, prefix=prefix)), block


def advance(
    config: QwenConfig,
    layout: Layout,
    settings: SlotSettings,
    width: int,
    params: Params,
    state: SlotState,
    is_wanted: Bool[Array, " P"],
    stops: StopTables,
) -> tuple[SlotState, Turns]:
    """Draw up to `num_turns` tokens in every slot that is not idle.

    No prompt that is decoded is longer than `width`: what lies beyond is not read. A sequence that
    is wanted no more ends here, before it draws anything.
    """
    sequences = state.sequences
    count = jnp.where(is_wanted, sequences.count, 0)
    state = state._replace(sequences=sequences._replace(count=count))
    prefix = Prefix(
        [
            KeysValues(keys[:, :, :width], values[:, :, :width])
            for keys, values in state.prefix.layers
        ],
        state.prefix.lengths,
        state.prefix.mask[:, :width],
    )
    num_turns = settings.num_turns
    empty = jnp.zeros((settings.num_slots, num_turns), jnp.int32)
    nothing = jnp.zeros(settings.num_slots, jnp.int32)

    def is_running(carry: tuple[SlotState, Turns, Array]) -> Bool[Array, ""]:
        state, _, turn = carry
        return jnp.any(state.sequences.count > 0) & (turn < num_turns)

    def draw(carry: tuple[SlotState, Turns, Array]) -> tuple[SlotState, Turns, Array]:
        state, block, turn = carry
        state = state._replace(turn=(state.turn + 1) % state.num_cached)
        new = _next_tokens(state)
        hidden, caches = decode.decode_step(config, layout, params, prefix, state.caches, new)
        logits = decode.logits(config, layout, params, hidden)
        old = state.sequences
        token = _draw(layout, settings, logits, old.temperature, old.address, old.count)
        sequences, drawn = _record(settings, old, token, old.count > 0, stops)
        block = Turns(
            jax.lax.dynamic_update_slice(block.tokens, drawn.tokens, (0, turn)),
            block.lengths + drawn.lengths,
            block.endings + drawn.endings,
        )
        return state._replace(sequences=sequences, caches=caches), block, turn + 1

    # The prompts stay outside of the loop: it does not change them.
    kept, small = state.prefix, state._replace(prefix=prefix._replace(layers=[]))
    small, block, _ = jax.lax.while_loop(
        is_running, draw, (small, Turns(empty, nothing, nothing), jnp.int32(0))
    )
    return _placed(layout, small._replace(prefix=kept)), block


def _placed(layout: Layout, state: SlotState) -> SlotState:
    """Return the state with all that is small where each program leaves it, and wants it.

    Keys, values and caches are put where they are made. A state that lies otherwise would be
    compiled for anew.
    """
    named = state.sequences._asdict().items()
    ranks = {"address": "M -", "stop_states": "- M -", "accept": "- M"}
    sequences = Sequences(*(layout.shard(x, ranks.get(name, "M")) for name, x in named))
    lengths, mask = layout.shard(state.prefix.lengths, "P"), layout.shard(state.prefix.mask, "P T")
    prefix = state.prefix._replace(lengths=lengths, mask=mask)
    return state._replace(turn=layout.shard(state.turn, ""), sequences=sequences, prefix=prefix)


def _next_tokens(state: SlotState) -> NextTokens:
    """Return the tokens drawn last, as a decoding step takes them; see the sampler's."""
    sequences, num_cached = state.sequences, state.num_cached
    ring = (state.turn - 1) % num_cached
    age = (ring - jnp.arange(num_cached)) % num_cached
    positions = state.prefix.lengths + sequences.count - 1
    return NextTokens(sequences.token, positions, ring, age[None] < sequences.count[:, None])


def _draw(
    layout: Layout,
    settings: SlotSettings,
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    addresses: Int[Array, "B 3"],
    counts: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Draw the next token of each sequence, of which `counts` were drawn before."""

    def uniform(address: Int[Array, "3"], count: Array) -> Array:
        key = rollout_key(address[0], jnp.int32(0), address[1], address[2])
        return jax.random.uniform(jax.random.fold_in(key, count))

    uniforms = layout.shard(jax.vmap(uniform)(addresses, counts), "M")
    if not settings.has_temperatures:
        drawn, _ = sample(layout, logits, settings.distribution, uniforms)
        return layout.shard(drawn, "M")
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    drawn, _ = sample(layout, scaled, settings.distribution, uniforms)
    greedy = dataclasses.replace(settings.distribution, temperature=0.0)
    likeliest, _ = sample(layout, logits, greedy, uniforms)
    return layout.shard(jnp.where(temperature > 0, drawn, likeliest), "M")


def _record(
    settings: SlotSettings,
    sequences: Sequences,
    token: Int[Array, " P"],
    is_drawn: Bool[Array, " P"],
    stops: StopTables,
) -> tuple[Sequences, Turns]:
    """Count the tokens drawn where they count, and let sequences end that are over."""
    states = follow(stops, sequences.stop_states, token[:, None])
    own = stops._replace(accept=sequences.accept)
    is_end = has_ended(own, settings.stop_ids, states, token[:, None])[:, 0] & is_drawn
    count = jnp.where(is_drawn, sequences.count + 1, sequences.count)
    is_cut = is_drawn & ~is_end & (count == sequences.limit)
    block = Turns(
        jnp.where(is_drawn, token, 0)[:, None],
        is_drawn.astype(jnp.int32),
        jnp.where(is_end, STOPPED, 0) + jnp.where(is_cut, CUT, 0),
    )
    # Count 0 hides what the slot has cached from who comes next.
    count = jnp.where(is_end | is_cut, 0, count)
    states = jnp.where(is_drawn[None, :, None], states, sequences.stop_states)
    return sequences._replace(token=token, count=count, stop_states=states), block
