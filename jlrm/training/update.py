"""Optimiser steps and log-probabilities: where the model, the losses and optax meet.

Each function here is one jitted program of the run. It takes packed rows (packing.py), and walks
over their passes; how many there are is known at run time only. Passes are summed, not averaged:
`losses.token_weights` has already divided by the whole optimiser batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jlrm.config import DPOConfig, LossConfig, OptimizerConfig
from jlrm.model import lora, qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.distribution import Distribution
from jlrm.rl.logprobs import completion_logps, summed_token_loss
from jlrm.rl.losses import (
    PolicyTargets,
    averaged_log_ratio,
    policy_loss,
    sequence_log_ratio,
)
from jlrm.rl.preferences import PairTargets, RewardTargets, dpo_loss, reward_loss
from jlrm.runtime.mesh import Layout
from jlrm.training.packing import Rows
from jlrm.training.passes import Loss, one_pass, value_and_gradients


class TrainState(NamedTuple):
    params: Params  # what is trained
    opt_state: Any
    step: Int[Array, ""]  # optimiser steps taken
    base: Params = {}  # what is frozen beneath adapters; no checkpoint has it  # noqa: RUF012

    @property
    def weights(self) -> Params:
        """All parameters of the model."""
        return lora.join(self.base, self.params)


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
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    adamw = optax.chain(
        _at_rest(adam, mu=config.mu_dtype, nu=config.nu_dtype),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    # Clipping waits for all gradients. Where nothing does, the compiler orders a single pass so
    # that a 7B model takes 0.7 GiB more of each of 16 chips.
    wait = optax.stateless(lambda grads, _: jax.lax.optimization_barrier(grads))
    return optax.chain(wait, adamw)


def _at_rest(adam: optax.GradientTransformation, **dtypes: str) -> optax.GradientTransformation:
    """Keep Adam's moments in these dtypes between steps; the step itself computes in float32."""

    def cast(state: Any, dtypes: dict[str, str]) -> Any:
        moments = {
            name: jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), getattr(state, name))
            for name, dtype in dtypes.items()
        }
        return state._replace(**moments)

    def init(params: Any) -> Any:
        return cast(adam.init(params), dtypes)

    def step(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, cast(state, dict.fromkeys(dtypes, "float32")), params)
        return updates, cast(state, dtypes)

    return optax.GradientTransformation(init, step)


