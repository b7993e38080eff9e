"""What a run compiles, as abstract arguments, and what else is in memory while each program runs.

`tasks` lists the programs in the order in which a run meets them, `phases` adds to each what
train.py keeps alive beside it: the weights, the optimiser's moments, the reference, weights that
are laid out for decoding. Nothing of it touches a device.

A program's results are taken to be allocated when it is sent off, not when it begins: what is sent
off ahead (`grpo.ahead`) adds its results to the program that still runs.

Shapes are those of the longest batch: every prompt `data.max_prompt_tokens` long, every completion
`sampling.max_new_tokens`, rows of the longest length of the closed set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jlrm.config import Config
from jlrm.model import qwen
from jlrm.model.qwen import QwenConfig
from jlrm.planning import slices
from jlrm.planning.counting import Assumed
from jlrm.planning.slices import Compiled
from jlrm.rl import logprobs
from jlrm.rl.distribution import Distribution
from jlrm.rl.losses import PolicyTargets
from jlrm.runtime.mesh import Layout, compiler_options, rollout_layout, training_layout
from jlrm.sampling import decode, sampler, stops
from jlrm.sampling.policy import bare_network
from jlrm.sampling.sampler import SamplerSettings
from jlrm.training import packing, update
from jlrm.training.packing import Group, Rows
from jlrm.training.programs import grpo_programs

WEIGHTS, MOMENTS, REFERENCE = "master weights", "optimiser", "reference"
LAID_OUT, CACHES, BATCH, TEMPORARY = "rollout weights", "KV caches", "batch", "temporary"
KINDS = (WEIGHTS, MOMENTS, REFERENCE, LAID_OUT, CACHES, BATCH, TEMPORARY)

PHASES = ("load", "sft", "rollout", "score", "update", "evaluation", "checkpoint")

# A program and its arguments; those of a rollout are known when `lay_out` is compiled.
Arguments = Callable[[dict[str, Compiled]], tuple[Any, ...]]


class PlannedProgram(NamedTuple):
    """A program to compile; arguments by kind, in bytes of a device."""

    program: Any
    arguments: Arguments
    kinds: dict[str, int]
    assumed: Assumed = MappingProxyType({})
    caches: int = 0  # bytes of its temporary memory that hold keys and values
    note: str = ""


class Point(NamedTuple):
    """A moment of a phase: a program that runs (empty: none), and what else is there, in bytes."""

    program: str
    beside: dict[str, int]


class Plan(NamedTuple):
    """The programs of a run by name, and its phases."""

    tasks: dict[str, PlannedProgram]
    phases: dict[str, list[Point]]
    resident: int  # bytes that are there for all of a GRPO run: a bound that needs no compiling


def plan(config: Config, model: QwenConfig, mesh: Mesh) -> Plan:
    """Return the programs of a run and its phases."""
    training, decoding = training_layout(mesh), rollout_layout(mesh)
    params = qwen.abstract_params(model, training)
    tasks: dict[str, PlannedProgram] = {}
    phases: dict[str, list[Point]] = {}
    weights = {WEIGHTS: slices.shard_bytes(params)}
    if not config.model.path:
        tasks["init"] = PlannedProgram(qwen.init_program(model, training), _given(_key()), {})
    resident = 0
    if config.sft.steps:
        resident = _sft(config, model, training, params, tasks, phases)
    if config.grpo.steps:
        resident = max(resident, _grpo(config, model, training, decoding, params, tasks, phases))
    _evaluation(config, model, decoding, params, tasks)
    if "init" in tasks:
        phases["load"].insert(0, Point("init", {}))
    else:
        phases["load"].insert(0, Point("", weights))
    return Plan(tasks, phases, resident)


def _sft(
    config: Config,
    model: QwenConfig,
    training: Layout,
    params: Any,
    tasks: dict[str, PlannedProgram],
    phases: dict[str, list[Point]],
) -> int:
    sft, longest = config.sft, (config.data.max_prompt_tokens, config.sft.max_target_tokens)
    optimizer = update.make_optimizer(sft.optimizer, sft.steps)
    state = update.abstract_state(model, training, optimizer)
    held = _state_kinds(state)
    most = sum(longest) * -(-sft.batch_size // training.mesh.size)
    sizes = packing.row_sizes(*longest, most, sft.pack_tokens, training.platform)
    groups = [Group(range(longest[0]), [range(longest[1])])] * sft.batch_size
    rows, assumed, note = _longest_rows(training, sizes, groups)
    weights = _like(rows.tokens, jnp.float32)
    program = jax.jit(
        partial(update.sft_update, model, training, optimizer),
        donate_argnums=0,
        compiler_options=compiler_options(training.mesh),
    )
    kinds = {**held, BATCH: slices.shard_bytes((rows, weights))}
    tasks["init_sft_optimizer"] = _init_optimizer(optimizer, state)
    tasks["sft"] = PlannedProgram(program, _given(state, rows, weights), kinds, assumed, note=note)
    _extend(phases, "load", Point("init_sft_optimizer", {}), Point("", held))
    _extend(phases, "sft", Point("sft", {}))
    _extend(phases, "evaluation", Point("evaluation", held))
    _extend(phases, "checkpoint", Point("", held))
    return sum(held.values())


def _grpo(
    config: Config,
    model: QwenConfig,
    training: Layout,
    decoding: Layout,
    params: Any,
    tasks: dict[str, PlannedProgram],
    phases: dict[str, list[Point]],
) -> int:
    grpo, sampling = config.grpo, config.sampling
    distribution = Distribution(
        sampling.temperature, sampling.top_k, sampling.top_p, model.vocab_size - 1
    )
    longest = config.data.max_prompt_tokens
    programs = grpo_programs(config, bare_network(model, training.mesh), longest)
    state = update.abstract_state(model, training, programs.optimizer)
    held, only = _state_kinds(state), {WEIGHTS: slices.shard_bytes(state.params)}
    moments = {MOMENTS: held[MOMENTS]}
    frozen = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        jax.eval_shape(partial(qwen.to_compute_dtype, model), params),
        params,
    )
    reference = {REFERENCE: slices.shard_bytes(frozen)} if grpo.loss.kl_weight else {}
    laid_out = {LAID_OUT: laid_out_bytes(model, decoding, sampling.weights == "int8")}

    group = Group(range(longest), [range(sampling.max_new_tokens)] * grpo.rollouts)
    rows, assumed, note = _longest_rows(
        training, programs.sizes, [group] * (grpo.prompts // grpo.minibatches)
    )
    targets = _targets(rows, bool(grpo.loss.kl_weight))
    one, others = slices.shard_bytes((rows, targets)), grpo.minibatches - 1
    batch = {BATCH: one * (1 + others)}

    tasks["init_optimizer"] = _init_optimizer(programs.optimizer, state)
    if reference:
        tasks["freeze"] = PlannedProgram(programs.freeze, _given(params), only)
    tasks["lay_out"] = PlannedProgram(programs.lay_out, _given(params), only)
    tasks["rollout"] = _rollout(
        model, decoding, distribution, config, grpo.prompts, grpo.rollouts, "lay_out"
    )
    of_rows = {BATCH: slices.shard_bytes(rows)}
    is_rescored = grpo.epochs * grpo.minibatches > 1 or grpo.loss.importance_cap > 0
    scored = {
        "score_reference": (reference, frozen, {**held}),
        "score_policy": (only if is_rescored else {}, params, {**moments, **reference}),
    }
    points = []
    for name, (kinds, scored_params, beside) in scored.items():
        if kinds:
            arguments = _given(scored_params, rows)
            tasks[name] = PlannedProgram(
                programs.score, arguments, {**kinds, **of_rows}, assumed, note=note
            )
            points.append(Point(name, {**beside, BATCH: batch[BATCH] - of_rows[BATCH]}))
    tasks["update"] = PlannedProgram(
        programs.update, _given(state, rows, targets), {**held, BATCH: one}, assumed, note=note
    )

    always = {**held, **reference}
    _extend(phases, "load", Point("init_optimizer", {}), Point("", always))
    if reference:
        # A run that goes on reads its weights of old once more, for the reference.
        _extend(phases, "load", Point("freeze", moments), Point("freeze", held))
    during = {**always}
    if grpo.ahead != "none":  # evaluation's weights, or of the second rollout: sent off behind it
        behind = {LAID_OUT: laid_out_bytes(model, decoding, False)}
        during = _sum(during, max(behind, laid_out, key=lambda kinds: kinds[LAID_OUT]))
    if grpo.ahead == "stale":
        during = _sum(during, batch)
    _extend(phases, "rollout", Point("lay_out", {**moments, **reference}), Point("rollout", during))
    _extend(phases, "score", *points, Point("", _sum(always, batch)))
    next_weights = laid_out if grpo.ahead == "next" else {}
    _extend(phases, "update", Point("update", _sum(reference, next_weights, {BATCH: others * one})))
    _extend(phases, "evaluation", Point("evaluation", always))
    saving = Point("", always) if grpo.ahead == "none" else Point("rollout", during)
    _extend(phases, "checkpoint", saving)
    return sum(always.values())


def _evaluation(
    config: Config,
    model: QwenConfig,
    decoding: Layout,
    params: Any,
    tasks: dict[str, PlannedProgram],
) -> None:
    """Add the programs that judge the held-out set, never with quantised weights."""
    lay_out = "lay_out"
    if config.sampling.weights == "int8" or not config.grpo.steps:
        lay_out = "lay_out_evaluation"
        program = jax.jit(partial(decode.decode_params, model, decoding))
        tasks[lay_out] = PlannedProgram(
            program, _given(params), {WEIGHTS: slices.shard_bytes(params)}
        )
    distribution = Distribution(config.sampling.eval_temperature, num_ids=model.vocab_size - 1)
    size = config.sampling.eval_batch_size
    tasks["evaluation"] = _rollout(model, decoding, distribution, config, size, 1, lay_out)


def _rollout(
    model: QwenConfig,
    layout: Layout,
    distribution: Distribution,
    config: Config,
    num_prompts: int,
    num_rollouts: int,
    lay_out: str,
) -> PlannedProgram:
    """Return a sampler's program, its prompts filled up to what the mesh divides."""
    sampling, width = config.sampling, config.data.max_prompt_tokens
    num_prompts += -num_prompts % layout.num_shards("P")
    settings = SamplerSettings(
        distribution, sampling.max_new_tokens, (model.vocab_size - 1,), sampling.slots
    )
    # Which ids spell a stop string is not known without a tokenizer; the tables' shape is.
    tables = stops.stop_tables(sampling.stop_strings, [], model.vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype

    def array(letters: str, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.activation(letters))

    rest = (
        decode.Prompts._make((array("P T", num_prompts, width), array("P", num_prompts))),
        array("P R", num_prompts, num_rollouts, dtype=key),
        jax.tree.map(
            lambda table: jax.ShapeDtypeStruct(
                table.shape, table.dtype, sharding=layout.replicated()
            ),
            tables,
        ),
    )
    shapes = jax.eval_shape(
        partial(
            decode.decode_params,
            model,
            layout,
            quantise=lay_out == "lay_out" and sampling.weights == "int8",
        ),
        qwen.abstract_params(model, layout),
    )

    def arguments(found: dict[str, Compiled]) -> tuple[Any, ...]:
        weights = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            found[lay_out].output_shardings,
        )
        return weights, *rest

    is_int8 = lay_out == "lay_out" and sampling.weights == "int8"
    slots = min(sampling.slots or num_rollouts, num_rollouts)
    kinds = {LAID_OUT: laid_out_bytes(model, layout, is_int8), BATCH: slices.shard_bytes(rest)}
    return PlannedProgram(
        jax.jit(partial(sampler.generate, model, layout, settings)),
        arguments,
        kinds,
        {"jit(generate)/while": decode_turns(settings, num_rollouts)},
        _cache_bytes(model, layout, num_prompts, slots, width, sampling.max_new_tokens),
        "longest completions",
    )


