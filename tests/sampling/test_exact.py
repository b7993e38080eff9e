"""`sampling.exact`: the log-probabilities of sampler and trainer have the same bits."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of

from jlrm.config import LossConfig, OptimizerConfig, UsageError
from jlrm.data import batches
from jlrm.model import qwen
from jlrm.model.qwen import QwenConfig
from jlrm.model.rope import Llama3, Yarn
from jlrm.rl.distribution import Distribution
from jlrm.rl.losses import PolicyTargets
from jlrm.runtime import exact
from jlrm.runtime.mesh import compiler_options
from jlrm.sampling import decode
from jlrm.sampling.generate import rollout_program
from jlrm.sampling.policy import Network, bare_network
from jlrm.sampling.sampler import SamplerSettings, rollout_keys
from jlrm.sampling.stops import stop_tables
from jlrm.training import packing, update
from jlrm.training.packing import Group

MODEL = QwenConfig(
    vocab_size=512,
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    qkv_bias=True,
    qk_norm=False,
    tie_word_embeddings=True,
    compute_dtype="bfloat16",
)


def rollout(model: QwenConfig, temperature: float, size: int, num_new: int = 70):
    """Return a network, its weights, and packed rows of what it has sampled, with log-probs."""
    network = Network(model, mesh_of(1, 1, 1), 0, (3,))
    params = qwen.init(model, network.training, 0)
    # Sharper than at birth, so that tokens have unequal probabilities.
    params["embed"] = params["embed"] * 20
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, length).tolist() for length in (90, 33)]
    tokens, lengths = batches.pad(prompts, 100)
    weights = jax.jit(partial(decode.decode_params, model, network.decoding))(params)
    settings = SamplerSettings(of(model, temperature), num_new, (3,))
    drawn = rollout_program(network, settings)(
        weights,
        decode.Prompts(tokens, lengths),
        rollout_keys(0, 0, np.arange(2, dtype=np.int32), 3),
        stop_tables({}, [], model.vocab_size),
    )
    ids, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    groups = [
        Group(prompt, [row[:n].tolist() for row, n in zip(*each, strict=True)])
        for prompt, *each in zip(prompts, ids, lengths, strict=True)
    ]
    packed = packing.pack(groups, [size], 1, network.unit)
    return network, params, packed, packed.take(np.asarray(drawn.logps).reshape(-1, num_new))


def of(model: QwenConfig, temperature: float) -> Distribution:
    return Distribution(temperature, exact=model.exact)


def gaps(model: QwenConfig, temperature: float) -> np.ndarray:
    """Return the distance of sampled and teacher-forced log-probabilities, token by token."""
    network, params, packed, sampled = rollout(model, temperature, 1024)
    logprobs = jax.jit(
        partial(update.logprobs, model, network.training, of(model, temperature)),
        compiler_options=compiler_options(network.mesh, model.exact),
    )
    forced, _ = logprobs(params, packing.to_devices(network.training, packed.rows))
    return np.abs(np.asarray(forced) - sampled)[packed.is_target]


def update_gap(model: QwenConfig, size: int) -> float:
    """Return the mean distance that an optimiser step finds from sampled log-probabilities."""
    network, params, packed, sampled = rollout(model, 1.0, size)
    mask = packed.is_target
    targets = PolicyTargets(
        old_logp=sampled,
        ref_logp=None,
        advantages=mask.astype(np.float32),
        mask=mask,
        weights=(mask / mask.sum()).astype(np.float32),
    )
    fixed = model, network.training, of(model, 1.0)
    optimizer = update.make_optimizer(OptimizerConfig(), 10)
    step = jax.jit(
        partial(update.grpo_update, *fixed, LossConfig(kl_weight=0.0), optimizer),
        compiler_options=compiler_options(network.mesh, model.exact),
    )
    state = update.init_state(model, network.training, optimizer, params)
    _, metrics = step(state, *packing.to_devices(network.training, (packed.rows, targets)))
    return float(metrics["old_logp_gap"])


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_and_teacher_forced_log_probabilities_have_the_same_bits(num_kv_heads, temperature):
    model = dataclasses.replace(MODEL, num_key_value_heads=num_kv_heads)
    found = gaps(dataclasses.replace(model, exact=True), temperature)
    assert found.size > 200
    assert not found.any()
    assert gaps(model, temperature).mean() > 1e-4  # else the test could not fail


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        {"qk_norm": True, "rope_scaling": Yarn(4.0, 64, 1.14)},
        {"rope_scaling": Llama3(8.0, 1.0, 4.0, 64), "tie_word_embeddings": False},
    ],
    ids=["qwen3", "llama"],
)
def test_so_have_those_of_other_families(family):
    found = gaps(dataclasses.replace(MODEL, qkv_bias=False, exact=True, **family), 1.0)
    assert found.size > 200
    assert not found.any()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_the_update_finds_the_same_bits(remat):
    model = dataclasses.replace(MODEL, exact=True, remat=remat)
    assert update_gap(model, 1024) == 0.0
    assert update_gap(model, 384) == 0.0  # several passes
    assert update_gap(dataclasses.replace(MODEL, remat=remat), 1024) > 1e-4


@pytest.mark.slow
def test_gradients_are_those_of_bfloat16():
    def gradients(model: QwenConfig) -> np.ndarray:
        network = Network(model, mesh_of(1, 1, 1), 0, (3,))
        params = qwen.init(model, network.training, 0)
        rng = np.random.default_rng(0)
        group = Group(range(4, 60), [rng.integers(4, 512, 60).tolist() for _ in range(3)])
        rows = packing.pack([group], [384], 1, 64).rows
        part = jax.tree.map(lambda x: x[0] if np.ndim(x) else x, rows)

        def loss(params: qwen.Params) -> jax.Array:
            params = qwen.to_compute_dtype(model, params)
            places = part.tokens, part.positions, part.packing
            states = qwen.hidden_states(model, network.training, params, *places)
            wide = states.astype(np.float32) * np.cos(np.arange(96, dtype=np.float32))[None, None]
            return (wide * (part.packing.group > 0)[..., None]).sum()

        options = compiler_options(network.mesh, model.exact)
        leaves = jax.tree.leaves(jax.jit(jax.grad(loss), compiler_options=options)(params))
        return np.concatenate([np.asarray(leaf).ravel() / np.linalg.norm(leaf) for leaf in leaves])

    wide = gradients(dataclasses.replace(MODEL, compute_dtype="float32"))
    plain, ordered = gradients(MODEL), gradients(dataclasses.replace(MODEL, exact=True))
    assert np.linalg.norm(ordered - wide) < 2 * np.linalg.norm(plain - wide)


@pytest.mark.parametrize("is_exact", [None, False, True])
def test_sums_are_right_with_the_options_of_every_program(is_exact):
    """A product with ones alone was garbage with all options but those of exact programs."""
    options = None if is_exact is None else compiler_options(mesh_of(1, 1, 1), is_exact)
    x = np.random.default_rng(0).random((2, 128, 300), np.float32)
    for sums, wanted in ((exact.total_last, x.sum(-1)), (exact.log_total, np.log(x.sum(-1)))):
        found = jax.jit(sums, compiler_options=options)(x)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_few_rows_sum_to_the_bits_of_many():
    """JAX 0.12 sums a float32 product of up to 60 rows in another order, 0.10 one of a single."""
    options = compiler_options(mesh_of(1, 1, 1), True)
    x = np.exp(np.random.default_rng(0).normal(size=(512, 300)).astype(np.float32))
    for sums in (exact.total_last, exact.log_total):
        program = jax.jit(sums, compiler_options=options)
        many = np.asarray(program(x))
        for num_rows in (1, 2, 5, 24, 60, 61, 64, 100):
            np.testing.assert_array_equal(program(x[:num_rows]), many[:num_rows])


def test_several_devices_are_refused():
    model = dataclasses.replace(MODEL, exact=True)
    with pytest.raises(UsageError, match="one CPU device"):
        bare_network(model, mesh_of(2, 1, 1))
