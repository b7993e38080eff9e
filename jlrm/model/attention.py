"""Grouped-query attention over packed rows.

The query heads of one key/value head are folded into one matrix, so keys and values are never
repeated. Scores and softmax are float32: bfloat16 keeps 8 bits of mantissa, too few for sums over a
thousand positions.

A packed row holds several groups. Each is a prompt and its completions, which see the prompt but
not one another: `[prompt 1 | prompt 2 | .. | completions of 1 | completions of 2 | .. | padding]`.
Few pairs of slots see each other, and which ones is data (visibility.py). So two forms of
`attend_packed` skip blocks at run time: on TPUs JAX's own kernel (splash.py), on CPUs a loop over
the visible blocks in plain XLA (this file). Neither holds an array of T x T. On GPUs cuDNN's kernel
(cudnn.py) takes the mask as such an array. A row stays on its device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlrm.model.remat import ATTENDED
from jlrm.model.visibility import BLOCK, Packing, scaled, visible_blocks
from jlrm.runtime import exact

# Finite: with -inf a query that has seen no key yet would compute exp(-inf + inf), which is NaN.
MASKED = -1e30
# The fastest of 32 to 256 on CPUs: 64 x 64 scores of 6 heads stay in cache. With completions of 64
# tokens the visible blocks hold 1.5 times the visible pairs (with 128 x 128: 2.1 times).
TILE = 64


def attend_packed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    packing: Packing,
    platform: str,
) -> Float[Array, "B T N H"]:
    """Return the attention output of every query over the keys its packing lets it see.

    The scale is 1/sqrt(H); query head n uses key/value head n // (N/K). Padding queries give 0. The
    rows are those of one device: with several, call it inside `shard_map`. `platform` is that of
    the mesh's devices, since a host without a TPU may compile for one.

    Raises:
      ValueError: T is no multiple of 128.
    """
    if q.shape[1] % BLOCK:
        raise ValueError(f"Packed rows have {q.shape[1]} slots. Pad them to a multiple of {BLOCK}.")
    if platform == "tpu":
        from jlrm.model.splash import splash  # imports Pallas, which other platforms do without

        return splash(q, k, v, packing)
    if platform == "gpu" and q.dtype != jnp.float32:  # cuDNN has no kernel for float32
        from jlrm.model.cudnn import cudnn

        return cudnn(q, k, v, packing)
    return _blockwise(q, k, v, packing)


def attend_causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    platform: str,
) -> Float[Array, "B T N H"]:
    """Return `attend_packed` of rows that are one segment each: all slots up to a query's own."""
    zeros = jnp.zeros(q.shape[:2], jnp.int32)
    packing = Packing(group=zeros + 1, start=zeros, prefix=zeros[:, 0])
    return attend_packed(q, k, v, packing, platform)


def attend_exactly(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    packing: Packing,
) -> Float[Array, "B T N H"]:
    """Return the same in bits that cached attention gives too (exact.py).

    Each segment must begin at a multiple of `TILE`.
    """
    return _blockwise(q, k, v, packing, True)


class _QueryBlocks(NamedTuple):
    """All blocks of queries, row by row along the leading axis, and the blocks that they see."""

    row: Int[Array, ""]
    slot: Int[Array, " Q"]
    group: Int[Array, " Q"]
    start: Int[Array, " Q"]
    key_blocks: Int[Array, " blocks"]  # the visible ones first
    num_visible: Int[Array, ""]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q: Array, k: Array, v: Array, packing: Packing, is_exact: bool = False) -> Array:
    """Attend block by block with a running softmax (FlashAttention, arXiv:2205.14135)."""
    # A VJP of its own, since the number of visible blocks is data: JAX has no reverse mode for
    # loops of unknown length.
    return _blockwise_forward(q, k, v, packing, is_exact)[0]


