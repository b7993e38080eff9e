"""The sampler: one jitted program that prefills prompts and decodes until every row is finished.

The loop's state is a `Decoding`; the token drawn in one turn is run through the model at the
beginning of the next, so no step is spent on a finished batch. Rows that are finished idle until
all are. Prompts are padded on the right and completions start at the same cache slot in every row,
which makes a cache write one slice update; positions and masks come from lengths. Randomness is
addressed by (seed, step, prompt, rollout, token): a row's text does not depend on what else is in
the batch.

Rewards are no business of this file, and neither is text: it knows ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jlrm.mesh import Layout
from jlrm.model import qwen
from jlrm.model.qwen import KVCache, Params, QwenConfig
from jlrm.rl.logprobs import Distribution, log_distribution

BLOCK = 512  # vocabulary ids whose probability is summed together when a token is drawn


@dataclass(frozen=True)
class Sampler:
    """What a rollout program is compiled for."""

    distribution: Distribution
    max_new_tokens: int
    stop_ids: tuple[int, ...]


class Rollout(NamedTuple):
    """Completions, padded on the right with id 0 and log-probability 0."""

    tokens: Int[Array, "B T"]
    logps: Float[Array, "B T"]  # under the sampling distribution, nats
    lengths: Int[Array, " B"]  # the end token counts
    is_finished: Bool[Array, " B"]  # False: cut off by max_new_tokens


class Decoding(NamedTuple):
    """The loop's state; `step` tokens have been drawn, the last of which has not been run yet."""

    step: Int[Array, ""]
    rollout: Rollout
    stop_states: Int[Array, "A B"]
    caches: list[KVCache]


def rollout_keys(
    seed: int, step: Int[Array, ""], prompt_ids: Int[Array, " B"], rollout_index: Int[Array, " B"]
) -> Key[Array, " B"]:
    """Return one key per sequence, a pure function of where it stands in the run."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def key(prompt_id: Array, index: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, prompt_id), index)

    return jax.vmap(key)(prompt_ids, rollout_index)


def generate(
    config: QwenConfig,
    layout: Layout,
    sampler: Sampler,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> Rollout:
    """Draw one completion for each right-padded prompt.

    `params` come from `qwen.decode_params`; the stop tables from `stops.stop_tables`. A completion
    ends with the first stop id, or with the token that completes a stop string.
    """
    num_rows, num_prompt = prompts.shape
    num_slots = num_prompt + sampler.max_new_tokens
    # Rows come spread over all devices, as training wants them; masks made from them should not.
    prompts, prompt_lengths = layout.shard(prompts, "B T"), layout.shard(prompt_lengths, "B")
    hidden, caches = qwen.prefill(config, layout, params, prompts, prompt_lengths, num_slots)
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    slots = jnp.arange(num_slots)[None, :]
    is_prompt = slots < prompt_lengths[:, None]

    def draw(state: Decoding, hidden: Float[Array, "B D"]) -> Decoding:
        logits = jnp.einsum(
            "BD,VD->BV", hidden, qwen.head(config, params), preferred_element_type=jnp.float32
        )
        log_probs = log_distribution(layout.shard(logits, "B V"), sampler.distribution)
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = sample(log_probs, sampler.distribution, token_keys)
        return _record(state, sampler, token, log_probs, stop_table, stop_accept)

    def is_running(state: Decoding) -> Bool[Array, ""]:
        return (state.step < sampler.max_new_tokens) & ~jnp.all(state.rollout.is_finished)

    def advance(state: Decoding) -> Decoding:
        previous = state.step - 1
        tokens = jax.lax.dynamic_index_in_dim(state.rollout.tokens, previous, 1, keepdims=False)
        slot = num_prompt + previous
        visible = is_prompt | ((slots >= num_prompt) & (slots <= slot))
        hidden, caches = qwen.decode_step(
            config, layout, params, tokens, prompt_lengths + previous, state.caches, slot, visible
        )
        return draw(state._replace(caches=caches), hidden)

    nothing = Rollout(
        tokens=jnp.zeros((num_rows, sampler.max_new_tokens), jnp.int32),
        logps=jnp.zeros((num_rows, sampler.max_new_tokens), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        is_finished=jnp.zeros(num_rows, bool),
    )
    states = jnp.zeros((stop_accept.shape[0], num_rows), stop_table.dtype)
    first = draw(Decoding(jnp.int32(0), nothing, states, caches), last)
    return jax.lax.while_loop(is_running, advance, first).rollout


def sample(
    log_probs: Float[Array, "B V"], distribution: Distribution, keys: Key[Array, " B"]
) -> Int[Array, " B"]:
    """Draw one id a row by inverting the cumulative distribution at one uniform number.

    The sum runs over blocks first and then inside one block: one pass over the vocabulary, no sort,
    one random number a row. Temperature 0 takes the most likely id.
    """
    if distribution.temperature == 0.0:
        return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)
    num_rows, num_ids = log_probs.shape
    num_blocks = -(-num_ids // BLOCK)
    padded = jnp.pad(jnp.exp(log_probs), ((0, 0), (0, num_blocks * BLOCK - num_ids)))
    blocks = padded.reshape(num_rows, num_blocks, BLOCK)
    mass = jnp.sum(blocks, axis=-1)
    uniform = jax.vmap(jax.random.uniform)(keys)
    block, rest = _invert(mass, uniform * jnp.sum(mass, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _invert(inside, rest)[0]


def _invert(
    mass: Float[Array, "B N"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Return where the running sum of `mass` passes `target`, and how far into that entry.

    Rounding can put the target below zero or past the end, and a parallel sum need not rise where
    nothing is added. An entry without mass is never taken: the first or last with any is instead.
    """
    running = jnp.cumsum(mass, axis=-1)
    is_passed = (running > target[:, None]) & (mass > 0)
    positions = jnp.arange(mass.shape[-1])[None, :]
    last = jnp.max(jnp.where(mass > 0, positions, 0), axis=-1)
    index = jnp.where(jnp.any(is_passed, axis=-1), jnp.argmax(is_passed, axis=-1), last)
    index = index.astype(jnp.int32)
    before = jnp.take_along_axis(running - mass, index[:, None], axis=-1)[:, 0]
    return index, target - before


def _record(
    state: Decoding,
    sampler: Sampler,
    token: Int[Array, " B"],
    log_probs: Float[Array, "B V"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> Decoding:
    """Write the drawn tokens of the running rows and see which of them end here."""
    step, rollout = state.step, state.rollout
    running = ~rollout.is_finished
    token = jnp.where(running, token, 0)
    logp = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    stop_states = jax.vmap(lambda table, states: table[states, token])(
        stop_table, state.stop_states
    )
    stop_states = jnp.where(running[None], stop_states, state.stop_states)
    is_end = jnp.any(stop_states == stop_accept[:, None], axis=0)
    if sampler.stop_ids:
        is_end |= jnp.any(token[:, None] == jnp.array(sampler.stop_ids)[None, :], axis=-1)
    return state._replace(
        step=step + 1,
        stop_states=stop_states,
        rollout=Rollout(
            tokens=jax.lax.dynamic_update_slice(rollout.tokens, token[:, None], (0, step)),
            logps=jax.lax.dynamic_update_slice(
                rollout.logps, jnp.where(running, logp, 0.0)[:, None], (0, step)
            ),
            lengths=rollout.lengths + running,
            is_finished=rollout.is_finished | (running & is_end),
        ),
    )
