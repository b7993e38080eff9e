"""Decoders of Qwen2 to 3, Llama and Mistral: pre-norm, RoPE, grouped queries, SwiGLU or experts.

One `Block` serves training and decoding. It is told how to `attend`, and returns what `attend`
returned beside the output. For training, `hidden_states` scans the block over stacked layer
parameters, with the attention of packed rows. So compile time does not grow with depth, and
`config.remat` says what of each layer is recomputed in the backward pass. For decoding,
sampling/decode.py applies the block layer by layer, with attention over explicit key/value caches.

The model ends at hidden states. Logits are computed where they are used (rl/logprobs.py,
sampling/decode.py), a few positions at a time: an array `[B, T, V]` would need more memory than
everything else. Letters as in runtime/mesh.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlrm.model import experts, gradient_sums, lora
from jlrm.model.attention import attend_exactly, attend_packed
from jlrm.model.exchange import gather, look_up, sum_heads
from jlrm.model.lora import LoRA
from jlrm.model.quantised import Blocks, quantise_layers, quantise_letters, widen_all
from jlrm.model.remat import QKV, rematerialised
from jlrm.model.rope import Rope, Scaling, angles, rotate
from jlrm.model.visibility import Packing
from jlrm.runtime import exact
from jlrm.runtime.mesh import LOCAL, Layout, Local

Params = dict[str, Any]
# attend(layout, q "B T N H", k "B K T H", v "B K T H", context) -> (output "B T N H", extra)
Attend = Callable[[Any, Array, Array, Array, Any], tuple[Array, Any]]


@dataclass(frozen=True)
class QwenConfig:
    """The architecture, with the names of a Hugging Face config.json, and how it is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of an expert, where there are experts
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool  # Qwen2, Qwen2.5
    qk_norm: bool  # Qwen3; Llama and Mistral have neither
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_scaling: Scaling | None = None
    num_experts: int = field(default=0, kw_only=True)  # of each layer; 0: it has an MLP
    num_experts_per_tok: int = field(default=0, kw_only=True)
    norm_topk_prob: bool = field(default=True, kw_only=True)
    # The name in config.json. Two families may compute the same, so it makes no other model.
    model_type: str = field(default="", kw_only=True, compare=False)
    num_labels: int = field(default=0, kw_only=True)  # scores of a reward model; 0: it writes text
    param_dtype: str = field(default="float32", kw_only=True)
    compute_dtype: str = field(default="bfloat16", kw_only=True)
    remat: str = field(default="full", kw_only=True)
    lora: LoRA | None = field(default=None, kw_only=True)  # None: all parameters are trained
    exact: bool = field(default=False, kw_only=True)  # every program rounds alike (exact.py)


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32: a sum of squares needs more than bfloat16's 8 bits."""

    config: QwenConfig
    letter: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        init = _lettered(nn.initializers.ones, self.letter)
        scale = self.param("scale", init, x.shape[-1:], jnp.dtype(self.config.param_dtype))
        wide = x.astype(jnp.float32)
        if self.config.exact:
            variance = exact.mean_last(exact.apart(jnp.square(wide)))[..., None]
        else:
            variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.config.rms_norm_eps)
        normed = normed * _last_axis(scale.astype(jnp.float32), x)
        return exact.rounded(normed, x.dtype) if self.config.exact else normed.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; `attend` decides which keys are seen."""

    config: QwenConfig
    layout: Layout | Local
    attend: Attend

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, context: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        config, shard = self.config, self.layout.shard
        q = self._project(x, "q", "N", config.num_attention_heads)
        k = self._project(x, "k", "K", config.num_key_value_heads)
        v = self._project(x, "v", "K", config.num_key_value_heads)
        if config.qk_norm:
            q = RMSNorm(config, "H", name="q_norm")(q)
            k = RMSNorm(config, "H", name="k_norm")(k)
        q = shard(rotate(q, rope, config.exact), "A T N H")
        k = shard(rotate(k, rope, config.exact).swapaxes(1, 2), "A K T H")
        v = shard(v.swapaxes(1, 2), "A K T H")
        out, extra = self.attend(self.layout, q, k, v, context)
        letters = "N", "H", "D"
        kernel = _weight(self, "o", letters, (*out.shape[-2:], x.shape[-1]), fan_in=(0, 1))
        if config.exact:
            return exact.product("BTNH,NHD->BTD", out, kernel), extra
        summed = sum_heads(self.layout, out, kernel)
        return lora.add(self, "o", letters, out, kernel, summed), extra

    def _project(self, x: Array, name: str, heads: str, num_heads: int) -> Array:
        config = self.config
        shape = (x.shape[-1], num_heads, config.head_dim)
        letters = "D", heads, "H"
        kernel = _weight(self, name, letters, shape)
        product = exact.product if config.exact else jnp.einsum
        out = product("BTD,DNH->BTNH", x, kernel)
        out = lora.add(self, name, letters, x, kernel, out)
        if config.qkv_bias:
            init = _lettered(nn.initializers.zeros, heads, "H")
            bias = self.param(f"{name}_bias", init, shape[1:], jnp.dtype(config.param_dtype))
            out = _add(config, out, bias.astype(out.dtype)[None, None])
        return out


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    config: QwenConfig
    layout: Layout | Local

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width, inner = x.shape[-1], self.config.intermediate_size
        if self.config.exact:
            return self._exactly(x, width, inner)
        x = self.layout.shard(x, "M T D")
        gate, up = self._times(x, "gate", "D", "F", inner), self._times(x, "up", "D", "F", inner)
        hidden = self.layout.shard(jax.nn.silu(gate) * up, "M T F")
        return self.layout.shard(self._times(hidden, "down", "F", "D", width), "B T D")

    def _times(self, x: Array, name: str, inputs: str, outputs: str, size: int) -> Array:
        kernel = _weight(self, name, (inputs, outputs), (x.shape[-1], size))
        return lora.add(self, name, (inputs, outputs), x, kernel, x @ kernel)

    def _exactly(self, x: Float[Array, "B T D"], width: int, inner: int) -> Float[Array, "B T D"]:
        """Compute the same, rounded alike in every program (exact.py)."""
        kernels = (_weight(self, name, ("D", "F"), (width, inner)) for name in ("gate", "up"))
        gate, up = (exact.product("BTD,DF->BTF", x, kernel) for kernel in kernels)
        wide = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        down = _weight(self, "down", ("F", "D"), (inner, width))
        return exact.product("BTF,FD->BTD", exact.rounded(wide, x.dtype), down)


class Mixture(nn.Module):
    """Experts and their router, in the place of an MLP."""

    config: QwenConfig
    layout: Layout | Local

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config = self.config
        x = self.layout.shard(x, "M T D")
        # Whole wherever experts are cut: each device chooses among all.
        router = _weight(self, "router", ("D", None), (x.shape[-1], config.num_experts))
        chosen = experts.choose(x, router, config.num_experts_per_tok, config.norm_topk_prob)
        return experts.mix(self.layout, x, *chosen, Experts(config, name="experts")())


class Experts(nn.Module):
    """The matrices of all experts of a layer."""

    config: QwenConfig

    @nn.compact
    def __call__(self) -> experts.Matrices:
        config = self.config
        sizes = {"D": config.hidden_size, "F": config.intermediate_size}

        def matrices(name: str, inputs: str, outputs: str) -> Array:
            shape = config.num_experts, sizes[inputs], sizes[outputs]
            return _weight(self, name, ("E", inputs, outputs), shape, fan_in=(1,))

        gate, up = matrices("gate", "D", "F"), matrices("up", "D", "F")
        return experts.Matrices(gate, up, matrices("down", "F", "D"))


class Block(nn.Module):
    """One decoder layer; returns its output and what `attend` returned beside its own."""

    config: QwenConfig
    layout: Layout | Local
    attend: Attend

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, context: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        normed = RMSNorm(self.config, "D", name="attn_norm")(x)
        attention = Attention(self.config, self.layout, self.attend, name="attn")
        attended, extra = attention(normed, rope, context)
        x = self.layout.shard(_add(self.config, x, attended), "B T D")
        normed = RMSNorm(self.config, "D", name="mlp_norm")(x)
        mlp = (Mixture if self.config.num_experts else MLP)(self.config, self.layout, name="mlp")
        return _add(self.config, x, mlp(normed)), extra


def abstract_params(config: QwenConfig, layout: Layout) -> Params:
    """Return the parameter tree as `ShapeDtypeStruct`s that carry their shardings in `layout`."""
    return jax.tree.map(
        lambda leaf, letters: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=layout.param(letters)
        ),
        _shapes(config),
        param_letters(config),
    )


def param_letters(config: QwenConfig, base: str = "") -> Any:
    """Return the letters of every parameter's dimensions, as a tree of `PartitionSpec`s.

    base: as of `LoRA`, if it is not as in the config.
    """
    base = base or (config.lora.base if config.lora else "stored")
    outer = {"embed": PartitionSpec("V", "D")}
    if config.num_labels:
        outer["score"] = PartitionSpec("D", None)
    elif not config.tie_word_embeddings:
        outer["head"] = PartitionSpec("V", "D")
    layers = jax.tree.map(lambda letters: PartitionSpec("L", *letters), _layer_letters(config))
    whole = {**outer, "layers": layers, "final_norm": {"scale": PartitionSpec("D")}}
    return quantise_letters(whole, base)


# A run asks for both some twenty times, and each takes a trace of Flax: without a memory that was
# most of what a run of a tiny model did outside its programs. Callers get trees of their own.
@lru_cache(maxsize=64)
def _shapes(config: QwenConfig) -> Params:
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


@lru_cache(maxsize=64)
def _layer_letters(config: QwenConfig) -> Any:
    """Return the letters of one layer's parameters, without that of the layers."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init_layer(config, jax.random.key(0))))