def _blockwise_forward(
    q: Array, k: Array, v: Array, packing: Packing, is_exact: bool
) -> tuple[Array, Any]:
    """Return the output, and what the backward pass needs (Algorithm 1 of FlashAttention)."""
    blocks, queries = _query_blocks(packing), _fold(scaled(q, is_exact), k.shape[1])

    def exact_block(_: None, xs: tuple[Array, _QueryBlocks]) -> tuple[None, tuple[Array, Array]]:
        queries, block = xs

        def highest_of(n: Array, highest: Array) -> Array:
            scores = _scores(queries, k, packing, block, block.key_blocks[n])
            return jnp.maximum(highest, scores.max(-1))

        total, weighted = (jnp.zeros(shape) for shape in (queries.shape[:2], queries.shape))
        # In a pass before, so that the sums are never rescaled on the way.
        highest = lax.fori_loop(0, block.num_visible, highest_of, jnp.full_like(total, MASKED))

        def key_block(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            index = block.key_blocks[n]
            scores = _scores(queries, k, packing, block, index)
            values = _key_block(v, block.row, index)
            return add_block(scores - highest[..., None], values, "KQS,KSH->KQH", *carry)

        total, weighted = lax.fori_loop(0, block.num_visible, key_block, (total, weighted))
        return None, _finished(highest, total, weighted, q.dtype)

    def query_block(_: None, xs: tuple[Array, _QueryBlocks]) -> tuple[None, tuple[Array, Array]]:
        queries, block = xs

        def key_block(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, weighted = carry
            index = block.key_blocks[n]
            scores = _scores(queries, k, packing, block, index)
            new_highest = jnp.maximum(highest, scores.max(-1))
            # Until a query's first visible key, `highest` is MASKED and its weights are exp(0) = 1.
            # The first visible key erases them: then `decay` is exp(MASKED - score), which is 0.
            weights = jnp.exp(scores - new_highest[..., None])
            decay = jnp.exp(highest - new_highest)
            values = _key_block(v, block.row, index)
            new = _dot("KQS,KSH->KQH", weights.astype(v.dtype), values)
            return (
                new_highest,
                total * decay + weights.sum(-1),
                weighted * decay[..., None] + new,
            )

        total, weighted = (jnp.zeros(shape) for shape in (queries.shape[:2], queries.shape))
        highest, total, weighted = lax.fori_loop(
            0, block.num_visible, key_block, (jnp.full_like(total, MASKED), total, weighted)
        )
        return None, _finished(highest, total, weighted, q.dtype)

    body = exact_block if is_exact else query_block
    _, (out, logsumexp) = lax.scan(body, None, (queries, blocks))
    # One number a query instead of its weights: the backward pass recomputes those from it.
    out, logsumexp = checkpoint_name((_unfold(out, q), logsumexp), ATTENDED)
    return out, (queries, k, v, packing, blocks, out, logsumexp)


def add_block(
    scores: Float[Array, "*batch S"],
    values: Float[Array, "..."],
    formula: str,
    total: Float[Array, " *batch"],
    weighted: Float[Array, "*batch H"],
) -> tuple[Float[Array, " *batch"], Float[Array, "*batch H"]]:
    """Add a block of keys to the sums of a softmax; `scores` are less the highest of all."""
    weights = exact.rounded(jnp.exp(scores), values.dtype)
    return total + exact.total_last(weights), weighted + _dot(formula, weights, values)


def _finished(highest: Array, total: Array, weighted: Array, dtype: Any) -> tuple[Array, Array]:
    """Return the output of queries, and the logarithm of their sums of weights."""
    # Real scores lie far above MASKED / 2. Padding queries have seen nothing and give 0.
    has_seen = highest > MASKED / 2
    total = jnp.where(has_seen, total, 1.0)
    out = jnp.where(has_seen[..., None], weighted / total[..., None], 0.0)
    # With 0 here, the backward pass computes weights exp(MASKED - 0) = 0 for such a query.
    return exact.rounded(out, dtype), jnp.where(has_seen, highest + jnp.log(total), 0.0)


def _blockwise_backward(
    is_exact: bool, residuals: Any, d_out: Array
) -> tuple[Array, Array, Array, None]:
    """Return the gradients by q, k and v (Algorithm 4 of FlashAttention)."""
    queries, k, v, packing, blocks, out, logsumexp = residuals
    # The softmax subtracts the mean of d_weights under the weights, which is sum(d_out * out).
    means = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    xs = (queries, _fold(d_out, k.shape[1]), logsumexp, _fold(means, k.shape[1])[..., 0], blocks)

    def query_block(
        carry: tuple[Array, Array], xs: tuple[Array, Array, Array, Array, _QueryBlocks]
    ) -> tuple[tuple[Array, Array], Array]:
        queries, d_out, logsumexp, means, block = xs

        def key_block(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            # dk and dv of all rows are carried and updated in place: a block of keys gets shares
            # from many blocks of queries.
            dq, dk, dv = carry
            index = block.key_blocks[n]
            keys, values = (_key_block(x, block.row, index) for x in (k, v))
            scores = _scores(queries, k, packing, block, index)
            weights = jnp.exp(scores - logsumexp[..., None])
            d_weights = _dot("KQH,KSH->KQS", d_out, values)
            d_scores = (weights * (d_weights - means[..., None])).astype(k.dtype)
            dv = _add(dv, block.row, index, _dot("KQS,KQH->KSH", weights.astype(v.dtype), d_out))
            dk = _add(dk, block.row, index, _dot("KQS,KQH->KSH", d_scores, queries))
            return dq + _dot("KQS,KSH->KQH", d_scores, keys), dk, dv

        start = (jnp.zeros(queries.shape), *carry)
        dq, dk, dv = lax.fori_loop(0, block.num_visible, key_block, start)
        return (dk, dv), dq.astype(queries.dtype)

    # Sums over many blocks, so float32 until they are complete.
    (dk, dv), dq = lax.scan(query_block, (jnp.zeros(k.shape), jnp.zeros(v.shape)), xs)
    # The keys have met scaled queries, so dk is complete; dq still lacks the scale.
    return scaled(_unfold(dq, d_out)), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _query_blocks(packing: Packing) -> _QueryBlocks:
    """Cut the queries of all rows into blocks, and list the blocks of keys that each one sees."""
    num_rows, num_slots = packing.group.shape
    visible = visible_blocks(packing, TILE, TILE)
    slots = jnp.broadcast_to(jnp.arange(num_slots), packing.group.shape)
    return _QueryBlocks(
        row=jnp.repeat(jnp.arange(num_rows), num_slots // TILE),
        slot=slots.reshape(-1, TILE),
        group=packing.group.reshape(-1, TILE),
        start=packing.start.reshape(-1, TILE),
        # Visible blocks first, in order: the loop over them then has a run-time length.
        key_blocks=jnp.argsort(~visible, axis=2, stable=True).reshape(-1, visible.shape[2]),
        num_visible=visible.sum(2).reshape(-1),
    )


def _scores(
    queries: Array, k: Array, packing: Packing, block: _QueryBlocks, index: Array
) -> Float[Array, "K Q S"]:
    """Return the attention scores of a block of queries with key block `index`, masked."""
    scores = _dot("KQH,KSH->KQS", queries, _key_block(k, block.row, index))
    start = index * TILE
    key_group = lax.dynamic_slice(packing.group, (block.row, start), (1, TILE))
    key = start + jnp.arange(TILE)[None]
    # The rule of `Packing`: own group, at or before its own position, prompt or own segment.
    mask = (block.group[:, None] == key_group) & (key_group > 0) & (key <= block.slot[:, None])
    mask &= (key < packing.prefix[block.row]) | (key >= block.start[:, None])
    # All query heads of a key/value head have the same mask.
    return jnp.where(jnp.tile(mask, (queries.shape[1] // TILE, 1))[None], scores, MASKED)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _fold(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "blocks K Q H"]:
    """Cut rows into blocks; the query heads of a key/value head become rows of one matrix."""
    num_rows, num_slots, _, width = x.shape
    x = x.reshape(num_rows, num_slots // TILE, TILE, num_kv_heads, -1, width)
    x = x.transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(num_rows * (num_slots // TILE), num_kv_heads, -1, width)


def _unfold(x: Float[Array, "blocks K Q H"], like: Array) -> Float[Array, "B T N H"]:
    num_rows, _, _, width = like.shape
    x = x.reshape(num_rows, -1, x.shape[1], x.shape[2] // TILE, TILE, width)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(like.shape)


def _key_block(x: Float[Array, "B K T H"], row: Array, index: Array) -> Float[Array, "K S H"]:
    _, num_heads, _, width = x.shape
    return lax.dynamic_slice(x, (row, 0, index * TILE, 0), (1, num_heads, TILE, width))[0]


def _add(x: Array, row: Array, index: Array, block: Float[Array, "K S H"]) -> Array:
    """Add to a block of keys, in place once compiled."""
    block = block + _key_block(x, row, index)
    return lax.dynamic_update_slice(x, block[None], (row, 0, index * TILE, 0))
