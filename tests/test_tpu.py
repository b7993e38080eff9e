"""Every program of a run compiles for real TPU slices, on a machine without one.

`libtpu` compiles for a topology it is told of. What is checked are compile-time facts: that the
programs compile, and how the compiler laid them out. None of it is a speed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tpu_mesh
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jlrm.config import LossConfig, OptimizerConfig
from jlrm.model import experts, qwen
from jlrm.model.visibility import Packing
from jlrm.planning import counting, slices
from jlrm.rl.distribution import Distribution
from jlrm.rl.losses import PolicyTargets
from jlrm.runtime.mesh import AXES, Layout, compiler_options, rollout_layout, training_layout
from jlrm.sampling import decode, sampler, slots
from jlrm.sampling.sampler import SMALLEST_CACHE, SamplerSettings
from jlrm.sampling.slots import Entering, SlotSettings
from jlrm.sampling.stops import StopTables
from jlrm.training import packing, update
from jlrm.training.packing import Rows
from jlrm.weights.presets import preset

pytestmark = pytest.mark.slow  # whole models are compiled

ROWS, PROMPT = 16, 512
SLOTS = 4096
DISTRIBUTION = Distribution(temperature=1.0, top_p=0.9, num_ids=151665)


def model(name: str, **changes) -> qwen.QwenConfig:
    """A published shape, two layers deep: depth is a loop, so it changes size and not structure."""
    return dataclasses.replace(preset(name), num_hidden_layers=2, **changes)


def shaped(layout, letters: str, *shape: int, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.activation(letters))


def packed_rows(layout, num_rows: int, num_slots: int, num_passes: int = 1) -> Rows:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        sharding = packing.spread(layout, len(shape))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    cells = array(num_passes, num_rows, num_slots)
    packed = Packing(cells, cells, array(num_passes, num_rows))
    return Rows(cells, cells, packed, cells, cells, cells, array(num_passes), array())


def policy_targets(rows: Rows) -> PolicyTargets:
    def like(dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(rows.tokens.shape, dtype, sharding=rows.tokens.sharding)

    numbers = like(jnp.float32)
    return PolicyTargets(numbers, numbers, numbers, like(jnp.bool), numbers)


def largest_array(text: str) -> int:
    """Return the number of elements of the largest array in a compiled program."""
    shapes = re.findall(r"(?:f32|bf16)\[([0-9,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def sizes(operation: str, text: str) -> list[int]:
    """Return the numbers of elements of what operations of this name produce."""
    results = re.findall(rf"= (.*) {operation}(?:-start)?\(", text)
    shapes = re.findall(r"(?:f32|bf16)\[([0-9,]+)\]", "\n".join(results))
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


def lowered_update(config: qwen.QwenConfig, layout: Layout, num_passes: int) -> tuple[Any, ...]:
    """Return the update, not yet compiled, with its state and rows."""
    optimizer = update.make_optimizer(OptimizerConfig(), 100)
    state = update.abstract_state(config, layout, optimizer)
    settings = LossConfig(kl_weight=0.001, entropy_weight=0.001)
    rows = packed_rows(layout, layout.mesh.size, SLOTS, num_passes)
    step = partial(update.grpo_update, config, layout, DISTRIBUTION, settings, optimizer)
    return jax.jit(step, donate_argnums=0).lower(state, rows, policy_targets(rows)), state, rows


def test_update_and_scoring():
    config = model("qwen3-0.6b")
    layout = training_layout(tpu_mesh("v5e:4x4", 1, 4, 4))
    lowered, state, rows = lowered_update(config, layout, num_passes=4)
    compiled = lowered.compile(compiler_options(layout.mesh))
    state_bytes = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    # The old state's memory becomes the new one's.
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes
    text = compiled.as_text()
    # Each chip has one row; its logits never exist at once, nor does a square of its slots.
    assert largest_array(text) < SLOTS * config.vocab_size / 2
    assert not re.search(rf"\[(?:\d+,)*{SLOTS},{SLOTS}[,\]]", text)
    assert "splash" in text
    # A gradient moves in shares, whole ones never; a fused all-reduce-scatter moves shares too.
    computations = re.split(r"\n(?=%|ENTRY)", text)
    others = [part for part in computations if not part.startswith("%all-reduce-scatter")]
    smallest_matrix = config.hidden_size * config.num_key_value_heads * config.head_dim
    assert max(sizes("all-reduce", "\n".join(others))) < smallest_matrix / 2
    assert "all-reduce-scatter" in text or " reduce-scatter(" in text
    score = partial(update.logprobs, config, layout, DISTRIBUTION)
    jax.jit(score).lower(state.params, rows).compile(compiler_options(layout.mesh))


def test_slices_exchange_gradients_inside_of_loops():
    """What they send outside of one is held as a part of the program, for every shape of rows."""
    config = dataclasses.replace(model("qwen2.5-0.5b"), num_hidden_layers=16)
    chips = np.array(slices.devices("v5e:2x2", 2)).reshape(2, 2, 2)
    layout = training_layout(Mesh(chips, AXES))
    lowered, state, _ = lowered_update(config, layout, num_passes=1)
    compiled = lowered.compile(compiler_options(layout.mesh))
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "_xla_megascale_reduce_operation" in text  # they do exchange something
    gradients = slices.shard_bytes([state.params["layers"]])
    assert memory.generated_code_size_in_bytes < gradients / 2


def test_experts_are_trained_by_kernels():
    """As `test_products_of_experts_and_their_gradients` compiles them; the rest is as above."""
    layout = training_layout(tpu_mesh("v5e:4x4", 1, 4, 4))
    lowered, *_ = lowered_update(model("qwen3-30b-a3b"), layout, num_passes=1)
    text = lowered.as_text()
    assert "ragged_dot" not in text
    # Of the gradient of their matrices, and of every other product: outputs, and inputs again.
    kernels = re.findall(r"call @(t?gmm)\w*\(", text)
    assert kernels.count("tgmm") == 3 and kernels.count("gmm") >= 2 * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-235b-a22b"])
def test_products_of_experts_and_their_gradients(name, dtype):
    config, grid = model(name), tpu_mesh("v5e:4x4", 1, 4, 4)
    sides = {"n": 8 * SLOTS, "E": 128, "D": config.hidden_size, "F": config.intermediate_size}

    def array(*letters: str, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        sharding = training_layout(grid).replicated()
        return jax.ShapeDtypeStruct([sides[each] for each in letters], dtype, sharding=sharding)

    @partial(jax.shard_map, mesh=grid, in_specs=P(), out_specs=P(), check_vma=False)
    def gradients(rows, matrices, sizes, cotangent):
        _, pull = jax.vjp(partial(experts.grouped_product, sizes=sizes), rows, matrices)
        return pull(cotangent)

    inputs = array("n", "D"), array("E", "D", "F"), array("E", dtype="int32"), array("n", "F")
    text = jax.jit(gradients).lower(*inputs).compile().as_text()
    counted = counting.analyse(text, num_experts=128).total
    assert counted.flops == 2 * 2 * 8 * SLOTS * config.hidden_size * config.intermediate_size


def placed(program, *arguments):
    """Return what a program gives, as abstract arrays that lie where the compiler puts them."""
    jitted = jax.jit(program)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(jitted, *arguments),
        jitted.lower(*arguments).compile().output_shardings,
    )


def loop_bodies(text: str) -> str:
    """Return the bodies of a compiled program's loops."""
    names = set(re.findall(r"body=(%[\w.\-]+)", text))
    starts = (text.index(f"\n{name} (") for name in names)
    return "\n".join(text[start : text.index("\n}", start)] for start in starts)


