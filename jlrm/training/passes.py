"""Loss and gradients of an optimiser batch: its passes, one after another, and their sum.

Passes are summed, not averaged. Layers' gradients are added in place as they come, where layers are
computed anew in the backward pass anyway (model/gradient_sums.py). Between slices nothing is summed
before the last pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlrm.model import gradient_sums
from jlrm.model.qwen import Params
from jlrm.training.packing import Rows

# loss(params, sums of the layers' gradients or None, one pass) -> (loss, further sums)
Loss = Callable[[Params, Params | None, tuple[Rows, Any]], tuple[Array, dict[str, Array]]]


def value_and_gradients(
    loss: Loss, params: Params, abstract: Params, batch: tuple[Rows, Any], remat: str
) -> tuple[tuple[Array, dict[str, Array]], Params]:
    """Return loss, further sums and gradients of all passes, where their parameters lie.

    Args:
      abstract: the parameters as they are kept, with shardings; gradients have their dtype.
      remat: as of `QwenConfig`.
    """
    if batch[0].tokens.shape[0] == 1 and not gradient_sums.has_slices(abstract):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        value_and_sums, grads = value_and_grad(params, None, one_pass(batch, 0))
        grads = jax.lax.with_sharding_constraint(
            grads, jax.tree.map(lambda x: x.sharding, abstract)
        )
        return value_and_sums, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, abstract)
    if remat == "full":
        return _summed_in_place(loss, params, abstract, batch)
    return _summed(loss, params, abstract, batch)


def one_pass(batch: Any, i: Int[Array, ""] | int) -> Any:
    """Return the i-th pass; a number that belongs to all of them stays."""
    return jax.tree.map(lambda x: x[i] if x.ndim else x, batch)


def _summed(loss: Loss, params: Params, abstract: Params, batch: tuple[Rows, Any]) -> Any:
    """Return loss, further sums and gradients of all passes, added up pass by pass."""
    params, shardings, total = _apart(params, abstract)

    def value_and_grad(params: Params, part: tuple[Rows, Any]) -> Any:
        value_and_sums, grads = jax.value_and_grad(loss, has_aux=True)(params, None, part)
        return value_and_sums, jax.lax.with_sharding_constraint(grads, shardings)

    def add(i: Array, so_far: Any) -> Any:
        return jax.tree.map(jnp.add, so_far, value_and_grad(params, one_pass(batch, i)))

    zeros = _zeros(jax.eval_shape(value_and_grad, params, one_pass(batch, 0)))
    value_and_sums, grads = jax.lax.fori_loop(0, batch[0].num_passes, add, zeros)
    return value_and_sums, total(grads)


def _summed_in_place(loss: Loss, params: Params, abstract: Params, batch: tuple[Rows, Any]) -> Any:
    """Return the same, with layers' gradients added up as they come (model/gradient_sums.py)."""
    outer = {name: tree for name, tree in params.items() if name != "layers"}
    outer, shardings, total = _apart(outer, abstract)

    def value_and_grad(outer: Params, sums: Params, part: tuple[Rows, Any]) -> Any:
        def of_both(outer: Params, sums: Params) -> tuple[Array, dict[str, Array]]:
            return loss({**outer, "layers": params["layers"]}, sums, part)

        both = jax.value_and_grad(of_both, argnums=(0, 1), has_aux=True)
        value_and_sums, (grads, sums) = both(outer, sums)
        return (value_and_sums, jax.lax.with_sharding_constraint(grads, shardings)), sums

    def add(i: Array, so_far: Any) -> Any:
        others, sums = so_far
        more, sums = value_and_grad(outer, sums, one_pass(batch, i))
        return jax.tree.map(jnp.add, others, more), sums

    sums = gradient_sums.zeros(abstract["layers"])
    zeros = _zeros(jax.eval_shape(value_and_grad, outer, sums, one_pass(batch, 0))[0])
    others, sums = jax.lax.fori_loop(0, batch[0].num_passes, add, (zeros, sums))
    value_and_sums, grads = others
    layers = gradient_sums.total(sums, abstract["layers"])
    return value_and_sums, {**total(grads), "layers": layers}


def _apart(params: Params, abstract: Params) -> tuple[Params, Any, Callable[[Params], Params]]:
    """Let each slice sum gradients of its own: return the parameters to differentiate by.

    Also where their gradients lie, and what makes the whole gradients of these.
    """
    wanted = {name: abstract[name] for name in params}
    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    if not (params and gradient_sums.has_slices(abstract)):
        return params, shardings, lambda grads: grads
    copied = {name: tree for name, tree in wanted.items() if name != "score"}  # which is small
    shardings |= jax.tree.map(lambda x: gradient_sums.spread(x.sharding), copied)

    def total(grads: Params) -> Params:
        mine = {name: grads[name] for name in copied}
        return grads | gradient_sums.total_of_copies(mine, copied)

    copies = gradient_sums.copies({name: params[name] for name in copied}, copied)
    return params | copies, shardings, total


def _zeros(shapes: Any) -> Any:
    """Return zeros of these shapes, at least in float32."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes
    )
