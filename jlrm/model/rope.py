"""Rotary positions (arXiv 2104.09864), plain or extended: YaRN (arXiv 2309.00071), Llama 3.1.

Angles are always float32, whatever the compute dtype: bfloat16 rounds position 257 to 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
    rope_type: ClassVar[str] = "yarn"

    def stretch(self, plain: list[float], theta: float) -> list[float]:
        """Divide the frequencies of slow dimensions by the factor, and blend those between."""
        half = len(plain)

        def dimension(rotations: float) -> float:
            """Return the dimension of this many turns over the original context (Eq. 17-18)."""
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return half * math.log(turns) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        span = high - low if high != low else 0.001
        ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(half)]
        return [f * (1 - r) + f / self.factor * r for f, r in zip(plain, ramp, strict=True)]


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's context extension, fields as in a Hugging Face `rope_parameters`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0

    def stretch(self, plain: list[float], theta: float) -> list[float]:
        """Divide frequencies of few turns over the original context, and blend those between.

        Fewer turns than `low_freq_factor` are divided by the factor. More than `high_freq_factor`
        stay as they are.
        """
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = [self.original_max_position_embeddings * f / (2 * math.pi) for f in plain]
        kept = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
        return [f * k + f / self.factor * (1 - k) for f, k in zip(plain, kept, strict=True)]


Scaling = Yarn | Llama3


def angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: Scaling | None
) -> Rope:
    """Return cosine and sine of the rotary angles; `theta` is the base of their wavelengths."""
    half = head_dim // 2
    frequencies, scale = [theta ** (-i / half) for i in range(half)], 1.0
    if scaling is not None:
        frequencies, scale = scaling.stretch(frequencies, theta), scaling.attention_factor
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
