"""Which slots of a packed row see which: what both forms of packed attention share.

attention.py loops over blocks on any platform; splash.py drives the TPU kernels. The mask is data,
not shape, so both compute it from a `Packing` at run time. This file holds the rule, the limits
that the rule puts on rows, and the list of blocks that can be skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.runtime import exact

# A packed row is a whole number of blocks. A TPU register has 128 lanes.
BLOCK = 128


class Packing(NamedTuple):
    """The layout of packed rows. All prompts of a row stand before all of its completions.

    A query sees the keys of its own group at or before its own position that are in the prompt or
    in the query's own segment.
    """

    group: Int[Array, "B T"]  # 0: padding
    start: Int[Array, "B T"]  # first slot of the token's own segment: its completion or its prompt
    prefix: Int[Array, " B"]  # slots below this one hold prompts; a multiple of `prefix_align(T)`


def prefix_align(num_slots: int) -> int:
    """Return the number that must divide `Packing.prefix` in rows of this many slots.

    Splash gives its mask 32 bits about each query: two slot numbers, and the prefix in the bits
    that remain.

    Raises:
      ValueError: no bits remain.
    """
    bits = slot_bits(num_slots)
    if bits > 15:
        raise ValueError(f"Packed rows have {num_slots} slots. The most is {2**15}.")
    # 8192 slots take 13 bits each, and 6 remain: the prefix is counted in units of 128. Up to 1024
    # slots all 3 numbers fit exactly.
    return 1 << max(0, bits - (32 - 2 * bits))


def slot_bits(num_slots: int) -> int:
    """Return the number of bits that a slot number takes."""
    return (num_slots - 1).bit_length()


def visible_blocks(
    packing: Packing, query_block: int, key_block: int
) -> Bool[Array, "B query_blocks key_blocks"]:
    """Return which pairs of blocks may hold a query and a key that it sees.

    A pair too many costs time; a pair too few would be a wrong result, and there is none. So the
    test may be coarse: it compares group numbers modulo 32, and takes the least `start` of a query
    block for all of it.
    """
    num_rows, num_slots = packing.group.shape
    is_token = packing.group > 0
    # The groups of a block as one word: two blocks share a group only if the words share a bit.
    bits = jnp.where(is_token, jnp.left_shift(1, packing.group % 32), 0)
    groups = [
        jnp.bitwise_or.reduce(bits.reshape(num_rows, -1, block), axis=2)
        for block in (query_block, key_block)
    ]
    # Padding sees nothing, so it must not lower the least start.
    own_start = jnp.where(is_token, packing.start, num_slots)
    own_start = own_start.reshape(num_rows, -1, query_block).min(2)[:, :, None]
    last_query = jnp.arange(query_block - 1, num_slots, query_block)[None, :, None]
    key = jnp.arange(0, num_slots, key_block)[None, None]
    shares_group = (groups[0][:, :, None] & groups[1][:, None]) != 0
    is_prompt = key < packing.prefix[:, None, None]
    return shares_group & (key <= last_query) & (is_prompt | (key + key_block > own_start))


def scaled(q: Float[Array, "B T N H"], is_exact: bool = False) -> Float[Array, "B T N H"]:
    """Scale queries by 1/sqrt(H), in float32: for H = 128 it is no bfloat16 number."""
    wide = q.astype(jnp.float32) * q.shape[3] ** -0.5
    return exact.rounded(wide, q.dtype) if is_exact else wide.astype(q.dtype)
