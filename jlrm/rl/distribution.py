"""The distribution that tokens are drawn from; the vocabulary may be spread over devices.

Sampler and trainer must mean the same distribution. So temperature, top-k, top-p and the number of
existing ids are one `Distribution`, applied by one function. Cut-offs come from bisecting the bits
of a float: this is exact, and needs no sort of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.runtime import exact

REMOVED = -1e30  # logit of an id that can't be drawn; finite, so that gradients stay finite


@dataclass(frozen=True)
class Distribution:
    """The settings that turn logits into the distribution tokens are drawn from."""

    temperature: float = 1.0  # 0: log-probabilities are those at temperature 1
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    num_ids: int = 0  # ids from here on exist in the head but not in the tokenizer; 0: all exist
    exact: bool = False  # sampler and trainer normalise by the same sum, bit for bit


def log_distribution(
    logits: Float[Array, "*batch V"],
    distribution: Distribution,
    keep: Int[Array, " *batch"] | None = None,
) -> Float[Array, "*batch V"]:
    """Return log-probabilities (nats, float32) after temperature, then top-k, then top-p.

    Removed ids get about -1e30. Ids tied with the last kept one are kept. `keep` names one more id
    to keep in each row: after an update the drawn token may have left the top-k, and its
    log-probability must stay finite. No gradient flows through the choice of kept ids.
    """
    kept = kept_logits(logits, distribution, keep, Vocabulary(logits.shape[-1]))
    return jax.nn.log_softmax(kept, axis=-1)


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that this device has, and the operations over all parts."""

    size: int  # ids in the head
    axes: tuple[str, ...] = ()  # mesh axes that logits are spread over; (): none
    num_shards: int = 1

    def first(self, logits: Array) -> Array | int:
        """Return the id of the first of these logits."""
        return jax.lax.axis_index(self.axes) * logits.shape[-1] if self.axes else 0

    def ids(self, logits: Array) -> Int[Array, "*batch v"]:
        """Return the id of each of these logits."""
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return ids + self.first(logits)

    def sum(self, *terms: Array) -> list[Array]:
        """Sum each of these over all ids; the last axis stays, with length 1."""
        return self.sum_of_devices([jnp.sum(term, axis=-1, keepdims=True) for term in terms])

    def max(self, x: Array) -> Array:
        highest = jnp.max(x, axis=-1, keepdims=True)
        return jax.lax.pmax(highest, self.axes) if self.axes else highest

    def min(self, x: Array) -> Array:
        return -self.max(-x)

    def sum_of_devices(self, tree: Any) -> Any:
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def value_of(self, tokens: Int[Array, "*batch 1"], x: Array) -> Float[Array, "*batch 1"]:
        """Return `x` of each row's token, whichever device has it."""
        # Indexed: on CPUs a sum over `ids == tokens` makes log-probabilities 10 % slower.
        index = tokens - self.first(x)
        value = jnp.take_along_axis(x, index, axis=-1, mode="clip")
        is_here = (index >= 0) & (index < x.shape[-1])
        return self.sum_of_devices(jnp.where(is_here, value, 0.0))

    def gather(self, x: Array) -> Array:
        """Return the rows of all devices that share the vocabulary."""
        return jax.lax.all_gather(x, self.axes, tiled=True) if self.axes else x

    def scatter(self, x: Array) -> Array:
        """Undo `gather`: sum over the devices, of which each keeps its own rows."""
        # One axis at a time: for both at once the TPU compiler sums whole arrays on every device.
        for axis in self.axes:
            x = jax.lax.psum_scatter(x, axis, tiled=True)
        return x

    def own(self, x: Array, num_rows: int) -> Array:
        """Undo `gather` for a replicated value: keep this device's own rows."""
        if not self.axes:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axes) * num_rows, num_rows)


def scaled(logits: Float[Array, "*batch v"], distribution: Distribution) -> Array:
    """Return float32 logits divided by the temperature."""
    logits = logits.astype(jnp.float32) / (distribution.temperature or 1.0)
    is_one = distribution.temperature in (0.0, 1.0)
    return exact.apart(logits) if distribution.exact and not is_one else logits


def kept_logits(
    logits: Float[Array, "*batch v"],
    distribution: Distribution,
    keep: Int[Array, " *batch"] | None,
    vocabulary: Vocabulary,
) -> Float[Array, "*batch v"]:
    """Return float32 logits divided by the temperature, REMOVED where an id can't be drawn."""
    logits = scaled(logits, distribution)
    ids = vocabulary.ids(logits)
    num_ids = distribution.num_ids or vocabulary.size
    if num_ids < logits.shape[-1] * vocabulary.num_shards:
        logits = jnp.where(ids < num_ids, logits, REMOVED)
    if distribution.top_k or distribution.top_p < 1.0:
        kept = _kept_mask(jax.lax.stop_gradient(logits), distribution, vocabulary)
        if keep is not None:
            kept |= ids == keep[..., None]
        logits = jnp.where(kept, logits, REMOVED)
    return logits


def _kept_mask(
    logits: Float[Array, "*batch v"], distribution: Distribution, vocabulary: Vocabulary
) -> Bool[Array, "*batch v"]:
    """Return which ids top-k and then top-p admit."""
    kept = jnp.ones(logits.shape, bool)
    if distribution.top_k:
        wanted = min(distribution.top_k, vocabulary.size)
        ones = jnp.ones(logits.shape, jnp.int32)
        kept = logits >= _largest_threshold(logits, ones, wanted, vocabulary)
    if distribution.top_p < 1.0:
        highest = vocabulary.max(logits)  # always a kept one
        mass = jnp.where(kept, jnp.exp(logits - highest), 0.0)
        probs = mass / vocabulary.sum(mass)[0]
        kept &= logits >= _largest_threshold(logits, probs, distribution.top_p, vocabulary)
    return kept


def _largest_threshold(
    values: Float[Array, "*batch v"], weights: Array, wanted: float, vocabulary: Vocabulary
) -> Float[Array, "*batch 1"]:
    """Return each row's largest value v such that the weights of all values >= v reach `wanted`.

    This bisects the 32 bits of a float, in the order of floats, so the result is exact.
    """
    ordered = _float_order(values)

    def narrow(bit: Int[Array, ""], threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        (reached,) = vocabulary.sum(jnp.where(ordered >= higher, weights, 0))
        return jnp.where(reached >= wanted, higher, threshold)

    lowest = jnp.zeros((*values.shape[:-1], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, narrow, lowest)
    return vocabulary.min(jnp.where(ordered >= threshold, values, jnp.inf))


def _float_order(values: Float[Array, " *shape"]) -> Array:
    """Map float32 to uint32, keeping the order: flip all bits of a negative, else the sign bit."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
