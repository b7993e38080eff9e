"""Beam search, and greedy decoding, with a repetition penalty: one jitted program.

What `transformers` does with `do_sample=False` (generation/utils.py `_beam_search` and `_sample`,
generation/logits_process.py `RepetitionPenaltyLogitsProcessor`), token for token. With Z beams, end
ids E and a penalty a:

    s(y_t)   = penalised(log softmax(logits))[y_t]     penalised(x) = x a  where x < 0, else x / a,
    S(y)     = s(y_1) + ... + s(y_t)                   for ids that the prompt or y has already
    extend     keep the best max(2, 1 + |E|) Z of all beams' continuations by S, so that Z of them
               go on even if all Z beams' ends are among them
    finish     of the first Z, those that end compete by S(y) / |y| for Z finished places
    go on      with the best Z that do not end, until no beam's S(y) / |y| exceeds the worst
               finished place, all being taken, or the token limit ends everything

So the length penalty is 1 and `early_stopping` is False. One beam is greedy decoding: the penalty
acts on logits, the highest is taken, and the first end is the end. A stop string ends a hypothesis
like an end id.

A prompt's beams are its rollouts of `decode`: they share its prefix, and each step reorders their
caches. Unlike there, ids of padding are no part of what has been seen. Left out: sampling, any
other length penalty, more than the best hypothesis.
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
from jlrm.sampling.decode import KeysValues
from jlrm.sampling.sampler import cache_sizes

OUT = -1e9  # added to the score of what is not in the race; the reference's number


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
        """How many continuations of a prompt's beams are looked at in one step."""
        return max(2, 1 + len(self.stop_ids)) * self.num_beams


class Hypotheses(NamedTuple):
    """Each prompt's best hypothesis, padded on the right with id 0."""

    tokens: Int[Array, "P T"]
    lengths: Int[Array, " P"]  # the end token counts
    is_finished: Bool[Array, " P"]  # False: cut off by max_new_tokens
    scores: Float[Array, " P"]  # S(y) / |y|; of greedy decoding: the last logit over |y|


class Beams(NamedTuple):
    """The hypotheses that go on, best first; the last token of each has not been run yet."""

    tokens: Int[Array, "P Z T"]
    scores: Float[Array, "P Z"]
    stop_states: Int[Array, "A P Z"]
    seen: Bool[Array, "B V"] | None  # ids of the prompt and of `tokens`; None: without a penalty


class Places(NamedTuple):
    """The best hypotheses that have ended, best first; length 0: none yet."""

    tokens: Int[Array, "P Z T"]
    scores: Float[Array, "P Z"]
    lengths: Int[Array, "P Z"]
    is_finished: Bool[Array, "P Z"]


class SearchState(NamedTuple):
    """The loop's state after `turn` tokens."""

    turn: Int[Array, ""]
    beams: Beams
    places: Places
    is_open: Bool[Array, " P"]  # a beam could still better its prompt's places
    caches: list[KeysValues]


