"""The programs of a run for a slice, and what else is in memory while each of them runs.

The programs are training's own (training/programs.py). `Point`s add what training keeps alive
beside each: the weights, the optimiser's moments, the reference, weights that are laid out for
decoding. Nothing here touches a device.

A program's results are taken to be allocated at dispatch, not when it begins: what is dispatched
ahead (`grpo.ahead`) adds its results to the program that still runs.

Shapes are those of the longest batch: every prompt `data.max_prompt_tokens` long, every completion
`sampling.max_new_tokens`, rows of the longest length of the closed set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jlrm.config import Config, stages_of
from jlrm.model import lora, qwen
from jlrm.model.qwen import QwenConfig
from jlrm.planning.counting import Assumed
from jlrm.planning.memory import (
    BATCH,
    LAID_OUT,
    MOMENTS,
    REFERENCE,
    WEIGHTS,
    Held,
    Point,
    cache_bytes,
    decode_turns,
    host_bytes,
    laid_out_bytes,
    num_slots,
    state_kinds,
    total,
)
from jlrm.planning.slices import Compiled, shard_bytes
from jlrm.rl import logprobs
from jlrm.sampling.policy import Network, bare_network
from jlrm.sampling.sampler import SamplerSettings
from jlrm.training.calls import Call, laid_out_weights
from jlrm.training.programs import first_calls, heldout_calls, rollout_settings
from jlrm.training.recipes.stages import STAGES
from jlrm.training.update import TrainState

# Phases of every run; a stage adds its own between the first and the last two.
FIRST_PHASES, LAST_PHASES = ("load",), ("evaluation", "checkpoint")


class PlannedProgram(NamedTuple):
    """A program to compile, and its arguments by kind."""

    call: Call
    kinds: Held
    assumed: Assumed = MappingProxyType({})
    caches: int = 0  # bytes of its temporary memory that hold keys and values
    note: str = ""


class Plan(NamedTuple):
    """The programs of a run by name, and its phases, both in the order in which a run has them."""

    programs: dict[str, PlannedProgram]
    phases: dict[str, list[Point]]
    resident: int  # bytes that are there for all of a stage: a bound that needs no compiling
    host: Held  # bytes that a VM holds for each of its devices, by phase
    is_tpu: bool = True
    num_experts: int = 0  # of each layer

    def updates(self) -> list[str]:
        """Return the programs that take optimiser steps."""
        return [name for name, each in self.programs.items() if MOMENTS in each.kinds]

    def arguments(self, name: str, compiled: Mapping[str, Compiled]) -> tuple[Any, ...]:
        """Return a program's abstract arguments.

        Weights of a rollout lie as the program lays them out that was compiled before it.
        """
        call = self.programs[name].call
        if not call.weights:
            return call.arguments
        lay_out = self.programs[call.weights].call
        weights = laid_out_weights(lay_out, compiled[call.weights].output_shardings)
        return weights, *call.arguments


def plan(config: Config, model: QwenConfig, mesh: Mesh) -> Plan:
    """Return the programs of a run and its phases."""
    network, longest = bare_network(model, mesh), config.data.max_prompt_tokens
    calls = first_calls(config, network)
    begun = [_read(network)] if config.model.path else []
    points = {"load": [*begun, *(Point(name, {}) for name in calls)]}
    resident, state = 0, dict[str, int]()
    for stage in stages_of(config):
        own = STAGES[stage].calls(config, network, longest)
        kinds = {name: _kinds(config, network, name, call) for name, call in own.items()}
        added = POINTS.get(stage, _points)(stage, config, network, kinds)
        for phase, more in added.items():
            points.setdefault(phase, []).extend(more)
        always = _always(kinds)
        resident = max(resident, sum(always.values()))
        state = max(state, always, key=lambda each: sum(each.values()))
        calls |= own
    if stages_of(config) != ["reward_model"]:  # which judges by scores, and writes nothing
        calls |= heldout_calls(config, network, longest)
    phases = {phase: points[phase] for phase in points if phase not in LAST_PHASES}
    return Plan(
        {name: _planned(config, network, name, call) for name, call in calls.items()},
        phases | {phase: points[phase] for phase in LAST_PHASES},
        resident,
        host_bytes(qwen.abstract_params(network.model, network.training), state),
        network.training.platform == "tpu",
        model.num_experts,
    )


def _read(network: Network) -> Point:
    """Return the moment at which weights have been read."""
    model = replace(network.model, lora=None)  # a base is read before it is quantised
    return Point("", {WEIGHTS: shard_bytes(qwen.abstract_params(model, network.training))})


def _points(
    stage: str, config: Config, network: Network, kinds: Mapping[str, Held]
) -> dict[str, list[Point]]:
    """Return the moments of a stage whose steps are one program, named as the stage."""
    held = _always(kinds)
    init = next(name for name in kinds if name.startswith("init"))
    return {
        "load": [Point(init, _rest(held, kinds[init])), Point("", held)],
        stage: [Point(stage, {})],
        "evaluation": [Point("evaluation", held)],
        "checkpoint": [Point("", held)],
    }


def _dpo_points(
    stage: str, config: Config, network: Network, kinds: Mapping[str, Held]
) -> dict[str, list[Point]]:
    """Return the moments of DPO, as the loop of training/recipes/preference.py keeps things."""
    points, held = _points(stage, config, network, kinds), _always(kinds)
    reference = {kind: size for kind, size in held.items() if kind == REFERENCE}
    others = {kind: size for kind, size in held.items() if kind != WEIGHTS}
    if reference:
        moments = {MOMENTS: held[MOMENTS]}
        frozen = (
            Point("freeze_dpo", moments),
            Point("freeze_dpo", total(moments, {WEIGHTS: held[WEIGHTS]})),
        )
        points["load"][1:1] = frozen
        points["dpo"].insert(0, Point("dpo_reference", {k: held[k] for k in (WEIGHTS, MOMENTS)}))
    points["dpo"][-1] = Point("dpo", reference)
    if "rollout_dpo" in kinds:
        points["dpo"][:0] = [Point("lay_out", others), Point("rollout_dpo", held)]
    return points


def _reward_points(
    stage: str, config: Config, network: Network, kinds: Mapping[str, Held]
) -> dict[str, list[Point]]:
    """Return the moments of a reward model, which judges by scores."""
    moments = {MOMENTS: kinds[stage][MOMENTS]}
    points = _points(stage, config, network, kinds)
    return {**points, "evaluation": [Point("reward_scores", moments)]}


def _grpo_points(
    stage: str, config: Config, network: Network, kinds: Mapping[str, Held]
) -> dict[str, list[Point]]:
    """Return the moments of GRPO's phases, as the loop of training/recipes/grpo.py keeps things."""
    grpo = config.grpo
    held = {kind: kinds["update"][kind] for kind in (WEIGHTS, MOMENTS)}
    moments = {MOMENTS: held[MOMENTS]}
    one = kinds["update"][BATCH]
    others, batch = {BATCH: (grpo.minibatches - 1) * one}, {BATCH: grpo.minibatches * one}
    reference = {}
    if "logprobs_reference" in kinds:
        reference = {REFERENCE: kinds["logprobs_reference"][REFERENCE]}
    always = {**held, **reference}
    laid_out = {LAID_OUT: laid_out_bytes(network, config.sampling.weights)}
    during = _during_rollout(config, network, always, laid_out, batch)
    return {
        "load": [
            Point("init_optimizer", _rest(held, kinds["init_optimizer"])),
            Point("", always),
            # A run that goes on reads its first weights once more, for the reference.
            *([Point("freeze", {**moments, **_rest(held, kinds["freeze"])})] if reference else []),
            *([Point("freeze", held)] if reference else []),
        ],
        "rollout": [
            Point("lay_out", {**moments, **reference}),
            *(Point(name, during) for name in ("rollout", "rollout_greedy") if name in kinds),
        ],
        "logprobs": [*_logprobs(kinds, held, reference, batch), Point("", total(always, batch))],
        "update": [
            Point("update", total(reference, laid_out if grpo.ahead == "next" else {}, others))
        ],
        "evaluation": [Point("evaluation", always)],
        "checkpoint": [Point("", always) if grpo.ahead == "none" else Point("rollout", during)],
    }


