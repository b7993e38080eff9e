"""Adapters train as the matrices that they move would, and nothing beneath them moves."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from test_update import (
    FAST,
    ONE,
    ONE_PASS,
    SEVERAL_PASSES,
    check_same,
    grpo_step,
    initial_state,
    layout_of,
    optimizer_of,
    pack,
    random_batch,
    score,
)

from jlrm.model import lora, qwen
from jlrm.model.lora import LoRA
from jlrm.model.quantised import quantise_layers, widen_all
from jlrm.training import packing, update

pytestmark = pytest.mark.slow  # whole models are compiled

ALL = ("q", "k", "v", "o", "gate", "up", "down")
PLAIN = LoRA(3, 0.7, ALL, has_magnitude=False, dtype="float32")
KINDS = {"lora": PLAIN, "dora": dataclasses.replace(PLAIN, has_magnitude=True)}


def adapted(kind: str = "lora", architecture: str = "qwen2_tied") -> qwen.QwenConfig:
    return tiny_config(architecture, lora=KINDS[kind])


def check_gradients(found: qwen.Params, wanted: qwen.Params) -> None:
    """Compare gradients, or what plain descent has made of them, to a share of the largest."""
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    check_same(found, wanted, atol=1e-5 * largest)


def merged(config: qwen.QwenConfig, params: qwen.Params) -> qwen.Params:
    """Return the parameters of a model without adapters that computes the same."""
    layers = jax.vmap(functools.partial(lora.merge, config.lora))(params["layers"])
    return {**params, "layers": layers}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_their_matrices_do_what_merged_ones_do(kind):
    config, batch = adapted(kind), random_batch()
    weights = initial_state("sgd", ONE, config).weights
    rows = pack(batch).rows
    beside, inside = score(config)(weights, rows), score(config)(merged(config, weights), rows)
    check_same(beside, inside, atol=2e-5)
    bare = score(config)(lora.split(config.lora, weights)[1], rows)
    assert np.max(np.abs(beside[0] - bare[0])) > 0.1, "the adapters do nothing"


@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen2_untied", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing(kind, architecture):
    """They are born with B = 0, and DoRA's lengths as they are, so both are the reference."""
    config, rows = adapted(kind, architecture), pack(random_batch()).rows
    base = qwen.init(dataclasses.replace(config, lora=None), layout_of(ONE), 0)
    params = lora.join(base, qwen.adapters_program(config, layout_of(ONE))(jax.random.key(0), base))
    check_same(qwen.init(config, layout_of(ONE), 0), params, atol=1e-6)
    born, off = score(config)(params, rows), score(config)(base, rows)
    if kind == "lora":
        jax.tree.map(np.testing.assert_array_equal, born, off)
    check_same(born, off, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_in_half_precision(kind):
    half = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    config, rows = dataclasses.replace(adapted(kind), **half), pack(random_batch()).rows
    params = update.init_state(
        config, layout_of(ONE), optimizer_of("sgd"), qwen.init(config, layout_of(ONE), 0)
    ).weights
    born, off = score(config)(params, rows), score(config)(lora.split(config.lora, params)[1], rows)
    assert np.mean(np.asarray(born[0]) != np.asarray(off[0])) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_merged_matrices(kind):
    """By the chain rule through the merged matrix; the lengths that DoRA divides by are fixed."""
    config, batch = adapted(kind), random_batch()
    state = initial_state("sgd", ONE, config)
    after, metrics = grpo_step(batch, state=state, config=config)
    found = jax.tree.map(jnp.subtract, state.params, after.params)
    plain = dataclasses.replace(config, lora=None)
    whole = merged(config, state.weights)
    before = update.init_state(plain, layout_of(ONE), optimizer_of("sgd"), whole)
    moved, wanted_metrics = grpo_step(batch, state=before, config=plain)
    dense = jax.tree.map(jnp.subtract, whole, moved.params)["layers"]
    lengths = jax.tree.map(jnp.asarray, _lengths(config, state.weights))

    def of_adapters(adapters: qwen.Params) -> jax.Array:
        """Return the product of the merged matrices with their gradients."""
        params = lora.join(state.base, adapters)["layers"]
        total = jnp.float32(0)
        for group, name in ((g, n) for g in ("attn", "mlp") for n in ALL if n in params[g]):
            leaves = params[group]
            a, b, m = (leaves.get(f"{name}_lora_{part}") for part in "abm")
            kernel = leaves[name] + config.lora.scale * jax.vmap(
                lambda a, b: jnp.tensordot(a, b, ((-1,), (-1,)))
            )(a, b)
            if m is not None:
                factor = m / lengths[group][name]
                num_inputs = a.ndim - 2
                kernel *= jnp.expand_dims(factor, tuple(range(1, 1 + num_inputs)))
            total += jnp.sum(kernel * dense[group][name])
        return total

    wanted = jax.grad(of_adapters)(state.params)
    check_gradients(found, wanted)
    np.testing.assert_allclose(metrics["loss"], wanted_metrics["loss"], rtol=1e-5)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))