def search(
    config: QwenConfig,
    layout: Layout,
    settings: SearchSettings,
    params: Params,
    prompts: Int[Array, "P T"],
    prompt_lengths: Int[Array, " P"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> Hypotheses:
    """Return the best completion that is found for each right-padded prompt.

    `params` come from `decode.decode_params`; the stop tables from `stops.stop_tables`.
    """
    num_beams, num_new = settings.num_beams, settings.max_new_tokens
    prompts, prompt_lengths = layout.shard(prompts, "P T"), layout.shard(prompt_lengths, "P")
    hidden, prefix = decode.prefill(config, layout, params, prompts)
    ends = jnp.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)
    is_prompt = jnp.arange(prompts.shape[1])[None] < prompt_lengths[:, None]

    def extend(state: SearchState, hidden: Float[Array, "B D"]) -> SearchState:
        logits = jnp.einsum(
            "BD,VD->BV",
            layout.shard(hidden, "M D"),
            decode.head(config, params),
            preferred_element_type=jnp.float32,
        )
        scores = _token_scores(settings, layout.shard(logits, "M V"), state.beams.seen)
        return _extend(settings, layout, state, scores, stop_table, stop_accept)

    def advance(state: SearchState) -> SearchState:
        hidden, caches = decode.decode_step(
            config,
            layout,
            params,
            state.beams.tokens[:, :, state.turn - 1].reshape(-1),
            jnp.repeat(prompt_lengths + state.turn - 1, num_beams),
            prefix,
            is_prompt,
            state.caches,
            state.turn - 1,
            _written(state, len(prompts) * num_beams),
        )
        return extend(state._replace(caches=caches), hidden)

    sizes = cache_sizes(num_new)
    caches = decode.empty_caches(config, layout, (len(prompts), num_beams), sizes[0])
    state = _start(config, layout, settings, prompts, is_prompt, stop_table, caches)
    state = extend(state, jnp.repeat(ends[:, 0], num_beams, axis=0))
    for size in sizes:
        state = state._replace(caches=decode.grow_caches(layout, state.caches, size))
        last_turn = min(size, num_new - 1)

        def is_running(state: SearchState, last_turn: int = last_turn) -> Bool[Array, ""]:
            return jnp.any(state.is_open) & (state.turn <= last_turn)

        state = jax.lax.while_loop(is_running, advance, state)
    tokens, scores, lengths, is_finished = (x[:, 0] for x in state.places)
    return Hypotheses(tokens, lengths, is_finished, scores)


def _start(
    config: QwenConfig,
    layout: Layout,
    settings: SearchSettings,
    prompts: Int[Array, "P T"],
    is_prompt: Bool[Array, "P T"],
    stop_table: Int[Array, "A states V"],
    caches: list[KeysValues],
) -> SearchState:
    """Return the state before the first token, where a prompt's beams are all the same."""
    num_prompts, num_beams = len(prompts), settings.num_beams
    shape = (num_prompts, num_beams)
    tokens = jnp.zeros((*shape, settings.max_new_tokens), jnp.int32)
    seen = None
    if settings.repetition_penalty != 1.0:
        nothing = jnp.zeros((num_prompts, config.vocab_size), bool)
        seen = nothing.at[jnp.arange(num_prompts)[:, None], prompts].max(is_prompt)
        seen = layout.shard(jnp.repeat(seen, num_beams, axis=0), "M V")
    out = jnp.full(shape, OUT, jnp.float32)
    stop_states = jnp.zeros((len(stop_table), *shape), stop_table.dtype)
    # All but one stay out of the race at first, or every beam would become the same.
    beams = Beams(tokens, out.at[:, 0].set(0.0), stop_states, seen)
    places = Places(tokens, out, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
    return SearchState(jnp.int32(0), beams, places, jnp.ones(num_prompts, bool), caches)


def _written(state: SearchState, num_rows: int) -> Bool[Array, "B S"]:
    """Return which cache slots hold tokens, that of this step too: the same ones in all rows."""
    num_cached = state.caches[0].values.shape[3]
    return jnp.broadcast_to(jnp.arange(num_cached)[None] < state.turn, (num_rows, num_cached))


def _token_scores(
    settings: SearchSettings, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
    """Return s of every id: the order of softmax and penalty is the reference's, not one idea."""
    scores = jax.nn.log_softmax(logits, axis=-1) if settings.num_beams > 1 else logits
    if seen is not None:
        penalty = settings.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if settings.num_ids:
        is_id = jnp.arange(scores.shape[1])[None] < settings.num_ids
        scores = jnp.where(is_id, scores, OUT)
    return scores


def _extend(
    settings: SearchSettings,
    layout: Layout,
    state: SearchState,
    token_scores: Float[Array, "B V"],
    stop_table: Int[Array, "A states V"],
    stop_accept: Int[Array, " A"],
) -> SearchState:
    """Continue beams by one token: some end and compete for places, the best others go on."""
    beams, num_beams, length = state.beams, settings.num_beams, state.turn + 1
    if num_beams > 1:
        token_scores += beams.scores.reshape(-1, 1)
    scores, parents, ids = _best(layout, token_scores, num_beams, settings.num_candidates)
    tokens = jax.lax.dynamic_update_slice(
        _take(beams.tokens, parents), ids[..., None], (0, 0, state.turn)
    )
    stop_states = jax.vmap(lambda table, states: table[_take(states, parents), ids])(
        stop_table, beams.stop_states
    )
    is_end = jnp.any(stop_states == stop_accept[:, None, None], axis=0)
    if settings.stop_ids:
        is_end |= jnp.any(ids[..., None] == jnp.array(settings.stop_ids)[None, None], axis=-1)
    is_over = is_end | (length == settings.max_new_tokens)

    running, chosen = jax.lax.top_k(scores + jnp.where(is_over, OUT, 0.0), num_beams)
    parents = _take(parents, chosen)
    next_beams = Beams(
        tokens=_take(tokens, chosen),
        scores=running,
        stop_states=jax.vmap(lambda states: _take(states, chosen))(stop_states),
        seen=_see(layout, beams.seen, parents, _take(ids, chosen)),
    )
    is_placed = is_over & (jnp.arange(scores.shape[1])[None] < num_beams) & state.is_open[:, None]
    ended = Places(
        tokens,
        jnp.where(is_placed, scores / length, OUT),
        jnp.where(is_placed, length, 0),
        is_end,
    )
    places = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), state.places, ended)
    _, order = jax.lax.top_k(places.scores, num_beams)
    places = jax.tree.map(lambda x: _take(x, order), places)
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


def _is_open(
    settings: SearchSettings, best: Float[Array, " P"], places: Places
) -> Bool[Array, " P"]:
    """Return whether a prompt's best beam, ended here, would take a place."""
    is_taken = places.lengths > 0
    if settings.num_beams == 1:
        return ~is_taken[:, 0]
    worst = jnp.min(places.scores, axis=1)
    return ~jnp.all(is_taken, axis=1) | (best > worst)


def _best(
    layout: Layout, scores: Float[Array, "B V"], num_beams: int, num_candidates: int
) -> tuple[Float[Array, "P C"], Int[Array, "P C"], Int[Array, "P C"]]:
    """Return the highest of each prompt's scores, with their beams and ids.

    Each part of the vocabulary gives its own highest first, so that no scores move but those.
    """
    num_rows, num_ids = scores.shape
    num_shards = layout.num_shards("V")
    num_shards = num_shards if num_ids % num_shards == 0 else 1
    size = num_ids // num_shards
    parts = layout.shard(scores.reshape(num_rows, num_shards, size), "M V -")
    highest, ids = jax.lax.top_k(parts, min(num_candidates, size))
    ids += (jnp.arange(num_shards, dtype=jnp.int32) * size)[None, :, None]
    highest, ids = (
        layout.shard(x.reshape(num_rows // num_beams, -1), "P -") for x in (highest, ids)
    )
    of_beam = highest.shape[1] // num_beams
    found, index = jax.lax.top_k(highest, num_candidates)
    return found, index // of_beam, jnp.take_along_axis(ids, index, axis=1)


def _see(
    layout: Layout,
    seen: Bool[Array, "B V"] | None,
    parents: Int[Array, "P Z"],
    ids: Int[Array, "P Z"],
) -> Bool[Array, "B V"] | None:
    """Return what the beams that go on have seen."""
    if seen is None:
        return None
    taken = _take(seen.reshape(*parents.shape, -1), parents).reshape(seen.shape)
    is_new = ids.reshape(-1, 1) == jnp.arange(seen.shape[1])[None]
    return layout.shard(taken | is_new, "M V")


def _take(x: Any, index: Int[Array, "P C"]) -> Any:
    """Return each prompt's rows of these indices."""
    return jax.vmap(lambda rows, chosen: jnp.take(rows, chosen, axis=0, mode="clip"))(x, index)
