"""Token losses of SFT and GRPO, and the weights that turn them into one number.

A loss is `sum(weights * token_loss)`. The weights depend on masks alone and are made once for the
whole optimiser batch, so the loss is the same however its tokens are packed, and split over passes
and devices: there is no denominator left to get wrong. Letters as in mesh.py, with T over
completion tokens, and C over the completion tokens of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def policy_loss(
    settings: PolicyLoss,
    logp: Float[Array, " *tokens"],
    entropy: Float[Array, " *tokens"],
    targets: PolicyTargets,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the GRPO loss of these tokens and sums of its parts; both add up over any split.

    Loss of a token: `-min(r A, clip(r, 1 - low, 1 + high) A) + kl_weight k3 - entropy_weight H`,
    with `r = exp(logp - old_logp)` and `k3 = exp(ref - logp) - (ref - logp) - 1` (GRPO, Eq. 3-4;
    JudgeLRM, Eq. 6). `dual_clip` bounds r where A < 0 (arXiv 1912.09729). `ratio="sequence"` uses
    the geometric mean of r over the sequence with the gradient of each token's own log-probability
    (GSPO, arXiv 2507.18071).

    Metrics are token sums under `mask`; `num_tokens` is their denominator.
    """
    mask, old_logp, ref_logp = targets.mask, targets.old_logp, targets.ref_logp
    if ref_logp is None and settings.kl_weight:
        raise ValueError(f"kl_weight={settings.kl_weight} needs ref_logp.")
    # Padding may hold anything, and its exp may be inf: inf times a weight of 0 would be NaN.
    log_ratio = jnp.where(mask, logp - old_logp, 0.0)
    gap = jnp.abs(log_ratio)
    if settings.ratio == "sequence":
        if targets.sequence_log_ratio is None:
            raise ValueError("ratio='sequence' needs sequence_log_ratio.")
        log_ratio += jax.lax.stop_gradient(targets.sequence_log_ratio - log_ratio)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - settings.clip_low, 1.0 + settings.clip_high)
    advantages = targets.advantages
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
        "old_logp_gap": gap,
        "num_tokens": jnp.ones_like(logp),
    }
    if ref_logp is not None:
        kl = k3(jnp.where(mask, logp, 0.0), jnp.where(mask, ref_logp, 0.0))
        token_loss += settings.kl_weight * kl
        sums["kl"] = kl
    metrics = {
        name: jnp.sum(jnp.where(mask, value, 0), dtype=jnp.float32) for name, value in sums.items()
    }
    return jnp.sum(targets.weights * jnp.where(mask, token_loss, 0.0)), metrics


def sequence_log_ratio(
    log_ratio: Float[Array, "B C"], mask: Bool[Array, "B C"], sequence: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """Return for each token the mean log-ratio of its sequence, numbered from 0 within a row."""

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
