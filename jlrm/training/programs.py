"""The programs of SFT, GRPO and the held-out set, what they are called with, and their batches.

Training calls these programs with arrays; a plan compiles the same ones for abstract arrays, from
`first_calls`, each stage's own calls and `heldout_calls`. Nothing here knows text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

from jlrm.config import Config
from jlrm.judgement import prompts
from jlrm.model import lora, qwen
from jlrm.model.qwen import Params, QwenConfig
from jlrm.rl.losses import PolicyTargets, completion_mask, token_weights
from jlrm.runtime.mesh import compiler_options
from jlrm.sampling.generate import lay_out_program, rollout_arguments, rollout_program
from jlrm.sampling.policy import Network
from jlrm.sampling.sampler import SamplerSettings
from jlrm.sampling.stops import StopTables, stop_tables
from jlrm.sampling.writer import DecodingSettings, sampler_settings
from jlrm.training import packing, update
from jlrm.training.calls import Call, abstract_reference, init_optimizer, like, longest_rows
from jlrm.training.packing import Group, Rows
from jlrm.weights.source import quantise_program


class SFTPrograms(NamedTuple):
    """The program of SFT, and the row lengths it is compiled for."""

    update: Any  # state, rows, weights of tokens -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


class GRPOPrograms(NamedTuple):
    """The programs of GRPO besides the sampler, and the row lengths they are compiled for."""

    lay_out: Any  # params -> params laid out for decoding
    freeze: Any  # what is trained -> a copy in compute precision: updates take the originals
    logprobs: Any  # params, rows -> log-probabilities, entropy
    update: Any  # state, rows, targets -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    sizes: list[int]


class Known(NamedTuple):
    """What is known of the B completions of a minibatch, besides their tokens."""

    logps: Float[np.ndarray, "B T"]  # the old ones
    advantages: Float[np.ndarray, " B"]
    is_kept: Bool[np.ndarray, " B"]  # False: no part in the loss
    ref_logps: Float[np.ndarray, "B T"] | None = None
    is_singled: Bool[np.ndarray, "B T"] | None = None  # by `losses.covariance_tokens`


class Minibatch(NamedTuple):
    """What one optimiser step learns from, on the devices, and metrics of its packing."""

    rows: Rows
    targets: PolicyTargets
    packing: dict[str, float]
    num_tokens: int  # in the loss
    completion: Int[np.ndarray, "A B C"]  # number of each target's completion; -1: no target


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
        stop_strings=stop_strings(config),
        stop_after=prompts.reasoning_end(config.data.prompt),
    )


def sft_programs(config: Config, network: Network, longest: tuple[int, int]) -> SFTPrograms:
    """Return the programs of SFT on prompts and targets of at most so many tokens."""
    sft, layout = config.sft, network.training
    optimizer = update.make_optimizer(sft.optimizer, sft.steps)
    per_device = -(-sft.batch_size // layout.mesh.size)
    return SFTPrograms(
        update=jax.jit(
            partial(update.sft_update, network.model, layout, optimizer),
            donate_argnums=0,
            compiler_options=compiler_options(layout.mesh, network.model.exact),
        ),
        optimizer=optimizer,
        rate=update.learning_rate(sft.optimizer, sft.steps),
        sizes=packing.row_sizes(
            *longest, sum(longest) * per_device, sft.pack_tokens, layout.platform
        ),
    )


def sft_calls(
    config: Config,
    network: Network,
    longest_prompt: int,
    programs: SFTPrograms | None = None,
    longest_target: int = 0,
) -> dict[str, Call]:
    """Return every program that SFT runs beside those of the held-out set, by name.

    Args:
      programs: the run's own; None: others like them, for a plan.
      longest_target: 0: as long as the config allows.
    """
    longest = longest_prompt, longest_target or config.sft.max_target_tokens
    programs = programs or sft_programs(config, network, longest)
    state = update.abstract_state(network.model, network.training, programs.optimizer)
    group = Group(range(longest[0]), [range(longest[1])])
    rows = longest_rows(network.training, programs.sizes, [group] * config.sft.batch_size)
    weights = like(rows.rows.tokens, jnp.float32)
    return {
        "init_sft_optimizer": init_optimizer(network, programs.optimizer, state),
        "sft": Call(programs.update, (state, rows.rows, weights), longest=rows),
    }


def grpo_programs(config: Config, network: Network, longest_prompt: int) -> GRPOPrograms:
    """Return the programs of a GRPO run, each compiled when first called."""
    grpo, sampling = config.grpo, config.sampling
    model, training = network.model, network.training
    num_updates = grpo.steps * grpo.epochs * grpo.minibatches
    optimizer = update.make_optimizer(grpo.optimizer, num_updates)
    options = compiler_options(training.mesh, model.exact)
    fixed = model, training, network.distribution(sampling)
    prompts_per_device = -(-grpo.prompts // (grpo.minibatches * training.mesh.size))
    unit, num_new = network.unit, sampling.max_new_tokens
    longest = longest_prompt + -longest_prompt % unit, num_new + -num_new % unit
    group_tokens = longest[0] + grpo.rollouts * longest[1]
    return GRPOPrograms(
        lay_out=lay_out_program(model, network.decoding, sampling.weights),
        freeze=freeze_program(network),
        logprobs=jax.jit(partial(update.logprobs, *fixed), compiler_options=options),
        update=jax.jit(
            partial(update.grpo_update, *fixed, grpo.loss, optimizer),
            donate_argnums=0,
            compiler_options=options,
        ),
        optimizer=optimizer,
        rate=update.learning_rate(grpo.optimizer, num_updates),
        sizes=packing.row_sizes(
            *longest,
            prompts_per_device * group_tokens,
            grpo.pack_tokens,
            training.platform,
        ),
    )


def grpo_calls(
    config: Config, network: Network, longest_prompt: int, programs: GRPOPrograms | None = None
) -> dict[str, Call]:
    """Return every program that GRPO runs beside those of the held-out set, by name.

    Args:
      programs: as of `sft_calls`.
    """
    grpo, sampling, layout = config.grpo, config.sampling, network.training
    programs = programs or grpo_programs(config, network, longest_prompt)
    state = update.abstract_state(network.model, layout, programs.optimizer)
    group = Group(range(longest_prompt), [range(sampling.max_new_tokens)] * grpo.rollouts)
    groups = [group] * (grpo.prompts // grpo.minibatches)
    rows = longest_rows(layout, programs.sizes, groups)
    has_reference = grpo.has_reference
    extra = weighs_policy_alone(config), grpo.loss.singles_out
    targets = abstract_targets(rows.rows, has_reference, *extra)
    calls = {"init_optimizer": init_optimizer(network, programs.optimizer, state)}
    if has_reference:
        calls["freeze"] = Call(programs.freeze, (state.params,))
    calls["lay_out"] = Call(programs.lay_out, (state.weights,))
    calls["rollout"] = Call(
        rollout_program(network, rollout_settings(config, network)),
        rollout_arguments(
            network, training_stops(config, network), grpo.prompts, grpo.rollouts, longest_prompt
        ),
        weights="lay_out",
    )
    if has_reference:
        frozen = abstract_reference(network, state)
        calls["logprobs_reference"] = Call(programs.logprobs, (frozen, rows.rows), longest=rows)
    if needs_old_logprobs(config):
        arguments = state.weights, rows.rows
        calls["logprobs_policy"] = Call(programs.logprobs, arguments, longest=rows)
    calls["update"] = Call(programs.update, (state, rows.rows, targets), longest=rows)
    return calls


def needs_old_logprobs(config: Config) -> bool:
    """Return whether a step computes old log-probabilities: the sampler's own can't always serve.

    They serve for one optimiser step a rollout, and that step measures the gap between the two.
    """
    grpo = config.grpo
    return grpo.epochs * grpo.minibatches > 1 or grpo.loss.importance_cap > 0


def weighs_policy_alone(config: Config) -> bool:
    """Return whether importance weights stand beside a token's weight, for its surrogate alone."""
    grpo = config.grpo
    return grpo.loss.importance_cap > 0 and grpo.importance_terms == "policy"