@pytest.mark.parametrize(
    ("name", "num_new", "num_slots"),
    [("qwen2.5-7b", 512, 0), ("qwen3-0.6b", 1024, 2), ("qwen3-30b-a3b", 512, 0)],
)
def test_rollout(name, num_new, num_slots):
    num_rollouts, config = 8, model(name)
    grid = tpu_mesh("v5e:4x4", 1, 4, 4)
    training, layout = training_layout(grid), rollout_layout(grid)
    params = qwen.abstract_params(config, training)
    weights = placed(partial(decode.decode_params, config, layout), params)
    settings = SamplerSettings(Distribution(num_ids=151665), num_new, (151645, 151643), num_slots)
    compiled = (
        jax.jit(partial(sampler.generate, config, layout, settings))
        .lower(
            weights,
            decode.Prompts(shaped(training, "B T", ROWS, PROMPT), shaped(training, "B", ROWS)),
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (ROWS, num_rollouts))),
            StopTables(
                jax.ShapeDtypeStruct((1, 19, config.vocab_size), jnp.int16),
                jax.ShapeDtypeStruct((1,), jnp.int16),
            ),
        )
        .compile()
    )
    body = loop_bodies(compiled.as_text())
    num_rows = ROWS * (num_slots or num_rollouts)
    # Of a step's activations each chip gathers those of all rows at most; weights and logits stay.
    gathered = sizes("all-gather", body)
    assert gathered and max(gathered) <= num_rows * config.hidden_size
    assert max(sizes("all-reduce", body)) <= num_rows * config.hidden_size
    if not num_slots:
        # Two sums a layer over all chips; besides them the embedding's and three to draw a token.
        kinds = r"all-(?:gather|reduce|to-all)|reduce-scatter|collective-permute"
        moved = re.findall(rf"= .* (?:{kinds})(?:-start)?\(", body)
        assert len(moved) == 2 * config.num_hidden_layers + 4
    # Caches are written in place, in each of the loops between which they grow.
    num_cached = num_rows * SMALLEST_CACHE * config.num_key_value_heads * config.head_dim
    assert max(sizes("copy", body)) < num_cached / grid.size


