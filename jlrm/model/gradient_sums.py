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

PARTS = 32  # of a matrix, one of which slices exchange at a time
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
        empty = jnp.zeros((_num_sharing(param.sharding), *param.shape), jnp.float32)
        return jax.lax.with_sharding_constraint(empty, spread(param.sharding))

    return jax.tree.map(zero, params)


def has_slices(params: Any) -> bool:
    """Return whether abstract parameters lie on several slices."""
    return jax.tree.leaves(params)[0].sharding.mesh.shape["data"] > 1


def copies(params: Any, abstract: Any) -> Any:
    """Return parameters with a leading axis over the devices that share them, which costs nothing.

    The gradient of a copy is what its devices have. So passes need not sum over slices, whose
    network is slow: `total_of_copies` does, once a step.
    """

    def copy(x: Array, param: jax.ShapeDtypeStruct) -> Array:
        assert isinstance(param.sharding, NamedSharding)
        many = jnp.broadcast_to(x[None], (_num_sharing(param.sharding), *x.shape))
        return jax.lax.with_sharding_constraint(many, spread(param.sharding))

    return jax.tree.map(copy, params, abstract)


def total(sums: Any, params: Any) -> Any:
    """Return the sums over all devices of layers' gradients, each where its parameter lies."""
    if has_slices(params):
        return _exchanged(_in_loop, sums, params)
    return jax.tree.map(
        lambda x, param: jax.lax.with_sharding_constraint(jnp.sum(x, axis=0), param.sharding),
        sums,
        params,
    )


def total_of_copies(gradients: Any, params: Any) -> Any:
    """Return the sums over all devices of the gradients of `copies`."""

    def in_parts(x: Array, axes: tuple[str, ...]) -> Array:
        parts = x.reshape(math.gcd(len(x), PARTS), -1, *x.shape[1:])
        return _in_loop(parts, axes).reshape(x.shape)

    each = partial(jax.tree.map, in_parts)
    return _exchanged(each, gradients, params)


def _exchanged(exchange: Callable[[Any, Any], Any], sums: Any, params: Any) -> Any:
    """Run `exchange` on what each device has, given the axes of the mesh to sum over."""
    shardings = jax.tree.map(lambda param: param.sharding, params)
    axes = jax.tree.map(_sharing, shardings)
    return jax.shard_map(
        lambda sums: exchange(jax.tree.map(lambda x: x[0], sums), axes),
        mesh=jax.tree.leaves(shardings)[0].mesh,
        in_specs=(jax.tree.map(lambda sharding: spread(sharding).spec, shardings),),
        out_specs=jax.tree.map(lambda sharding: sharding.spec, shardings),
        check_vma=False,
    )(sums)


def _in_loop(stack: Any, axes: Any) -> Any:
    """Sum over devices, one of a stack at a time and in place.

    For what slices send each other outside of a loop, libtpu 0.0.42 counts a buffer of its size to
    the program's code, which stays in memory, once for every shape of rows: 9.5 GiB for a 14B on
    two slices of v5e-64, and 1.9 so. In a loop it is temporary, and of one layer.
    """

    def add(i: Array, stack: Any) -> Any:
        return jax.tree.map(lambda x, axes: x.at[i].set(jax.lax.psum(x[i], axes)), stack, axes)

    return jax.lax.fori_loop(0, len(jax.tree.leaves(stack)[0]), add, stack)


def _num_sharing(sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in _sharing(sharding))


def _sharing(sharding: NamedSharding) -> tuple[str, ...]:
    """Return the axes of the mesh that do not cut a parameter."""
    cut = [axes if isinstance(axes, tuple) else (axes,) for axes in sharding.spec]
    return tuple(axis for axis in AXES if not any(axis in axes for axes in cut))