def first_calls(config: Config, network: Network) -> dict[str, Call]:
    """Return the programs before a stage: weights and adapters are born, unless they are read."""
    model, layout = network.model, network.training
    plain, key = dataclasses.replace(model, lora=None), jax.eval_shape(lambda: jax.random.key(0))
    calls = {} if config.model.path else {"init": Call(qwen.init_program(plain, layout), (key,))}
    if model.lora is None:
        return calls
    if model.lora.base != "stored":
        whole = qwen.abstract_params(plain, layout)
        calls["init_base"] = Call(quantise_program(model, layout), (whole,))
    if not config.model.adapter:
        _, base = lora.split(model.lora, qwen.abstract_params(model, layout))
        calls["init_adapters"] = Call(qwen.adapters_program(model, layout), (key, base))
    return calls


def heldout_calls(config: Config, network: Network, longest_prompt: int) -> dict[str, Call]:
    """Return the programs that judge the held-out set, never with quantised weights.

    `lay_out` is that of rollouts, where rollouts have the same one.
    """
    is_sampled = config.grpo.steps > 0 or config.dpo.is_sampled
    is_shared = is_sampled and config.sampling.weights == "full"
    weights = "lay_out" if is_shared else "lay_out_evaluation"
    program = lay_out_program(network.model, network.decoding)
    params = qwen.abstract_params(network.model, network.training)
    settings = sampler_settings(network, heldout_decoding(config))
    tables, size = training_stops(config, network), config.sampling.eval_batch_size
    return {
        weights: Call(program, (params,)),
        "evaluation": Call(
            rollout_program(network, settings),
            rollout_arguments(network, tables, size, 1, longest_prompt),
            weights=weights,
        ),
    }


