"""Experts in the place of an MLP: a router sends each token to a few of many (Qwen3-MoE).

Tokens are sorted by expert, and a ragged product multiplies each run of them with the matrices of
its expert. A TPU computes the chosen experts alone; on CPUs JAX multiplies every row with all
experts and masks, which suits tests and small models. No expert is ever full: nothing is dropped.

While training, a device has gathered the experts of a layer and runs its own tokens, on TPUs by
Megablox: for the gradient of the matrices XLA's own ragged product would run all experts on all
tokens (libtpu 0.0.42, compiled: 128 times the work for Qwen3-30B-A3B). In a rollout experts stay
where they are: a device runs the tokens that chose one of its own, and the outputs of all are
summed, as those of an MLP are.

Whatever is computed anew, in a backward pass too, is rounded anew: between experts that are nearly
as good for a token another may be chosen then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jlrm.model.remat import EXPERTS
from jlrm.runtime.mesh import Layout, Local

# product(rows "n D", matrices "E D F", the number of rows of each "E") -> "n F"
Product = Callable[[Array, Array, Array], Array]
TILE = 512, 1024, 1024  # of a grouped product, at most: rows, inputs, outputs
MOST_ROWS = 2**16  # tokens times experts that are computed at once in a rollout


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
        chosen = chosen - jax.lax.axis_index(axes) * len(own.gate)
        # Of prompts that are long together, part by part: each token stands there once for each of
        # its experts, on every device.
        num_tokens, num_parts = chosen[..., 0].size, -(-chosen.size // MOST_ROWS)
        missing = -num_tokens % num_parts

        def parted(x: Array, filling: int) -> Array:
            flat = x.reshape(num_tokens, x.shape[-1])
            filled = jnp.pad(flat, ((0, missing), (0, 0)), constant_values=filling)
            return filled.reshape(num_parts, 1, -1, x.shape[-1])

        parts = parted(x, 0), parted(chosen, -1), parted(shares, 0)  # -1: no expert's number
        out = jax.lax.map(lambda part: run(part[0], part[1], part[2], own), parts)
        return jax.lax.psum(out.reshape(-1, x.shape[-1])[:num_tokens].reshape(x.shape), axes)

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
    named = partial(checkpoint_name, name=EXPERTS)
    flat = chosen.reshape(-1)
    is_own = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(is_own, flat, num_experts)  # others' last, beyond all groups
    order = jnp.argsort(flat)
    back = jnp.argsort(order)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)

    rows: Any = _rows_of_tokens(num_chosen, x.reshape(-1, x.shape[-1]), order, back)
    gate, up = (named(product(rows, each, sizes)) for each in experts[:2])
    out = named(product(jax.nn.silu(gate) * up, experts.down, sizes))
    return _summed(_permuted(out, back, order), is_own, shares).astype(x.dtype)


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

    tiling = _tiling if rows.dtype.itemsize == 2 else _tiling_of_wide
    return megablox.gmm(rows, matrices, sizes, rows.dtype, tiling, None, None, False, interpret)


def _tiling(num_rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    return math.gcd(num_rows, TILE[0]), min(inputs, TILE[1]), min(outputs, TILE[2])


def _tiling_of_wide(num_rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Return tiles of float32, of which fewer numbers fit on the chip."""
    num_rows, inputs, outputs = _tiling(num_rows, inputs, outputs)
    return num_rows, min(inputs, TILE[1] // 2), min(outputs, TILE[2] // 2)


def _summed(
    out: Float[Array, "n D"], is_own: Bool[Array, " n"], shares: Float[Array, "B T C"]
) -> Float[Array, "B T D"]:
    """Return the sums over a token's experts, in float32; a product leaves others' rows open."""
    out = jnp.where(is_own[:, None], out, 0).reshape(*shares.shape, -1)
    return jnp.einsum("BTCD,BTC->BTD", out, shares, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows_of_tokens(
    num_chosen: int, x: Float[Array, "t D"], order: Int[Array, " n"], back: Int[Array, " n"]
) -> Float[Array, "n D"]:
    """Return each token once for each of its experts, in an order that `back` undoes."""
    return x[order // num_chosen]


def _rows_forward(num_chosen: int, x: Array, order: Array, back: Array) -> tuple[Array, Array]:
    return x[order // num_chosen], back


def _rows_backward(num_chosen: int, back: Array, gradient: Array) -> tuple[Array, None, None]:
    of_tokens = gradient[back].reshape(-1, num_chosen, gradient.shape[-1])
    return of_tokens.sum(axis=1, dtype=jnp.float32).astype(gradient.dtype), None, None


_rows_of_tokens.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def _permuted(rows: Float[Array, "n D"], order: Array, back: Array) -> Float[Array, "n D"]:
    """Return `rows[order]`; `back` undoes it. Its gradient is a permutation too, and no sum."""
    return rows[order]


def _permuted_forward(rows: Array, order: Array, back: Array) -> tuple[Array, Array]:
    return rows[order], back


def _permuted_backward(back: Array, gradient: Array) -> tuple[Array, None, None]:
    return gradient[back], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
