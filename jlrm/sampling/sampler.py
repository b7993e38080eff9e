"""The sampler: one jitted program that prefills prompts and decodes R completions of each.

A prompt is run once. Its rollouts are drawn in `num_slots` slots, all at once or a few at a time:
when one ends, the prompt's next one begins in its slot, inside the same loop, from the hidden state
that the prompt's end has left. The loop's state is a `SamplingState`; the token drawn in one turn
is run through the model at the beginning of the next, so no step is spent on a finished batch.

Slots write what they draw one turn after the other, whichever rollout it belongs to; completions
are cut out of that after the loop. Randomness is addressed by (seed, step, prompt, rollout, token):
a completion does not depend on what else is in the batch, nor on its slot or turn.

Rewards are no business of this file, and neither is text: it knows ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.distribution import REMOVED, Distribution, log_distribution
from jlrm.runtime.mesh import Layout
from jlrm.sampling import decode
from jlrm.sampling.decode import KeysValues

BLOCK = 512  # vocabulary ids whose probability is summed together when a token is drawn
SMALLEST_CACHE = 512  # each doubling is another loop to compile


@dataclass(frozen=True)
class SamplerSettings:
    """What a rollout program is compiled for."""

    distribution: Distribution
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    num_slots: int = 0  # rollouts of a prompt that run at once; 0: all


class Rollout(NamedTuple):
    """Completions, padded on the right with id 0 and log-probability 0."""

    tokens: Int[Array, "P R T"]
    logps: Float[Array, "P R T"]  # under the sampling distribution, nats
    lengths: Int[Array, "P R"]  # the end token counts
    is_finished: Bool[Array, "P R"]  # False: cut off by max_new_tokens


class Slots(NamedTuple):
    """What runs in each of a prompt's Z slots."""

    rollout: Int[Array, "P Z"]  # its index; R: none, the slot idles
    count: Int[Array, "P Z"]  # tokens drawn of it
    token: Int[Array, "P Z"]  # the last of them
    stop_states: Int[Array, "A P Z"]
    following: Int[Array, " P"]  # the rollout that begins when one ends


class DrawnTokens(NamedTuple):
    """What all slots have drawn, and where each rollout begins in it."""

    tokens: Int[Array, "P Z turns"]
    logps: Float[Array, "P Z turns"]
    begins: Int[Array, "P R"]  # slot · turns + turn
    lengths: Int[Array, "P R"]
    is_finished: Bool[Array, "P R"]


class SamplingState(NamedTuple):
    """The loop's state after `turn` turns; the last drawn tokens have not been run yet."""

    turn: Int[Array, ""]
    slots: Slots
    drawn: DrawnTokens
    caches: list[KeysValues]


