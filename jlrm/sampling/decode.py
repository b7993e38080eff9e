"""Decoding: run each prompt once, then all sequences one token at a time.

The keys and values of a sequence lie in two places. Those of its prompt, the prefix, are computed
once and shared by all sequences of that prompt. Those of its own tokens lie in a cache of its own.
Attention takes one softmax over both.

A cache is a ring. All rows write the same slot of it in the same step, so a write is one slice
update. Rows may have begun at different times: the caller's `slot_mask` says which slots a row
sees.

Layers are unrolled, not scanned, so that each layer updates its own cache in place. A scan copies
cache slices: for 7B on v5e-16 the compiler's estimate was 15 ms a step, and 4.8 ms unrolled.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from jlrm.model import lora, qwen
from jlrm.model.attention import TILE, attend_causal
from jlrm.model.quantised import widen_all
from jlrm.model.qwen import Block, Params, QwenConfig
from jlrm.model.visibility import BLOCK
from jlrm.runtime.mesh import Layout, step_layout
from jlrm.sampling.caches import Context, KeysValues, fold, on_each_device, shard, unfold, write
from jlrm.sampling.exact_attention import attend_cached_exactly, attend_prompt_exactly

# Input dimensions of each matrix, counted from its last, since experts are stacked. Int8 scales are
# per output, so these are reduced over.
INPUTS = {
    **dict.fromkeys(("q", "k", "v"), (-3,)),
    "o": (-3, -2),
    **dict.fromkeys(("gate", "up", "down"), (-2,)),
}
QUERIES = 256  # prompt positions whose attention scores are held at once
MASKED = -1e30  # finite: a row that sees no key gets a mean of the values instead of NaN


class Prompts(NamedTuple):
    """Prompts, padded on the right."""

    tokens: Int[Array, "P T"]
    lengths: Int[Array, " P"]


class Branches(NamedTuple):
    """Rows that hold more than a prompt: continuations, and branches that leave them.

    A slot sees, at or before itself: the prompt, `shared` slots; what its branch leaves, the slots
    from `begin` to before `limit`; and its own segment, from `own` on.
    """

    positions: Int[Array, "P T"]  # of each token in its own sequence
    shared: Int[Array, " P"]
    begin: Int[Array, "P T"]
    limit: Int[Array, "P T"]
    own: Int[Array, "P T"]


class Prefix(NamedTuple):
    """The prompts as decoding steps see them."""

    layers: list[KeysValues]
    lengths: Int[Array, " P"]
    mask: Bool[Array, "P T"]  # False: padding


class NextTokens(NamedTuple):
    """The tokens that one decoding step runs, and where they go.

    Rows of one prompt stand together: B = P·R, and row b belongs to prompt b // R.
    """

    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]  # in prompt + completion
    slot: Int[Array, ""]  # cache slot that every row writes
    slot_mask: Bool[Array, "B S"]  # cache slots that a row sees, the new one included


class Int8(NamedTuple):
    """A matrix as 8-bit integers, and the float32 factor of each output."""

    values: Int[Array, "..."]
    scale: Float[Array, "..."]


def decode_params(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    weights: str = "full",
) -> Params:
    """Return parameters as decoding wants them: compute dtype, one tree a layer, in `layout`.

    With `weights` "int8" the matrices of the layers and the head are `Int8`, so a step reads half
    the bytes. The head is then a copy, since the embedding table keeps its dtype. Tokens and
    reported log-probabilities are those of the quantised policy.

    Adapters are merged into their matrices, in compute precision. With "unmerged" they stay beside
    them, and a step does what training does.
    """
    # Weights move here, once a rollout. With training's shards left in place, each step of 7B on
    # v5e-16 would gather 9.6 GiB (compiled).
    params = qwen.to_compute_dtype(config, params)
    letters = lora.of_paths(qwen.param_letters(config, base="stored"), params)

    def place(tree: Params, letters: Any, drop: int) -> Params:
        return jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, layout.param(spec[drop:])),
            tree,
            letters,
        )

    outer = {name: leaf for name, leaf in params.items() if name != "layers"}
    outer = place(outer, {name: letters[name] for name in outer}, 0)
    layers = [
        place(_layer(config, params["layers"], i), letters["layers"], 1)
        for i in range(config.num_hidden_layers)
    ]
    if weights != "unmerged":
        layers = [lora.merge(config.lora, layer) for layer in layers]
    if weights != "int8":
        return {**outer, "layers": layers}
    head = _quantise(qwen.head(config, params), (1,))
    layers = [
        traverse_util.path_aware_map(
            lambda path, x: (
                _quantise(x, INPUTS[str(path[-1])]) if path[-1] in INPUTS else x  # norms, biases
            ),
            layer,
        )
        for layer in layers
    ]
    return {**outer, "head": head, "layers": layers}


def _layer(config: QwenConfig, stacked: Params, i: int) -> Params:
    return qwen.to_compute_dtype(config, widen_all(jax.tree.map(lambda x: x[i], stacked)))


def head(config: QwenConfig, params: Params) -> Float[Array, "V D"]:
    """Return the output embedding of `decode_params`."""
    if isinstance(params.get("head"), Int8):
        return dequantise(config, params["head"])
    return qwen.head(config, params)


def logits(
    config: QwenConfig, layout: Layout, params: Params, hidden: Float[Array, "B D"]
) -> Float[Array, "B V"]:
    """Return the logits of each row in float32, as training takes them."""
    # Letter M: the rows are gathered, because the head is spread over the devices that share them.
    product = jnp.einsum(
        "BD,VD->BV",
        layout.shard(hidden, "M D"),
        head(config, params),
        preferred_element_type=jnp.float32,
    )
    return layout.shard(product, "M V")


def dequantise(config: QwenConfig, params: Any) -> Any:
    """Return quantised matrices in compute dtype; XLA does this where they are read."""

    def widen(x: Any) -> Any:
        if not isinstance(x, Int8):
            return x
        return x.values.astype(config.compute_dtype) * x.scale.astype(config.compute_dtype)

    return jax.tree.map(widen, params, is_leaf=lambda x: isinstance(x, Int8))


def _quantise(x: Array, inputs: tuple[int, ...]) -> Int8:
    """Round to 255 even levels, from minus to plus the largest weight of each output."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8(values, scale)


