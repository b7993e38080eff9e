"""Beam search and greedy decoding, with a repetition penalty: one jitted program.

It gives the tokens of `transformers` with `do_sample=False` (generation/utils.py `_beam_search` and
`_sample`, generation/logits_process.py `RepetitionPenaltyLogitsProcessor`). With Z beams, end ids E
and a penalty a:

    s(y_t)   = penalised(log softmax(logits))[y_t]     penalised(x) = x a  where x < 0, else x / a,
    S(y)     = s(y_1) + ... + s(y_t)                   for ids that are in the prompt or in y
    extend     of all beams' continuations keep the max(2, 1 + |E|) Z with the highest S: even if
               each beam's every end id is among them, Z others are left that go on
    finish     those of the first Z that end compete by S(y) / |y| for Z finished places
    go on      with the best Z that do not end. The search is over once all places are filled and no
               beam's S(y) / |y| exceeds the worst of them, or at the token limit

So the length penalty is 1 and `early_stopping` is False. One beam is greedy decoding: the penalty
acts on logits, the highest logit is taken, and the first end ends the search. A stop string ends a
hypothesis like an end id.

The beams of a prompt are what `decode` calls its rollouts: they share its prefix, and each step
reorders their caches. One difference to `transformers`: padding ids do not count as seen. Left out:
sampling, other length penalties, and hypotheses below the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.model.qwen import Params, QwenConfig
from jlrm.runtime.mesh import Layout
from jlrm.sampling import decode
from jlrm.sampling.decode import KeysValues, NextTokens, Prompts
from jlrm.sampling.sampler import cache_sizes
from jlrm.sampling.stops import StopTables, has_ended

BLOCK = 128  # ids of which `top_k` compares the maxima; a TPU register has as many lanes
OUT = -1e9  # added to the sum of a hypothesis to exclude it; the number that transformers uses


@dataclass(frozen=True)
class SearchSettings:
    """What a search program is compiled for."""

    num_beams: int  # 1: greedy
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    num_ids: int = 0  # ids from here on exist in the head but not in the tokenizer; 0: all exist

    @property
    def num_candidates(self) -> int:
        """The number of continuations of a prompt's beams that one step compares."""
        return max(2, 1 + len(self.stop_ids)) * self.num_beams


class Hypotheses(NamedTuple):
    """Each prompt's best hypothesis, padded on the right with id 0."""

    tokens: Int[Array, "P T"]
    lengths: Int[Array, " P"]  # in tokens, the end token included
    is_finished: Bool[Array, " P"]  # False: cut off by max_new_tokens
    means: Float[Array, " P"]  # S(y) / |y|; with one beam: the last logit over |y|


class Beams(NamedTuple):
    """The hypotheses that go on, best first; the last token of each has not been run yet."""

    tokens: Int[Array, "P Z T"]
    sums: Float[Array, "P Z"]  # S(y)
    stop_states: Int[Array, "A P Z"]
    seen: Bool[Array, "B V"] | None  # ids of the prompt and of `tokens`; None: without a penalty


class Places(NamedTuple):
    """The best hypotheses that have ended, best first; length 0: an empty place."""

    tokens: Int[Array, "P Z T"]
    means: Float[Array, "P Z"]  # S(y) / |y|
    lengths: Int[Array, "P Z"]
    is_finished: Bool[Array, "P Z"]


class SearchState(NamedTuple):
    """The state of the loop after `turn` tokens."""

    turn: Int[Array, ""]
    beams: Beams
    places: Places
    is_open: Bool[Array, " P"]  # a beam could still take a place of this prompt
    caches: list[KeysValues]


def search(
    config: QwenConfig,
    layout: Layout,
    settings: SearchSettings,
    params: Params,
    prompts: Prompts,
    stops: StopTables,
) -> Hypotheses:
    """Return the best completion of each prompt; `params` come from `decode.decode_params`."""
    num_beams, num_new = settings.num_beams, settings.max_new_tokens
    ends, prefix = decode.run_prompts(config, layout, params, prompts)

    def extend(state: SearchState, hidden: Float[Array, "B D"]) -> SearchState:
        logits = decode.logits(config, layout, params, hidden)
        logps = _penalised(settings, logits, state.beams.seen)
        return _extend(settings, layout, state, logps, stops)

    def advance(state: SearchState) -> SearchState:
        new = _next_tokens(state, prefix.lengths)
        hidden, caches = decode.decode_step(config, layout, params, prefix, state.caches, new)
        return extend(state._replace(caches=caches), hidden)

    sizes = cache_sizes(num_new)
    caches = decode.empty_caches(config, layout, (len(prompts.tokens), num_beams), sizes[0])
    seen = _seen_in_prompts(config, layout, settings, prompts.tokens, prefix.mask)
    state = _start(settings, len(prompts.tokens), seen, stops, caches)
    state = extend(state, jnp.repeat(ends, num_beams, axis=0))
    for size in sizes:
        state = state._replace(caches=decode.grow_caches(layout, state.caches, size))
        last_turn = min(size, num_new - 1)

        def is_running(state: SearchState, last_turn: int = last_turn) -> Bool[Array, ""]:
            return jnp.any(state.is_open) & (state.turn <= last_turn)

        state = jax.lax.while_loop(is_running, advance, state)
    tokens, means, lengths, is_finished = (x[:, 0] for x in state.places)
    return Hypotheses(tokens, lengths, is_finished, means)


