"""Every program of a run compiles for real TPU slices, on a machine without one.

`libtpu` compiles for a topology it is told of. What is checked are compile-time facts: that the
programs compile, and how the compiler laid them out. None of it is a speed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import required
from jax.sharding import AxisType, Mesh

from jlrm import rollout, update
from jlrm.config import OptimizerConfig
from jlrm.mesh import AXES, rollout_layout, training_layout
from jlrm.model import qwen
from jlrm.model.presets import preset
from jlrm.rl.logprobs import Distribution
from jlrm.rl.losses import PolicyLoss
from jlrm.rollout import Sampler

ROWS, PROMPT, NEW = 16, 512, 1024
DISTRIBUTION = Distribution(temperature=1.0, top_p=0.9, num_ids=151665)


@pytest.fixture(scope="module")
def devices():
    """The chips of a v5e 2x2 slice, described."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    )
    try:
        import libtpu  # noqa: F401
    except ImportError:
        required("JLRM_REQUIRE_LIBTPU", "libtpu is not installed (pip install 'jlrm[plan]')")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return np.array(topology.devices)


def mesh(devices, *shape: int) -> Mesh:
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def model(name: str, **changes) -> qwen.QwenConfig:
    """A published shape, two layers deep: depth is a loop, so it changes size and not structure."""
    return dataclasses.replace(preset(name), num_hidden_layers=2, **changes)


def shaped(layout, letters: str, *shape: int, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.activation(letters))


def sequences(layout) -> update.Sequences:
    cells, rows = "B T", "B"
    return update.Sequences(
        shaped(layout, cells, ROWS, PROMPT),
        shaped(layout, rows, ROWS),
        shaped(layout, cells, ROWS, NEW),
        shaped(layout, rows, ROWS),
    )


def largest_array(text: str) -> int:
    """Return the number of elements of the largest array in a compiled program."""
    shapes = re.findall(r"(?:f32|bf16)\[([0-9,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_update_and_scoring(devices):
    config = model("qwen3-0.6b")
    layout = training_layout(mesh(devices, 1, 4, 1))
    optimizer = update.make_optimizer(OptimizerConfig(), 100)
    state = update.abstract_state(config, layout, optimizer)
    settings = PolicyLoss(kl_weight=0.001, entropy_weight=0.001)
    numbers = partial(shaped, layout, "B T", ROWS, NEW)
    batch = update.PolicyBatch(
        sequences(layout),
        numbers(dtype=jnp.float32),
        numbers(dtype=jnp.float32),
        shaped(layout, "B", ROWS, dtype=jnp.float32),
        numbers(dtype=jnp.bool),
        numbers(dtype=jnp.float32),
    )
    step = partial(update.grpo_update, config, layout, DISTRIBUTION, settings, optimizer, 2)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    state_bytes = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    # The old state's memory becomes the new one's.
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes
    # Each chip has a quarter of the rows; their logits never exist at once.
    whole_logits = ROWS // 4 * NEW * config.vocab_size
    assert largest_array(compiled.as_text()) < whole_logits / 2
    score = partial(update.score, config, layout, DISTRIBUTION, 1)
    jax.jit(score).lower(state.params, sequences(layout)).compile()


@pytest.mark.parametrize(("name", "tensor"), [("qwen2.5-0.5b", 2), ("qwen3-0.6b", 4)])
def test_rollout(devices, name, tensor):
    config = model(name)
    grid = mesh(devices, 1, 4 // tensor, tensor)
    training, layout = training_layout(grid), rollout_layout(grid)
    params = qwen.abstract_params(config, training)
    decode = jax.jit(partial(qwen.decode_params, config, layout))
    lowered = decode.lower(params)
    weights = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(decode, params),
        lowered.compile().output_shardings,
    )
    sampler = Sampler(DISTRIBUTION, NEW, (151645, 151643))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    tables = jax.ShapeDtypeStruct((1, 19, config.vocab_size), jnp.int16)
    compiled = (
        jax.jit(partial(rollout.generate, config, layout, sampler))
        .lower(
            weights,
            shaped(training, "B T", ROWS, PROMPT),
            shaped(training, "B", ROWS),
            keys,
            tables,
            jax.ShapeDtypeStruct((1,), jnp.int16),
        )
        .compile()
    )
    # Activations move between chips, weights never.
    gathers = re.findall(r"(?:f32|bf16)\[([0-9,]+)\]\S* all-gather\(", compiled.as_text())
    gathered = [tuple(map(int, shape.split(","))) for shape in gathers]
    shapes = {
        leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(decode, params)) if leaf.ndim > 1
    }
    assert gathered and not shapes & set(gathered)
    assert max(map(math.prod, gathered)) < config.hidden_size * config.intermediate_size
    assert "while(" in compiled.as_text()
