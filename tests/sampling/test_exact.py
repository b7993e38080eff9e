"""`sampling.exact`: the log-probabilities of sampler and trainer have the same bits."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of

from jlrm.config import UsageError
from jlrm.data import batches
from jlrm.model import qwen
from jlrm.model.qwen import QwenConfig
from jlrm.rl.distribution import Distribution
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


def gaps(model: QwenConfig, temperature: float, num_new: int = 70) -> np.ndarray:
    """Return the distance of sampled and teacher-forced log-probabilities, token by token."""
    network = Network(model, mesh_of(1, 1, 1), 0, (3,))
    distribution = Distribution(temperature, exact=model.exact)
    params = qwen.init(model, network.training, 0)
    # Sharper than at birth, so that tokens have unequal probabilities.
    params["embed"] = params["embed"] * 20
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 512, length).tolist() for length in (90, 33)]
    tokens, lengths = batches.pad(prompts, 100)
    rows = np.arange(len(prompts), dtype=np.int32)
    weights = jax.jit(partial(decode.decode_params, model, network.decoding))(params)
    drawn = rollout_program(network, SamplerSettings(distribution, num_new, (3,)))(
        weights,
        decode.Prompts(tokens, lengths),
        rollout_keys(0, 0, rows, 3),
        stop_tables({}, [], model.vocab_size),
    )
    ids, lengths = np.asarray(drawn.tokens), np.asarray(drawn.lengths)
    groups = [
        Group(prompt, [row[:n].tolist() for row, n in zip(*each, strict=True)])
        for prompt, *each in zip(prompts, ids, lengths, strict=True)
    ]
    packed = packing.pack(groups, [896, 1024], 1, network.unit)
    options = compiler_options(network.mesh, model.exact)
    logprobs = jax.jit(
        partial(update.logprobs, model, network.training, distribution), compiler_options=options
    )
    forced, _ = logprobs(params, packing.to_devices(network.training, packed.rows))
    sampled = packed.take(np.asarray(drawn.logps).reshape(-1, num_new))
    return np.abs(np.asarray(forced) - sampled)[packed.is_target]


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_and_teacher_forced_log_probabilities_have_the_same_bits(num_kv_heads, temperature):
    model = dataclasses.replace(MODEL, num_key_value_heads=num_kv_heads)
    exact = gaps(dataclasses.replace(model, exact=True), temperature)
    assert exact.size > 200
    assert not exact.any()
    assert gaps(model, temperature).mean() > 1e-4  # else the test could not fail


def test_several_devices_are_refused():
    model = dataclasses.replace(MODEL, exact=True)
    with pytest.raises(UsageError, match="one CPU device"):
        bare_network(model, mesh_of(2, 1, 1))
