"""Log-probabilities under the sampling distribution, without ever holding `[B, T, V]`.

Sampler and trainer must mean the same distribution: temperature, top-k, top-p and the ids that
exist are one `Distribution`, applied by one function. Cut-offs are found by bisecting the bits of a
float, which is exact and needs no sort of the vocabulary. `completion_logps` applies the LM head to
a chunk of positions at a time and recomputes the chunk in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.mesh import Layout

REMOVED = -1e30  # logit of an id that can't be drawn; finite, so that gradients stay finite
CHUNK_LOGITS = 2**25  # logits held at a time on a device: 128 MiB in float32


@dataclass(frozen=True)
class Distribution:
    """How logits become a distribution to draw from."""

    temperature: float = 1.0  # 0: log-probabilities are those at temperature 1
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    num_ids: int = 0  # ids from here on exist in the head but not in the tokenizer; 0: all exist


def log_distribution(
    logits: Float[Array, "*batch V"],
    distribution: Distribution,
    keep: Int[Array, " *batch"] | None = None,
) -> Float[Array, "*batch V"]:
    """Return log-probabilities (nats, float32) after temperature, top-k and then top-p.

    Ids that are cut off get about -1e30. Ids tied with the last kept one are kept. `keep` adds one
    id a row to the kept ones: when an update has moved the policy, the drawn token may have left
    the top-k, and its log-probability must stay finite. Which ids are kept carries no gradient.
    """
    temperature = distribution.temperature or 1.0
    logits = logits.astype(jnp.float32) / temperature
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    if distribution.num_ids:
        logits = jnp.where(vocabulary < distribution.num_ids, logits, REMOVED)
    if distribution.top_k or distribution.top_p < 1.0:
        kept = _kept_mask(jax.lax.stop_gradient(logits), distribution)
        if keep is not None:
            kept |= vocabulary == keep[..., None]
        logits = jnp.where(kept, logits, REMOVED)
    return jax.nn.log_softmax(logits, axis=-1)


def completion_logps(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    distribution: Distribution,
    layout: Layout,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return each token's log-probability and the entropy of its distribution, in nats.

    `hidden[:, t]` is the state that predicts `tokens[:, t]`. The head is gathered once, before the
    loop over chunks of positions; inside the loop no weight moves.
    """
    num_rows, num_tokens = tokens.shape
    rows_per_device = max(num_rows // layout.num_batch_shards(), 1)
    chunk = min(max(CHUNK_LOGITS // (head.shape[0] * rows_per_device), 1), num_tokens)
    num_chunks = -(-num_tokens // chunk)
    padding = num_chunks * chunk - num_tokens
    head = layout.shard(head.astype(hidden.dtype), "- -")

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return padded.reshape(num_rows, num_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def score(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        logits = jnp.einsum("BTD,VD->BTV", hidden, head, preferred_element_type=jnp.float32)
        log_probs = log_distribution(layout.shard(logits, "B T V"), distribution, keep=tokens)
        logp = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return logp, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    if num_chunks == 1:
        return score(hidden, tokens)
    _, parts = jax.lax.scan(
        lambda carry, part: (carry, score(*part)), None, (split(hidden), split(tokens))
    )
    logp, entropy = (part.swapaxes(0, 1).reshape(num_rows, -1)[:, :num_tokens] for part in parts)
    return logp, entropy


def _kept_mask(
    logits: Float[Array, "*batch V"], distribution: Distribution
) -> Bool[Array, "*batch V"]:
    """Return which ids top-k and then top-p admit."""
    kept = jnp.ones(logits.shape, bool)
    if distribution.top_k:
        wanted = min(distribution.top_k, logits.shape[-1])
        kept = logits >= _largest_threshold(logits, jnp.ones(logits.shape, jnp.int32), wanted)
    if distribution.top_p < 1.0:
        probs = jax.nn.softmax(jnp.where(kept, logits, REMOVED), axis=-1)
        kept &= logits >= _largest_threshold(logits, probs, distribution.top_p)
    return kept


def _largest_threshold(
    values: Float[Array, "*batch V"], weights: Array, wanted: float
) -> Float[Array, "*batch 1"]:
    """Return each row's largest value v such that the weights of all values >= v reach `wanted`.

    Bisects over the 32 bits of a float in the order of floats, so the result is exact.
    """
    ordered = _float_order(values)

    def narrow(bit: Int[Array, ""], threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(ordered >= higher, weights, 0), axis=-1, keepdims=True)
        return jnp.where(reached >= wanted, higher, threshold)

    lowest = jnp.zeros((*values.shape[:-1], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, narrow, lowest)
    return jnp.min(jnp.where(ordered >= threshold, values, jnp.inf), axis=-1, keepdims=True)


def _float_order(values: Float[Array, " *shape"]) -> Array:
    """Map float32 to uint32 in the same order: flip all bits of negatives, else the sign."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
