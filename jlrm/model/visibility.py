"""Which slots of packed rows see which: the mask that both forms of packed attention share."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Packed rows are whole blocks of so many slots, the lanes of a TPU.
BLOCK = 128


class Packing(NamedTuple):
    """Which slots of packed rows see which: all prompts of a row come before all completions.

    A query sees a key of its own group, not behind itself, that is in a prompt or in the query's
    own segment.
    """

    group: Int[Array, "B T"]  # 0: padding
    start: Int[Array, "B T"]  # first slot of the token's own segment: its completion or its prompt
    prefix: Int[Array, " B"]  # slots below this one hold prompts; a multiple of `prefix_align(T)`


def prefix_align(num_slots: int) -> int:
    """Return what `Packing.prefix` must be a multiple of in rows of this many slots.

    Splash hands its mask 32 bits a query: two slot numbers, and the prefix in what is left.

    Raises:
      ValueError: nothing is left.
    """
    bits = slot_bits(num_slots)
    if bits > 15:
        raise ValueError(f"Packed rows have {num_slots} slots. The most is {2**15}.")
    return 1 << max(0, bits - (32 - 2 * bits))


def slot_bits(num_slots: int) -> int:
    """Return how many bits the number of a slot takes."""
    return (num_slots - 1).bit_length()


def visible_blocks(
    packing: Packing, query_block: int, key_block: int
) -> Bool[Array, "B query_blocks key_blocks"]:
    """Return which pairs of blocks hold a query and a key that see each other, or may.

    Groups enter modulo 32, as bits of a word, and `start` by its least of a query block: a pair too
    many costs time, and there is none too few.
    """
    num_rows, num_slots = packing.group.shape
    is_token = packing.group > 0
    bits = jnp.where(is_token, jnp.left_shift(1, packing.group % 32), 0)
    groups = [
        jnp.bitwise_or.reduce(bits.reshape(num_rows, -1, block), axis=2)
        for block in (query_block, key_block)
    ]
    own_start = jnp.where(is_token, packing.start, num_slots)
    own_start = own_start.reshape(num_rows, -1, query_block).min(2)[:, :, None]
    last_query = jnp.arange(query_block - 1, num_slots, query_block)[None, :, None]
    key = jnp.arange(0, num_slots, key_block)[None, None]
    shares_group = (groups[0][:, :, None] & groups[1][:, None]) != 0
    is_prompt = key < packing.prefix[:, None, None]
    return shares_group & (key <= last_query) & (is_prompt | (key + key_block > own_start))


def scaled(q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Scale queries in float32: 1/sqrt(H) is no bfloat16 number for H=128."""
    return (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
