"""Pretrained checkpoints that speak English give what `transformers` gives.

Set JLRM_REAL_MODEL (a small one) and JLRM_REAL_QWEN (Qwen2.5-0.5B or larger) to directories in
Qwen2 or Qwen3 format; without them these tests skip.
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

from jlrm import export
from jlrm.data import batches
from jlrm.data.tokenizer import encode, end_ids, load_tokenizer, prompt_template
from jlrm.judgement import prompts
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


@pytest.fixture(scope="module", params=["JLRM_REAL_MODEL", "JLRM_REAL_QWEN"])
def directory(request) -> pathlib.Path:
    if request.param not in os.environ:
        pytest.skip(f"{request.param} names no checkpoint")
    return pathlib.Path(os.environ[request.param])


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
    return load(directory, "float32")


def load(directory: pathlib.Path, compute_dtype: str):
    config = hf_config.read_config(directory, compute_dtype=compute_dtype)
    return config, hf.load_params(directory, config, training_layout(mesh_of(1, 1, 1)))


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


def greedy(ours, ids: list[list[int]], ends: tuple[int, ...]) -> list[list[int]]:
    """Return what our sampler writes after each prompt, all in one batch."""
    config, params = ours
    layout = rollout_layout(mesh_of(1, 1, 1))
    tokens, lengths = batches.pad(ids, 64)
    tables = stop_tables({}, [], config.vocab_size)
    rows = np.arange(len(ids), dtype=np.int32)
    settings = SamplerSettings(Distribution(temperature=0.0), NUM_NEW, ends)
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


def test_greedy_tokens_batched_and_alone(torch, theirs, ours, directory):
    ids, model, tokenizer = theirs
    ends = end_ids(load_tokenizer(directory), directory)
    wanted = []
    for sequence in ids:
        with torch.no_grad():
            output = model.generate(
                torch.tensor([sequence]), max_new_tokens=NUM_NEW, do_sample=False
            )
        wanted.append(output[0, len(sequence) :].tolist())
    assert greedy(ours, ids, ends) == wanted
    for sequence, text in list(zip(ids, wanted, strict=True))[::4]:
        assert greedy(ours, [sequence], ends) == [text]
    padded = tokenizer.pad(
        {"input_ids": ids}, padding_side="left", return_tensors="pt", padding=True
    )
    with torch.no_grad():
        batch = model.generate(**padded, max_new_tokens=NUM_NEW, do_sample=False)
    width = padded["input_ids"].shape[1]
    for row, text in zip(batch[:, width:].tolist(), wanted, strict=True):
        assert row[: len(text)] == text


def test_bfloat16_is_no_farther_from_float32_than_theirs(torch, theirs, directory):
    from transformers import AutoModelForCausalLM

    ids, exact, _ = theirs
    ids = ids[::5]
    rounded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    mine = logits(load(directory, "bfloat16"), ids, "right")
    gaps = []
    for sequence, my_logits in zip(ids, mine, strict=True):
        with torch.no_grad():
            wanted, their_logits = (
                model(torch.tensor([sequence])).logits[0].float().numpy()
                for model in (exact, rounded)
            )
        my_logits = np.asarray(my_logits, np.float32)
        gaps.append([np.abs(each - wanted).mean() for each in (my_logits, their_logits)])
    my_gap, their_gap = np.mean(gaps, axis=0)
    print(f"mean abs logit difference to float32: {my_gap:.4f}, transformers {their_gap:.4f}")
    assert my_gap <= 1.1 * their_gap


def test_prompts_are_those_of_the_chat_template(theirs, directory):
    their_tokenizer, tokenizer = theirs[2], load_tokenizer(directory)
    system, user = prompts.messages("jlrm", 1, 10)
    texts = {"question": "Wie geht's? \u4f60\u597d", "answer_1": "a\n\n b", "answer_2": "\u00e9"}
    filled = prompts.fill(prompt_template(tokenizer, "jlrm"), **texts)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    wanted = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for name, text in texts.items():
        wanted = wanted.replace("{" + name + "}", text, 1)
    assert filled == wanted + "<think>\n"
    (mine,) = encode(tokenizer, [filled])
    assert mine == their_tokenizer(filled, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(mine) == filled


def test_import_then_export_gives_every_tensor_back(torch, directory, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    export.import_from_hf(str(directory), tmp_path / "run")
    export.export_to_hf(str(tmp_path / "run"), tmp_path / "out")
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (source,), (written,) = (sorted(d.glob("*.safetensors")) for d in (directory, tmp_path / "out"))
    with safe_open(source, "pt") as before, safe_open(written, "pt") as after:
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118, no mapping
            assert torch.equal(before.get_tensor(name), after.get_tensor(name))