def init(config: QwenConfig, layout: Layout, seed: int) -> Params:
    """Return random parameters, born sharded: normal with variance 1/fan-in, embedding 0.02."""
    return init_program(config, layout)(jax.random.key(seed))


def init_program(config: QwenConfig, layout: Layout) -> Any:
    """Return the jitted program key -> random parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, layout))
    return jax.jit(partial(_init, config), out_shardings=shardings)


def adapters_program(config: QwenConfig, layout: Layout) -> Any:
    """Return the jitted program key, frozen parameters -> adapters that change nothing yet."""
    adapters, _ = lora.split(config.lora, abstract_params(config, layout))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, adapters)
    return jax.jit(partial(_init_adapters, config), out_shardings=shardings)


def hidden_states(
    config: QwenConfig,
    layout: Layout,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    packing: Packing,
    sums: Params | None = None,
) -> Float[Array, "B T D"]:
    """Return final hidden states of packed rows; T is a multiple of `visibility.BLOCK`.

    Without adapters in `params` the states are those of the frozen model. Parameters may be
    `gradient_sums.copies`.

    The place of a token comes from `positions` and `packing` only. Padding may hold any ids.

    With `sums` the gradients of what is trained of the layers are added to these
    (gradient_sums.py), and the layers are computed anew in the backward pass, as with `remat`
    "full".

    What each device does is written out here, not left to the compiler. A device runs its own rows,
    and gathers the weights of one layer at a time, axis by axis. The gradient of such a gather is a
    reduce-scatter along each axis. Left to itself, the compiler sums whole gradients on every
    device of slices such as v5e 4x4 (7B on v5e-16: 99 GiB of all-reduce in an update, compiled).
    """
    params = {name: tree for name, tree in params.items() if name not in ("head", "score")}
    letters = lora.of_paths(param_letters(config), params)
    attend = partial(_attend_packed, config.exact, layout.platform)
    block = Block(config, Local(layout.platform), attend)

    def one_layer(weights: Params, x: Array, context: tuple[Rope, Packing]) -> Array:
        weights = gather(layout, weights, letters["layers"])
        x, _ = apply(block, to_compute_dtype(config, widen_all(weights)), x, *context)
        return x

    def run(
        params: Params, tokens: Array, positions: Array, packing: Packing, sums: Params | None
    ) -> Array:
        params = jax.tree.map(lambda x, is_copy: x[0] if is_copy else x, params, are_copies)
        x = look_up(layout, params["embed"], tokens).astype(config.compute_dtype)
        angles_ = rope(config, positions)

        def layer(x: Array, weights: Params) -> tuple[Array, None]:
            return one_layer(weights, x, (angles_, packing)), None

        if sums is None:
            x, _ = jax.lax.scan(rematerialised(config.remat, layer), x, params["layers"])
        else:
            trained, frozen = lora.split(config.lora, params["layers"])
            x = gradient_sums.run(one_layer, trained, frozen, sums, x, (angles_, packing))
        norm = gather(layout, params["final_norm"], letters["final_norm"])
        return apply(RMSNorm(config, "D"), norm, x)

    cells, rows = layout.activation("B -").spec, layout.activation("B").spec
    packed: Any = Packing(cells, cells, rows)  # pyright: ignore[reportArgumentType]
    are_copies = jax.tree.map(lambda x, letters: x.ndim > len(letters), params, letters)

    def lies(letters: Any, is_copy: bool) -> PartitionSpec:
        sharding = layout.param(letters)
        return (gradient_sums.spread(sharding) if is_copy else sharding).spec

    weights = jax.tree.map(lies, letters, are_copies)
    summed, _ = lora.split(config.lora, letters["layers"])
    spread = jax.tree.map(lambda x: gradient_sums.spread(layout.param(x)).spec, summed)
    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(weights, cells, cells, packed, None if sums is None else spread),
        out_specs=layout.activation("B - -").spec,
        check_vma=False,  # the TPU kernels do not say over which axes their results vary
    )(params, tokens, positions, packing, sums)


def to_compute_dtype(config: QwenConfig, params: Params) -> Params:
    """Cast weights to the dtype they are used in.

    Norm scales and DoRA's lengths are used in float32 and stay so; quantised matrices stay narrow
    until they run.
    """

    def cast(path: Any, x: Array) -> Array:
        is_kept = path[-1].endswith(("scale", lora.LENGTH)) or isinstance(x, Blocks)
        return x if is_kept else x.astype(config.compute_dtype)

    return dict(flax.traverse_util.path_aware_map(cast, params))


def head(config: QwenConfig, params: Params) -> Float[Array, "V D"]:
    """Return the output embedding, which is the input embedding if they are tied."""
    return params["embed"] if config.tie_word_embeddings else params["head"]


def scores(params: Params, states: Float[Array, "B C D"]) -> Float[Array, "B C labels"]:
    """Apply the head of a reward model, in float32: nothing is preferred by rounding."""
    return jnp.einsum("BCD,DK->BCK", states, params["score"], preferred_element_type=jnp.float32)


def rope(config: QwenConfig, positions: Int[Array, "B T"]) -> Rope:
    """Return the rotary angles of these positions."""
    return angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)


def embed(
    config: QwenConfig, layout: Layout, table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Return the rows of the embedding table, in compute precision."""
    rows = jnp.take(table, tokens, axis=0).astype(config.compute_dtype)
    return layout.shard(rows, "B T D")


