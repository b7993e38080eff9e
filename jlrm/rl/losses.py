"""Token losses of SFT and GRPO, and the weights that turn them into one number.

A loss is `sum(weights * token_loss)`. The weights depend on masks alone and are made once for the
whole optimiser batch, so the loss is the same however its tokens are packed, and split over passes
and devices: there is no denominator left to get wrong.

A policy loss is chosen by data, `LossConfig`: its surrogate is a line of `SURROGATES`, a pure
function of each token's probability ratio and advantage. `policy_loss` adds the KL, a line of
`KL_ESTIMATORS`, and the entropy, which all surrogates share. Letters as in mesh.py, with T over
completion tokens, and C over the completion tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    is_singled: Bool[Array, " *tokens"] | None = None  # see `covariance_tokens`


class Tokens(NamedTuple):
    """What a surrogate sees of each token; padding holds ratio 1 and log-probability 0."""

    logp: Float[Array, " *tokens"]
    ratio: Float[Array, " *tokens"]  # r: the policy's probability over the old policy's
    advantages: Float[Array, " *tokens"]  # A
    log_ratio: Float[Array, " *tokens"]
    is_singled: Bool[Array, " *tokens"] | bool = False


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


def sapo(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return `-(4 / tau) sigmoid(tau (r - 1)) A` (SAPO, arXiv 2511.20347, Eq. 5-7).

    A smooth gate stands for the clip: its slope is 1 at r = 1 and falls to 0 on both sides, faster
    for a larger tau. tau is `gate_positive` where A > 0, else `gate_negative`.
    """
    is_positive = tokens.advantages > 0
    gate = jnp.where(is_positive, settings.gate_positive, settings.gate_negative)
    return -jax.nn.sigmoid(gate * (tokens.ratio - 1.0)) * 4.0 / gate * tokens.advantages


