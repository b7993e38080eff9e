"""Optimiser steps and scoring passes: where the model, the losses and optax meet.

Each function here is one jitted program of the run. Rows travel as a `Sequences`: a right-padded
prompt and a right-padded completion, the very arrays that the sampler took and gave. Micro-batches
are summed, not averaged: `losses.token_weights` has already divided by the whole optimiser batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jlrm.config import OptimizerConfig
from jlrm.mesh import Layout
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.logprobs import Distribution, completion_logps
from jlrm.rl.losses import PolicyLoss, completion_mask, policy_loss


class TrainState(NamedTuple):
    params: Params
    opt_state: Any
    step: Int[Array, ""]  # optimiser steps taken


class Sequences(NamedTuple):
    """Prompts and completions, both right-padded; lengths count the end token, but no padding."""

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]


class PolicyBatch(NamedTuple):
    """What one GRPO optimiser step learns from."""

    sequences: Sequences
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    advantages: Float[Array, " B"]
    mask: Bool[Array, "B T"]
    weights: Float[Array, "B T"]


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return step → learning rate: linear warm-up, then constant or down to 0 at `num_steps`."""
    rest = max(num_steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    # From 1/n rather than 0: a step at rate 0 is a batch thrown away.
    first = config.learning_rate / config.warmup_steps
    warmup = optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Return AdamW with weight decay on every parameter, after clipping by global norm."""
    adamw = optax.adamw(
        learning_rate(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return (
        optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
        if config.clip_norm
        else adamw
    )


def abstract_state(
    config: QwenConfig, layout: Layout, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state as `ShapeDtypeStruct`s with shardings; moments lie as their parameters."""
    params = qwen.abstract_params(config, layout)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=layout.replicated()
        ),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated())
    return TrainState._make([params, opt_state, step])


def init_state(
    config: QwenConfig, layout: Layout, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
    """Return the state before the first step, the optimiser's part born sharded."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, layout, optimizer))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.int32(0), shardings.step))


def score(
    config: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    num_micro: int,
    params: Params,
    sequences: Sequences,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return log-probability and entropy (nats) of completion tokens, `num_micro` parts in turn."""
    if num_micro == 1:
        return _score(config, layout, distribution, params, sequences)
    _, parts = jax.lax.scan(
        lambda carry, part: (carry, _score(config, layout, distribution, params, part)),
        None,
        _split(layout, sequences, num_micro),
    )
    return jax.tree.map(_join, parts)


def sft_update(
    config: QwenConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    num_micro: int,
    state: TrainState,
    sequences: Sequences,
    weights: Float[Array, "B T"],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the negative log-likelihood of completions alone, in nats a token."""

    def loss(params: Params, part: tuple[Sequences, Array]) -> tuple[Array, dict[str, Array]]:
        sequences, weights = part
        logp, _ = _score(config, layout, Distribution(), params, sequences)
        return -jnp.sum(weights * jnp.where(weights > 0, logp, 0.0)), {}

    return _step(layout, optimizer, loss, num_micro, state, (sequences, weights))


def grpo_update(
    config: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    settings: PolicyLoss,
    optimizer: optax.GradientTransformation,
    num_micro: int,
    state: TrainState,
    batch: PolicyBatch,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the GRPO loss (`losses.policy_loss`); metrics are means over tokens."""

    def loss(params: Params, part: PolicyBatch) -> tuple[Array, dict[str, Array]]:
        logp, entropy = _score(config, layout, distribution, params, part.sequences)
        gap = jnp.sum(jnp.where(part.mask, jnp.abs(logp - part.old_logp), 0.0))
        value, sums = policy_loss(
            settings,
            logp,
            entropy,
            part.old_logp,
            part.ref_logp,
            part.advantages,
            part.mask,
            part.weights,
        )
        return value, {**sums, "old_logp_gap": gap}

    state, metrics = _step(layout, optimizer, loss, num_micro, state, batch)
    num_tokens = jnp.maximum(metrics.pop("num_tokens"), 1.0)
    whole = {name: metrics.pop(name) for name in ("loss", "grad_norm")}
    return state, {**whole, **{name: value / num_tokens for name, value in metrics.items()}}


def batch_mask(
    sequences: Sequences, is_kept: Bool[Array, " B"] | None = None
) -> Bool[Array, "B T"]:
    """Return the loss mask: generated tokens, of the kept rows."""
    mask = completion_mask(sequences.lengths, sequences.tokens.shape[1])
    return mask if is_kept is None else mask & is_kept[:, None]


def _score(
    config: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    params: Params,
    sequences: Sequences,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Run prompt and completion in one row, laid out as the sampler's cache is."""
    num_prompt, num_tokens = sequences.prompts.shape[1], sequences.tokens.shape[1]
    prompt_lengths = sequences.prompt_lengths[:, None]
    tokens = jnp.concatenate([sequences.prompts, sequences.tokens], axis=1)
    slots = jnp.arange(num_prompt)[None, :]
    offsets = jnp.arange(num_tokens)[None, :]
    positions = jnp.concatenate(
        [jnp.broadcast_to(slots, sequences.prompts.shape), prompt_lengths + offsets], axis=1
    )
    key_mask = jnp.concatenate(
        [slots < prompt_lengths, offsets < sequences.lengths[:, None]], axis=1
    )
    hidden = qwen.hidden_states(
        config,
        layout,
        params,
        layout.shard(tokens, "B T"),
        layout.shard(positions, "B T"),
        layout.shard(key_mask, "B T"),
    )
    # The last prompt token predicts the first of the completion, each of those the next.
    last = jnp.take_along_axis(hidden, (prompt_lengths - 1)[..., None], axis=1)
    states = jnp.concatenate([last, hidden[:, num_prompt:-1]], axis=1)
    head = qwen.head(config, params)
    return completion_logps(states, head, sequences.tokens, distribution, layout)


def _step(
    layout: Layout,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Params, Any], tuple[Array, dict[str, Array]]],
    num_micro: int,
    state: TrainState,
    batch: Any,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Sum loss, gradients and metrics over micro-batches and apply the optimiser once."""
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if num_micro == 1:
        (value, sums), grads = value_and_grad(state.params, batch)
    else:
        parts = _split(layout, batch, num_micro)
        shapes = jax.eval_shape(value_and_grad, state.params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes
        )

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.params, part)), None

        ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **sums}
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _split(layout: Layout, batch: Any, num_micro: int) -> Any:
    """Cut rows into micro-batches so that every device keeps its own rows: stride, not block."""

    def split(x: Array) -> Array:
        parts = x.reshape(x.shape[0] // num_micro, num_micro, *x.shape[1:]).swapaxes(0, 1)
        return layout.shard(parts, " ".join(["-", "B", *["-"] * (x.ndim - 1)]))

    return jax.tree.map(split, batch)


def _join(parts: Array) -> Array:
    """Undo `_split`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])