def final_norm(config: QwenConfig, params: Params, x: Float[Array, "B T D"]) -> Array:
    """Apply the norm after the last layer."""
    return apply(RMSNorm(config, "D"), params["final_norm"], x)


def apply(module: nn.Module, params: Params, *args: Any) -> Any:
    """Apply a Flax module to its own parameters."""
    return module.apply({"params": params}, *args)


def _attend_packed(
    is_exact: bool, platform: str, layout: Any, q: Array, k: Array, v: Array, packing: Packing
) -> tuple[Array, None]:
    q, k, v = checkpoint_name((q, k, v), QKV)
    if is_exact:
        return attend_exactly(q, k, v, packing), None
    return attend_packed(q, k, v, packing, platform), None


def _add(config: QwenConfig, x: Array, y: Array) -> Array:
    """Add in compute precision."""
    if not config.exact:
        return x + y
    return exact.rounded(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)


def _last_axis(vector: Array, like: Array) -> Array:
    """Give a vector the leading axes of `like`: the tests forbid implicit rank promotion."""
    return jnp.expand_dims(vector, range(like.ndim - 1))


def _init(config: QwenConfig, key: Array) -> Params:
    """Return random parameters; those of the layers are stacked on a leading axis."""
    if config.lora is not None:
        base = _init(dataclasses.replace(config, lora=None), key)
        base = quantise_layers(base, config.lora.base)
        return lora.join(base, _init_adapters(config, key, base))
    table_key, head_key, layers_key = jax.random.split(key, 3)
    shape, dtype = (config.vocab_size, config.hidden_size), jnp.dtype(config.param_dtype)
    layer_keys = jax.random.split(layers_key, config.num_hidden_layers)
    params: Params = {
        "embed": nn.initializers.normal(0.02)(table_key, shape, dtype),
        "layers": jax.vmap(lambda key: nn.unbox(_init_layer(config, key)))(layer_keys),
        "final_norm": {"scale": jnp.ones(config.hidden_size, dtype)},
    }
    if config.num_labels:  # all scores are equal until something is learned
        params["score"] = jnp.zeros((config.hidden_size, config.num_labels), dtype)
    elif not config.tie_word_embeddings:
        params["head"] = _fan_in_normal((1,))(head_key, shape, dtype)
    return params