def test_slots_of_a_server():
    """Prompts enter and leave, in place, and those of others stay where they are."""
    config = model("qwen2.5-7b", compute_dtype="bfloat16")
    layout = rollout_layout(tpu_mesh("v5e:4x4", 1, 4, 4))
    settings = SlotSettings(32, 4096, 1024, (151645,), DISTRIBUTION)
    stops = StopTables(np.zeros((1, 24, config.vocab_size), np.int16), np.zeros(1, np.int16))
    params = qwen.abstract_params(config, training_layout(layout.mesh))
    weights = placed(partial(decode.decode_params, config, layout), params)
    state = placed(partial(slots.empty, config, layout, settings), stops)
    prefix = state.prefix.layers[0].keys.size // layout.mesh.size
    prompts = decode.Prompts(shaped(layout, "P T", 4, 512), shaped(layout, "P", 4))
    entering = Entering(
        np.zeros((4, 1), np.int32),
        np.zeros(4, np.int32),
        np.zeros(4, np.float32),
        np.zeros((4, 1, 3), np.int32),
        np.zeros((4, 1), np.int16),
    )
    enter = jax.jit(partial(slots.enter, config, layout, settings), donate_argnums=1)
    advance = jax.jit(partial(slots.advance, config, layout, settings, 512), donate_argnums=1)
    is_wanted = np.zeros(32, bool)
    for program in (
        enter.lower(weights, state, prompts, entering, stops).compile(),
        advance.lower(weights, state, is_wanted, stops).compile(),
    ):
        text, memory = program.as_text(), program.memory_analysis()
        moved = [
            size
            for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all")
            for size in sizes(name, text)
        ]
        assert max(moved) <= 4 * 512 * config.hidden_size < 4 * prefix  # activations alone
        kept = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        assert memory.alias_size_in_bytes > 2 * 2 * prefix * 2  # two layers, in place
        assert kept + memory.temp_size_in_bytes < 2**31
    resize = jax.jit(partial(slots.resize, layout), static_argnums=2)
    for size in (512, 2048):
        program = resize.lower(state.turn, state.caches, size).compile()
        assert not re.search("all-gather|all-reduce|permute|all-to-all", program.as_text())
        caches = 2 * sum(leaf.size for leaf in jax.tree.leaves(state.caches)) / layout.mesh.size
        assert program.memory_analysis().temp_size_in_bytes <= caches
