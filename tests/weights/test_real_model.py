"""A pretrained checkpoint that speaks English gives what `transformers` gives.

Set JLRM_REAL_MODEL to a directory in Qwen2 or Qwen3 format; without it these tests skip.
"""

from __future__ import annotations

import os
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, plain_states

from jlrm.data import batches
from jlrm.model import qwen
from jlrm.rl.distribution import Distribution
from jlrm.runtime.mesh import rollout_layout, training_layout
from jlrm.sampling import decode
from jlrm.sampling.sampler import SamplerSettings, generate, rollout_keys
from jlrm.sampling.stops import stop_tables
from jlrm.weights import hf, hf_config

pytestmark = pytest.mark.slow  # whole models are compiled

NUM_NEW = 64
TOPICS = ["Paris", "tides", "copper", "jazz", "chess", "bread", "bees", "Rome", "silk", "glaciers"]
QUESTIONS = [f"Tell me one fact about {topic}." for topic in TOPICS] + [
    f"Which of two answers about {topic} is better, the short one or the long one, and why so?"
    for topic in TOPICS
]


@pytest.fixture(scope="module")
def directory() -> pathlib.Path:
    if "JLRM_REAL_MODEL" not in os.environ:
        pytest.skip("JLRM_REAL_MODEL names no checkpoint")
    return pathlib.Path(os.environ["JLRM_REAL_MODEL"])


@pytest.fixture(scope="module")
def theirs(directory, torch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chats = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS
    ]
    return tokenizer(chats, add_special_tokens=False)["input_ids"], model, tokenizer


@pytest.fixture(scope="module")
def ours(directory):
    config = hf_config.read_config(directory, compute_dtype="float32")
    layout = training_layout(mesh_of(1, 1, 1))
    return config, hf.load_params(directory, config, layout)


def logits(ours, ids: list[list[int]], side: str) -> list[np.ndarray]:
    """Return our logits of every sequence, computed in one batch padded on the given side."""
    config, params = ours
    layout = training_layout(mesh_of(1, 1, 1))
    width = max(map(len, ids)) + 3
    starts = [width - len(row) if side == "left" else 0 for row in ids]
    tokens = np.full((len(ids), width), 7)
    key_mask = np.zeros((len(ids), width), bool)
    for row, sequence, start in zip(range(len(ids)), ids, starts, strict=True):
        tokens[row, start : start + len(sequence)] = sequence
        key_mask[row, start : start + len(sequence)] = True
    positions = np.maximum(np.cumsum(key_mask, axis=1) - 1, 0)
    hidden = jax.jit(partial(plain_states, config, layout))(
        params, jnp.array(tokens), jnp.array(positions), jnp.array(key_mask)
    )
    return [
        np.asarray(hidden[row, start : start + len(sequence)] @ qwen.head(config, params).T)
        for row, sequence, start in zip(range(len(ids)), ids, starts, strict=True)
    ]


def greedy(ours, ids: list[list[int]], end_id: int) -> list[list[int]]:
    """Return what our sampler writes after each prompt, all in one batch."""
    config, params = ours
    layout = rollout_layout(mesh_of(1, 1, 1))
    tokens, lengths = batches.pad(ids, 64)
    tables = stop_tables({}, [], config.vocab_size)
    rows = np.arange(len(ids), dtype=np.int32)
    settings = SamplerSettings(Distribution(temperature=0.0), NUM_NEW, (end_id,))
    weights = jax.jit(partial(decode.decode_params, config, layout))(params)
    result = jax.jit(partial(generate, config, layout, settings))(
        weights, decode.Prompts(tokens, lengths), rollout_keys(0, 0, rows, 1), tables
    )
    return [
        list(map(int, row[:length]))
        for row, length in zip(np.asarray(result.tokens)[:, 0], result.lengths[:, 0], strict=True)
    ]


def test_logits(torch, theirs, ours):
    ids, model, _ = theirs
    ids = ids[::5]
    for side in ("left", "right"):
        for sequence, mine in zip(ids, logits(ours, ids, side), strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([sequence])).logits[0].numpy()
            assert np.abs(mine - wanted).max() <= 2e-3
            print(f"{side}: max abs logit difference {np.abs(mine - wanted).max():.2e}")


def test_greedy_tokens_batched_and_alone(torch, theirs, ours):
    ids, model, tokenizer = theirs
    end_id = tokenizer.eos_token_id
    wanted = []
    for sequence in ids:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([sequence]), max_new_tokens=NUM_NEW, do_sample=False
            )
        wanted.append(output[0, len(sequence) :].tolist())
    assert greedy(ours, ids, end_id) == wanted
    for sequence, text in list(zip(ids, wanted, strict=True))[::4]:
        assert greedy(ours, [sequence], end_id) == [text]
    padded = tokenizer.pad(
        {"input_ids": ids}, padding_side="left", return_tensors="pt", padding=True
    )
    with torch.no_grad():
        batch = model.generate(**padded, max_new_tokens=NUM_NEW, do_sample=False)
    width = padded["input_ids"].shape[1]
    for row, text in zip(batch[:, width:].tolist(), wanted, strict=True):
        assert row[: len(text)] == text
