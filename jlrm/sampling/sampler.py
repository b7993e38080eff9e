"""The sampler: one jitted program that prefills prompts and decodes R completions of each.

A prompt is run once. Its rollouts are drawn in `num_slots` slots, all at once or a few at a time.
When a rollout ends, the next rollout of its prompt begins in the same slot, inside the same loop.
It begins from the hidden state at the prompt's end, which is kept. The state of the loop is a
`SamplingState`. A token drawn in one turn is run through the model at the beginning of the next
turn, so no step is spent on a batch that has finished.

A slot serves one prompt. Slots that change prompts would have to read keys and values of each slot
apart, where now a prompt's are read once for all its slots, and after the last prompt of a step
comes only the next step's, which would be sampled off-policy. They would save little. By the
lengths of 1,354 judgements of GPT-4 (132 tokens, at most 556), drawn by question, 16 prompts x 8
take 506 turns all at once; in half as many slots 943, or 656 if these change prompts. On the
roofline of a 7B on 16 v5e chips that is 0.59, 1.09 and 0.91 s: a turn of few rollouts reads the
same weights as one of many. At 128 x 8, where rows bind and not weights, it is 2.5, 2.25 and 2.27.
Judging has nothing to wait for, and so its slots do change prompts (refill.py).

Each slot writes its tokens turn by turn, whichever rollout they belong to. Completions are cut out
of these records after the loop. Randomness is addressed by (seed, step, prompt, rollout, token): a
completion does not depend on the rest of the batch, on its slot or on its turn.

This file knows ids only: no text and no rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jlrm.model.attention import TILE
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.distribution import REMOVED, Distribution, log_distribution, scaled
from jlrm.runtime import exact
from jlrm.runtime.mesh import Layout
from jlrm.sampling import decode
from jlrm.sampling.decode import KeysValues, NextTokens, Prompts
from jlrm.sampling.stops import StopTables, follow, has_ended

# Ids whose probabilities are summed together when a token is drawn. Of 152,064 ids that makes 297
# blocks: a running sum over 297 numbers and one over 512, in place of one over the vocabulary.
BLOCK = 512
SMALLEST_CACHE = 512  # each doubling from here on is one more loop to compile


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
    logps: Float[Array, "P R T"]  # under the sampling distribution, in nats
    lengths: Int[Array, "P R"]  # in tokens, the end token included
    is_finished: Bool[Array, "P R"]  # False: cut off by max_new_tokens


class Slots(NamedTuple):
    """The rollout that runs in each of a prompt's Z slots."""

    rollout: Int[Array, "P Z"]  # its index; R: the slot is idle
    count: Int[Array, "P Z"]  # tokens drawn of this rollout
    token: Int[Array, "P Z"]  # the last of them
    stop_states: Int[Array, "A P Z"]
    following: Int[Array, " P"]  # index of the next rollout to begin


class DrawnTokens(NamedTuple):
    """The tokens that all slots have drawn, and where each rollout begins among them."""

    tokens: Int[Array, "P Z turns"]
    logps: Float[Array, "P Z turns"]
    begins: Int[Array, "P R"]  # slot · turns + turn
    lengths: Int[Array, "P R"]
    is_finished: Bool[Array, "P R"]


class SamplingState(NamedTuple):
    """The state of the loop after `turn` turns; the last drawn tokens have not been run yet."""

    turn: Int[Array, ""]
    slots: Slots
    drawn: DrawnTokens
    caches: list[KeysValues]


def rollout_keys(
    seed: int, step: Int[Array, ""], prompt_ids: Int[Array, " P"], num_rollouts: int
) -> Key[Array, "P R"]:
    """Return one key per sequence; it depends only on seed, step, prompt and rollout."""
    key = partial(rollout_key, seed, step)
    return jax.vmap(jax.vmap(key, (None, 0)), (0, None))(prompt_ids, jnp.arange(num_rollouts))


