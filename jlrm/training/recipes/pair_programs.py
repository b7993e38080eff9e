"""The programs of the stages that learn from pairs, beside those of training/programs.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlrm.config import Config
from jlrm.rl.distribution import Distribution
from jlrm.rl.preferences import PairTargets, RewardTargets
from jlrm.runtime.mesh import compiler_options
from jlrm.sampling.generate import lay_out_program, rollout_arguments, rollout_program
from jlrm.sampling.policy import Network
from jlrm.sampling.scores import abstract_texts, scores_program
from jlrm.training import packing, update
from jlrm.training.calls import Call, abstract_reference, init_optimizer, like, longest_rows
from jlrm.training.packing import Group
from jlrm.training.programs import freeze_program, rollout_settings, training_stops
from jlrm.weights.hf_config import LABELS


class DPOPrograms(NamedTuple):
    """The programs of DPO besides the sampler, and the row lengths they are compiled for."""

    lay_out: Any  # params -> params laid out for decoding
    freeze: Any  # what is trained -> a copy in compute precision
    logprobs: Any  # params, rows -> log-probabilities, entropy
    update: Any  # state, rows, targets of pairs -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


def dpo_programs(config: Config, network: Network, longest: tuple[int, int]) -> DPOPrograms:
    """Return the programs of DPO on prompts and completions of at most so many tokens."""
    dpo, model, layout = config.dpo, network.model, network.training
    optimizer = update.make_optimizer(dpo.optimizer, dpo.steps)
    options = compiler_options(layout.mesh, model.exact)
    return DPOPrograms(
        lay_out=lay_out_program(model, network.decoding, config.sampling.weights),
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


class RewardPrograms(NamedTuple):
    """The program of a reward model, and the row lengths it is compiled for."""

    update: Any  # state, rows, targets -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


def scoring(network: Network, kind: str) -> Any:
    """Return the same network with the head of a reward model in the place of its own."""
    model = dataclasses.replace(network.model, num_labels=len(LABELS[kind]))
    return dataclasses.replace(network, model=model)


def reward_programs(config: Config, network: Network, longest: tuple[int, int]) -> RewardPrograms:
    """Return the programs of a reward model on prompts and answers of at most so many tokens.

    network: with the head of a reward model (`scoring`).
    """
    settings, layout = config.reward_model, network.training
    optimizer = update.make_optimizer(settings.optimizer, settings.steps)
    return RewardPrograms(
        update=jax.jit(
            partial(update.reward_update, network.model, layout, settings.kind, optimizer),
            donate_argnums=0,
            compiler_options=compiler_options(layout.mesh, network.model.exact),
        ),
        optimizer=optimizer,
        rate=update.learning_rate(settings.optimizer, settings.steps),
        sizes=pair_sizes(network, longest, settings.batch_size, settings.pack_tokens),
    )


def reward_calls(
    config: Config,
    network: Network,
    longest_prompt: int,
    programs: RewardPrograms | None = None,
    longest_target: int = 0,
) -> dict[str, Call]:
    """Return every program that a reward model runs, judging the held-out set included, by name.

    Args:
      programs, longest_target: as of `programs.sft_calls`.
    """
    settings = config.reward_model
    if not network.model.num_labels:
        network = scoring(network, settings.kind)
    is_pair = settings.kind == "bradley_terry"
    longest = longest_prompt, longest_target or (settings.max_target_tokens if is_pair else 0)
    programs = programs or reward_programs(config, network, longest)
    state = update.abstract_state(network.model, network.training, programs.optimizer)
    ids = scored_group(range(longest_prompt), [range(longest[1])] * 2 if is_pair else [])
    rows = longest_rows(network.training, programs.sizes, [ids] * settings.batch_size)
    is_last, label = (like(rows.rows.tokens, dtype) for dtype in (jnp.bool, jnp.int32))
    count = like(rows.rows.num_passes, jnp.float32)
    targets = RewardTargets(is_last, label, count)
    texts = abstract_texts(network, config.sampling.eval_batch_size, sum(longest))
    return {
        "init_reward_optimizer": init_optimizer(network, programs.optimizer, state),
        "reward_scores": Call(scores_program(network), (state.weights, *texts)),
        "reward_model": Call(programs.update, (state, rows.rows, targets), longest=rows),
    }


def scored_group(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Group:
    """Return a prompt and its answers as a group in which the end of each answer is a source.

    The state at the last token is scored. It is there if a token is predicted from it: any one
    behind. Without answers the prompt itself is scored.
    """
    return Group(prompt, [[*ids, 0] for ids in answers] or [[0]])


def pair_sizes(
    network: Network, longest: tuple[int, int], batch_size: int, pack_tokens: int
) -> list[int]:
    """Return the row lengths of pairs; the longest has room for a prompt and both completions.

    A completion may have a token more than the longest: one that ends it for `scored_group`.
    """
    prompt, completion = longest
    both = 2 * (completion + 1)
    per_device = -(-batch_size // network.mesh.size)
    platform = network.training.platform
    return packing.row_sizes(prompt, both, (prompt + both) * per_device, pack_tokens, platform)


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
        calls["lay_out"] = Call(programs.lay_out, (state.weights,))
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
        arguments = abstract_reference(network, state), rows.rows
        calls["dpo_reference"] = Call(programs.logprobs, arguments, longest=rows)
    calls["dpo"] = Call(programs.update, (state, rows.rows, targets), longest=rows)
    return calls
