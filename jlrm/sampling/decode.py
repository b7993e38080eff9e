"""Decoding: prompts are run once, then one token of every sequence at a time.

A sequence's keys and values lie in two places. Those of its prompt, the prefix, are computed once a
prompt, shared by all its sequences and never written again; those of its own tokens lie in a cache
of its own. Attention scores both and takes one softmax over them. A cache is a ring that all rows
write at the same slot, which makes a write one slice update; which slots a row sees is the caller's
`slot_mask`, so rows may have begun at different times.

Layers are unrolled: in a loop each updates its cache in place, where a scan would copy slices.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from jlrm.model import qwen
from jlrm.model.qwen import Block, Params, QwenConfig
from jlrm.runtime.mesh import Layout

# Dimensions of each matrix that are inputs.
INPUTS = {**dict.fromkeys(("q", "k", "v", "gate", "up", "down"), (0,)), "o": (0, 1)}
QUERIES = 256  # prompt positions whose scores are held at a time
MASKED = -1e30  # finite: a row that sees nothing gives a mean of values instead of NaN


class KeysValues(NamedTuple):
    """Keys and values of one layer, either a prefix or a cache.

    A prefix is `[P, K, T, H]` twice. In a cache keys are `[P, R, K, H, S]` and values
    `[P, R, K, S, H]`: both products of a step then run along the last axis, which on a CPU takes
    half the time.
    """

    keys: Array
    values: Array


class _Context(NamedTuple):
    """What one layer's attention of a decoding step needs beside the token itself."""

    prefix: KeysValues
    prefix_mask: Bool[Array, "P T"]
    cache: KeysValues
    slot: Int[Array, ""]
    slot_mask: Bool[Array, "B S"]


class Int8(NamedTuple):
    """A matrix as 8-bit integers, and what they are multiplied by: a float32 for each output."""

    values: Int[Array, "..."]
    scale: Float[Array, "..."]


def decode_params(
    config: QwenConfig, layout: Layout, params: Params, quantise: bool = False
) -> Params:
    """Return parameters as decoding wants them: compute dtype, one tree a layer, in `layout`.

    With `quantise` matrices are `Int8`, those of layers and the head, which is then a copy of its
    own; the embedding table stays as it is. A step reads half the bytes, and what is sampled, and
    reported as log-probability, is the quantised policy's.
    """
    params = qwen.to_compute_dtype(config, params)
    letters = qwen.param_letters(config)

    def place(tree: Params, letters: Any, drop: int) -> Params:
        return jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, layout.param(spec[drop:])),
            tree,
            letters,
        )

    outer = {name: leaf for name, leaf in params.items() if name != "layers"}
    outer = place(outer, {name: letters[name] for name in outer}, 0)
    layers = [
        place(jax.tree.map(lambda x, i=i: x[i], params["layers"]), letters["layers"], 1)
        for i in range(config.num_hidden_layers)
    ]
    if not quantise:
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


def head(config: QwenConfig, params: Params) -> Float[Array, "V D"]:
    """Return the output embedding of `decode_params`."""
    if isinstance(params.get("head"), Int8):
        return dequantise(config, params["head"])
    return qwen.head(config, params)


def dequantise(config: QwenConfig, params: Any) -> Any:
    """Return quantised matrices in compute dtype; XLA does so where it reads them."""

    def widen(x: Any) -> Any:
        if not isinstance(x, Int8):
            return x
        return x.values.astype(config.compute_dtype) * x.scale.astype(config.compute_dtype)

    return jax.tree.map(widen, params, is_leaf=lambda x: isinstance(x, Int8))


def _quantise(x: Array, inputs: tuple[int, ...]) -> Int8:
    """Round to 255 levels, evenly spread over what each output's weights reach."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=inputs, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    return Int8(values, scale)


def prefill(
    config: QwenConfig, layout: Layout, params: Params, tokens: Int[Array, "P T"]
) -> tuple[Float[Array, "P T D"], list[KeysValues]]:
    """Run right-padded prompts; return final hidden states and every layer's keys and values.

    A prompt's own positions see nothing of its padding, which stands after them; what stands at
    padding positions means nothing.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope = qwen.rope(config, positions)
    x = qwen.embed(config, layout, params["embed"], tokens)
    block, prefix = Block(config, layout, _attend_prompt), []
    for layer in params["layers"]:
        x, keys_values = qwen.apply(block, dequantise(config, layer), x, rope, None)
        prefix.append(keys_values)
    return qwen.final_norm(config, params, x), prefix


def empty_caches(
    config: QwenConfig, layout: Layout, num_rows: tuple[int, int], num_slots: int
) -> list[KeysValues]:
    """Return a cache of `num_slots` positions for each of P times R rows, for every layer."""
    shape = (*num_rows, config.num_key_value_heads, config.head_dim, num_slots)
    keys = jnp.zeros(shape, config.compute_dtype)
    cache = _shard(layout, KeysValues(keys, keys.swapaxes(3, 4)))
    return [cache] * config.num_hidden_layers


