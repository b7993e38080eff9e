"""Digests of what a checkpoint holds: of numbers, not of files.

A digest of an array is two sums over its numbers, modulo 2³², of a mixture of each number's bits
and place. Mixing is one-to-one, so one changed number always shows, and several do but for a chance
of some 2⁻⁶⁴. Sums come out alike however an array lies on devices and hosts: each device adds up
its own part, and a checkpoint that is restored onto another mesh has the same digests. They guard
against damage, not against people.

Stacked layers have a digest each, and experts in them, so that export can check what it reads. A
parameter has one for each precision in which it may be read. Numbers are float32, bfloat16, float16
or 32-bit integers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

GOLDEN, FIRST, SECOND, THIRD = (  # odd, so that multiplying by them is one-to-one
    *(0x9E3779B1, 0x85EBCA6B),  # 2³² over the golden ratio; MurmurHash3's finalizer
    *(0xC2B2AE35, 0x27D4EB2F),
)
PART = 2**16  # numbers that the host mixes at a time, to stay in its cache
PARAMS, STACKED = "params.", "params.layers."  # how names of parameters begin
EXPERTS = ".experts."
SEAL = "seal"


def look(tree: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the digests of arrays on devices, and the names of those with a NaN or an infinity.

    One program reads every array once. All processes call it; all get the same answer.

    Args:
      tree: {"params": ..., "opt_state": ...}, of `jax.Array`s.

    Returns:
      name: {dtype: digest, or a list of one for each layer (of experts: a list for each layer)},
      and names; a name is a path.
    """
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    sums, are_finite = jax.device_get(_program(mesh)(tree))
    computed = {name: {dtype: _text(s) for dtype, s in each.items()} for name, each in sums.items()}
    return computed, [name for name, is_fine in are_finite.items() if not is_fine]


def of_array(array: np.ndarray) -> str:
    """Return the digest of an array, or of a part of a stacked one, on the host."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    total = np.zeros(2, np.uint32)
    for start in range(0, len(bits), PART):
        part = bits[start : start + PART].astype(np.uint32)
        places = (np.arange(start, start + len(part)) % 2**32).astype(np.uint32)
        mixed = _mix(part + places * np.uint32(GOLDEN))
        total += [mixed.sum(dtype=np.uint32), _again(mixed).sum(dtype=np.uint32)]
    return _hex(total)


def is_stored(array: np.ndarray, index: tuple[int, ...], wanted: dict[str, Any]) -> bool:
    """Return whether an array on the host, or the part of it at an index, is what `look` found."""
    mine = wanted.get(array.dtype.name)
    for i in index:
        mine = mine[i] if isinstance(mine, list) and i < len(mine) else None
    return _of_parts(array, mine) == mine


def _of_parts(array: np.ndarray, like: Any) -> Any:
    """Return digests of an array's parts, in lists as deep as those of `like`."""
    if not isinstance(like, list) or not like:
        return of_array(array)
    return [_of_parts(each, like[0]) for each in array]


def of_json(content: Any) -> str:
    """Return the digest of what JSON says, however it is spelled."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(described: dict[str, Any]) -> dict[str, Any]:
    """Return digests with one of their own."""
    return {**described, SEAL: of_json(described)}


def is_intact(described: Any) -> bool:
    """Return whether these are digests as `sealed` made them."""
    rest = {k: v for k, v in described.items() if k != SEAL} if isinstance(described, dict) else {}
    return bool(rest) and of_json(rest) == described.get(SEAL)


def changed(tree: Any, wanted: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the names of arrays that are not what was saved, and of those that are not finite.

    Args:
      tree: as of `look`.
      wanted: what `look` had found.
    """
    computed, broken = look(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    dtypes = {_name(path): str(leaf.dtype) for path, leaf in leaves}
    return [
        name
        for name, dtype in dtypes.items()
        if wanted.get(name, {}).get(dtype) != computed[name][dtype]
    ], broken


@functools.lru_cache(maxsize=4)
def _program(mesh: Any) -> Any:
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(_look, out_shardings=whole)


def _look(tree: Any) -> Any:
    sums, are_finite = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        num_kept = name.startswith(STACKED) * (2 if EXPERTS in name else 1)
        sums[name] = {
            dtype: _sums(bits, num_kept)
            for dtype, bits in _bits(leaf, is_param=name.startswith(PARAMS)).items()
        }
        are_finite[name] = jnp.isfinite(leaf).all()
    return sums, are_finite


def _bits(x: jax.Array, is_param: bool) -> dict[str, jax.Array]:
    """Return an array's bits as uint32, in each precision in which it may be read."""
    size = x.dtype.itemsize * 8
    own = jax.lax.bitcast_convert_type(x, f"uint{size}").astype(jnp.uint32)
    if not is_param:
        return {str(x.dtype): own}
    # By integers, since a device may flush to zero what is small, and the host that reads does not.
    if x.dtype == jnp.bfloat16:
        full = own << 16
    else:
        full = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    half = (full + jnp.uint32(0x7FFF) + (full >> 16 & 1)) >> 16  # to nearest, ties to even
    return {"float32": full, "bfloat16": half, str(x.dtype): own}


def _sums(bits: jax.Array, num_kept: int) -> jax.Array:
    """Return both sums over all axes but the first `num_kept`, as the last axis."""
    axes = tuple(range(num_kept, bits.ndim))
    places, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(axes):
        step = jnp.uint32(stride % 2**32)
        places += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    mixed = _mix(bits + places * jnp.uint32(GOLDEN))
    both = [x.sum(axes, dtype=jnp.uint32) for x in (mixed, _again(mixed))]
    return jnp.stack(both, axis=-1)


def _mix(x: Any) -> Any:
    """Mix 32 bits, one-to-one; of NumPy or of JAX."""
    kind = np.uint32
    x = (x ^ (x >> kind(16))) * kind(FIRST)
    x = (x ^ (x >> kind(13))) * kind(SECOND)
    return x ^ (x >> kind(16))


def _again(mixed: Any) -> Any:
    """Mix once more, for a second sum that the first does not determine."""
    return (mixed ^ (mixed >> np.uint32(15))) * np.uint32(THIRD)


def _text(sums: np.ndarray) -> Any:
    return _hex(sums) if sums.ndim == 1 else [_text(each) for each in sums]


def _hex(both: np.ndarray) -> str:
    return "".join(f"{int(each):08x}" for each in both)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
