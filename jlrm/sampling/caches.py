"""Where keys and values of sequences lie while they are decoded, and how attention reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jlrm.runtime.mesh import Layout


class KeysValues(NamedTuple):
    """Keys and values of one layer: a prefix, or a cache.

    In a prefix both are `[P, K, T, H]`. In a cache keys are `[P, R, K, H, S]` and values
    `[P, R, K, S, H]`: both products of a step then run along the last axis, which halves their
    time on a CPU.
    """

    keys: Array
    values: Array


class Context(NamedTuple):
    """What the attention of one layer reads in a decoding step, beside the new tokens."""

    prefix: KeysValues
    prefix_mask: Bool[Array, "P T"]
    cache: KeysValues
    slot: Int[Array, ""]
    slot_mask: Bool[Array, "B S"]


def on_each_device(
    layout: Layout, causal: Callable[..., Array], q: Array, k: Array, v: Array
) -> Float[Array, "P T N H"]:
    queries, keys = layout.activation("P T N H").spec, layout.activation("P K T H").spec
    attend = jax.shard_map(
        causal,
        mesh=layout.mesh,
        in_specs=(queries, keys, keys),
        out_specs=queries,
        check_vma=False,  # the kernels do not say over which axes their results vary
    )
    return attend(q, k, v)


def fold(x: Float[Array, "P R K G X"]) -> Float[Array, "P K RG X"]:
    """Make one matrix of all queries that share a prompt and a key/value head."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def unfold(x: Float[Array, "P K RG X"], num_groups: int) -> Float[Array, "P R K G X"]:
    return x.reshape(*x.shape[:2], -1, num_groups, x.shape[3]).swapaxes(1, 2)


def write(
    layout: Layout, cache: KeysValues, k: Array, v: Array, slot: Int[Array, ""]
) -> KeysValues:
    """Store the keys and values of every row in the same slot."""
    rows = cache.keys.shape[:3]
    new_keys = k.reshape(*rows, k.shape[3], 1)
    new_values = v.reshape(*rows, 1, v.shape[3])
    keys = jax.lax.dynamic_update_slice(cache.keys, new_keys, (0, 0, 0, 0, slot))
    values = jax.lax.dynamic_update_slice(cache.values, new_values, (0, 0, 0, slot, 0))
    return shard(layout, KeysValues(keys, values))


def shard(layout: Layout, cache: KeysValues) -> KeysValues:
    keys, values = cache
    return KeysValues(layout.shard(keys, "P R K H S"), layout.shard(values, "P R K S H"))