def rollout_keys(
    seed: int, step: Int[Array, ""], prompt_ids: Int[Array, " P"], num_rollouts: int
) -> Key[Array, "P R"]:
    """Return one key per sequence, a pure function of where it stands in the run."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def key(prompt_id: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, prompt_id), index)

    return jax.vmap(jax.vmap(key, (None, 0)), (0, None))(prompt_ids, jnp.arange(num_rollouts))


def generate(
    config: QwenConfig,
    layout: Layout,
    settings: SamplerSettings,
    params: Params,
    prompts: Int[Array, "P T"],
    prompt_lengths: Int[Array, " P"],
    keys: Key[Array, "P R"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> Rollout:
    """Draw a completion of its right-padded prompt for each key.

    `params` come from `decode.decode_params`; the stop tables from `stops.stop_tables`. A
    completion ends with the first stop id, or with the token that completes a stop string.
    """
    num_rollouts, num_new = keys.shape[1], settings.max_new_tokens
    num_slots = min(settings.num_slots or num_rollouts, num_rollouts)
    # Prompts come spread over all devices, as training wants them.
    prompts, prompt_lengths = layout.shard(prompts, "P T"), layout.shard(prompt_lengths, "P")
    hidden, prefix = decode.prefill(config, layout, params, prompts)
    ends = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)
    ends = jnp.repeat(ends[:, 0], num_slots, axis=0)
    is_prompt = jnp.arange(prompts.shape[1])[None] < prompt_lengths[:, None]
    uniforms = layout.shard(_uniforms(keys, num_new), "P R T")

    def draw(state: SamplingState, hidden: Float[Array, "B D"]) -> SamplingState:
        is_first = state.slots.count.reshape(-1, 1) == 0
        hidden = jnp.where(is_first, ends, hidden)
        logits = jnp.einsum(
            "BD,VD->BV",
            layout.shard(hidden, "M D"),
            decode.head(config, params),
            preferred_element_type=jnp.float32,
        )
        uniform = layout.shard(_uniform(state.slots, uniforms), "M")
        token, logp = sample(layout, layout.shard(logits, "M V"), settings.distribution, uniform)
        token, logp = layout.shard(token, "B"), layout.shard(logp, "B")
        return _record(settings, state, token, logp, stop_table, stop_accept)

    def advance(state: SamplingState) -> SamplingState:
        slots, num_cached = state.slots, state.caches[0].values.shape[3]
        ring = (state.turn - 1) % num_cached
        age = (ring - jnp.arange(num_cached)) % num_cached  # turns since a slot was written
        positions = prompt_lengths[:, None] + slots.count - 1
        hidden, caches = decode.decode_step(
            config,
            layout,
            params,
            slots.token.reshape(-1),
            positions.reshape(-1),
            prefix,
            is_prompt,
            state.caches,
            ring,
            age[None] < slots.count.reshape(-1, 1),
        )
        return draw(state._replace(caches=caches), hidden)

    sizes = cache_sizes(num_new)
    caches = decode.empty_caches(config, layout, (len(prompts), num_slots), sizes[0])
    slots, drawn = _empty(keys, num_slots, num_new, stop_table)
    state = draw(SamplingState(jnp.int32(0), slots, drawn, caches), ends)
    for size in sizes:
        state = state._replace(caches=decode.grow_caches(layout, state.caches, size))
        # The last size is that of a ring, written over and over until all rollouts are done.
        last_turn = size if size < num_new else drawn.tokens.shape[2]

        def is_running(state: SamplingState, last_turn: int = last_turn) -> Bool[Array, ""]:
            return jnp.any(state.slots.rollout < num_rollouts) & (state.turn <= last_turn)

        state = jax.lax.while_loop(is_running, advance, state)
    return _completions(state.drawn, num_new)


def cache_sizes(num_new: int) -> list[int]:
    """Return the cache sizes of successive loops: attention reads all of a cache, so it grows."""
    sizes = [num_new]
    while sizes[0] > SMALLEST_CACHE:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def sample(
    layout: Layout,
    logits: Float[Array, "B V"],
    distribution: Distribution,
    uniform: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one id a row by inverting the cumulative distribution at one uniform number.

    Returns ids and their log-probabilities. The sum runs over blocks first and then inside one
    block: one pass over the vocabulary for the largest logit, one for the sums, no sort. Blocks do
    not straddle the devices that the vocabulary is spread over; what these exchange are a row's
    sums and its chosen block. Temperature 0 takes the most likely id.
    """
    logits = _scaled(logits, distribution)
    num_rows, num_ids = logits.shape
    num_shards = layout.num_shards("V")
    num_shards = num_shards if num_ids % num_shards == 0 else 1
    parts = logits.reshape(num_rows, num_shards, -1)
    num_blocks = -(-parts.shape[2] // BLOCK)
    padding = num_blocks * BLOCK - parts.shape[2]
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, padding)), constant_values=REMOVED)
    blocks = layout.shard(parts.reshape(num_rows, num_shards, num_blocks, BLOCK), "M V - -")
    top = jnp.max(blocks, axis=(1, 2, 3))
    mass = jnp.sum(jnp.exp(blocks - top[:, None, None, None]), axis=3)
    mass = layout.shard(mass.reshape(num_rows, -1), "M -")
    total = jnp.sum(mass, axis=-1)
    if distribution.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -jnp.log(total)
    block, rest = _invert(mass, uniform * total)
    shard, block = block // num_blocks, block % num_blocks
    inside = layout.shard(blocks[jnp.arange(num_rows), shard, block], "M -")
    index, _ = _invert(jnp.exp(inside - top[:, None]), rest)
    logit = jnp.take_along_axis(inside, index[:, None], axis=1)[:, 0]
    token = shard * (num_ids // num_shards) + block * BLOCK + index
    return token, logit - top - jnp.log(total)


def _scaled(logits: Float[Array, "B V"], distribution: Distribution) -> Float[Array, "B V"]:
    """Return logits of the distribution to draw from, up to a constant a row."""
    if distribution.top_k or distribution.top_p < 1.0:
        return log_distribution(logits, distribution)
    logits = logits / (distribution.temperature or 1.0)
    if distribution.num_ids:
        is_id = jnp.arange(logits.shape[1])[None] < distribution.num_ids
        logits = jnp.where(is_id, logits, REMOVED)
    return logits


def _invert(
    mass: Float[Array, "B N"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Return where the running sum of `mass` passes `target`, and how far into that entry.

    Rounding can put the target below zero or past the end, and a parallel sum need not rise where
    nothing is added. An entry without mass is never taken: the first or last with any is instead.
    """
    num_entries = mass.shape[-1]
    positions = jnp.arange(num_entries, dtype=jnp.int32)[None, :]
    running = jnp.cumsum(mass, axis=-1)
    is_passed = (running > target[:, None]) & (mass > 0)
    first = jnp.min(jnp.where(is_passed, positions, num_entries), axis=-1)
    last = jnp.max(jnp.where(mass > 0, positions, 0), axis=-1)
    index = jnp.where(first < num_entries, first, last)
    before = jnp.take_along_axis(running - mass, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _uniforms(keys: Key[Array, "P R"], num_tokens: int) -> Float[Array, "P R T"]:
    """Return the number that each token is drawn with."""

    def uniform(key: Array, index: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, index))

    numbers = jax.vmap(jax.vmap(uniform, (None, 0)), (0, None))
    return numbers(keys.reshape(-1), jnp.arange(num_tokens)).reshape(*keys.shape, num_tokens)


def _uniform(slots: Slots, uniforms: Float[Array, "P R T"]) -> Float[Array, " B"]:
    """Return the numbers for the tokens that the slots draw next."""
    num_prompts, num_rollouts, num_tokens = uniforms.shape
    rollout = jnp.minimum(slots.rollout, num_rollouts - 1)
    address = rollout * num_tokens + slots.count
    return jnp.take_along_axis(uniforms.reshape(num_prompts, -1), address, axis=1).reshape(-1)


def _empty(
    keys: Key[Array, "P R"], num_slots: int, num_new: int, stop_table: Int[Array, "A states V"]
) -> tuple[Slots, DrawnTokens]:
    """Return the state before the first token: each slot's first rollout is about to begin."""
    num_prompts, num_rollouts = keys.shape
    # A rollout begins when its turn comes, at the latest when all before it had the full length.
    num_turns = math.ceil(num_rollouts / num_slots) * num_new
    zeros = jnp.zeros((num_prompts, num_slots), jnp.int32)
    first = jnp.broadcast_to(jnp.arange(num_slots), zeros.shape)
    of_rollouts = jnp.zeros((num_prompts, num_rollouts), jnp.int32)
    states = jnp.zeros((len(stop_table), *zeros.shape), stop_table.dtype)
    history = (num_prompts, num_slots, num_turns)
    begins = jnp.broadcast_to(jnp.arange(num_rollouts) * num_turns, of_rollouts.shape)
    following = jnp.full(num_prompts, num_slots, jnp.int32)
    return Slots(first, zeros, zeros, states, following), DrawnTokens(
        tokens=jnp.zeros(history, jnp.int32),
        logps=jnp.zeros(history, jnp.float32),
        begins=begins,
        lengths=of_rollouts,
        is_finished=of_rollouts > 0,
    )


def _record(
    settings: SamplerSettings,
    state: SamplingState,
    token: Int[Array, " B"],
    logp: Float[Array, " B"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> SamplingState:
    """Write the drawn tokens, see which rollouts end here, and begin others in their slots."""
    slots, drawn, turn = state.slots, state.drawn, state.turn
    token, logp = token.reshape(slots.token.shape), logp.reshape(slots.token.shape)
    stop_states = jax.vmap(lambda table, states: table[states, token])(
        stop_table, slots.stop_states
    )
    is_end = jnp.any(stop_states == stop_accept[:, None, None], axis=0)
    if settings.stop_ids:
        is_end |= jnp.any(token[..., None] == jnp.array(settings.stop_ids)[None, None], axis=-1)
    count = slots.count + 1
    is_over = is_end | (count == settings.max_new_tokens)
    drawn = drawn._replace(
        tokens=jax.lax.dynamic_update_slice(drawn.tokens, token[..., None], (0, 0, turn)),
        logps=jax.lax.dynamic_update_slice(drawn.logps, logp[..., None], (0, 0, turn)),
    )
    slots = slots._replace(count=count, token=token, stop_states=stop_states)
    slots, drawn = _turn_over(slots, drawn, is_end, is_over, turn + 1)
    return state._replace(turn=turn + 1, slots=slots, drawn=drawn)


def _turn_over(
    slots: Slots,
    drawn: DrawnTokens,
    is_end: Bool[Array, "P Z"],
    is_over: Bool[Array, "P Z"],
    turn: Int[Array, ""],
) -> tuple[Slots, DrawnTokens]:
    """Note which rollouts are over, and begin the prompts' next ones in their slots at `turn`."""
    (num_slots, num_turns), num_rollouts = drawn.tokens.shape[1:], drawn.begins.shape[1]
    is_idle = slots.rollout == num_rollouts
    is_over &= ~is_idle
    order = jnp.cumsum(is_over, axis=1) - 1  # among those of its prompt that are over
    following = jnp.minimum(slots.following[:, None] + order, num_rollouts)
    begins = jnp.arange(num_slots)[None] * num_turns + turn

    def note(table: Array, mask: Array, rollout: Array, values: Array) -> Array:
        """Write values of slots into a table of rollouts."""
        chosen = mask[..., None] & (rollout[..., None] == jnp.arange(num_rollouts)[None, None])
        found = jnp.sum(jnp.where(chosen, values[..., None], 0), axis=1).astype(table.dtype)
        return jnp.where(jnp.any(chosen, axis=1), found, table)

    drawn = drawn._replace(
        begins=note(drawn.begins, is_over, following, begins),
        lengths=note(drawn.lengths, is_over, slots.rollout, slots.count),
        is_finished=note(drawn.is_finished, is_over, slots.rollout, is_end),
    )
    return slots._replace(
        rollout=jnp.where(is_over, following, slots.rollout),
        count=jnp.where(is_over | is_idle, 0, slots.count),
        stop_states=jnp.where((is_over | is_idle)[None], 0, slots.stop_states),
        following=jnp.minimum(slots.following + jnp.sum(is_over, axis=1), num_rollouts),
    ), drawn


def _completions(drawn: DrawnTokens, num_new: int) -> Rollout:
    """Cut the completions out of what the slots have drawn."""
    num_prompts = len(drawn.tokens)
    offsets = jnp.arange(num_new)[None, None]
    addresses = (drawn.begins[..., None] + offsets).reshape(num_prompts, -1)
    is_token = offsets < drawn.lengths[..., None]

    def cut(history: Array) -> Array:
        flat = history.reshape(num_prompts, -1)
        found = jnp.take_along_axis(flat, addresses, axis=1, mode="clip")
        return jnp.where(is_token, found.reshape(is_token.shape), 0)

    return Rollout(cut(drawn.tokens), cut(drawn.logps), drawn.lengths, drawn.is_finished)
