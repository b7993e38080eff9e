"""Arithmetic that gives a token the same bits in every program.

What a token's log-probability is made of is computed by several programs: prefill, decoding steps,
packed rows. They differ in how many rows they run at once and in what the compiler fuses. Here each
sum has an order of its own, and each rounding is written out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LANES = 16  # columns that sum: with a single one, a product is another routine
FEW = 64  # rows below which a float32 product is another routine (JAX 0.12: up to 60)


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
    """Sum what is not negative over the last axis, by a product that reads `x` as it lies there.

    Fused into a sum, exponentials are computed again there, by another routine.
    """
    return _summed(x).max(-1)


def log_total(mass: Float[Array, "*batch V"]) -> Float[Array, " *batch"]:
    """Return the logarithm of the sum over the last axis, for long axes of exponentials."""
    mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, -mass.shape[-1] % 128)])
    blocks = mass.reshape(*mass.shape[:-1], -1, 128)
    logarithms = jnp.log(sum_last(jnp.swapaxes(_summed(blocks), -1, -2)))
    # The first column is the sum's. Only a product reads them as whole vectors: fused into what
    # follows, the logarithm of a single number is taken by another routine.
    first = np.zeros((LANES, LANES), np.float32)
    first[0] = 1.0
    return jnp.einsum("...O,OP->...P", logarithms, first).max(-1)


def _summed(x: Float[Array, "*batch N"]) -> Float[Array, "*batch lanes"]:
    """Return the sum over the last axis in every lane but the last, which has half of it."""
    # Not all ones: XLA keeps those as one number that is repeated inside the product, and with the
    # options of other programs its library of fused loops (JAX 0.10.2) then returns garbage.
    ones = np.ones((x.shape[-1], LANES), x.dtype)
    ones[:, -1] = 0.5
    num_rows = math.prod(x.shape[:-1])
    if num_rows >= FEW:
        return jnp.einsum("...S,SO->...O", x, ones, preferred_element_type=jnp.float32)
    rows = jnp.pad(x.reshape(num_rows, -1), ((0, FEW - num_rows), (0, 0)))
    return _summed(rows)[:num_rows].reshape(*x.shape[:-1], LANES)