def rollout_key(
    seed: int | Int[Array, ""], step: Int[Array, ""], prompt_id: Array, index: Array
) -> Key[Array, ""]:
    """Return the key of one sequence."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(jax.random.fold_in(key, prompt_id), index)


def generate(
    config: QwenConfig,
    layout: Layout,
    settings: SamplerSettings,
    params: Params,
    prompts: Prompts,
    keys: Key[Array, "P R"],
    stops: StopTables,
) -> Rollout:
    """Draw a completion of its prompt for each key.

    `params` come from `decode.decode_params`. A completion ends with the first stop id, or with the
    token that completes a stop string.
    """
    num_rollouts, num_new = keys.shape[1], settings.max_new_tokens
    num_slots = min(settings.num_slots or num_rollouts, num_rollouts)
    ends, prefix = decode.run_prompts(config, layout, params, prompts)
    ends = layout.shard(jnp.repeat(ends, num_slots, axis=0), "M D")
    # All of them before the loop: 1 MiB for 128 rollouts of 2,048 tokens.
    uniforms = layout.shard(_uniforms(keys, num_new), "M - -")
    lengths = layout.shard(prefix.lengths, "M")

    def draw(state: SamplingState, hidden: Float[Array, "B D"]) -> SamplingState:
        # A rollout may begin in any turn. Its first token follows the prompt, not the slot's last.
        is_first = state.slots.count.reshape(-1, 1) == 0
        logits = decode.logits(config, layout, params, jnp.where(is_first, ends, hidden))
        uniform = layout.shard(_uniform(state.slots, uniforms), "M")
        token, logp = sample(layout, logits, settings.distribution, uniform)
        return _everywhere(layout, _record(settings, state, token, logp, stops))

    def advance(state: SamplingState) -> SamplingState:
        new = _next_tokens(state, lengths)
        hidden, caches = decode.decode_step(config, layout, params, prefix, state.caches, new)
        return draw(state._replace(caches=caches), hidden)

    sizes = cache_sizes(num_new)
    if config.exact:  # whole tiles
        sizes = [size + -size % TILE for size in sizes]
    caches = decode.empty_caches(config, layout, (len(prompts.tokens), num_slots), sizes[0])
    slots, drawn = _empty(keys, num_slots, num_new, stops)
    # The first token needs no decoding step: the prefill has computed the state it is drawn from.
    state = draw(SamplingState(jnp.int32(0), slots, drawn, caches), ends)
    for size in sizes:
        state = state._replace(caches=decode.grow_caches(layout, state.caches, size))
        # A smaller cache is left when it is full, so none wraps before it grows. The last is a ring
        # as long as the longest completion: what it overwrites belongs to earlier rollouts.
        last_turn = size if size < num_new else drawn.tokens.shape[2]

        def is_running(state: SamplingState, last_turn: int = last_turn) -> Bool[Array, ""]:
            return jnp.any(state.slots.rollout < num_rollouts) & (state.turn <= last_turn)

        state = jax.lax.while_loop(is_running, advance, state)
    return _completions(state.drawn, num_new)


def _everywhere(layout: Layout, state: SamplingState) -> SamplingState:
    """Keep what is drawn on every device of its row (letter M): it is small, and never moves."""

    def keep(x: Array, axis: int = 0) -> Array:
        return layout.shard(x, " ".join("M" if i == axis else "-" for i in range(x.ndim)))

    slots = state.slots._asdict().items()
    slots = Slots(*(keep(x, int(name == "stop_states")) for name, x in slots))
    return state._replace(slots=slots, drawn=jax.tree.map(keep, state.drawn))


def _next_tokens(state: SamplingState, prompt_lengths: Int[Array, " P"]) -> NextTokens:
    """Return the tokens drawn last, as the next decoding step takes them."""
    slots, num_cached = state.slots, state.caches[0].values.shape[3]
    # The first token was drawn in turn 0 and is run in turn 1, so it has ring slot 0.
    ring = (state.turn - 1) % num_cached
    age = (ring - jnp.arange(num_cached)) % num_cached  # turns since a ring slot was written
    # The token after the prompt has count 1 and position `prompt_lengths`.
    positions = prompt_lengths[:, None] + slots.count - 1
    # A rollout wrote the last `count` ring slots. The others are empty or of earlier rollouts.
    is_own = age[None] < slots.count.reshape(-1, 1)
    return NextTokens(slots.token.reshape(-1), positions.reshape(-1), ring, is_own)


def cache_sizes(num_new: int) -> list[int]:
    """Return the cache sizes of successive loops, ascending.

    A step reads the whole cache, filled or not, so the cache begins small and grows between loops.
    """
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

    Returns ids and their log-probabilities. The sum runs over blocks first, and then inside one
    block: one pass over the vocabulary for the largest logit, one for the sums, no sort. No block
    lies on two of the devices that the vocabulary is spread over. These devices exchange only the
    sums of a row and its chosen block. Temperature 0 takes the most likely id.
    """
    logits = _scaled(logits, distribution)
    num_rows, num_ids = logits.shape
    num_shards = layout.num_shards("V")
    # Where the vocabulary does not divide evenly, blocks are cut as on one device.
    num_shards = num_shards if num_ids % num_shards == 0 else 1
    parts = logits.reshape(num_rows, num_shards, -1)
    num_blocks = -(-parts.shape[2] // BLOCK)
    padding = num_blocks * BLOCK - parts.shape[2]
    # REMOVED has exactly no mass: exp(-1e30 - top) is 0 in float32.
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, padding)), constant_values=REMOVED)
    blocks = layout.shard(parts.reshape(num_rows, num_shards, num_blocks, BLOCK), "M V - -")
    top = jnp.max(blocks, axis=(1, 2, 3))
    # Less the largest logit, so that no exponential overflows and `total` is at least 1.
    mass = jnp.sum(jnp.exp(blocks - top[:, None, None, None]), axis=3)
    # Every device of a row gets all its sums: they are few (V / 512), and the next line adds them.
    mass = layout.shard(mass.reshape(num_rows, -1), "M -")
    total = jnp.sum(mass, axis=-1)
    if distribution.temperature == 0.0:
        # The log-probability at temperature 1, as in training: log(exp(top - top) / total).
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -jnp.log(total)
    # `uniform` is below 1, so the target is below the total, but for rounding (see `_invert`).
    block, rest = _invert(mass, uniform * total)
    shard, block = block // num_blocks, block % num_blocks
    inside = layout.shard(blocks[jnp.arange(num_rows), shard, block], "M -")
    index, _ = _invert(jnp.exp(inside - top[:, None]), rest)
    logit = jnp.take_along_axis(inside, index[:, None], axis=1)[:, 0]
    token = shard * (num_ids // num_shards) + block * BLOCK + index
    if distribution.exact:
        return token, logit - top - exact.log_total(jnp.exp(logits - top[:, None]))
    return token, logit - top - jnp.log(total)


def _scaled(logits: Float[Array, "B V"], distribution: Distribution) -> Float[Array, "B V"]:
    """Return logits of the distribution to draw from, up to a constant a row."""
    if distribution.top_k or distribution.top_p < 1.0:
        return log_distribution(logits, distribution)
    # Without a cut-off nothing is normalised here: `sample` divides by the total itself.
    logits = scaled(logits, distribution)
    if distribution.num_ids:
        is_id = jnp.arange(logits.shape[1])[None] < distribution.num_ids
        logits = jnp.where(is_id, logits, REMOVED)
    return logits


def _invert(
    mass: Float[Array, "B N"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Return where the running sum of `mass` passes `target`, and how far into that entry.

    An entry without mass is never taken. Where rounding puts the target below 0 or past the end,
    the first or the last entry with mass is taken.
    """
    num_entries = mass.shape[-1]
    positions = jnp.arange(num_entries, dtype=jnp.int32)[None, :]
    # Computed in parallel, a running sum need not be monotone: rounding differs between its terms.
    running = jnp.cumsum(mass, axis=-1)
    is_passed = (running > target[:, None]) & (mass > 0)
    first = jnp.min(jnp.where(is_passed, positions, num_entries), axis=-1)
    last = jnp.max(jnp.where(mass > 0, positions, 0), axis=-1)
    index = jnp.where(first < num_entries, first, last)
    before = jnp.take_along_axis(running - mass, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _uniforms(keys: Key[Array, "P R"], num_tokens: int) -> Float[Array, "P R T"]:
    """Return the uniform number that each token is drawn with."""

    def uniform(key: Array, index: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, index))

    numbers = jax.vmap(jax.vmap(uniform, (None, 0)), (0, None))
    return numbers(keys.reshape(-1), jnp.arange(num_tokens)).reshape(*keys.shape, num_tokens)


def _uniform(slots: Slots, uniforms: Float[Array, "P R T"]) -> Float[Array, " B"]:
    """Return the uniform numbers for the tokens that the slots draw next."""
    num_prompts, num_rollouts, num_tokens = uniforms.shape
    # An idle slot draws too, since all rows run; its token is never read.
    rollout = jnp.minimum(slots.rollout, num_rollouts - 1)
    address = rollout * num_tokens + slots.count
    return jnp.take_along_axis(uniforms.reshape(num_prompts, -1), address, axis=1).reshape(-1)


def _empty(
    keys: Key[Array, "P R"], num_slots: int, num_new: int, stops: StopTables
) -> tuple[Slots, DrawnTokens]:
    """Return the state before the first token: each slot's first rollout is about to begin."""
    num_prompts, num_rollouts = keys.shape
    # The most turns there can be: all completions have the full length, and slots run them in
    # rounds. No slot idles while its prompt has rollouts left.
    num_turns = math.ceil(num_rollouts / num_slots) * num_new
    zeros = jnp.zeros((num_prompts, num_slots), jnp.int32)
    first = jnp.broadcast_to(jnp.arange(num_slots), zeros.shape)
    of_rollouts = jnp.zeros((num_prompts, num_rollouts), jnp.int32)
    states = jnp.zeros((len(stops.tables), *zeros.shape), stops.tables.dtype)
    history = (num_prompts, num_slots, num_turns)
    # Right for the first rollout of each slot; `_turn_over` writes those of the others.
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
    stops: StopTables,
) -> SamplingState:
    """Write the drawn tokens, end rollouts that are over, and begin others in their slots."""
    slots, drawn, turn = state.slots, state.drawn, state.turn
    token, logp = token.reshape(slots.token.shape), logp.reshape(slots.token.shape)
    stop_states = follow(stops, slots.stop_states, token)
    is_end = has_ended(stops, settings.stop_ids, stop_states, token)
    count = slots.count + 1
    # An end in the last token still counts as finished: a completion is cut off only without one.
    is_over = is_end | (count == settings.max_new_tokens)
    # All slots write the same turn: one slice update each, no scatter.
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
    """Note which rollouts are over, and begin the next ones of their prompts at `turn`."""
    (num_slots, num_turns), num_rollouts = drawn.tokens.shape[1:], drawn.begins.shape[1]
    is_idle = slots.rollout == num_rollouts
    is_over &= ~is_idle
    # If several of a prompt's rollouts are over at once, each slot gets another successor.
    order = jnp.cumsum(is_over, axis=1) - 1
    # R means that none is left: the slot idles, and `note` ignores it since R is outside its table.
    following = jnp.minimum(slots.following[:, None] + order, num_rollouts)
    begins = jnp.arange(num_slots)[None] * num_turns + turn

    def note(table: Array, mask: Array, rollout: Array, values: Array) -> Array:
        """Write values of slots into a table of rollouts."""
        # Compared with every index instead of scattered: Z x R flags a prompt, and a sum has at
        # most one term, since a rollout runs in one slot.
        chosen = mask[..., None] & (rollout[..., None] == jnp.arange(num_rollouts)[None, None])
        noted = jnp.sum(jnp.where(chosen, values[..., None], 0), axis=1).astype(table.dtype)
        return jnp.where(jnp.any(chosen, axis=1), noted, table)

    drawn = drawn._replace(
        begins=note(drawn.begins, is_over, following, begins),
        lengths=note(drawn.lengths, is_over, slots.rollout, slots.count),
        is_finished=note(drawn.is_finished, is_over, slots.rollout, is_end),
    )
    return slots._replace(
        rollout=jnp.where(is_over, following, slots.rollout),
        # Count 0 hides the slot's whole cache from its next rollout.
        count=jnp.where(is_over | is_idle, 0, slots.count),
        stop_states=jnp.where((is_over | is_idle)[None], 0, slots.stop_states),
        following=jnp.minimum(slots.following + jnp.sum(is_over, axis=1), num_rollouts),
    ), drawn


def _completions(drawn: DrawnTokens, num_new: int) -> Rollout:
    """Cut the completions out of what the slots have drawn."""
    num_prompts = len(drawn.tokens)
    offsets = jnp.arange(num_new)[None, None]
    # A slot runs one rollout at a time, so the tokens of a completion stand in a row.
    addresses = (drawn.begins[..., None] + offsets).reshape(num_prompts, -1)
    is_token = offsets < drawn.lengths[..., None]

    def cut(history: Array) -> Array:
        flat = history.reshape(num_prompts, -1)
        # Addresses run past the end after a short completion that began late; the mask clears them.
        cells = jnp.take_along_axis(flat, addresses, axis=1, mode="clip")
        return jnp.where(is_token, cells.reshape(is_token.shape), 0)

    return Rollout(cut(drawn.tokens), cut(drawn.logps), drawn.lengths, drawn.is_finished)
