"""Token losses of SFT and GRPO, and the weights that turn them into one number.

A loss is `sum(weights * token_loss)`. The weights depend on masks alone and are made once for the
whole optimiser batch, so the loss is the same however its tokens are packed, and split over passes
and devices: there is no denominator left to get wrong.

A policy loss is chosen by data, `LossConfig`: its surrogate is a line of `SURROGATES`, a pure
function of each token's probability ratio and advantage. `policy_loss` adds the KL and entropy
terms, which all surrogates share. Letters as in mesh.py, with T over completion tokens, and C over
the completion tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jlrm.config import LossConfig


def completion_mask(lengths: Int[np.ndarray, " B"], num_tokens: int) -> Bool[np.ndarray, "B T"]:
    """Return which positions hold generated tokens, the end token included."""
    return np.arange(num_tokens)[None, :] < lengths[:, None]


def token_weights(
    mask: Bool[np.ndarray, "B T"], aggregation: str = "token_mean"
) -> Float[np.ndarray, "B T"]:
    """Return each token's share in the loss, by the mask of the whole optimiser batch.

    "token_mean": 1 / all tokens (DAPO; TRL `dapo`, verl `token-mean`).
    "sequence_mean": 1 / (own length · B) (GRPO paper; TRL `grpo`, verl `seq-mean-token-mean`).
    "sequence_sum": 1 / B (verl `seq-mean-token-sum`).
    "fixed_length": 1 / (B · T) (Dr. GRPO; TRL `dr_grpo`, verl `seq-mean-token-sum-norm`).
    Rows that are wholly masked count in B.
    """
    weights = np.asarray(mask, np.float32)
    num_rows, num_tokens = mask.shape
    if aggregation == "token_mean":
        return weights / max(weights.sum(), np.float32(1.0))
    if aggregation == "sequence_mean":
        lengths = weights.sum(axis=1, keepdims=True)
        return weights / (np.maximum(lengths, 1.0) * np.float32(num_rows))
    if aggregation == "sequence_sum":
        return weights / np.float32(num_rows)
    if aggregation == "fixed_length":
        return weights / np.float32(num_rows * num_tokens)
    raise ValueError(f"Unknown aggregation {aggregation!r}.")


class PolicyTargets(NamedTuple):
    """What the loss needs to know of each token beside its log-probability, in one shape."""

    old_logp: Float[Array, " *tokens"]
    ref_logp: Float[Array, " *tokens"] | None
    advantages: Float[Array, " *tokens"]
    mask: Bool[Array, " *tokens"]
    weights: Float[Array, " *tokens"]
    sequence_log_ratio: Float[Array, " *tokens"] | None = None  # for ratio="sequence"
    importance: Float[Array, " *tokens"] | None = None  # weighs the surrogate alone


class Tokens(NamedTuple):
    """What a surrogate sees of each token; padding holds ratio 1 and log-probability 0."""

    logp: Float[Array, " *tokens"]
    ratio: Float[Array, " *tokens"]  # r: the policy's probability over the old policy's
    advantages: Float[Array, " *tokens"]  # A


Surrogate = Callable[[LossConfig, Tokens], Float[Array, " *tokens"]]


def ppo(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` (PPO, arXiv 1707.06347, Eq. 7).

    Two separate clips are DAPO's (arXiv 2503.14476, Section 3.1). Where A < 0 the minimum leaves
    large r unbounded; `dual_clip` bounds it there (arXiv 1912.09729, "Dual-clip PPO").
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    if settings.dual_clip:
        ratio = jnp.where(advantages < 0, jnp.minimum(ratio, settings.dual_clip), ratio)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def cispo(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return `-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p` (arXiv 2506.13585, Eq. 4-5).

    The clip bounds how much a token counts; no token loses its gradient. The paper sets no lower
    bound, which is clip_low=1.
    """
    weight = jnp.clip(tokens.ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    return -jax.lax.stop_gradient(weight) * tokens.advantages * tokens.logp


# A new loss is one function above and one line here; `LossConfig.surrogate` lists the names.
SURROGATES: dict[str, Surrogate] = {
    "ppo": ppo,
    "cispo": cispo,
}


def policy_loss(
    settings: LossConfig,
    logp: Float[Array, " *tokens"],
    entropy: Float[Array, " *tokens"],
    targets: PolicyTargets,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the GRPO loss of these tokens and sums of its parts; both add up over any split.

    Loss of a token: `w surrogate + kl_weight k3 - entropy_weight H`, with
    `k3 = exp(ref - logp) - (ref - logp) - 1` (GRPO, arXiv 2402.03300, Eq. 3-4) and `w` the
    importance of the token, 1 where there is none.

    Metrics are token sums under `mask`; `num_tokens` is their denominator. `clip_ratio/*` count
    tokens whose gradient PPO's clip removes.

    Raises:
      ValueError: the settings need `ref_logp` or `sequence_log_ratio`, and it is None.
    """
    mask, ref_logp, advantages = targets.mask, targets.ref_logp, targets.advantages
    if ref_logp is None and settings.kl_weight:
        raise ValueError(f"kl_weight={settings.kl_weight} needs ref_logp.")
    # Padding may hold anything, and its exp may be inf: inf times a weight of 0 would be NaN.
    gap = jnp.where(mask, logp - targets.old_logp, 0.0)
    logp = jnp.where(mask, logp, 0.0)
    log_ratio = gap
    if settings.ratio == "sequence":
        if targets.sequence_log_ratio is None:
            raise ValueError("ratio='sequence' needs sequence_log_ratio.")
        log_ratio = _with_value(targets.sequence_log_ratio, log_ratio)
    ratio = jnp.exp(log_ratio)
    token_loss = SURROGATES[settings.surrogate](settings, Tokens(logp, ratio, advantages))
    if targets.importance is not None:
        token_loss *= targets.importance
    token_loss -= settings.entropy_weight * entropy
    sums = {
        "entropy": entropy,
        "clip_ratio/low_mean": (ratio < 1.0 - settings.clip_low) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > 1.0 + settings.clip_high) & (advantages > 0),
        "approx_kl": -log_ratio,
        "old_logp_gap": jnp.abs(gap),
        "num_tokens": jnp.ones_like(logp),
    }
    if ref_logp is not None:
        kl = k3(logp, jnp.where(mask, ref_logp, 0.0))
        token_loss += settings.kl_weight * kl
        sums["kl"] = kl
    metrics = {
        name: jnp.sum(jnp.where(mask, value, 0), dtype=jnp.float32) for name, value in sums.items()
    }
    return jnp.sum(targets.weights * jnp.where(mask, token_loss, 0.0)), metrics


def _with_value(
    value: Float[Array, " *tokens"], gradient_of: Float[Array, " *tokens"]
) -> Float[Array, " *tokens"]:
    """Return `value` with the gradient of the other array.

    GSPO-token (arXiv 2507.18071, Section 4.3): the ratio is the geometric mean over the sequence,
    its gradient that of each token's own log-probability.
    """
    return gradient_of + jax.lax.stop_gradient(value - gradient_of)


def importance_weights(
    old_logp: Float[Array, " *tokens"], sampled_logp: Float[Array, " *tokens"], cap: float
) -> Float[Array, " *tokens"]:
    """Return `min(old / sampled probability, cap)`: how much a token counts.

    Truncated importance sampling: tokens were drawn by another policy (older or quantised weights)
    than the loss assumes (https://fengyao.notion.site/off-policy-rl).
    """
    return jnp.minimum(jnp.exp(old_logp - sampled_logp), cap)


def sequence_log_ratio(
    log_ratio: Float[Array, "B C"], mask: Bool[Array, "B C"], sequence: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """Return for each token the mean log-ratio of its sequence.

    GSPO (arXiv 2507.18071, Section 4.1). `sequence` numbers the completions of a row from 0.
    """

    def mean(log_ratio: Array, mask: Array, sequence: Array) -> Array:
        sums = jax.ops.segment_sum(jnp.where(mask, log_ratio, 0.0), sequence, len(sequence))
        counts = jax.ops.segment_sum(mask.astype(jnp.float32), sequence, len(sequence))
        return (sums / jnp.maximum(counts, 1.0))[sequence]

    return jax.vmap(mean)(log_ratio, mask, sequence)


def k3(logp: Float[Array, " *shape"], ref_logp: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return the non-negative, unbiased estimate of KL(policy | reference) from policy tokens.

    Source: http://joschu.net/blog/kl-approx.html, the estimator k3.
    """
    difference = ref_logp - logp
    return jnp.exp(difference) - difference - 1.0
