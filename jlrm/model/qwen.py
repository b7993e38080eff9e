"""Qwen2/2.5 and Qwen3 dense decoders: pre-norm blocks, rotary positions, grouped queries, SwiGLU.

One `Block` serves three ways of running it. `hidden_states` scans it over stacked layer parameters
(compile time does not grow with depth; each layer is rematerialised by `config.remat`). `prefill`
and `decode_step` apply the same block layer by layer with an explicit key/value cache, an argument
and a result: unrolled layers update their caches in place, where a scan would copy every layer's
slice.

The model ends at hidden states. Logits are made where they are used (rl/logprobs.py, rollout.py), a
few positions at a time: an array `[B, T, V]` would outweigh everything else. Letters as in mesh.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jlrm.mesh import Layout
from jlrm.model.attention import attend
from jlrm.model.rope import Rope, Yarn, angles, rotate

Params = dict[str, Any]
KVCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]


@dataclass(frozen=True)
class QwenConfig:
    """Architecture, by the names of a Hugging Face config.json, and how it is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool  # Qwen2, Qwen2.5
    qk_norm: bool  # Qwen3
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    yarn: Yarn | None = None
    param_dtype: str = field(default="float32", kw_only=True)
    compute_dtype: str = field(default="bfloat16", kw_only=True)
    remat: str = field(default="full", kw_only=True)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32: squares and their sum need more than bfloat16's 8 bits."""

    config: QwenConfig
    letter: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = _lettered(nn.initializers.ones, self.letter)
        scale = self.param("scale", init, x.shape[-1:], jnp.dtype(self.config.param_dtype))
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.config.rms_norm_eps)
        return (normed * _last_axis(scale.astype(jnp.float32), x)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, over its own keys or over a cache."""

    config: QwenConfig
    layout: Layout

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        cache: KVCache | None,
        slot: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        config, shard = self.config, self.layout.shard
        q = self._project(x, "q", "N", config.num_attention_heads)
        k = self._project(x, "k", "K", config.num_key_value_heads)
        v = self._project(x, "v", "K", config.num_key_value_heads)
        if config.qk_norm:
            q = RMSNorm(config, "H", name="q_norm")(q)
            k = RMSNorm(config, "H", name="k_norm")(k)
        q = shard(rotate(q, rope), "B T N H")
        keys = shard(rotate(k, rope).swapaxes(1, 2), "B K S H")
        values = shard(v.swapaxes(1, 2), "B K S H")
        if cache is not None:
            start = (0, 0, 0 if slot is None else slot, 0)
            cache = (
                shard(jax.lax.dynamic_update_slice(cache[0], keys, start), "B K S H"),
                shard(jax.lax.dynamic_update_slice(cache[1], values, start), "B K S H"),
            )
            if slot is not None:
                keys, values = cache
        out = attend(q, keys, values, mask)
        kernel = self._weight("o", ("N", "H", "D"), (*out.shape[-2:], x.shape[-1]), fan_in=(0, 1))
        return shard(jnp.einsum("BTNH,NHD->BTD", out, kernel), "B T D"), cache

    def _project(self, x: Array, name: str, heads: str, num_heads: int) -> Array:
        config = self.config
        shape = (x.shape[-1], num_heads, config.head_dim)
        out = jnp.einsum("BTD,DNH->BTNH", x, self._weight(name, ("D", heads, "H"), shape))
        if config.qkv_bias:
            init = _lettered(nn.initializers.zeros, heads, "H")
            bias = self.param(f"{name}_bias", init, shape[1:], jnp.dtype(config.param_dtype))
            out = out + bias.astype(out.dtype)[None, None]
        return out

    def _weight(
        self,
        name: str,
        letters: tuple[str, ...],
        shape: tuple[int, ...],
        fan_in: tuple[int, ...] = (0,),
    ) -> Array:
        init = _lettered(_fan_in_normal(fan_in), *letters)
        value = self.param(name, init, shape, jnp.dtype(self.config.param_dtype))
        return value.astype(self.config.compute_dtype)


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    config: QwenConfig
    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        width, inner = x.shape[-1], config.intermediate_size
        dtypes = jnp.dtype(config.param_dtype), config.compute_dtype
        into = _lettered(_fan_in_normal((0,)), "D", "F")
        out_of = _lettered(_fan_in_normal((0,)), "F", "D")
        gate = self.param("gate", into, (width, inner), dtypes[0]).astype(dtypes[1])
        up = self.param("up", into, (width, inner), dtypes[0]).astype(dtypes[1])
        down = self.param("down", out_of, (inner, width), dtypes[0]).astype(dtypes[1])
        hidden = jax.nn.silu(x @ gate) * (x @ up)
        return self.layout.shard(self.layout.shard(hidden, "B T F") @ down, "B T D")


class Block(nn.Module):
    """One decoder layer; with `cache` it also returns that cache, this call's keys written in it.

    `slot` is the cache position of the one token of a decode step, whose queries see the whole
    cache; without it the call is a prefill, written from position 0, whose queries see this call's
    keys only.
    """

    config: QwenConfig
    layout: Layout

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        cache: KVCache | None = None,
        slot: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        normed = RMSNorm(self.config, "D", name="attn_norm")(x)
        attended, cache = Attention(self.config, self.layout, name="attn")(
            normed, rope, mask, cache, slot
        )
        x = x + attended
        normed = RMSNorm(self.config, "D", name="mlp_norm")(x)
        return x + MLP(self.config, self.layout, name="mlp")(normed), cache


class Decoder(nn.Module):
    """The whole decoder up to its final norm, layers stacked on a leading axis."""

    config: QwenConfig
    layout: Layout

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], mask: Bool[Array, "B T T"]
    ) -> Float[Array, "B T D"]:
        config = self.config
        dtype = jnp.dtype(config.param_dtype)
        table_init = _lettered(nn.initializers.normal(0.02), "V", "D")
        shape = (config.vocab_size, config.hidden_size)
        table = self.param("embed", table_init, shape, dtype)
        if not config.tie_word_embeddings:
            self.param("head", _lettered(_fan_in_normal((1,)), "V", "D"), shape, dtype)
        x = _embed(config, self.layout, table, tokens)
        layers = nn.scan(
            _rematerialised(config.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]  (flax: unannotated)
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        x, _ = layers(config, self.layout, name="layers")(x, _rope(config, positions), mask)
        return RMSNorm(config, "D", name="final_norm")(x)


def abstract_params(config: QwenConfig, layout: Layout) -> Params:
    """Return the parameter tree as `ShapeDtypeStruct`s that carry their shardings in `layout`."""
    boxed = jax.eval_shape(lambda: _init(config, layout, jax.random.key(0)))
    letters = nn.get_partition_spec(boxed)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=layout.param(spec)
        ),
        nn.unbox(boxed),
        letters,
    )


def init(config: QwenConfig, layout: Layout, seed: int) -> Params:
    """Return random parameters, born sharded: normal with variance 1/fan-in, embedding 0.02."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, layout))
    make = jax.jit(lambda key: nn.unbox(_init(config, layout, key)), out_shardings=shardings)
    return make(jax.random.key(seed))


def hidden_states(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    key_mask: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Return final hidden states; a query sees the keys up to its own slot that `key_mask` admits.

    Padding may stand anywhere: `positions` and `key_mask` alone give a token its place.
    """
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
    mask = layout.shard(causal[None] & key_mask[:, None, :], "B T S")
    return _apply(Decoder(config, layout), params, tokens, positions, mask)


def decode_params(config: QwenConfig, layout: Layout, params: Params) -> Params:
    """Return parameters as decoding wants them: compute dtype, one tree a layer, in `layout`."""
    params = to_compute_dtype(config, params)
    letters = nn.get_partition_spec(
        jax.eval_shape(lambda: _init(config, layout, jax.random.key(0)))
    )

    def place(tree: Params, letters: Any, drop: int) -> Params:
        return jax.tree.map(
            lambda x, spec: jax.lax.with_sharding_constraint(x, layout.param(spec[drop:])),
            tree,
            letters,
        )

    outer = {name: leaf for name, leaf in params.items() if name != "layers"}
    outer = place(outer, {name: letters[name] for name in outer}, 0)
    layers = [
        place(jax.tree.map(lambda x, i=i: x[i], params["layers"]), letters["layers"], 1)
        for i in range(config.num_hidden_layers)
    ]
    return {**outer, "layers": layers}


def to_compute_dtype(config: QwenConfig, params: Params) -> Params:
    """Cast weights as their use would; norm scales are used in float32 and stay as they are."""

    def cast(path: Any, x: Array) -> Array:
        return x if path[-1] == "scale" else x.astype(config.compute_dtype)

    return dict(flax.traverse_util.path_aware_map(cast, params))


def prefill(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    num_slots: int,
) -> tuple[Float[Array, "B T D"], list[KVCache]]:
    """Run right-padded prompts and return hidden states with caches of `num_slots` positions.

    `params` come from `decode_params`. Slots from T on are empty, for `decode_step` to fill.
    """
    num_rows, num_tokens = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(num_tokens), tokens.shape)
    causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
    mask = causal[None] & (positions < lengths[:, None])[:, None, :]
    rope = _rope(config, positions)
    x = _embed(config, layout, params["embed"], tokens)
    shape = (num_rows, config.num_key_value_heads, num_slots, config.head_dim)
    empty = layout.shard(jnp.zeros(shape, x.dtype), "B K S H")
    caches = []
    for layer in params["layers"]:
        x, cache = _apply(Block(config, layout), layer, x, rope, mask, (empty, empty))
        caches.append(cache)
    return _final_norm(config, params, x), caches


def decode_step(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    caches: list[KVCache],
    slot: Int[Array, ""],
    slot_mask: Bool[Array, "B S"],
) -> tuple[Float[Array, "B D"], list[KVCache]]:
    """Run one token of every row, stored in cache slot `slot`; it sees the slots of `slot_mask`."""
    rope = _rope(config, positions[:, None])
    x = _embed(config, layout, params["embed"], tokens[:, None])
    new_caches = []
    for layer, cache in zip(params["layers"], caches, strict=True):
        x, cache = _apply(Block(config, layout), layer, x, rope, slot_mask[:, None, :], cache, slot)
        new_caches.append(cache)
    return _final_norm(config, params, x)[:, 0], new_caches


def head(config: QwenConfig, params: Params) -> Float[Array, "V D"]:
    """Return the output embedding: the input one where they are tied."""
    return params["embed"] if config.tie_word_embeddings else params["head"]


def _last_axis(vector: Array, like: Array) -> Array:
    """Give a vector the leading axes of `like`, since implicit rank promotion is an error here."""
    return jnp.expand_dims(vector, range(like.ndim - 1))


def _rope(config: QwenConfig, positions: Int[Array, "B T"]) -> Rope:
    return angles(positions, config.head_dim, config.rope_theta, config.yarn)


def _init(config: QwenConfig, layout: Layout, key: Array) -> Any:
    """Return parameters as Flax makes them, boxed with their letters."""
    tokens = jnp.zeros((layout.num_batch_shards(), 1), jnp.int32)
    mask = jnp.ones((*tokens.shape, 1), bool)
    return Decoder(config, layout).init(key, tokens, tokens, mask)["params"]


def _apply(module: nn.Module, params: Params, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _embed(
    config: QwenConfig, layout: Layout, table: Array, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    rows = jnp.take(table, tokens, axis=0).astype(config.compute_dtype)
    return layout.shard(rows, "B T D")


def _final_norm(config: QwenConfig, params: Params, x: Array) -> Array:
    return _apply(RMSNorm(config, "D"), params["final_norm"], x)


def _lettered(init: Callable[..., Array], *letters: str) -> Callable[..., Any]:
    """Attach the letters of a parameter's shape to its initialiser, for `Layout.param`."""
    return nn.with_partitioning(init, letters)


def _fan_in_normal(axes: tuple[int, ...]) -> Any:
    """Return an initialiser of variance 1/fan-in, the product of `axes` of the unstacked shape."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        fan_in = math.prod(shape[axis] for axis in axes)
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return init


def _rematerialised(policy: str) -> type[nn.Module]:
    """Return `Block` that recomputes nothing ("none"), all but matrix products, or everything."""
    if policy == "none":
        return Block
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # Inside a scan XLA can't undo rematerialisation by common-subexpression elimination.
    return nn.remat(Block, policy=dots if policy == "dots" else None, prevent_cse=False)
