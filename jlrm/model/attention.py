"""Causal grouped-query attention behind one function.

Queries of one key/value head are folded into a group axis, so keys and values are never repeated.
Scores and softmax are float32: bfloat16 keeps 8 bits of mantissa, too few for sums over a thousand
positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite, so that a row without any visible key (padding) gives a mean of values instead of NaN.
MASKED = -1e30


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Return the attention output of every query over the keys its mask row admits.

    The scale is 1/sqrt(H); query head n uses key/value head n // (N/K).
    """
    num_groups = q.shape[2] // k.shape[1]
    grouped = q.reshape(*q.shape[:2], k.shape[1], num_groups, q.shape[3])
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * q.shape[3] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", weights, v).reshape(q.shape)
