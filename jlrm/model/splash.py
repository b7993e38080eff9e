"""Attention over packed rows by Splash, the TPU kernels that come with JAX.

A `MaskInfo` tells the kernels which tiles to skip and how to mask the others. The library builds it
from a mask that is known when compiling. Here the mask is data, so its arrays are computed from the
packing at run time. For each query the kernels give the mask function one int32 (`q_sequence`) and
the slot of the key. That int32 holds all that the mask needs to know about the query.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks
from jaxtyping import Array, Bool, Float, Int

from jlrm.model.remat import ATTENDED
from jlrm.model.visibility import BLOCK, Packing, prefix_align, scaled, slot_bits, visible_blocks

# The largest tile a kernel takes at once. A row of 5120 slots has 10 x 10 of them.
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
    # A long row is padded to whole large tiles. What is added is padding, which is skipped.
    if unpadded > 4 * MAX_TILE:
        q, k, v, packing = _pad(q, k, v, packing, -unpadded % MAX_TILE)
    num_slots = q.shape[1]
    tile = max(size for size in range(BLOCK, MAX_TILE + 1, BLOCK) if num_slots % size == 0)

    def attend_row(row: tuple[Array, Array, Array, Array, Array, Array]) -> Array:
        q, k, v, group, queries, visible = row
        # Padding keys get a group that no query has. Otherwise the output of a padding query would
        # depend on which tiles are skipped.
        segments = kernels.SegmentIds(q=group, kv=jnp.where(group > 0, group, -1))
        out: Any = _kernel(num_slots, tile, queries, visible, interpret)(q, k, v, segments)
        # A tile of padding alone is skipped; its outputs are 0 / 0, which is NaN.
        return jnp.where(group[None, :, None] > 0, out, 0)

    visible = visible_blocks(packing, tile, tile)
    rows = (scaled(q).swapaxes(1, 2), k, v, packing.group, _encode(packing), visible)
    # Row by row, since each row has a mask of its own and a kernel takes one.
    return lax.map(attend_row, rows).swapaxes(1, 2)[:, :unpadded]


def _kernel(
    num_slots: int,
    tile: int,
    queries: Int[Array, " T"],
    visible: Bool[Array, "I J"],
    interpret: bool,
) -> kernels.SplashAttentionKernel:
    """Return the kernel of one row: `queries` from `_encode`, and which tiles are visible."""
    # One tile size everywhere: the backward pass then skips the tiles that the forward pass skips.
    sizes = kernels.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
    )
    # The kernel for dk and dv visits the tiles column by column.
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
    return kernels.SplashAttentionKernel(
        forward,
        forward,
        backward,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=ATTENDED,
        mask_function=_mask_function(num_slots),
        interpret=interpret,
    )


def _pad(
    q: Array, k: Array, v: Array, packing: Packing, num_slots: int
) -> tuple[Array, Array, Array, Packing]:
    """Add `num_slots` slots of padding (group 0) to every row."""

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, num_slots if i == axis else 0) for i in range(x.ndim)])

    more = packing._replace(group=pad(packing.group, 1), start=pad(packing.start, 1))
    return pad(q, 1), pad(k, 2), pad(v, 2), more


def _next_visible(visible: Bool[Array, "I J"]) -> Int[Array, "I J"]:
    """Return the column of the next visible tile, counting the tile itself.

    The kernel fetches that tile ahead. Tiles are visited row by row; the last visible one is
    followed by the first.
    """
    indices = jnp.arange(visible.size, dtype=jnp.int32)
    # A running minimum from the end gives each tile the first visible index at or after its own.
    following = lax.cummin(jnp.where(visible.ravel(), indices, visible.size), reverse=True)
    following = jnp.where(following < visible.size, following, following[0])
    return (following % visible.shape[1]).reshape(visible.shape)


def _encode(packing: Packing) -> Int[Array, "B T"]:
    """Pack a query's slot (low bits), `start`, and `prefix` (high bits, sign included) in 32 bits.

    A prefix of all 2**bits slots overflows its bits and becomes 0. The mask stays right: then all
    slots are prompts, and a query in a prompt sees the keys from `start` on.
    """
    num_rows, num_slots = packing.group.shape
    # Splash wants one int32 a query, so three numbers share its bits (`prefix_align`).
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
    """Return the mask function that the kernels call; the same object for the same slots."""
    # Cached, because JAX compares static arguments by identity: a new function compiles anew.
    bits, align = slot_bits(num_slots), prefix_align(num_slots)

    def mask_function(queries: Array, key: Array) -> Array:
        slot = queries & (2**bits - 1)
        start = (queries >> bits) & (2**bits - 1)
        # Logical shift: the prefix may have filled the sign bit.
        prefix = lax.shift_right_logical(queries, jnp.full_like(queries, 2 * bits)) * align
        # The group is compared by the kernel itself (`SegmentIds`).
        return (key <= slot) & ((key < prefix) | (key >= start))

    return mask_function