def prefill(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "P T"],
    branches: Branches | None = None,
) -> tuple[Float[Array, "P T D"], list[KeysValues]]:
    """Run right-padded prompts; return final hidden states, and the keys and values of each layer.

    Outputs at padding positions mean nothing. Prompts need no mask: padding stands after the
    prompt, and attention is causal. Rows with more in them are laid out by `branches`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    positions = positions if branches is None else branches.positions
    rope = qwen.rope(config, positions)
    x = qwen.embed(config, layout, params["embed"], tokens)
    is_exact = config.exact and branches is None
    block, prefix = Block(config, layout, attend_prompt_exactly if is_exact else _attend_prompt), []
    for layer in params["layers"]:
        x, keys_values = qwen.apply(block, dequantise(config, layer), x, rope, branches)
        prefix.append(keys_values)
    return qwen.final_norm(config, params, x), prefix


def run_prompts(
    config: QwenConfig, layout: Layout, params: Params, prompts: Prompts
) -> tuple[Float[Array, "P D"], Prefix]:
    """Return the hidden state that predicts each prompt's first new token, and the prefix."""
    # They come spread over all devices, as training wants them.
    tokens, lengths = layout.shard(prompts.tokens, "P T"), layout.shard(prompts.lengths, "P")
    if config.exact:  # whole tiles
        tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % TILE)))
    hidden, layers = prefill(config, layout, params, tokens)
    ends = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return ends[:, 0], Prefix(layers, lengths, mask)


def empty_caches(
    config: QwenConfig, layout: Layout, num_rows: tuple[int, int], num_slots: int
) -> list[KeysValues]:
    """Return empty caches for P times R rows, of `num_slots` slots, one cache a layer."""
    shape = (*num_rows, config.num_key_value_heads, config.head_dim, num_slots)
    keys = jnp.zeros(shape, config.compute_dtype)
    cache = shard(layout, KeysValues(keys, keys.swapaxes(3, 4)))
    return [cache] * config.num_hidden_layers


