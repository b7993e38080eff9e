"""Rotary positions (arXiv 2104.09864), plain or extended by YaRN (arXiv 2309.00071).

Angles are always float32, whatever the compute dtype: bfloat16 rounds position 257 to 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlrm.runtime import exact

Rope = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]  # cosine and sine, H2 = H/2


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), fields as in a Hugging Face `rope_parameters`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def angles(positions: Int[Array, "B T"], head_dim: int, theta: float, yarn: Yarn | None) -> Rope:
    """Return cosine and sine of the rotary angles; `theta` is the base of their wavelengths."""
    frequencies, scale = _frequencies(head_dim, theta, yarn)
    wide = positions[..., None].astype(jnp.float32)
    turned = wide * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(turned) * scale, jnp.sin(turned) * scale


def rotate(
    x: Float[Array, "B T N H"], rope: Rope, is_exact: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of every head by their angles, paired as Hugging Face does."""
    cos, sin = (angle[:, :, None, :] for angle in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    if is_exact:
        products = (
            exact.apart(x * y)
            for x, y in ((first, cos), (second, sin), (second, cos), (first, sin))
        )
        a, b, c, d = products
        return exact.rounded(jnp.concatenate([a - b, c + d], axis=-1), x.dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(head_dim: int, theta: float, yarn: Yarn | None) -> tuple[list[float], float]:
    """Return the H/2 angular frequencies and the factor on cosine and sine (1 without YaRN)."""
    half = head_dim // 2
    plain = [theta ** (-i / half) for i in range(half)]
    if yarn is None:
        return plain, 1.0

    def dimension(rotations: float) -> float:
        """Return the dimension that makes this many turns over the original context (Eq. 17-18)."""
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(theta)

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(half)]
    blended = [f * (1 - r) + f / yarn.factor * r for f, r in zip(plain, ramp, strict=True)]
    return blended, yarn.attention_factor
