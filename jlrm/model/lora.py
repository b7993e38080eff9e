"""Adapters: what is trained beside matrices that stay as they are.

LoRA (arXiv 2106.09685) adds `scale · A Bᵀ` of a low rank U to a matrix W. DoRA (arXiv 2402.09353)
then gives each output of the sum a trained length: `m (W + scale · A Bᵀ) / ‖W + scale · A Bᵀ‖`,
where the norm over inputs is taken as a constant. A is `[inputs, U]` and B `[outputs, U]`.

While training, x goes past W by the side: `x W + scale · (x A) Bᵀ`. If the sum of the matrices were
formed instead, the backward pass would compute the gradient of all of W, a quarter of an update's
products, only to multiply it by A and by B. For decoding they are merged, layer by layer, since a
step reads every matrix for few tokens.

Adapters act where they are given: parameters without them are the frozen model. So the reference of
the KL term is the same frozen arrays with the adapters that training began from.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from jlrm.config import LoRAConfig
from jlrm.model.quantised import widen

Params = dict[str, Any]
flatten: Any = traverse_util.flatten_dict
unflatten: Any = traverse_util.unflatten_dict
MARK = "_lora_"  # in the names of what is trained: q_lora_a, q_lora_b, q_lora_m
LENGTH = f"{MARK}m"
SCORE = ("score",)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices of the layers have adapters, and of what kind."""

    rank: int
    scale: float
    targets: tuple[str, ...]
    has_magnitude: bool  # DoRA
    dtype: str  # of the adapters; the frozen weights have the model's `param_dtype`
    base: str = "stored"  # or how the matrices of the frozen layers are quantised (quantised.py)


def of_settings(settings: LoRAConfig, dtype: str) -> LoRA:
    """Return the adapters that settings ask for."""
    divisor = settings.rank**0.5 if settings.rank_stabilised else settings.rank
    targets = tuple(sorted({*settings.targets}))
    scale, rest = settings.alpha / divisor, (settings.magnitude, dtype, settings.base)
    return LoRA(settings.rank, scale, targets, *rest)


def add(
    module: Any, name: str, letters: tuple[str, ...], x: Array, kernel: Array, out: Array
) -> Array:
    """Return `out`, which is x times a kernel, with what the kernel's adapter adds to it.

    Args:
      module: whose parameters these are; it has a `config`.
      letters: of the kernel.
    """
    if module.config.lora is None:
        return out
    lora: LoRA = module.config.lora
    is_born = module.is_initializing() and name in lora.targets
    if not (is_born or module.has_variable("params", f"{name}{MARK}a")):
        return out
    num_inputs = x.ndim - 2
    inputs, outputs = kernel.shape[:num_inputs], kernel.shape[num_inputs:]

    def param(part: str, init: Any, shape: tuple[int, ...], *letters: str) -> Array:
        init = nn.with_partitioning(init, letters)
        return module.param(f"{name}{MARK}{part}", init, shape, jnp.dtype(lora.dtype))

    a = param("a", _uniform, (*inputs, lora.rank), *letters[:num_inputs], "U")
    b = param("b", nn.initializers.zeros, (*outputs, lora.rank), *letters[num_inputs:], "U")
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    narrow = jnp.tensordot(x, a, num_inputs)
    out = out + lora.scale * jnp.tensordot(narrow, b, ((-1,), (-1,)))
    if not lora.has_magnitude:
        return out
    magnitude = param("m", nn.initializers.ones, outputs, *letters[num_inputs:])
    lengths = jax.lax.stop_gradient(norms(moved(lora, kernel, a, b), num_inputs))
    # In float32: 8 bits would change every length by up to 0.4 % before anything is learnt.
    factor = jnp.expand_dims(magnitude.astype(jnp.float32) / lengths, (0, 1))
    return (out.astype(jnp.float32) * factor).astype(out.dtype)


def merge(lora: LoRA | None, layer: Params) -> Params:
    """Return a layer's parameters with its adapters merged into its matrices, in their dtype."""
    flat = flatten(layer)
    merged = {path: leaf for path, leaf in flat.items() if MARK not in path[-1]}
    for path, kernel in merged.items():
        a, b, m = (flat.get((*path[:-1], f"{path[-1]}{MARK}{part}")) for part in "abm")
        if a is not None and b is not None:
            assert lora is not None
            sum_ = moved(lora, kernel, a, b)
            if m is not None:
                sum_ *= (m.astype(jnp.float32) / norms(sum_, a.ndim - 1))[(None,) * (a.ndim - 1)]
            merged[path] = sum_.astype(kernel.dtype)
    return unflatten(merged)


def moved(lora: LoRA, kernel: Array, a: Array, b: Array) -> Float[Array, "..."]:
    """Return a kernel with the product of its adapter added, in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.tensordot(a, b, ((-1,), (-1,)), precision="highest")
    return kernel.astype(jnp.float32) + lora.scale * product


def norms(kernel: Float[Array, "..."], num_inputs: int) -> Float[Array, "..."]:
    """Return the length of each output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(num_inputs))))


def with_lengths(adapters: Params, base: Params) -> Params:
    """Return stacked adapters whose magnitudes are the lengths of the matrices' own outputs."""
    flat, kernels = flatten(adapters), flatten(base)
    for path, ones in flat.items():
        name, _, part = path[-1].partition(MARK)
        if part == "m":
            kernel = widen(kernels[*path[:-1], name]).astype(jnp.float32)
            inputs = kernel.ndim - ones.ndim
            lengths = jax.vmap(lambda kernel, n=inputs: norms(kernel, n))(kernel)
            flat[path] = lengths.astype(ones.dtype)
    return unflatten(flat)


def split(lora: LoRA | None, params: Params) -> tuple[Params, Params]:
    """Return what is trained of parameters (or of their letters), and what is frozen.

    The head of a reward model is trained whole: it is new.
    """
    if lora is None:
        return params, {}
    flat = flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if MARK in path[-1] or path == SCORE}
    base = {path: leaf for path, leaf in flat.items() if path not in trained}
    return unflatten(trained), unflatten(base)


def join(base: Params, trained: Params) -> Params:
    """Return frozen and trained parameters as one tree."""
    if not base:
        return trained
    return unflatten({**flatten(base), **flatten(trained)})


def of_paths(tree: Any, like: Params) -> Any:
    """Return what a tree holds of the paths of another, which may have fewer."""
    paths = flatten(like)
    flat = flatten(tree)
    return unflatten({path: flat[path] for path in paths})


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return numbers of variance 1/(3 · fan-in), as PEFT's adapters begin."""
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