def decode_turns(settings: SamplerSettings, num_rollouts: int) -> list[int]:
    """Return the turns of a rollout's successive loops if no completion ends early."""
    slots = min(settings.num_slots or num_rollouts, num_rollouts)
    num_turns = math.ceil(num_rollouts / slots) * settings.max_new_tokens
    ends = [*sampler.cache_sizes(settings.max_new_tokens)[:-1], num_turns - 1]
    return np.diff([0, *ends]).tolist()


def laid_out_bytes(model: QwenConfig, layout: Layout, is_int8: bool) -> int:
    """Return what one device holds of the weights laid out for decoding."""
    params = qwen.abstract_params(model, layout)
    compute = jax.eval_shape(partial(qwen.to_compute_dtype, model), params)
    placed = jax.tree.map(
        lambda leaf, like: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like.sharding),
        compute,
        params,
    )
    if not is_int8:
        return slices.shard_bytes(placed)
    total = slices.shard_bytes({**placed, "layers": {}})
    total += slices.shard_bytes(qwen.head(model, placed)) // 2  # a copy of its own
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed["layers"]):
        is_matrix = path[-1].key in decode.INPUTS
        total += slices.shard_bytes(leaf) // (2 if is_matrix else 1)
    return total


def _cache_bytes(
    model: QwenConfig, layout: Layout, num_prompts: int, slots: int, width: int, num_new: int
) -> int:
    """Return a device's keys and values of all layers: of prompts, and the last loop's caches."""
    heads, size = model.num_key_value_heads, model.head_dim
    shapes = (
        ("P K T H", (num_prompts, heads, width, size)),
        ("P R K S H", (num_prompts, slots, heads, num_new, size)),
    )
    arrays = [
        jax.ShapeDtypeStruct(
            shape, jnp.dtype(model.compute_dtype), sharding=layout.activation(letters)
        )
        for letters, shape in shapes
    ]
    return 2 * model.num_hidden_layers * slices.shard_bytes(arrays)