def _seen_in_prompts(
    config: QwenConfig,
    layout: Layout,
    settings: SearchSettings,
    tokens: Int[Array, "P T"],
    mask: Bool[Array, "P T"],
) -> Bool[Array, "B V"] | None:
    """Return which ids each beam has seen before its first token; None: without a penalty."""
    if settings.repetition_penalty == 1.0:
        return None
    nothing = jnp.zeros((len(tokens), config.vocab_size), bool)
    seen = nothing.at[jnp.arange(len(tokens))[:, None], tokens].max(mask)
    return layout.shard(jnp.repeat(seen, settings.num_beams, axis=0), "M V")


def _start(
    settings: SearchSettings,
    num_prompts: int,
    seen: Bool[Array, "B V"] | None,
    stops: StopTables,
    caches: list[KeysValues],
) -> SearchState:
    """Return the state before the first token, where all beams of a prompt are the same."""
    shape = (num_prompts, settings.num_beams)
    tokens = jnp.zeros((*shape, settings.max_new_tokens), jnp.int32)
    out = jnp.full(shape, OUT, jnp.float32)
    stop_states = jnp.zeros((len(stops.tables), *shape), stops.tables.dtype)
    # At first all beams but one are excluded. Otherwise all would choose the same continuation.
    beams = Beams(tokens, out.at[:, 0].set(0.0), stop_states, seen)
    places = Places(tokens, out, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    return SearchState(jnp.int32(0), beams, places, jnp.ones(num_prompts, bool), caches)


def _next_tokens(state: SearchState, prompt_lengths: Int[Array, " P"]) -> NextTokens:
    """Return the last token of each beam, as the next decoding step takes it."""
    num_prompts, num_beams, _ = state.beams.tokens.shape
    tokens = state.beams.tokens[:, :, state.turn - 1].reshape(-1)
    positions = jnp.repeat(prompt_lengths + state.turn - 1, num_beams)
    # Beams begin together, so all rows have filled the same slots, this step's included.
    num_cached = state.caches[0].values.shape[3]
    is_written = jnp.arange(num_cached)[None] < state.turn
    is_written = jnp.broadcast_to(is_written, (num_prompts * num_beams, num_cached))
    return NextTokens(tokens, positions, state.turn - 1, is_written)


def _penalised(
    settings: SearchSettings, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
    """Return s of every id.

    The penalty acts on log-probabilities with several beams, but on logits with one. This is
    inconsistent, and kept to match `transformers`.
    """
    logps = jax.nn.log_softmax(logits, axis=-1) if settings.num_beams > 1 else logits
    if seen is not None:
        penalty = settings.repetition_penalty
        logps = jnp.where(seen, jnp.where(logps < 0, logps * penalty, logps / penalty), logps)
    if settings.num_ids:
        is_id = jnp.arange(logps.shape[1])[None] < settings.num_ids
        logps = jnp.where(is_id, logps, OUT)
    return logps


def _extend(
    settings: SearchSettings,
    layout: Layout,
    state: SearchState,
    logps: Float[Array, "B V"],
    stops: StopTables,
) -> SearchState:
    """Continue the beams by one token: some end and compete for places, the best others go on."""
    beams, num_beams, length = state.beams, settings.num_beams, state.turn + 1
    if num_beams > 1:
        logps += beams.sums.reshape(-1, 1)
    sums, parents, ids = _best(layout, logps, num_beams, settings.num_candidates)
    tokens = jax.lax.dynamic_update_slice(
        _take(beams.tokens, parents), ids[..., None], (0, 0, state.turn)
    )
    stop_states = jax.vmap(lambda table, states: table[_take(states, parents), ids])(
        stops.tables, beams.stop_states
    )
    is_end = has_ended(stops, settings.stop_ids, stop_states, ids)
    is_over = is_end | (length == settings.max_new_tokens)

    running, chosen = jax.lax.top_k(sums + jnp.where(is_over, OUT, 0.0), num_beams)
    parents = _take(parents, chosen)
    next_beams = Beams(
        tokens=_take(tokens, chosen),
        sums=running,
        stop_states=jax.vmap(lambda states: _take(states, chosen))(stop_states),
        seen=_see(layout, beams.seen, parents, _take(ids, chosen)),
    )
    # Only an end among the first Z candidates competes, and only while the prompt's search is open.
    is_placed = is_over & (jnp.arange(sums.shape[1])[None] < num_beams) & state.is_open[:, None]
    ended = Places(
        tokens,
        jnp.where(is_placed, sums / length, OUT),
        jnp.where(is_placed, length, 0),
        is_end,
    )
    places = _best_places(state.places, ended, num_beams)
    return SearchState(
        turn=length,
        beams=next_beams,
        places=places,
        is_open=state.is_open & _is_open(settings, running[:, 0] / length, places),
        # With one beam there is nothing to reorder, and a copy would cost a pass over the caches.
        caches=jax.tree.map(lambda x: _take(x, parents), state.caches)
        if num_beams > 1
        else state.caches,
    )


def _best_places(places: Places, ended: Places, num_places: int) -> Places:
    """Return the best of the places so far and of the hypotheses that have just ended."""
    places = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), places, ended)
    _, order = jax.lax.top_k(places.means, num_places)
    return jax.tree.map(lambda x: _take(x, order), places)