def geo_mean(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return `-r A`, r the geometric mean of clipped ratios (GMPO, arXiv 2507.20673, Eq. 4).

    The clip is inside the mean, in `averaged_log_ratio`: a token beyond it has no gradient, the
    others of its completion keep theirs.
    """
    return -tokens.ratio * tokens.advantages


def clip_cov(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return the loss of `ppo`, and 0 for tokens singled out (arXiv 2505.22617, Section 4.2).

    Tokens whose log-probability and advantage vary together are those that use up the entropy. One
    that the clip holds already is not taken out of the loss.
    """
    loss = ppo(settings, tokens)
    is_clipped = loss > -tokens.ratio * tokens.advantages
    return jnp.where(tokens.is_singled & ~is_clipped, 0.0, loss)


def kl_cov(settings: LossConfig, tokens: Tokens) -> Float[Array, " *tokens"]:
    """Return `-r A`, plus `covariance_kl |log r|` for tokens singled out (as above, Eq. 12).

    Nothing is clipped. The penalty holds those tokens to the old policy, so it acts only where a
    batch is used for several optimiser steps.
    """
    penalty = jnp.where(tokens.is_singled, settings.covariance_kl * _abs(tokens.log_ratio), 0.0)
    return -tokens.ratio * tokens.advantages + penalty


# A new loss is one function above and one line here; `LossConfig.surrogate` lists the names.
SURROGATES: dict[str, Surrogate] = {
    "ppo": ppo,
    "cispo": cispo,
    "sapo": sapo,
    "geo_mean": geo_mean,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}


def policy_loss(
    settings: LossConfig,
    logp: Float[Array, " *tokens"],
    entropy: Float[Array, " *tokens"],
    targets: PolicyTargets,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the GRPO loss of these tokens and sums of its parts; both add up over any split.

    Loss of a token: `w surrogate + kl_weight KL - entropy_weight H` (GRPO, arXiv 2402.03300, Eq.
    3-4), with `w` the importance of the token, 1 where there is none.

    Metrics are token sums under `mask`; `num_tokens` is their denominator. `clip_ratio/*` count
    tokens whose gradient the clip of "ppo" or "geo_mean" removes.

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
        own = averaged_log_ratio(settings, gap, advantages)
        log_ratio = _with_value(targets.sequence_log_ratio, own)
    ratio = jnp.exp(log_ratio)
    tokens = Tokens(logp, ratio, advantages, log_ratio)
    if targets.is_singled is not None:
        tokens = tokens._replace(is_singled=targets.is_singled)
    token_loss = SURROGATES[settings.surrogate](settings, tokens)
    if targets.importance is not None:
        token_loss *= targets.importance
    token_loss -= settings.entropy_weight * entropy
    distance = gap if settings.surrogate == "geo_mean" else ratio - 1.0  # what the clip looks at
    sums = {
        "entropy": entropy,
        "clip_ratio/low_mean": (distance < -settings.clip_low) & (advantages < 0),
        "clip_ratio/high_mean": (distance > settings.clip_high) & (advantages > 0),
        "approx_kl": -gap,
        "old_logp_gap": jnp.abs(gap),
        "num_tokens": jnp.ones_like(logp),
    }
    if ref_logp is not None:
        kl = kl_term(settings, logp, jnp.where(mask, ref_logp, 0.0), ratio)
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


def _abs(x: Float[Array, " *tokens"]) -> Float[Array, " *tokens"]:
    """Return |x| with gradient 0 at 0, where `jnp.abs` has 1: on policy all ratios are there."""
    return x * jnp.sign(x)


def averaged_log_ratio(
    settings: LossConfig, log_ratio: Float[Array, " *tokens"], advantages: Float[Array, " *tokens"]
) -> Float[Array, " *tokens"]:
    """Return what the ratio of a sequence is the mean of: for "geo_mean" clipped log-ratios.

    As in PPO the clip takes only the side that pays: `min(log r, clip_high)` where the advantage is
    positive, `max(log r, -clip_low)` where it is negative.
    """
    if settings.surrogate != "geo_mean":
        return log_ratio
    return jnp.where(
        advantages > 0,
        jnp.minimum(log_ratio, settings.clip_high),
        jnp.maximum(log_ratio, -settings.clip_low),
    )


@partial(jax.jit, static_argnums=0)  # of several hosts: constants must lie where the arrays do
def importance_weights(
    settings: LossConfig,
    log_ratio: Float[Array, "*rows C"],
    mask: Bool[Array, "*rows C"],
    sequence: Int[Array, "*rows C"],
) -> Float[Array, "*rows C"]:
    """Return how much each token counts, from old over sampled log-probability.

    Tokens were drawn by another policy (older or quantised weights) than the loss assumes. The
    weight is the ratio of both probabilities of the token or, under `importance_ratio="sequence"`,
    their product over its completion. Outside [importance_floor, importance_cap] it is the bound
    (https://fengyao.notion.site/off-policy-rl), or 0 (IcePop, arXiv 2510.18855; MIS,
    https://richardli.xyz/rl-collapse). `sequence` numbers the completions of a row from 0.
    """
    if settings.importance_ratio == "sequence":
        log_ratio = _totals(log_ratio, mask, sequence)
    weights = jnp.exp(log_ratio)
    bounded = jnp.clip(weights, settings.importance_floor, settings.importance_cap)
    if settings.importance_outside == "truncate":
        return bounded
    return jnp.where(weights == bounded, weights, 0.0)


def sequence_log_ratio(
    log_ratio: Float[Array, "B C"], mask: Bool[Array, "B C"], sequence: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """Return for each token the mean log-ratio of its sequence.

    GSPO (arXiv 2507.18071, Section 4.1). `sequence` numbers the completions of a row from 0.
    """

    sums = _totals(log_ratio, mask, sequence)
    counts = _totals(jnp.ones_like(log_ratio), mask, sequence)
    return sums / jnp.maximum(counts, 1.0)


def _totals(values: Array, mask: Array, sequence: Array) -> Array:
    """Return for each token of each row the sum over its completion."""
    return jnp.take_along_axis(sequence_sums(values, mask, sequence), sequence, -1)


@partial(jnp.vectorize, signature="(c),(c),(c)->(c)")
def sequence_sums(
    values: Float[Array, "*rows C"], mask: Bool[Array, "*rows C"], sequence: Int[Array, "*rows C"]
) -> Float[Array, "*rows C"]:
    """Return for each row the sums over its sequences, by their number; 0 where there is none."""
    return jax.ops.segment_sum(jnp.where(mask, values, 0.0), sequence, len(sequence))


def k2(logp: Float[Array, " *shape"], ref_logp: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return half the squared log-ratio; its expected gradient is that of the divergence."""
    return 0.5 * jnp.square(logp - ref_logp)


def k3(logp: Float[Array, " *shape"], ref_logp: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
    """Return the non-negative, unbiased estimate of KL(policy | reference) from policy tokens.

    Source: http://joschu.net/blog/kl-approx.html, the estimator k3.
    """
    difference = ref_logp - logp
    return jnp.exp(difference) - difference - 1.0


def low_var(
    logp: Float[Array, " *shape"], ref_logp: Float[Array, " *shape"]
) -> Float[Array, " *shape"]:
    """Return k3 with the bounds of verl's `low_var_kl`: log-ratios of at most 20, values of 10."""
    difference = jnp.clip(ref_logp - logp, -20.0, 20.0)
    return jnp.minimum(jnp.exp(difference) - difference - 1.0, 10.0)


KL_ESTIMATORS: dict[str, Callable[[Array, Array], Array]] = {
    "k1": lambda logp, ref_logp: logp - ref_logp,
    "abs": lambda logp, ref_logp: _abs(logp - ref_logp),
    "k2": k2,
    "k3": k3,
    "low_var": low_var,
}


def kl_term(
    settings: LossConfig,
    logp: Float[Array, " *tokens"],
    ref_logp: Float[Array, " *tokens"],
    ratio: Float[Array, " *tokens"],
) -> Float[Array, " *tokens"]:
    """Return each token's estimate of KL(policy | reference), corrected as the settings say.

    Tokens come from the old policy, so an estimate needs the ratio (DeepSeek-V3.2, arXiv
    2512.02556, Eq. 7; TRL's `use_bias_correction_kl`). The other correction is verl's suffix `+`.
    """
    kl = KL_ESTIMATORS[settings.kl_estimator](logp, ref_logp)
    if settings.kl_correction == "ratio":
        return kl * ratio
    return _with_value(kl, k2(logp, ref_logp)) if settings.kl_correction == "k2" else kl


def covariance_tokens(
    settings: LossConfig,
    logp: Float[np.ndarray, "B T"],
    advantages: Float[np.ndarray, " B"],
    mask: Bool[np.ndarray, "B T"],
    seed: int | tuple[int, ...],
) -> Bool[np.ndarray, "B T"]:
    """Return the tokens that "clip_cov" and "kl_cov" single out, of the whole optimiser batch.

    The covariance of a token is the product of what its log-probability and its advantage are above
    their means over tokens (arXiv 2505.22617, Eq. 9). "kl_cov" takes the largest ones, "clip_cov"
    some between two bounds by chance; both at least one, if there is one.
    """
    chosen = np.zeros(mask.shape, bool)
    where = np.flatnonzero(mask)
    if not len(where):
        return chosen
    logps = logp.reshape(-1)[where].astype(np.float64)
    gains = np.broadcast_to(advantages[:, None], mask.shape)[mask].astype(np.float64)
    covariance = (logps - logps.mean()) * (gains - gains.mean())
    if settings.surrogate == "kl_cov":
        order = np.argsort(-covariance, kind="stable")
    else:
        is_between = covariance > settings.covariance_low
        is_between &= covariance < settings.covariance_high
        order = np.random.default_rng(seed).permutation(np.flatnonzero(is_between))
    count = max(int(settings.covariance_share * len(where)), 1)
    chosen.flat[where[order[:count]]] = True
    return chosen