def grow_caches(layout: Layout, caches: list[KeysValues], num_slots: int) -> list[KeysValues]:
    """Return caches of `num_slots` positions that hold what these hold."""

    def grow(x: Array, axis: int) -> Array:
        widths = [(0, num_slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)

    return [
        _shard(layout, KeysValues(grow(cache.keys, 4), grow(cache.values, 3))) for cache in caches
    ]


def decode_step(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    prefix: list[KeysValues],
    prefix_mask: Bool[Array, "P T"],
    caches: list[KeysValues],
    slot: Int[Array, ""],
    slot_mask: Bool[Array, "B S"],
) -> tuple[Float[Array, "B D"], list[KeysValues]]:
    """Run one token of every row, stored in cache slot `slot`; it sees the slots of `slot_mask`.

    Rows of one prompt stand together: B = P·R, row b belongs to prompt b // R.
    """
    rope = qwen.rope(config, positions[:, None])
    x = qwen.embed(config, layout, params["embed"], tokens[:, None])
    block, new_caches = Block(config, layout, _attend_cached), []
    for layer, keys_values, cache in zip(params["layers"], prefix, caches, strict=True):
        context = _Context(keys_values, prefix_mask, cache, slot, slot_mask)
        x, cache = qwen.apply(block, dequantise(config, layer), x, rope, context)
        new_caches.append(cache)
    return qwen.final_norm(config, params, x)[:, 0], new_caches


def _attend_prompt(
    layout: Layout,
    q: Float[Array, "P T N H"],
    k: Float[Array, "P K T H"],
    v: Float[Array, "P K T H"],
    context: None,
) -> tuple[Float[Array, "P T N H"], KeysValues]:
    """Attend causally, a block of queries at a time."""
    num_tokens = q.shape[1]
    outputs = []
    for start in range(0, num_tokens, QUERIES):
        end = min(start + QUERIES, num_tokens)
        mask = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
        grouped = q[:, start:end].reshape(q.shape[0], end - start, k.shape[1], -1, q.shape[3])
        scores = _scores("PTKGH,PKSH->PKGTS", grouped, k[:, :, :end])
        scores = jnp.where(mask[None, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        outputs.append(jnp.einsum("PKGTS,PKSH->PTKGH", weights, v[:, :, :end]))
    return jnp.concatenate(outputs, axis=1).reshape(q.shape), KeysValues(k, v)


def _attend_cached(
    layout: Layout,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    context: _Context,
) -> tuple[Float[Array, "B 1 N H"], KeysValues]:
    """Attend from one token of every row over its prompt's prefix and its own cache."""
    prefix, cache = context.prefix, _write(layout, context.cache, k, v, context.slot)
    num_prompts, num_heads = prefix.keys.shape[:2]
    grouped = q.reshape(num_prompts, -1, num_heads, q.shape[2] // num_heads, q.shape[3])
    of_prefix = _scores("PKQH,PKTH->PKQT", _fold(grouped), prefix.keys)
    of_prefix = jnp.where(context.prefix_mask[:, None, None], of_prefix, MASKED)
    of_cache = _scores("PRKGH,PRKHS->PRKGS", grouped, cache.keys)
    of_cache = jnp.where(
        context.slot_mask.reshape(num_prompts, -1, 1, 1, context.slot_mask.shape[1]),
        of_cache,
        MASKED,
    )
    # One softmax over both parts, in float32 like every softmax here.
    unfold = partial(_unfold, num_groups=grouped.shape[3])
    top = jnp.maximum(
        unfold(jnp.max(of_prefix, -1, keepdims=True)), jnp.max(of_cache, -1, keepdims=True)
    )
    of_prefix, of_cache = jnp.exp(of_prefix - _fold(top)), jnp.exp(of_cache - top)
    total = unfold(jnp.sum(of_prefix, -1, keepdims=True)) + jnp.sum(of_cache, -1, keepdims=True)
    out = unfold(_weighted("PKQT,PKTH->PKQH", of_prefix, prefix.values))
    out += _weighted("PRKGS,PRKSH->PRKGH", of_cache, cache.values)
    return (out / total).astype(q.dtype).reshape(q.shape), cache


def _fold(x: Float[Array, "P R K G X"]) -> Float[Array, "P K RG X"]:
    """Put all queries of one prompt and key/value head together: they share a prefix."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _unfold(x: Float[Array, "P K RG X"], num_groups: int) -> Float[Array, "P R K G X"]:
    return x.reshape(*x.shape[:2], -1, num_groups, x.shape[3]).swapaxes(1, 2)


def _write(
    layout: Layout, cache: KeysValues, k: Array, v: Array, slot: Int[Array, ""]
) -> KeysValues:
    """Store every row's keys and values in the one slot."""
    rows = cache.keys.shape[:3]
    new_keys = k.reshape(*rows, k.shape[3], 1)
    new_values = v.reshape(*rows, 1, v.shape[3])
    keys = jax.lax.dynamic_update_slice(cache.keys, new_keys, (0, 0, 0, 0, slot))
    values = jax.lax.dynamic_update_slice(cache.values, new_values, (0, 0, 0, slot, 0))
    return _shard(layout, KeysValues(keys, values))


def _shard(layout: Layout, cache: KeysValues) -> KeysValues:
    keys, values = cache
    return KeysValues(layout.shard(keys, "P R K H S"), layout.shard(values, "P R K S H"))


def _scores(formula: str, q: Array, k: Array) -> Array:
    scores = jnp.einsum(formula, q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _weighted(formula: str, weights: Array, v: Array) -> Array:
    return jnp.einsum(formula, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
