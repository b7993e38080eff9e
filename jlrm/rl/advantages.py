"""Group-relative advantages: each reward against the other completions of the same prompt."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def group_advantages(
    rewards: Float[Array | np.ndarray, "P R"], scale: str = "group", eps: float = 1e-6
) -> Float[Array, "P R"]:
    """Return `(reward - group mean) / (standard deviation + eps)` (GRPO, arXiv 2402.03300, Eq. 3).

    The deviation has one degree of freedom taken off, as in TRL (eps 1e-4) and verl (eps 1e-6).
    `scale` says whose it is: of the "group", of the whole "batch", or "none" to divide by nothing
    (Dr. GRPO, arXiv 2503.20783). A group of equal rewards gets zeros.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    # A mean of equal floats can be one rounding off, which is no small number over 0 + eps.
    is_uniform = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    centred = jnp.where(is_uniform, 0.0, centred)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(rewards, ddof=1) + eps)
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + eps)
