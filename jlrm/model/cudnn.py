"""Attention over packed rows by cuDNN, the kernels for NVIDIA GPUs that JAX calls by name.

The kernels hold no scores, but they take the mask as an array of T x T in the dtype of the queries,
and compute every pair, the hidden ones too. They know float16 and bfloat16 only.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jlrm.model.visibility import Packing


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    packing: Packing,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Return the attention output of the rows of one device; see `attend_packed`.

    `implementation` "xla" computes the same anywhere, with all scores in memory.
    """

    def attend_row(row: tuple[Array, Array, Array, Packing]) -> Array:
        q, k, v, packing = row
        out = jax.nn.dot_product_attention(
            q[None],
            k.swapaxes(0, 1)[None],
            v.swapaxes(0, 1)[None],
            mask=_visible(packing)[None, None],
            implementation=implementation,
        )
        # A padding query sees nothing, and its softmax is over masked scores alone.
        return jnp.where(packing.group[:, None, None] > 0, out[0], 0)

    # Row by row, since each row has a mask of its own.
    return lax.map(attend_row, (q, k, v, packing))


def _visible(packing: Packing) -> Bool[Array, "T T"]:
    """Return which keys each query of one row sees: the rule of `Packing`, pair by pair."""
    group, start, prefix = packing
    query, key = jnp.arange(len(group))[:, None], jnp.arange(len(group))[None, :]
    is_own = (group[:, None] == group[None, :]) & (group[None, :] > 0)
    return is_own & (key <= query) & ((key < prefix) | (key >= start[:, None]))
