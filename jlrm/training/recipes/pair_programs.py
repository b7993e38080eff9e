"""The programs of the stages that learn from pairs, beside those of training/programs.py."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlrm.config import Config
from jlrm.rl.distribution import Distribution
from jlrm.rl.preferences import PairTargets
from jlrm.runtime.mesh import compiler_options
from jlrm.sampling.generate import lay_out_program, rollout_arguments, rollout_program
from jlrm.sampling.policy import Network
from jlrm.training import packing, update
from jlrm.training.packing import Group
from jlrm.training.programs import (
    Call,
    abstract_reference,
    freeze_program,
    init_optimizer,
    like,
    longest_rows,
    rollout_settings,
    training_stops,
)


class DPOPrograms(NamedTuple):
    """The programs of DPO besides the sampler, and the row lengths they are compiled for."""

    lay_out: Any  # params -> params laid out for decoding
    freeze: Any  # params -> a copy in compute precision
    logprobs: Any  # params, rows -> log-probabilities, entropy
    update: Any  # state, rows, targets of pairs -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


def dpo_programs(config: Config, network: Network, longest: tuple[int, int]) -> DPOPrograms:
    """Return the programs of DPO on prompts and completions of at most so many tokens."""
    dpo, model, layout = config.dpo, network.model, network.training
    optimizer = update.make_optimizer(dpo.optimizer, dpo.steps)
    options = compiler_options(layout.mesh)
    return DPOPrograms(
        lay_out=lay_out_program(model, network.decoding, config.sampling.weights == "int8"),
        freeze=freeze_program(network),
        logprobs=jax.jit(
            partial(update.logprobs, model, layout, Distribution()), compiler_options=options
        ),
        update=jax.jit(
            partial(update.dpo_update, model, layout, dpo, optimizer),
            donate_argnums=0,
            compiler_options=options,
        ),
        optimizer=optimizer,
        rate=update.learning_rate(dpo.optimizer, dpo.steps),
        sizes=pair_sizes(network, longest, dpo.batch_size, dpo.pack_tokens),
    )


def pair_sizes(
    network: Network, longest: tuple[int, int], batch_size: int, pack_tokens: int
) -> list[int]:
    """Return the row lengths of pairs; the longest has room for a prompt and both completions."""
    prompt, completion = longest
    per_device = -(-batch_size // network.mesh.size)
    most_tokens = (prompt + 2 * completion) * per_device
    platform = network.training.platform
    return packing.row_sizes(prompt, 2 * completion, most_tokens, pack_tokens, platform)


def longest_pair(config: Config, longest_prompt: int) -> tuple[int, int]:
    """Return the most tokens of a prompt and of a completion of DPO."""
    dpo, sampling = config.dpo, config.sampling
    return longest_prompt, sampling.max_new_tokens if dpo.is_sampled else dpo.max_target_tokens


def dpo_calls(
    config: Config,
    network: Network,
    longest_prompt: int,
    programs: DPOPrograms | None = None,
    longest_target: int = 0,
) -> dict[str, Call]:
    """Return every program that DPO runs beside those of the held-out set, by name.

    Args:
      programs, longest_target: as of `programs.sft_calls`.
    """
    prompt, most = longest_pair(config, longest_prompt)
    longest = prompt, longest_target or most
    programs = programs or dpo_programs(config, network, longest)
    state = update.abstract_state(network.model, network.training, programs.optimizer)
    group = Group(range(prompt), [range(longest[1])] * 2)
    rows = longest_rows(network.training, programs.sizes, [group] * config.dpo.batch_size)
    has_reference = config.dpo.reference == "start"
    numbers, mask = (like(rows.rows.tokens, dtype) for dtype in (jnp.float32, jnp.bool))
    count = like(rows.rows.num_passes, jnp.float32)
    targets = PairTargets(numbers if has_reference else None, mask, count)
    calls = {"init_dpo_optimizer": init_optimizer(network, programs.optimizer, state)}
    if has_reference:
        calls["freeze_dpo"] = Call(programs.freeze, (state.params,))
    if config.dpo.is_sampled:
        calls["lay_out"] = Call(programs.lay_out, (state.params,))
        calls["rollout_dpo"] = Call(
            rollout_program(network, rollout_settings(config, network)),
            rollout_arguments(
                network,
                training_stops(config, network),
                config.dpo.batch_size,
                config.dpo.rollouts,
                prompt,
            ),
            weights="lay_out",
        )
    if has_reference:
        arguments = abstract_reference(network), rows.rows
        calls["dpo_reference"] = Call(programs.logprobs, arguments, longest=rows)
    calls["dpo"] = Call(programs.update, (state, rows.rows, targets), longest=rows)
    return calls
