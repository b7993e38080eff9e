"""What devices exchange inside the model, written out where the compiler's own choice costs more.

`gather` and `look_up` are called on each device by itself, inside `shard_map`; `sum_heads` by all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlrm.runtime.mesh import Layout, Local


def gather(layout: Layout, weights: Any, letters: Any) -> Any:
    """Gather the weights of one layer from all devices."""

    def whole(x: Array, letters: PartitionSpec) -> Array:
        of_layer = [letter for letter in letters if letter != "L"]
        # In reverse, because a dimension is cut by its first axis first.
        for dimension, axes in enumerate(layout.param_axes(of_layer)):
            for axis in reversed(axes):
                x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
        return x

    return jax.tree.map(whole, weights, letters)


def look_up(layout: Layout, table: Array, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return embeddings from a table that is spread by rows, without gathering the table.

    An all-to-all spreads the table by columns. Each device looks up its columns for the tokens of
    all devices, and a second all-to-all brings back whole embeddings of its own tokens.
    """
    axes = layout.param_axes("V")[0]
    turned = jax.lax.all_to_all(table, axes, split_axis=1, concat_axis=0, tiled=True)
    everyones = jax.lax.all_gather(tokens, axes, axis=0, tiled=True)
    columns = jnp.take(turned, everyones, axis=0)
    return jax.lax.all_to_all(columns, axes, split_axis=0, concat_axis=2, tiled=True)


def sum_heads(
    layout: Layout | Local, out: Float[Array, "A T N H"], kernel: Float[Array, "N H D"]
) -> Float[Array, "B T D"]:
    """Return the sum over heads of their outputs times their weights."""

    if isinstance(layout, Local) or _stays(layout, len(out)):
        return layout.shard(jnp.einsum("ATNH,NHD->ATD", out, kernel), "B T D")
    rows = tuple(axis for axis in layout.axes("A") if axis not in layout.axes("B"))
    num_parts = layout.num_shards("A") // layout.num_shards("B")

    def run(out: Array, kernel: Array) -> Array:
        # One sum over all devices, to which each gives its own rows, and zeros for others'. Left to
        # itself, the compiler sums over heads and then gathers rows.
        is_own = jnp.arange(num_parts) == jax.lax.axis_index(rows)
        everyones = jnp.where(is_own[:, None, None, None, None], out[None], 0)
        everyones = everyones.reshape(-1, *out.shape[1:])
        product = jnp.einsum("BTNH,NHD->BTD", everyones, kernel)
        return jax.lax.psum(product, (*rows, *layout.axes("N")))

    specs = layout.activation("A T N H").spec, layout.param(("N", "H", "D")).spec
    spec = layout.activation("B T D").spec
    return jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=spec)(out, kernel)


def _stays(layout: Layout, num_rows: int) -> bool:
    """Return whether rows lie the same inside and outside of attention, or can't be divided."""
    return layout.axes("A") == layout.axes("B") or num_rows % layout.num_shards("A") > 0
