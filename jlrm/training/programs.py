"""What a run compiles, and batches in the form that the programs take.

Training, evaluation and the benchmark run these very programs. Nothing here knows text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from jlrm.config import Config
from jlrm.model import qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.losses import PolicyTargets, completion_mask, token_weights
from jlrm.runtime.mesh import Layout, compiler_options
from jlrm.sampling.generate import lay_out_program
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import SamplerSettings
from jlrm.sampling.writer import DecodingSettings
from jlrm.training import packing, update
from jlrm.training.packing import Group, Rows


class GRPOPrograms(NamedTuple):
    """The programs of GRPO besides the sampler, and the row lengths they are compiled for."""

    lay_out: Any  # params -> params laid out for decoding
    freeze: Any  # params -> a copy in compute precision: the originals are given up to the update
    score: Any  # params, rows -> log-probabilities, entropy
    update: Any  # state, rows, targets -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


class Minibatch(NamedTuple):
    """What one optimiser step learns from, on the devices, and metrics of its packing."""

    rows: Rows
    targets: PolicyTargets
    packing: dict[str, float]


def rollout_settings(config: Config, network: Network) -> SamplerSettings:
    """Return how the completions of a GRPO step are drawn."""
    sampling = config.sampling
    return SamplerSettings(
        network.distribution(sampling), sampling.max_new_tokens, network.end_ids, sampling.slots
    )


def heldout_decoding(config: Config) -> DecodingSettings:
    """Return how the held-out set is judged."""
    settings = config.sampling
    return DecodingSettings(
        settings.max_new_tokens,
        settings.eval_batch_size,
        config.run.seed,
        settings.eval_temperature,
        stop_strings=settings.stop_strings,
    )


def grpo_programs(config: Config, network: Network, longest_prompt: int) -> GRPOPrograms:
    """Return the programs of a GRPO run, each compiled when first called."""
    grpo, sampling = config.grpo, config.sampling
    model, training = network.model, network.training
    num_updates = grpo.steps * grpo.epochs * grpo.minibatches
    optimizer = update.make_optimizer(grpo.optimizer, num_updates)
    options = compiler_options(training.mesh)
    fixed = model, training, network.distribution(sampling)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, qwen.abstract_params(model, training))
    prompts_per_device = -(-grpo.prompts // (grpo.minibatches * training.mesh.size))
    group_tokens = longest_prompt + grpo.rollouts * sampling.max_new_tokens
    return GRPOPrograms(
        lay_out=lay_out_program(model, network.decoding, sampling.weights == "int8"),
        freeze=jax.jit(partial(_freeze, model), out_shardings=shardings),
        score=jax.jit(partial(update.score, *fixed), compiler_options=options),
        update=jax.jit(
            partial(update.grpo_update, *fixed, grpo.loss, optimizer),
            donate_argnums=0,
            compiler_options=options,
        ),
        optimizer=optimizer,
        rate=update.learning_rate(grpo.optimizer, num_updates),
        sizes=packing.row_sizes(
            longest_prompt,
            sampling.max_new_tokens,
            prompts_per_device * group_tokens,
            grpo.pack_tokens,
            training.platform,
        ),
    )


def pack_minibatch(
    layout: Layout,
    sizes: Sequence[int],
    groups: Sequence[Group],
    logps: Float[np.ndarray, "B T"],
    advantages: Float[np.ndarray, " B"],
    is_kept: Bool[np.ndarray, " B"],
    aggregation: str,
    ref_logps: Float[np.ndarray, "B T"] | None = None,
) -> Minibatch:
    """Pack groups and what is known of their B completions, and send it to the devices.

    `logps` are the old log-probabilities; a completion that is not kept has no part in the loss.
    """
    packed = packing.pack(groups, sizes, layout.mesh.size)
    lengths = np.array([len(ids) for group in groups for ids in group.completions])
    mask = completion_mask(lengths, logps.shape[1]) & is_kept[:, None]
    targets = PolicyTargets(
        old_logp=packed.take(logps),
        ref_logp=None if ref_logps is None else packed.take(ref_logps),
        advantages=packed.take(advantages),
        mask=packed.take(is_kept),
        weights=packed.take(token_weights(mask, aggregation)),
    )
    rows, targets = packing.to_devices(layout, (packed.rows, targets))
    return Minibatch(rows, targets, packed.metrics)


def _freeze(model: QwenConfig, params: Params) -> Params:
    # Without a copy, a cast that changes nothing would give back the very same buffers.
    return jax.tree.map(jnp.copy, qwen.to_compute_dtype(model, params))