def _longest_rows(
    layout: Layout, sizes: list[int], groups: list[Group]
) -> tuple[Rows, Assumed, str]:
    """Return rows of the longest length, as abstract arrays, and how often their loops run.

    If any packing of the longest batch has several passes, theirs is the program that is planned.
    """
    num_rows = layout.mesh.size
    usual, longest = (packing.pack(groups, lengths, num_rows) for lengths in (sizes, sizes[-1:]))
    num_passes = int(longest.rows.num_passes)
    most = max(packed.rows.tokens.shape[0] for packed in (usual, longest))

    def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (most, *x.shape[1:]) if x.ndim else ()
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=packing.spread(layout, x.ndim))

    rows = jax.tree.map(abstract, longest.rows)
    chunk = max(logprobs.CHUNK_POSITIONS, 1)
    chunk = -(-sizes[-1] // -(-sizes[-1] // chunk))
    chunks = -(-int(np.max(longest.rows.count)) // chunk)
    note = f"{num_passes} passes of {num_rows} rows of {sizes[-1]} tokens"
    return rows, {"shard_map/while": [chunks], "/while": [num_passes]}, note


def _targets(rows: Rows, has_reference: bool) -> PolicyTargets:
    numbers = _like(rows.tokens, jnp.float32)
    return PolicyTargets(
        old_logp=numbers,
        ref_logp=numbers if has_reference else None,
        advantages=numbers,
        mask=_like(rows.tokens, jnp.bool),
        weights=numbers,
    )


def _init_optimizer(optimizer: Any, state: Any) -> PlannedProgram:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    program = jax.jit(optimizer.init, out_shardings=shardings)
    return PlannedProgram(
        program, _given(state.params), {WEIGHTS: slices.shard_bytes(state.params)}
    )


def _state_kinds(state: Any) -> dict[str, int]:
    return {
        WEIGHTS: slices.shard_bytes(state.params),
        MOMENTS: slices.shard_bytes(state.opt_state),
    }


def _like(leaf: Any, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _given(*arguments: Any) -> Arguments:
    return lambda found: arguments


def _extend(phases: dict[str, list[Point]], name: str, *points: Point) -> None:
    phases.setdefault(name, []).extend(points)


def _sum(*parts: Mapping[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for kind, number in part.items():
            total[kind] = total.get(kind, 0) + number
    return total