def abstract_state(
    config: QwenConfig, layout: Layout, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return the state as `ShapeDtypeStruct`s with shardings; moments lie as their parameters."""
    params, base = lora.split(config.lora, qwen.abstract_params(config, layout))
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
    return TrainState._make([params, opt_state, step, base])


def init_state(
    config: QwenConfig, layout: Layout, optimizer: optax.GradientTransformation, params: Params
) -> TrainState:
    """Return the state before the first step, of all parameters."""
    params, base = lora.split(config.lora, params)
    opt_state = init_optimizer_program(config, layout, optimizer)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.int32(0), layout.replicated()), base)


def init_optimizer_program(
    config: QwenConfig, layout: Layout, optimizer: optax.GradientTransformation
) -> Any:
    """Return the jitted program parameters -> the optimiser's state, born sharded."""
    state = abstract_state(config, layout, optimizer).opt_state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(optimizer.init, out_shardings=shardings)


def logprobs(
    config: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    params: Params,
    rows: Rows,
) -> tuple[Float[Array, "A B C"], Float[Array, "A B C"]]:
    """Return log-probability and entropy (nats) of every target, 0 where there is none."""
    params = qwen.to_compute_dtype(config, params)
    head = qwen.head(config, params)

    def one(part: Rows) -> tuple[Array, Array]:
        states = _states(config, layout, params, part)
        return completion_logps(states, head, part.targets, part.count, distribution, layout)

    if rows.tokens.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], one(one_pass(rows, 0)))

    def write(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(lambda all_, x: all_.at[i].set(x), so_far, one(one_pass(rows, i)))

    empty = layout.shard(jnp.zeros(rows.targets.shape, jnp.float32), "- B -")
    return jax.lax.fori_loop(0, rows.num_passes, write, (empty, empty))


def sft_update(
    config: QwenConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rows: Rows,
    weights: Float[Array, "A B C"],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the negative log-likelihood of completions alone, in nats a token."""

    def token_loss(logp: Array, entropy: Array, weights: Array) -> tuple[Array, dict[str, Array]]:
        return -jnp.sum(weights * jnp.where(weights > 0, logp, 0.0)), {}

    def loss(
        params: Params, sums: Params | None, part: tuple[Rows, Array]
    ) -> tuple[Array, dict[str, Array]]:
        rows, weights = part
        states, head = _states(config, layout, params, rows, sums), qwen.head(config, params)
        where = rows.targets, rows.count
        return summed_token_loss(token_loss, states, head, *where, weights, Distribution(), layout)

    return _step(config, layout, optimizer, loss, state, (rows, weights))


def dpo_update(
    config: QwenConfig,
    layout: Layout,
    settings: DPOConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rows: Rows,
    targets: PairTargets,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the loss of pairs (`preferences.dpo_loss`), which stand whole in rows.

    A pair's loss is no sum over tokens. So log-probabilities come first; they tell what each token
    counts in the gradient, and that sum of weighted log-probabilities is differentiated.
    """

    def weighted(logp: Array, entropy: Array, weights: Array) -> tuple[Array, dict[str, Array]]:
        return jnp.sum(weights * logp), {}

    def loss(
        params: Params, sums: Params | None, part: tuple[Rows, PairTargets]
    ) -> tuple[Array, dict[str, Array]]:
        rows, targets = part
        states, head = _states(config, layout, params, rows, sums), qwen.head(config, params)
        where = rows.targets, rows.count
        logp, _ = completion_logps(
            *jax.lax.stop_gradient((states, head)), *where, Distribution(), layout
        )
        of_logp = partial(dpo_loss, settings, targets=targets, sequence=rows.sequence)
        by_logp: Any = jax.value_and_grad(of_logp, has_aux=True)
        (value, means), weights = by_logp(logp)
        weighed: Any = summed_token_loss(
            weighted, states, head, *where, weights, Distribution(), layout
        )
        return weighed[0] + jax.lax.stop_gradient(value - weighed[0]), means

    return _step(config, layout, optimizer, loss, state, (rows, targets))


def reward_update(
    config: QwenConfig,
    layout: Layout,
    kind: str,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rows: Rows,
    targets: RewardTargets,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the loss of a reward model (`preferences.reward_loss`).

    A sequence is scored where it ends, by the state that would predict a token behind it.
    """

    def loss(
        params: Params, sums: Params | None, part: tuple[Rows, RewardTargets]
    ) -> tuple[Array, dict[str, Array]]:
        rows, targets = part
        scores = qwen.scores(params, _states(config, layout, params, rows, sums))
        return reward_loss(kind, scores, targets, rows.sequence)

    return _step(config, layout, optimizer, loss, state, (rows, targets))


def grpo_update(
    config: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    settings: LossConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    rows: Rows,
    targets: PolicyTargets,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Take one step on the GRPO loss (`losses.policy_loss`); metrics are means over tokens."""

    def token_loss(logp: Array, entropy: Array, targets: PolicyTargets) -> Any:
        return policy_loss(settings, logp, entropy, targets)

    def loss(
        params: Params, sums: Params | None, part: tuple[Rows, PolicyTargets]
    ) -> tuple[Array, dict[str, Array]]:
        rows, targets = part
        states, head = _states(config, layout, params, rows, sums), qwen.head(config, params)
        where = rows.targets, rows.count
        if settings.ratio == "sequence":  # known before the loss of any of its tokens
            logp, _ = completion_logps(
                *jax.lax.stop_gradient((states, head)), *where, distribution, layout
            )
            own = averaged_log_ratio(settings, logp - targets.old_logp, targets.advantages)
            ratios = sequence_log_ratio(own, targets.mask, rows.sequence)
            targets = targets._replace(sequence_log_ratio=ratios)
        return summed_token_loss(token_loss, states, head, *where, targets, distribution, layout)

    state, metrics = _step(config, layout, optimizer, loss, state, (rows, targets))
    num_tokens = jnp.maximum(metrics.pop("num_tokens"), 1.0)
    whole = {name: metrics.pop(name) for name in ("loss", "grad_norm")}
    return state, {**whole, **{name: value / num_tokens for name, value in metrics.items()}}


def _states(
    config: QwenConfig, layout: Layout, params: Params, rows: Rows, sums: Params | None = None
) -> Float[Array, "B C D"]:
    """Run one pass and return the states that predict its targets."""
    places = rows.tokens, rows.positions, rows.packing
    hidden = qwen.hidden_states(config, layout, params, *places, sums)
    # Each device takes from its own rows. The compiler would not see that, and gather them all.
    take = jax.shard_map(
        lambda hidden, sources: jnp.take_along_axis(hidden, sources[..., None], axis=1),
        mesh=layout.mesh,
        in_specs=(layout.activation("B - -").spec, layout.activation("B -").spec),
        out_specs=layout.activation("B - -").spec,
    )
    return take(hidden, rows.sources)


def _step(
    config: QwenConfig,
    layout: Layout,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    state: TrainState,
    batch: tuple[Rows, Any],
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Sum loss, gradients and metrics over passes in float32 and apply the optimiser once.

    A step whose loss or gradient is not finite leaves the state as it is.

    Weights are cast once, before the passes: what moves between devices, and each pass's own
    gradients, are in compute precision.
    """
    abstract, _ = lora.split(config.lora, qwen.abstract_params(config, layout))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = qwen.to_compute_dtype(config, state.params)
    params = jax.lax.with_sharding_constraint(params, shardings)
    if state.base:
        base, of_all = qwen.to_compute_dtype(config, state.base), loss
        loss = lambda params, *rest: of_all(lora.join(base, params), *rest)  # noqa: E731
    (value, sums), grads = value_and_gradients(loss, params, abstract, batch, config.remat)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new_params: Any = optax.apply_updates(state.params, updates)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads), **sums}
    is_finite = jnp.isfinite(value) & jnp.isfinite(metrics["grad_norm"])
    before, taken = state._replace(base={}), TrainState(new_params, opt_state, state.step + 1)
    after = jax.tree.map(partial(jnp.where, is_finite), taken, before)
    return after._replace(base=state.base), metrics