def _during_rollout(
    config: Config, network: Network, always: Held, laid_out: Held, batch: Held
) -> Held:
    """Return what is there while a rollout runs, with what has been dispatched behind it."""
    during = dict(always)
    if config.grpo.ahead != "none":  # evaluation's weights, or those of a second rollout
        behind = {LAID_OUT: laid_out_bytes(network, "full")}
        during = total(during, max(behind, laid_out, key=lambda kinds: kinds[LAID_OUT]))
    return total(during, batch) if config.grpo.ahead == "stale" else during


def _logprobs(kinds: Mapping[str, Held], held: Held, reference: Held, batch: Held) -> list[Point]:
    """Return the moments at which log-probabilities are computed, one minibatch at a time."""
    beside = {
        "logprobs_reference": {**held, **_rest(held, kinds.get("logprobs_reference", {}))},
        "logprobs_policy": {MOMENTS: held[MOMENTS], **reference},
    }
    return [
        Point(name, {**others, BATCH: batch[BATCH] - kinds[name][BATCH]})
        for name, others in beside.items()
        if name in kinds
    ]


def _rest(held: Held, of_program: Held) -> dict[str, int]:
    """Return the weights that are there beside those of a program: frozen ones, or trained ones."""
    return {WEIGHTS: held[WEIGHTS] - of_program.get(WEIGHTS, 0)}