def _is_open(
    settings: SearchSettings, best: Float[Array, " P"], places: Places
) -> Bool[Array, " P"]:
    """Return whether the best beam of a prompt would take a place if it ended here."""
    is_taken = places.lengths > 0
    if settings.num_beams == 1:
        return ~is_taken[:, 0]
    worst = jnp.min(places.means, axis=1)
    return ~jnp.all(is_taken, axis=1) | (best > worst)


def _best(
    layout: Layout, sums: Float[Array, "B V"], num_beams: int, num_candidates: int
) -> tuple[Float[Array, "P C"], Int[Array, "P C"], Int[Array, "P C"]]:
    """Return the highest sums of each prompt, with their beams and ids.

    Each part of the vocabulary selects its own highest first. Only these move between devices.
    """
    num_rows, num_ids = sums.shape
    num_shards = layout.num_shards("V")
    num_shards = num_shards if num_ids % num_shards == 0 else 1
    size = num_ids // num_shards
    parts = layout.shard(sums.reshape(num_rows, num_shards, size), "M V -")
    highest, ids = top_k(parts, min(num_candidates, size))
    ids += (jnp.arange(num_shards, dtype=jnp.int32) * size)[None, :, None]
    highest, ids = (
        layout.shard(x.reshape(num_rows // num_beams, -1), "P -") for x in (highest, ids)
    )
    of_beam = highest.shape[1] // num_beams
    best, index = jax.lax.top_k(highest, num_candidates)
    return best, index // of_beam, jnp.take_along_axis(ids, index, axis=1)


def top_k(x: Float[Array, "*batch N"], k: int) -> tuple[Array, Array]:
    """Return the k highest numbers of each row and their places, as `jax.lax.top_k` does.

    That one sorts whole rows on TPUs. Here a row is cut into blocks: the k highest numbers lie in
    the k blocks whose maxima are highest, and of equal ones the first do.
    """
    padded = jnp.pad(
        x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)], constant_values=-jnp.inf
    )
    blocks = padded.reshape(*x.shape[:-1], -1, BLOCK)
    if blocks.shape[-2] <= k:
        return jax.lax.top_k(x, k)
    _, chosen = jax.lax.top_k(jnp.max(blocks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # in their order, so that the first of equals stays first
    inside = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    highest, index = jax.lax.top_k(inside.reshape(*x.shape[:-1], -1), k)
    places = jnp.take_along_axis(chosen, index // BLOCK, axis=-1) * BLOCK + index % BLOCK
    return highest, places


def _see(
    layout: Layout,
    seen: Bool[Array, "B V"] | None,
    parents: Int[Array, "P Z"],
    ids: Int[Array, "P Z"],
) -> Bool[Array, "B V"] | None:
    """Return the ids that the chosen beams have seen, the new one of each included."""
    if seen is None:
        return None
    taken = _take(seen.reshape(*parents.shape, -1), parents).reshape(seen.shape)
    is_new = ids.reshape(-1, 1) == jnp.arange(seen.shape[1])[None]
    return layout.shard(taken | is_new, "M V")


def _take(x: Any, index: Int[Array, "P C"]) -> Any:
    """Return the rows with these indices, prompt by prompt."""
    return jax.vmap(lambda rows, chosen: jnp.take(rows, chosen, axis=0, mode="clip"))(x, index)
