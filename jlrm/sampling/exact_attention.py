"""Attention of prefill and decoding in the order of packed rows, bit for bit (runtime/exact.py).

Packed rows attend tile by tile: the prompt's tiles, and then those of the completion. In exact
runs each segment of a row begins with a tile, so the tiles of a sequence are the same here.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from jlrm.model.attention import MASKED, TILE, attend_exactly
from jlrm.model.visibility import Packing, scaled
from jlrm.runtime import exact
from jlrm.runtime.mesh import Layout
from jlrm.sampling.caches import Context, KeysValues, fold, on_each_device, unfold, write


def attend_prompt_exactly(
    layout: Layout, q: Array, k: Array, v: Array, context: None
) -> tuple[Float[Array, "P T N H"], KeysValues]:
    """Attend causally by the code of packed rows: each prompt is a row of one segment."""

    def causal(q: Array, k: Array, v: Array) -> Array:
        zeros = jnp.zeros(q.shape[:2], jnp.int32)
        return attend_exactly(q, k, v, Packing(zeros + 1, zeros, zeros[:, 0]))

    return on_each_device(layout, causal, q, k, v), KeysValues(k, v)


def attend_cached_exactly(
    layout: Layout,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    context: Context,
) -> tuple[Float[Array, "B 1 N H"], KeysValues]:
    """Attend as packed rows do: tile by tile of the prompt, and then of the completion."""
    prefix, cache = context.prefix, write(layout, context.cache, k, v, context.slot)
    num_prompts, num_heads = prefix.keys.shape[:2]
    q_scaled = scaled(q, True)
    grouped = q_scaled.reshape(num_prompts, -1, num_heads, q.shape[2] // num_heads, q.shape[3])
    if grouped.shape[3] == 1:  # a product with a single row is another routine: two of each
        grouped = jnp.concatenate([grouped, grouped], axis=3)
    of_prefix = _dot("PKQH,PKTH->PKQT", fold(grouped), prefix.keys)
    of_prefix = jnp.where(context.prefix_mask[:, None, None], of_prefix, MASKED)
    of_cache = _dot("PRKGH,PRKHS->PRKGS", grouped, cache.keys)
    of_cache = jnp.where(
        context.slot_mask.reshape(num_prompts, -1, 1, 1, context.slot_mask.shape[1]),
        of_cache,
        MASKED,
    )
    apart = partial(unfold, num_groups=grouped.shape[3])
    top = jnp.maximum(
        apart(jnp.max(of_prefix, -1, keepdims=True)), jnp.max(of_cache, -1, keepdims=True)
    )
    sums = jnp.zeros((*of_prefix.shape[:3], 1)), jnp.zeros(fold(grouped).shape)
    sums = _add_tiles(of_prefix - fold(top), prefix.values, *sums)
    total, weighted = _add_tiles(of_cache - top, cache.values, *map(apart, sums))
    out = exact.rounded(weighted / total, q.dtype)
    if q.shape[2] == num_heads:
        out = jnp.max(out, axis=3)
    return out.reshape(q.shape), cache


def _add_tiles(
    scores: Float[Array, "*batch Q S"],
    values: Float[Array, "*batch S H"],
    total: Float[Array, "*batch Q 1"],
    weighted: Float[Array, "*batch Q H"],
) -> tuple[Array, Array]:
    """Add the keys of each tile to the sums of a softmax, in order."""
    weights = exact.rounded(jnp.exp(scores), values.dtype)
    # One product a tile. All at once they need a transposition, which XLA makes a part of the
    # product, and then it takes a routine that sums in another order.
    for start in range(0, scores.shape[-1], TILE):
        tile = weights[..., start : start + TILE]
        total = total + exact.total_last(tile)[..., None]
        weighted = weighted + _dot("...QS,...SH->...QH", tile, values[..., start : start + TILE, :])
    return total, weighted


def _dot(formula: str, x: Array, y: Array) -> Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
