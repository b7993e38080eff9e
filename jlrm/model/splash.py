"""Attention over packed rows by Splash, the TPU kernels that come with JAX.

The kernels skip the tiles, and apply the mask, that their `MaskInfo` names. The library makes one
of a mask known when compiling; here its arrays are computed from the packing. Its `q_sequence`, an
int32 a query that the kernels hand to the mask function beside the key's slot, holds all that the
mask needs to know of a query.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks
from jaxtyping import Array, Bool, Float, Int

from jlrm.model.visibility import BLOCK, Packing, prefix_align, scaled, slot_bits, visible_blocks

# The largest tile a kernel takes at once; a row of 5120 slots is 10 x 10 of them.
MAX_TILE = 512


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    packing: Packing,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return the attention output of the rows of one device; see `attend_packed`.

    `interpret` runs the kernels off TPUs, slowly.
    """
    unpadded = q.shape[1]
    if unpadded > 4 * MAX_TILE:  # whole large tiles: what is added is skipped
        q, k, v, packing = _pad(q, k, v, packing, -unpadded % MAX_TILE)
    num_slots = q.shape[1]
    tile = max(size for size in range(BLOCK, MAX_TILE + 1, BLOCK) if num_slots % size == 0)
    # One tile size everywhere: the backward pass then skips what the forward pass skipped.
    sizes = kernels.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
    )

    def attend_row(row: tuple[Array, Array, Array, Array, Array, Array]) -> Array:
        q, k, v, group, queries, visible = row
        forward, backward = (
            masks.MaskInfo(
                data_next=next_visible[None],
                mask_next=None,
                block_mask=visible.astype(jnp.int32)[None],
                partial_mask_blocks=None,
                q_sequence=queries,  # pyright: ignore[reportArgumentType]
            )
            for next_visible in (_next_visible(visible), _next_visible(visible.T).T)
        )
        kernel = kernels.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_mask_function(num_slots),
            interpret=interpret,
        )
        # A padding key is of no group, so that what a padding query sees does not hang on tiles.
        segments = kernels.SegmentIds(q=group, kv=jnp.where(group > 0, group, -1))
        out: Any = kernel(q, k, v, segments)
        # A tile of padding alone is skipped, and what is divided by its sum of 0 is NaN.
        return jnp.where(group[None, :, None] > 0, out, 0)

    visible = visible_blocks(packing, tile, tile)
    rows = (scaled(q).swapaxes(1, 2), k, v, packing.group, _encode(packing), visible)
    return lax.map(attend_row, rows).swapaxes(1, 2)[:, :unpadded]


def _pad(
    q: Array, k: Array, v: Array, packing: Packing, num_slots: int
) -> tuple[Array, Array, Array, Packing]:
    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, num_slots if i == axis else 0) for i in range(x.ndim)])

    more = packing._replace(group=pad(packing.group, 1), start=pad(packing.start, 1))
    return pad(q, 1), pad(k, 2), pad(v, 2), more


def _next_visible(visible: Bool[Array, "I J"]) -> Int[Array, "I J"]:
    """Return the column of the next visible tile, itself included, for the kernel to fetch ahead.

    Tiles are visited row by row; after the last visible one comes the first.
    """
    indices = jnp.arange(visible.size, dtype=jnp.int32)
    following = lax.cummin(jnp.where(visible.ravel(), indices, visible.size), reverse=True)
    following = jnp.where(following < visible.size, following, following[0])
    return (following % visible.shape[1]).reshape(visible.shape)


def _encode(packing: Packing) -> Int[Array, "B T"]:
    """Pack a query's slot (low bits), `start`, and `prefix` (high bits, sign included) in 32 bits.

    A prefix of all 2**bits slots is one too large for its bits and becomes 0, which is as good:
    where all are prompts, `start` alone says it all.
    """
    num_rows, num_slots = packing.group.shape
    bits = slot_bits(num_slots)
    prefix = packing.prefix // prefix_align(num_slots)
    words = (
        prefix[:, None].astype(jnp.uint32) << (2 * bits),
        packing.start.astype(jnp.uint32) << bits,
        jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.uint32), (num_rows, num_slots)),
    )
    return lax.bitcast_convert_type(words[0] | words[1] | words[2], jnp.int32)


@cache
def _mask_function(num_slots: int) -> Any:
    """Return the mask that Splash computes in its kernels; the same object for the same slots."""
    bits, align = slot_bits(num_slots), prefix_align(num_slots)

    def mask_function(queries: Array, key: Array) -> Array:
        slot = queries & (2**bits - 1)
        start = (queries >> bits) & (2**bits - 1)
        prefix = lax.shift_right_logical(queries, jnp.full_like(queries, 2 * bits)) * align
        return (key <= slot) & ((key < prefix) | (key >= start))

    return mask_function
