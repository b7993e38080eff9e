"""Group-relative advantages: each reward against the other completions of the same prompt.

The group's mean is the baseline, so no value network is needed (GRPO, arXiv 2402.03300,
Section 4.1). P prompts, R rollouts of each.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def group_advantages(
    rewards: Float[Array | np.ndarray, "P R"], scale: str = "group", eps: float = 1e-6
) -> Float[Array, "P R"]:
    """Return `(reward - group mean) / (standard deviation + eps)`.

    This is GRPO's (arXiv 2402.03300, Section 4.1.2). The deviation is the sample's (ddof 1), as in
    TRL (eps 1e-4) and verl (eps 1e-6). `scale` names the rewards that it is taken over: those
    of the prompt's own "group" or of the whole "batch"; "none" divides by nothing (Dr. GRPO, arXiv
    2503.20783, Section 3.2). A group of equal rewards gets zeros.

    NaN is a completion without a reward. It counts in no mean and no deviation and gets zero, as in
    TRL, and so does the only one of a group that has a reward.
    """
    is_paid = ~np.isnan(rewards)
    rewards = jnp.asarray(rewards, jnp.float32)
    # Without a mask where none is needed: a masked sum may add in another order.
    where = None if is_paid.all() else jnp.asarray(is_paid)
    group: dict[str, Any] = {"axis": 1, "keepdims": True, "where": where}
    # The float32 mean of equal rewards can be one rounding off. Divided by 0 + eps, that rounding
    # would become a large advantage.
    highest = jnp.max(rewards, initial=-jnp.inf, **group)
    is_uniform = highest <= jnp.min(rewards, initial=jnp.inf, **group)
    is_zero = is_uniform | ~is_paid
    centred = jnp.where(is_zero, 0.0, rewards - jnp.mean(rewards, **group))
    if scale == "none":
        return centred
    over: dict[str, Any] = {"where": where} if scale == "batch" else group
    deviation = jnp.std(rewards, ddof=1, **over)
    return jnp.where(is_zero, 0.0, centred / (deviation + eps))
