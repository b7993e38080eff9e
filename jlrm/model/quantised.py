"""Frozen matrices in 8 or 4 bits, as QLoRA stores them (arXiv 2305.14314): widened when they run.

Numbers that stand next to each other along the last axis, 64 at most, share a float32 scale: the
largest magnitude among them. 8 bits hold 255 even levels. 4 bits hold the 16 levels of NormalFloat
(appendix E there), two numbers a byte. The last axis is cut by no device in training, so a device
widens its own part, and gathers travel narrow. Left out: quantising the scales too.

All functions take arrays of JAX, or of NumPy where no device is wanted.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 64
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Blocks(NamedTuple):
    """A quantised matrix."""

    values: Any  # int8, or uint8: the first half of the last axis in the low bits, the second above
    scale: Any  # float32, one a block


def quantise(x: Any, kind: str) -> Blocks:
    """Quantise along the last axis; `kind` is "int8" or "nf4"."""
    np_ = np if isinstance(x, np.ndarray) else jnp
    blocks = x.astype(np_.float32).reshape(*x.shape[:-1], -1, math.gcd(BLOCK, x.shape[-1]))
    scale = np_.max(np_.abs(blocks), axis=-1)
    share = blocks / np_.where(scale > 0, scale, 1)[..., None]
    if kind == "int8":
        return Blocks(np_.round(share * 127).astype(np_.int8).reshape(x.shape), scale)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    index: Any = sum((share > middle).astype(np_.uint8) for middle in middles)
    index = index.reshape(x.shape)
    half = x.shape[-1] // 2
    return Blocks(index[..., :half] | index[..., half:] << 4, scale)


def widen(x: Any) -> Float[Array, "..."]:
    """Return the float32 matrix that a quantised one stands for; another as it is."""
    if not isinstance(x, Blocks):
        return x
    np_ = np if isinstance(x.values, np.ndarray) else jnp
    if x.values.dtype == jnp.int8:
        share = x.values.astype(np_.float32) / 127
    else:
        index = np_.concatenate([x.values & 15, x.values >> 4], axis=-1)
        # By the bits of the index, since a TPU looks up slowly in a table of its own.
        levels: list[Any] = [np_.float32(level) for level in NF4]
        for bit in range(4):
            is_set = (index >> bit & 1) == 1
            pairs = zip(levels[::2], levels[1::2], strict=True)
            levels = [np_.where(is_set, high, low) for low, high in pairs]
        (share,) = levels
    blocks = share.reshape(*x.scale.shape, -1) * x.scale[..., None]
    return blocks.reshape(share.shape)


def quantise_layers(params: Any, kind: str) -> Any:
    """Return parameters with the matrices of their layers quantised; `kind` "stored": none."""
    if kind == "stored":
        return params
    return _map_matrices(params, lambda x: quantise(x, kind))


def widen_all(tree: Any) -> Any:
    """Return a tree with every quantised matrix in float32."""
    return jax.tree.map(widen, tree, is_leaf=lambda x: isinstance(x, Blocks))


def quantise_letters(letters: Any, kind: str) -> Any:
    """Return the letters of quantised parameters."""
    return letters if kind == "stored" else _map_matrices(letters, lambda x: Blocks(x, x))


def _map_matrices(params: Any, function: Any) -> Any:
    layers = flax.traverse_util.path_aware_map(
        lambda path, x: function(x) if path[-1] in MATRICES else x, params["layers"]
    )
    return {**params, "layers": layers}
