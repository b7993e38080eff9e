"""Layers whose gradients are added, one by one and in place, to the sums of the passes before.

An optimiser step of several passes needs the sum of their gradients. Summed after each pass, there
are two sets of gradients at a time, this pass's and the sum. Here the backward pass of the layers
carries the sums through its loop, and adds a layer's gradient when it has it: there is one set.

The sums enter as an argument, and what leaves is their cotangent: not a derivative, but the sums
with this call's gradients in them. Each device adds what it has of its own. Where a parameter lies
on several devices whole, each of them has a sum, and `total` adds these up, once for all passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jlrm.model.lora import join
from jlrm.runtime.mesh import AXES

# layer(weights of one layer, x "B T D", context) -> x "B T D"
Layer = Callable[[Any, Array, Any], Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(
    layer: Layer, stack: Any, frozen: Any, sums: Any, x: Float[Array, "B T D"], context: Any
) -> Float[Array, "B T D"]:
    """Run layers whose weights are stacked; the backward pass computes each of them again.

    Args:
      layer: must not close over traced arrays.
      stack, frozen: the weights that are trained, and those that have no gradient.
      sums: as `spread` puts them, as one device sees them: a leading axis of size 1.
      context: has no gradient.
    """
    whole = join(frozen, stack)
    x, _ = jax.lax.scan(lambda x, weights: (layer(weights, x, context), None), x, whole)
    return x


def _forward(
    layer: Layer, stack: Any, frozen: Any, sums: Any, x: Array, context: Any
) -> tuple[Array, Any]:
    whole = join(frozen, stack)
    out, inputs = jax.lax.scan(lambda x, weights: (layer(weights, x, context), x), x, whole)
    return out, (stack, frozen, sums, inputs, context)


def _backward(layer: Layer, kept: Any, gradient: Array) -> tuple[None, None, Any, Array, None]:
    stack, frozen, sums, inputs, context = kept
    last = inputs.shape[0] - 1

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        gradient, sums = carry
        take = partial(jax.lax.dynamic_index_in_dim, index=last - i, keepdims=False)
        weights, fixed, x = jax.tree.map(take, (stack, frozen, inputs))
        _, pull = jax.vjp(lambda weights, x: layer(join(fixed, weights), x, context), weights, x)
        of_weights, gradient = pull(gradient)
        sums = jax.tree.map(
            lambda total, one: total.at[0, last - i].add(one.astype(total.dtype)), sums, of_weights
        )
        return gradient, sums

    gradient, sums = jax.lax.fori_loop(0, last + 1, step, (gradient, sums))
    return None, None, sums, gradient, None


run.defvjp(_forward, _backward)


def spread(sharding: NamedSharding) -> NamedSharding:
    """Return where the sums of a parameter lie: a leading axis over the devices that share it."""
    return NamedSharding(sharding.mesh, PartitionSpec(_sharing(sharding) or None, *sharding.spec))


def zeros(params: Any) -> Any:
    """Return sums to begin with, in float32, of abstract parameters with shardings."""

    def zero(param: jax.ShapeDtypeStruct) -> Array:
        assert isinstance(param.sharding, NamedSharding)
        num = math.prod(param.sharding.mesh.shape[axis] for axis in _sharing(param.sharding))
        empty = jnp.zeros((num, *param.shape), jnp.float32)
        return jax.lax.with_sharding_constraint(empty, spread(param.sharding))

    return jax.tree.map(zero, params)


def total(sums: Any, params: Any) -> Any:
    """Return the sums over all devices, each where its parameter lies."""
    if jax.tree.leaves(params)[0].sharding.mesh.shape["data"] > 1:
        return _total_of_slices(sums, params)
    return jax.tree.map(
        lambda x, param: jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), param.sharding),
        sums,
        params,
    )


def _total_of_slices(sums: Any, params: Any) -> Any:
    """Return the same, layer by layer and in place.

    For what slices send each other outside of a loop, libtpu 0.0.42 counts a buffer of its size to
    the program's code, which stays in memory, once for every shape of rows: 9.5 GiB for a 14B on
    two slices of v5e-64, and 1.9 so. In a loop it is temporary, and of one layer.
    """
    shardings = jax.tree.map(lambda param: param.sharding, params)
    axes = jax.tree.map(_sharing, shardings)

    def run(sums: Any) -> Any:
        def add(i: Array, own: Any) -> Any:
            return jax.tree.map(lambda x, axes: x.at[i].set(jax.lax.psum(x[i], axes)), own, axes)

        own = jax.tree.map(lambda x: x[0], sums)
        return jax.lax.fori_loop(0, len(jax.tree.leaves(own)[0]), add, own)

    return jax.shard_map(
        run,
        mesh=jax.tree.leaves(shardings)[0].mesh,
        in_specs=(jax.tree.map(lambda sharding: spread(sharding).spec, shardings),),
        out_specs=jax.tree.map(lambda sharding: sharding.spec, shardings),
        check_vma=False,
    )(sums)


def _sharing(sharding: NamedSharding) -> tuple[str, ...]:
    """Return the axes of the mesh that do not cut a parameter."""
    cut = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    return tuple(axis for axis in AXES if not any(axis in axes for axes in cut))
