"""Arithmetic that gives a token the same bits in every program.

What a token's log-probability is made of is computed by several programs: prefill, decoding steps,
packed rows. They differ in how many rows they run at once and in what the compiler fuses. Here each
sum has an order of its own, and each rounding is written out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 16  # columns of ones: with a single one, a product is another routine


def rounded(x: Array, dtype: Any) -> Array:
    """Cast to a narrower float; no compiler leaves this rounding out between fused operations."""
    if jnp.dtype(dtype) == x.dtype:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant).astype(dtype)


def apart(x: Array) -> Array:
    """Keep a float32 product from the sum that it enters: fused, it would not be rounded.

    It loses its last bit, since a compiler leaves out a rounding that changes nothing.
    """
    return jax.lax.reduce_precision(x, 8, 22)


def product(formula: str, x: Array, weight: Array) -> Array:
    """Return an einsum, summed in float32 and then rounded; its gradient is the plain one."""
    out: Any = _product(formula, x, weight)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(formula: str, x: Array, weight: Array) -> Array:
    return _forward(formula, x, weight)[0]


def _forward(formula: str, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    out = jnp.einsum(formula, x, weight, preferred_element_type=jnp.float32)
    return rounded(out, x.dtype), (x, weight)


def _backward(formula: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, pull = jax.vjp(partial(jnp.einsum, formula), *kept)
    return pull(gradient)


_product.defvjp(_forward, _backward)


def sum_last(x: Float[Array, "*batch N"]) -> Float[Array, " *batch"]:
    """Sum over the last axis by halves, whose order no compiler changes."""
    while x.shape[-1] > 1:
        size = x.shape[-1]
        if size % 2:
            x, size = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]), size + 1
        x = x[..., : size // 2] + x[..., size // 2 :]
    return x[..., 0]


def mean_last(x: Float[Array, "*batch N"]) -> Float[Array, " *batch"]:
    """Return the mean over the last axis."""
    return apart(sum_last(x) / x.shape[-1])


def total_last(x: Float[Array, "*batch N"]) -> Float[Array, " *batch"]:
    """Sum over the last axis by a matrix product, which reads `x` as it lies in memory.

    Fused into a sum, exponentials are computed again there, by another routine.
    """
    ones = jnp.ones((x.shape[-1], LANES), x.dtype)
    return jnp.einsum("...S,SO->...O", x, ones, preferred_element_type=jnp.float32).max(-1)


def log_total(mass: Float[Array, "*batch V"]) -> Float[Array, " *batch"]:
    """Return the logarithm of the sum over the last axis, for long axes of exponentials."""
    mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, -mass.shape[-1] % 128)])
    blocks = mass.reshape(*mass.shape[:-1], -1, 128)
    ones = jnp.ones((128, LANES), mass.dtype)
    sums = jnp.einsum("...S,SO->...O", blocks, ones, preferred_element_type=jnp.float32)
    logarithms = jnp.log(sum_last(jnp.swapaxes(sums, -1, -2)))
    # All columns are equal. Only a product reads them as whole vectors: fused into what follows,
    # the logarithm of a single number is taken by another routine.
    first = jnp.zeros((LANES, LANES)).at[0].set(1.0)
    return jnp.einsum("...O,OP->...P", logarithms, first).max(-1)