def abstract_targets(
    rows: Rows, has_reference: bool, has_importance: bool = False, has_singled: bool = False
) -> PolicyTargets:
    """Return what the policy loss takes beside its rows, as abstract arrays."""
    numbers = like(rows.tokens, jnp.float32)
    return PolicyTargets(
        old_logp=numbers,
        ref_logp=numbers if has_reference else None,
        advantages=numbers,
        mask=like(rows.tokens, jnp.bool),
        weights=numbers,
        importance=numbers if has_importance else None,
        is_singled=like(rows.tokens, jnp.bool) if has_singled else None,
    )


def pack_minibatch(
    network: Network,
    sizes: Sequence[int],
    groups: Sequence[Group],
    known: Known,
    aggregation: str,
) -> Minibatch:
    """Pack groups and what is known of their completions, and send it to the devices."""
    layout = network.training
    packed = packing.pack(groups, sizes, layout.mesh.size, network.unit)
    lengths = np.array([len(ids) for group in groups for ids in group.completions])
    mask = completion_mask(lengths, known.logps.shape[1]) & known.is_kept[:, None]
    targets = PolicyTargets(
        old_logp=packed.take(known.logps),
        ref_logp=None if known.ref_logps is None else packed.take(known.ref_logps),
        advantages=packed.take(known.advantages),
        mask=packed.take(known.is_kept),
        weights=packed.take(token_weights(mask, aggregation)),
        is_singled=None if known.is_singled is None else packed.take(known.is_singled),
    )
    rows, targets = packing.to_devices(layout, (packed.rows, targets))
    return Minibatch(rows, targets, packed.metrics, int(mask.sum()), packed.completion)


def freeze_program(network: Network) -> Any:
    """Return the program that keeps a copy of what is trained as the reference."""
    params = qwen.abstract_params(network.model, network.training)
    trained, _ = lora.split(network.model.lora, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
    return jax.jit(partial(_freeze, network.model), out_shardings=shardings)


def _freeze(model: QwenConfig, params: Params) -> Params:
    # Without a copy, a cast that changes nothing would give back the very same buffers.
    return jax.tree.map(jnp.copy, qwen.to_compute_dtype(model, params))


def stop_strings(config: Config) -> dict[str, int]:
    """Return which occurrence of which text ends a completion; one score has one `</answer>`."""
    given = config.sampling.stop_strings
    is_single = config.data.judging == "single" and "</answer>" in given
    return {**given, "</answer>": 1} if is_single else given


def training_stops(
    config: Config, network: Network, token_bytes: Sequence[bytes] = ()
) -> StopTables:
    """Return what ends completions; without the bytes of tokens: tables of the same shape."""
    after = prompts.reasoning_end(config.data.prompt)
    return stop_tables(stop_strings(config), token_bytes, network.model.vocab_size, after)