def _lengths(config: qwen.QwenConfig, params: qwen.Params) -> dict[str, dict[str, np.ndarray]]:
    """Return the length of every output of every moved matrix, by NumPy."""
    found: dict[str, dict[str, np.ndarray]] = {"attn": {}, "mlp": {}}
    for group, leaves in params["layers"].items():
        for name in ALL:
            if name in leaves:
                a, b = (np.asarray(leaves[f"{name}_lora_{part}"]) for part in "ab")
                num_layers, rank = a.shape[0], a.shape[-1]
                product = np.einsum(
                    "Liu,Lou->Lio", a.reshape(num_layers, -1, rank), b.reshape(num_layers, -1, rank)
                )
                kernel = np.asarray(leaves[name]).reshape(product.shape)
                length = np.linalg.norm(kernel + config.lora.scale * product, axis=1)
                found[group][name] = length.reshape(num_layers, *b.shape[1:-1])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (2, 2, 2)])
def test_a_step_does_not_depend_on_passes_and_devices_and_leaves_the_base(kind, mesh_shape):
    config, batch = adapted(kind), random_batch(60, 2)
    one = initial_state("adamw", ONE, config)
    wanted, metrics = grpo_step(
        batch, [1024], "adamw", state=one, config=dataclasses.replace(config, remat="none")
    )
    assert int(pack(batch, SEVERAL_PASSES, math.prod(mesh_shape)).rows.num_passes) > 1
    state = initial_state("adamw", mesh_shape, config)
    where = jax.tree.map(lambda x: x.sharding, state)
    found, found_metrics = grpo_step(
        batch, SEVERAL_PASSES, "adamw", state=state, config=config, mesh_shape=mesh_shape
    )
    check_same(found_metrics, metrics)
    check_same(found.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, found.base, one.base)
    stays = jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), found, where)
    assert all(jax.tree.leaves(stays))
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    held = [leaf.size for leaf in jax.tree.leaves(found.opt_state)]
    assert sum(held) <= 2 * num_trained + 4, "moments of what is not trained"


def test_a_frozen_base_of_half_precision_stays_so():
    config = dataclasses.replace(adapted(), param_dtype="bfloat16")
    batch, optimizer = random_batch(), optimizer_of("adamw")
    layout = layout_of(ONE)
    state = update.init_state(config, layout, optimizer, qwen.init(config, layout, 0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.base)} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {"float32"}
    before = jax.tree.map(np.array, state.base)
    after, metrics = grpo_step(batch, ONE_PASS, "adamw", state=state, config=config)
    jax.tree.map(np.testing.assert_array_equal, before, after.base)
    assert metrics["grad_norm"] > 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(after.params)} == {"float32"}


def test_the_gradient_of_frozen_matrices_is_not_computed():
    """By the FLOPs of the compiled update: the base's gradients are a quarter of all products."""
    batch, flops = random_batch(), {}
    wide = dict(hidden_size=256, intermediate_size=1024, head_dim=64)
    for name, config in {
        "all": tiny_config(**wide),
        "lora": tiny_config(lora=PLAIN, **wide),
    }.items():
        layout, optimizer = layout_of(ONE), optax.sgd(1.0)
        state = update.abstract_state(config, layout, optimizer)
        rows = packing.to_devices(layout, pack(batch).rows)
        weights = jnp.ones(rows.targets.shape, jnp.float32)
        program = functools.partial(update.sft_update, config, layout, optimizer)
        compiled = jax.jit(program, compiler_options=FAST).lower(state, rows, weights).compile()
        flops[name] = compiled.cost_analysis()["flops"]
    assert flops["lora"] < 0.85 * flops["all"], flops


# --- a quantised base ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize("mesh_shape", [ONE, (1, 2, 2)])
def test_a_step_over_a_quantised_base_is_that_over_what_it_stands_for(base, mesh_shape):
    """Quantised on several devices, widened layer by layer there, it gives the step of one."""
    narrow = dataclasses.replace(adapted(), lora=dataclasses.replace(PLAIN, base=base))
    batch, layout = random_batch(), layout_of(mesh_shape)
    weights = initial_state("sgd", mesh_shape, adapted()).weights
    _, shapes = lora.split(narrow.lora, qwen.abstract_params(narrow, layout))
    adapters, wide = lora.split(PLAIN, weights)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    stored = jax.jit(lambda x: quantise_layers(x, base), out_shardings=shardings)(wide)
    program = functools.partial(update.init_state, narrow, layout, optimizer_of("sgd"))
    state = program(lora.join(stored, adapters))
    held = {str(leaf.dtype) for leaf in jax.tree.leaves(state.base["layers"]["mlp"])}
    assert held == {"float32", "int8" if base == "int8" else "uint8"}
    found, metrics = grpo_step(
        batch, SEVERAL_PASSES, state=state, config=narrow, mesh_shape=mesh_shape
    )
    before, _ = lora.split(PLAIN, initial_state("sgd", ONE, adapted()).weights)
    widened = quantise_layers(jax.tree.map(np.asarray, wide), base)
    plain = lora.join(jax.tree.map(jnp.asarray, widen_all(widened)), before)
    wanted, wanted_metrics = grpo_step(
        batch,
        state=update.init_state(adapted(), layout_of(ONE), optimizer_of("sgd"), plain),
        config=adapted(),
    )
    check_same(metrics, wanted_metrics)
    check_gradients(found.params, wanted.params)