def grow_caches(layout: Layout, caches: list[KeysValues], num_slots: int) -> list[KeysValues]:
    """Return these caches with `num_slots` slots, the new ones empty and last."""

    def grow(x: Array, axis: int) -> Array:
        widths = [(0, num_slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)

    return [
        shard(layout, KeysValues(grow(cache.keys, 4), grow(cache.values, 3))) for cache in caches
    ]


def decode_step(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    prefix: Prefix,
    caches: list[KeysValues],
    new: NextTokens,
) -> tuple[Float[Array, "B D"], list[KeysValues]]:
    """Run one token of every row; return its hidden state and the caches that hold it."""
    layout = step_layout(layout)
    tokens, positions = layout.shard(new.tokens, "B"), layout.shard(new.positions, "B")
    slot_mask = layout.shard(new.slot_mask, "B S")
    rope = qwen.rope(config, positions[:, None])
    x = qwen.embed(config, layout, params["embed"], tokens[:, None])
    attend = attend_cached_exactly if config.exact else _attend_cached
    block, new_caches = Block(config, layout, attend), []
    for layer, keys_values, cache in zip(params["layers"], prefix.layers, caches, strict=True):
        context = Context(keys_values, prefix.mask, cache, new.slot, slot_mask)
        x, cache = qwen.apply(block, dequantise(config, layer), x, rope, context)
        new_caches.append(cache)
    return qwen.final_norm(config, params, x)[:, 0], new_caches


def _attend_prompt(
    layout: Layout,
    q: Float[Array, "P T N H"],
    k: Float[Array, "P K T H"],
    v: Float[Array, "P K T H"],
    context: Branches | None,
) -> tuple[Float[Array, "P T N H"], KeysValues]:
    """Attend causally, and to what branches let a slot see: queries block by block.

    Plain prompts are attended to as in training.
    """
    num_prompts, num_tokens = q.shape[:2]
    is_even = num_prompts % layout.num_shards("P") == 0 and num_tokens % BLOCK == 0
    # Packed attention loops over tiles of 64 where there is no kernel, which a GPU can't fill.
    has_kernel = layout.platform != "gpu" or q.dtype != jnp.float32
    if context is None and is_even and has_kernel:
        causal = partial(attend_causal, platform=layout.platform)
        return on_each_device(layout, causal, q, k, v), KeysValues(k, v)
    outputs = []
    for start in range(0, num_tokens, QUERIES):
        end = min(start + QUERIES, num_tokens)
        mask = (jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None])[None]
        if context is not None:
            mask &= _is_seen(context, start, end)
        grouped = q[:, start:end].reshape(q.shape[0], end - start, k.shape[1], -1, q.shape[3])
        scores = _scores("PTKGH,PKSH->PKGTS", grouped, k[:, :, :end])
        scores = jnp.where(mask[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        outputs.append(jnp.einsum("PKGTS,PKSH->PTKGH", weights, v[:, :, :end]))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape), KeysValues(k, v)


def _is_seen(branches: Branches, start: int, end: int) -> Bool[Array, "P Q S"]:
    """Return which slots below `end` the slots from `start` on see, but for the order of both."""
    slot = jnp.arange(end)[None, None]
    begin, limit, own = (
        x[:, start:end, None] for x in (branches.begin, branches.limit, branches.own)
    )
    is_left = (slot >= begin) & (slot < limit)
    return (slot < branches.shared[:, None, None]) | is_left | (slot >= own)


def _attend_cached(
    layout: Layout,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    context: Context,
) -> tuple[Float[Array, "B 1 N H"], KeysValues]:
    """Attend from one token of every row, over the prefix of its prompt and its own cache."""
    # Written first: a token sees itself.
    prefix, cache = context.prefix, write(layout, context.cache, k, v, context.slot)
    num_prompts, num_heads = prefix.keys.shape[:2]
    grouped = q.reshape(num_prompts, -1, num_heads, q.shape[2] // num_heads, q.shape[3])
    # One product for all rollouts of a prompt: its prefix is read once a step, not R times.
    of_prefix = _scores("PKQH,PKTH->PKQT", fold(grouped), prefix.keys)
    of_prefix = jnp.where(context.prefix_mask[:, None, None], of_prefix, MASKED)
    of_cache = _scores("PRKGH,PRKHS->PRKGS", grouped, cache.keys)
    of_cache = jnp.where(
        context.slot_mask.reshape(num_prompts, -1, 1, 1, context.slot_mask.shape[1]),
        of_cache,
        MASKED,
    )
    # One softmax over both parts needs their common maximum and their common sum (float32).
    apart = partial(unfold, num_groups=grouped.shape[3])
    top = jnp.maximum(
        apart(jnp.max(of_prefix, -1, keepdims=True)), jnp.max(of_cache, -1, keepdims=True)
    )
    of_prefix, of_cache = jnp.exp(of_prefix - fold(top)), jnp.exp(of_cache - top)
    total = apart(jnp.sum(of_prefix, -1, keepdims=True)) + jnp.sum(of_cache, -1, keepdims=True)
    out = apart(_weighted("PKQT,PKTH->PKQH", of_prefix, prefix.values))
    out += _weighted("PRKGS,PRKSH->PRKGH", of_cache, cache.values)
    return (out / total).astype(q.dtype).reshape(q.shape), cache


def _scores(formula: str, q: Array, k: Array) -> Array:
    scores = jnp.einsum(formula, q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _weighted(formula: str, weights: Array, v: Array) -> Array:
    return jnp.einsum(formula, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
