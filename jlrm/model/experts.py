"""Experts in the place of an MLP: a router sends each token to a few of many (Qwen3-MoE).

Tokens are sorted by expert, and a ragged product multiplies each run of them with the matrices of
its expert. A TPU computes the chosen experts alone; elsewhere JAX writes the product as one of all
experts with masks, which suits tests and small models. No expert is ever full: nothing is dropped.

While training, a device has gathered the experts of a layer and runs its own tokens, on TPUs by
Megablox: for the gradient of the matrices XLA's own ragged product would run all experts on all
tokens (libtpu 0.0.42, compiled: 128 times the work for Qwen3-30B-A3B). In a rollout experts stay
where they are: a device runs the tokens that chose one of its own, and the outputs of all are
summed, as those of an MLP are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.runtime.mesh import Layout, Local

# product(rows "n D", matrices "E D F", the number of rows of each "E") -> "n F"
Product = Callable[[Array, Array, Array], Array]
TILE = 512, 1024, 1024  # of a grouped product, at most: rows, inputs, outputs


class Matrices(NamedTuple):
    """The weights of all experts, or of those that lie on a device."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


def choose(
    x: Float[Array, "B T D"], router: Float[Array, "D E"], num_chosen: int, is_normed: bool
) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"]]:
    """Return the experts of each token and their shares, in float32.

    Args:
      is_normed: the shares of a token sum to 1; else they are what a softmax over all gives.
    """
    logits = jnp.einsum("BTD,DE->BTE", x, router, preferred_element_type=jnp.float32)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits), num_chosen)
    return chosen, shares / shares.sum(axis=-1, keepdims=True) if is_normed else shares


def mix(
    layout: Layout | Local,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T C"],
    shares: Float[Array, "B T C"],
    experts: Matrices,
) -> Float[Array, "B T D"]:
    """Return the sum over each token's experts of their outputs, by their shares."""
    if isinstance(layout, Local):
        product = grouped_product if layout.platform == "tpu" else jax.lax.ragged_dot
        return run(x, chosen, shares, experts, product)
    axes = layout.axes("E")

    def run_own(x: Array, chosen: Array, shares: Array, own: Matrices) -> Array:
        first = jax.lax.axis_index(axes) * len(own.gate)
        return jax.lax.psum(run(x, chosen - first, shares, own), axes)

    letters = "M - -" if len(x) % layout.num_shards("M") == 0 else "- - -"
    rows, own = layout.activation(letters).spec, layout.param(("E", None, None)).spec
    specs: Any = rows, rows, rows, Matrices(own, own, own)  # pyright: ignore[reportArgumentType]
    sharded = jax.shard_map(run_own, mesh=layout.mesh, in_specs=specs, out_specs=rows)
    return layout.shard(sharded(x, chosen, shares, experts), "B T D")


def run(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T C"],
    shares: Float[Array, "B T C"],
    experts: Matrices,
    product: Product = jax.lax.ragged_dot,
) -> Float[Array, "B T D"]:
    """Return the sum of the outputs of these experts; others' numbers are not 0 to E - 1."""
    num_experts, num_chosen = len(experts.gate), chosen.shape[-1]
    flat = chosen.reshape(-1)
    is_own = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(is_own, flat, num_experts)  # others' last, beyond all groups
    order = jnp.argsort(flat)
    back = jnp.argsort(order)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)

    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), num_chosen, axis=0)
    rows = _permuted(rows, order, back)
    hidden = jax.nn.silu(product(rows, experts.gate, sizes)) * product(rows, experts.up, sizes)
    out = _permuted(product(hidden, experts.down, sizes), back, order)
    return _summed(out, is_own, shares).astype(x.dtype)


def grouped_product(
    rows: Float[Array, "n D"],
    matrices: Float[Array, "E D F"],
    sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "n F"]:
    """Return each row times the matrix of its group, by TPU kernels, as are its gradients.

    Args:
      sizes: of the groups, which hold all rows.
      interpret: run the kernels on another platform.
    """

    from jax.experimental.pallas.ops.tpu import megablox  # other platforms do without

    return megablox.gmm(rows, matrices, sizes, rows.dtype, _tiling, None, None, False, interpret)


def _tiling(num_rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    return math.gcd(num_rows, TILE[0]), min(inputs, TILE[1]), min(outputs, TILE[2])


def _summed(
    out: Float[Array, "n D"], is_own: Bool[Array, " n"], shares: Float[Array, "B T C"]
) -> Float[Array, "B T D"]:
    """Return the sums over a token's experts, in float32; a product leaves others' rows open."""
    out = jnp.where(is_own[:, None], out, 0).reshape(*shares.shape, -1)
    return jnp.einsum("BTCD,BTC->BTD", out, shares, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _permuted(rows: Float[Array, "n D"], order: Array, back: Array) -> Float[Array, "n D"]:
    """Return `rows[order]`; `back` undoes it. Its gradient is a permutation too, and no sum."""
    return rows[order]


def _permuted_forward(rows: Array, order: Array, back: Array) -> tuple[Array, Array]:
    return rows[order], back


def _permuted_backward(back: Array, gradient: Array) -> tuple[Array, None, None]:
    return gradient[back], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