def _always(kinds: Mapping[str, Held]) -> dict[str, int]:
    """Return what a stage holds all the time: its state, and the reference if it has one."""
    lasting = (WEIGHTS, MOMENTS, REFERENCE)
    return {kind: held[kind] for kind in lasting for held in kinds.values() if kind in held}


def _kinds(config: Config, network: Network, name: str, call: Call) -> dict[str, int]:
    """Return what the arguments of a program are."""
    first, rest = call.arguments[0], call.arguments[1:]
    if call.weights:
        laid_out = laid_out_bytes(network, _form(config, call))
        return {LAID_OUT: laid_out, BATCH: shard_bytes(call.arguments)}
    if isinstance(first, TrainState):
        return {**state_kinds(first), BATCH: shard_bytes(rest)}
    if name in ("init", "init_adapters"):  # a random key, and what lies beneath the adapters
        return {WEIGHTS: shard_bytes(rest)}
    kinds = {WEIGHTS: shard_bytes(first)}
    if name.endswith("_reference"):  # adapters have the policy's own base
        trained, base = lora.split(network.model.lora, first)
        kinds = {REFERENCE: shard_bytes(trained), WEIGHTS: shard_bytes(base)}
    return {**kinds, BATCH: shard_bytes(rest)} if rest else kinds


def _form(config: Config, call: Call) -> str:
    return config.sampling.weights if call.weights == "lay_out" else "full"


def _planned(config: Config, network: Network, name: str, call: Call) -> PlannedProgram:
    kinds = _kinds(config, network, name, call)
    if call.weights:
        return _rollout(network, call, kinds, rollout_settings(config, network))
    if call.longest is None:
        return PlannedProgram(call, kinds)
    num_rows, num_slots = call.longest.rows.tokens.shape[1:]
    chunk = max(logprobs.CHUNK_POSITIONS, 1)
    chunk = -(-num_slots // -(-num_slots // chunk))
    assumed = {
        "shard_map/while": [-(-call.longest.num_targets // chunk)],
        "/while": [call.longest.num_passes],
    }
    note = f"{call.longest.num_passes} passes of {num_rows} rows of {num_slots} tokens"
    return PlannedProgram(call, kinds, assumed, note=note)


def _rollout(
    network: Network, call: Call, kinds: Held, settings: SamplerSettings
) -> PlannedProgram:
    """Return a sampler's program; only sizes of `settings` are used, which evaluation shares."""
    prompts, keys, _ = call.arguments
    num_rollouts = keys.shape[1]
    caches = cache_bytes(
        network.model,
        network.decoding,
        prompts.tokens,
        num_slots(settings, num_rollouts),
        settings.max_new_tokens,
    )
    assumed = {"jit(generate)/while": decode_turns(settings, num_rollouts)}
    return PlannedProgram(call, kinds, assumed, caches, "longest completions")


# Stages whose steps do more than update, and what they hold then.
POINTS = MappingProxyType(
    {"dpo": _dpo_points, "grpo": _grpo_points, "reward_model": _reward_points}
)
