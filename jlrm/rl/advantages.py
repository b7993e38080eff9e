"""Group-relative advantages: each reward against the other completions of the same prompt.

The group's mean is the baseline, so no value network is needed (GRPO, arXiv 2402.03300,
Section 4.1). P prompts, R rollouts of each.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def group_advantages(
    rewards: Float[Array | np.ndarray, "P R"], scale: str = "group", eps: float = 1e-6
) -> Float[Array, "P R"]:
    """Return `(reward - group mean) / (standard deviation + eps)`.

    This is GRPO's (arXiv 2402.03300, Section 4.1.2). The deviation is the sample's (ddof 1), as in
    TRL (eps 1e-4) and verl (eps 1e-6). `scale` names the rewards that it is taken over: the own
    "group" or the whole "batch"; "none" divides by nothing (Dr. GRPO, arXiv 2503.20783,
    Section 3.2). A group of equal rewards gets zeros.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    # The float32 mean of equal rewards can be one rounding off. Divided by 0 + eps, that rounding
    # would become a large advantage.
    is_uniform = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    centred = jnp.where(is_uniform, 0.0, centred)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(rewards, ddof=1) + eps)
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + eps)