def _init_adapters(config: QwenConfig, key: Array, base: Params) -> Params:
    keys = jax.random.split(jax.random.fold_in(key, 1), config.num_hidden_layers)
    layers = jax.vmap(lambda key: nn.unbox(_init_layer(config, key)))(keys)
    adapters, _ = lora.split(config.lora, layers)
    return {"layers": lora.with_lengths(adapters, base["layers"])}


def _init_layer(config: QwenConfig, key: Array) -> Any:
    """Return the parameters of one layer, boxed by Flax with their letters."""
    block = Block(config, LOCAL, lambda layout, q, k, v, context: (q, None))
    x = jnp.zeros((1, 1, config.hidden_size), config.compute_dtype)
    return block.init(key, x, rope(config, jnp.zeros((1, 1), jnp.int32)), None)["params"]


def _lettered(init: Callable[..., Array], *letters: str | None) -> Callable[..., Any]:
    """Attach the letters of a parameter's shape to its initialiser; `Layout.param` reads them."""
    return nn.with_partitioning(init, letters)


def _weight(
    module: Any,
    name: str,
    letters: tuple[str | None, ...],
    shape: tuple[int, ...],
    fan_in: tuple[int, ...] = (0,),
) -> Array:
    """Return a matrix of a module in the precision that it is used in."""
    init = _lettered(_fan_in_normal(fan_in), *letters)
    value = module.param(name, init, shape, jnp.dtype(module.config.param_dtype))
    return value.astype(module.config.compute_dtype)


def _fan_in_normal(axes: tuple[int, ...]) -> Any:
    """Return an initialiser of variance 1/fan-in; `axes` are the input axes of one layer."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        fan_in = math.prod(shape[axis] for axis in axes)
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return init
