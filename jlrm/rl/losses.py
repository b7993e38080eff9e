"""Token losses of SFT and GRPO, and the weights that turn them into one number.

A loss is `sum(weights * token_loss)`. The weights depend on masks alone and are made once for the
whole optimiser batch, so the loss is the same however its rows are split over micro-batches and
devices: there is no denominator left to get wrong. Letters as in mesh.py, with T over completion
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class PolicyLoss:
    """The static choices of the GRPO loss; names as in `GRPOConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    ratio: str = "token"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0


def completion_mask(lengths: Int[Array, " B"], num_tokens: int) -> Bool[Array, "B T"]:
    """Return which positions hold generated tokens, the end token included."""
    return jnp.arange(num_tokens)[None, :] < lengths[:, None]


def token_weights(mask: Bool[Array, "B T"], aggregation: str = "token_mean") -> Float[Array, "B T"]:
    """Return each token's share in the loss, by the mask of the whole optimiser batch.

    "token_mean": 1 / all tokens (DAPO; TRL `dapo`, verl `token-mean`).
    "sequence_mean": 1 / (own length · B) (GRPO paper; TRL `grpo`, verl `seq-mean-token-mean`).
    "sequence_sum": 1 / B (verl `seq-mean-token-sum`).
    "fixed_length": 1 / (B · T) (Dr. GRPO; TRL `dr_grpo`, verl `seq-mean-token-sum-norm`).
    Rows that are wholly masked count in B.
    """
    weights = mask.astype(jnp.float32)
    num_rows, num_tokens = mask.shape
    if aggregation == "token_mean":
        return weights / jnp.maximum(jnp.sum(weights), 1.0)
    if aggregation == "sequence_mean":
        lengths = jnp.sum(weights, axis=1, keepdims=True)
        return weights / (jnp.maximum(lengths, 1.0) * num_rows)
    if aggregation == "sequence_sum":
        return weights / num_rows
    if aggregation == "fixed_length":
        return weights / (num_rows * num_tokens)
    raise ValueError(f"Unknown aggregation {aggregation!r}.")


def policy_loss(
    settings: PolicyLoss,
    logp: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the GRPO loss of these rows and sums of its parts, to be added over micro-batches.

    Loss of a token: `-min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight k3 - entropy_weight H`,
    with `r = exp(logp - old_logp)` and `k3 = exp(ref - logp) - (ref - logp) - 1` (GRPO, Eq. 3-4;
    JudgeLRM, Eq. 6). `dual_clip` bounds r where A < 0 (arXiv 1912.09729). `ratio="sequence"` uses
    the geometric mean of r over the sequence with the gradient of each token's own log-probability
    (GSPO, arXiv 2507.18071).

    Metrics are token sums under `mask`; `num_tokens` is their denominator.
    """
    if ref_logp is None and settings.kl_weight:
        raise ValueError(f"kl_weight={settings.kl_weight} needs ref_logp.")
    # Padding may hold anything, and its exp may be inf: inf times a weight of 0 would be NaN.
    log_ratio = jnp.where(mask, logp - old_logp, 0.0)
    if settings.ratio == "sequence":
        log_ratio = _sequence_log_ratio(log_ratio, mask)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    advantages = advantages[:, None]
    unclipped = ratio
    if settings.dual_clip:
        unclipped = jnp.where(advantages < 0, jnp.minimum(ratio, settings.dual_clip), ratio)
    token_loss = -jnp.minimum(unclipped * advantages, clipped * advantages)
    token_loss -= settings.entropy_weight * entropy
    sums = {
        "entropy": entropy,
        "clip_ratio/low_mean": (ratio < 1.0 - settings.clip_low) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > 1.0 + settings.clip_high) & (advantages > 0),
        "approx_kl": -log_ratio,
        "num_tokens": jnp.ones_like(logp),
    }
    if ref_logp is not None:
        kl = k3(jnp.where(mask, logp, 0.0), jnp.where(mask, ref_logp, 0.0))
        token_loss += settings.kl_weight * kl
        sums["kl"] = kl
    metrics = {name: jnp.sum(jnp.where(mask, value, 0)) for name, value in sums.items()}
    return jnp.sum(weights * jnp.where(mask, token_loss, 0.0)), metrics


def k3(logp: Float[Array, " *shape"], ref_logp: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return the non-negative, unbiased estimate of KL(policy | reference) from policy tokens.

    Source: http://joschu.net/blog/kl-approx.html, the estimator k3.
    """
    difference = ref_logp - logp
    return jnp.exp(difference) - difference - 1.0


def _sequence_log_ratio(
    log_ratio: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return each sequence's mean log-ratio as value, each token's own log-ratio as gradient."""
    lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    mean = jnp.sum(log_ratio, axis=1, keepdims=True) / lengths
    return jax.lax.stop_gradient(mean - log_ratio) + log_ratio
