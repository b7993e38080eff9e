"""Beam search and penalised greedy decoding write what `transformers` writes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tpu_mesh

from jlrm.data.batches import pad
from jlrm.model import qwen
from jlrm.runtime.mesh import rollout_layout, training_layout
from jlrm.sampling import decode, sampler
from jlrm.sampling.beam import BLOCK, Hypotheses, SearchSettings, search, top_k
from jlrm.sampling.stops import StopTables, stop_tables
from jlrm.weights import hf, hf_config
from jlrm.weights.presets import preset

VOCAB, NUM_NEW, WIDTH = 96, 12, 9
END_IDS = (5, 40, 77)
NO_STOPS = stop_tables({}, [], VOCAB)
FAST = {"xla_backend_optimization_level": 0}


@pytest.mark.parametrize("size", [7, 128, 1000, 5 * 128, 12345])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_highest_without_a_sort(size, k):
    """As the library's, ties and their order included."""
    rng = np.random.default_rng(size + k)
    for numbers in (rng.normal(size=(3, 2, size)), rng.integers(0, 4, (3, 2, size))):
        numbers = jnp.asarray(numbers, jnp.float32)
        if k <= size:
            for mine, theirs in zip(top_k(numbers, k), jax.lax.top_k(numbers, k), strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def models(torch, tmp_path_factory):
    """Return a function to a random model of theirs, and the same of ours."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    kinds = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    }

    @functools.cache
    def make(kind: str, seed: int) -> tuple[Any, qwen.QwenConfig, Any]:
        settings, model_of, more = kinds[kind]
        torch.manual_seed(seed)
        theirs = model_of(
            settings(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2 if kind == "qwen3" else 1,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=kind == "qwen3",
                initializer_range=0.3,
                **more,
            )
        ).eval()
        directory = tmp_path_factory.mktemp(f"{kind}-{seed}")
        theirs.save_pretrained(directory)
        config = hf_config.read_config(directory, compute_dtype="float32")
        return theirs, config, hf.load_params(directory, config, training_layout(mesh_of(1, 1, 1)))

    return make


def random_prompts(seed: int, num_prompts: int = 8) -> list[list[int]]:
    """Return prompts of every length, one of them as long as the batch is wide."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=i % WIDTH + 2).tolist() for i in range(num_prompts)]


def generate(
    torch, model: Any, prompts: list[list[int]], **settings: Any
) -> tuple[list[list[int]], Any]:
    """Return what `transformers` writes after left-padded prompts, and all that it returns."""
    width = max(map(len, prompts))
    # They penalise ids of padding like any others: it repeats an id that the prompt has anyway.
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=list(END_IDS),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    return [until_end(row) for row in found.sequences[:, width:].tolist()], found


def until_end(ids: list[int], letters: int = NUM_NEW + 1) -> list[int]:
    """Cut off the padding: what follows an end id or the last of so many letters x."""
    for i, token in enumerate(ids):
        letters -= token % 4 == 0
        if token in END_IDS or not letters:
            return ids[: i + 1]
    return ids


@functools.cache
def compiled(
    config: qwen.QwenConfig, settings: SearchSettings, mesh_shape: tuple[int, int, int]
) -> Any:
    layout = rollout_layout(mesh_of(*mesh_shape))

    def run(params: Any, *arguments: Any) -> Hypotheses:
        weights = decode.decode_params(config, layout, params)
        return search(config, layout, settings, weights, *arguments)

    return jax.jit(run, compiler_options=FAST)


def find(
    config: qwen.QwenConfig,
    params: Any,
    prompts: list[list[int]],
    settings: SearchSettings,
    stops: StopTables = NO_STOPS,
    mesh_shape: tuple[int, int, int] = (1, 1, 1),
) -> tuple[list[list[int]], Hypotheses]:
    """Return what the search writes, as lists of ids and as it comes."""
    placed = jax.device_put(
        params,
        jax.tree.map(
            lambda leaf: leaf.sharding,
            qwen.abstract_params(config, training_layout(mesh_of(*mesh_shape))),
        ),
    )
    program = compiled(config, settings, mesh_shape)
    found = jax.tree.map(
        np.asarray, program(placed, decode.Prompts(*pad(prompts, WIDTH + 3)), stops)
    )
    return [
        row[:length].tolist() for row, length in zip(found.tokens, found.lengths, strict=True)
    ], found


# --- what transformers does ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "num_beams", "penalty"),
    [
        ("qwen2", 4, 1.0),
        ("qwen2", 4, 1.2),
        ("qwen3", 4, 1.2),
        ("qwen2", 1, 1.2),
        ("qwen3", 1, 1.2),
    ],
)
def test_ids_are_those_of_transformers(torch, models, kind, num_beams, penalty):
    """Several models and prompts of several lengths, of which some end and some are cut off."""
    num_finished = 0
    for seed in range(3):
        theirs, config, params = models(kind, seed)
        prompts = random_prompts(seed)
        wanted, scored = generate(
            torch, theirs, prompts, num_beams=num_beams, repetition_penalty=penalty
        )
        texts, found = find(
            config, params, prompts, SearchSettings(num_beams, NUM_NEW, END_IDS, penalty)
        )
        assert texts == wanted
        is_finished = [text[-1] in END_IDS for text in wanted]
        assert found.is_finished.tolist() == is_finished
        num_finished += sum(is_finished)
        if num_beams > 1:
            scores = scored.sequences_scores.numpy()
            np.testing.assert_allclose(found.means, scores, rtol=1e-4, atol=1e-5)
    assert 3 <= num_finished <= 21


@pytest.mark.slow
def test_the_penalty_changes_what_is_written(models):
    _, config, params = models("qwen2", 0)
    texts = [
        find(config, params, random_prompts(0), SearchSettings(4, NUM_NEW, END_IDS, penalty))[0]
        for penalty in (1.0, 1.2)
    ]
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_a_stop_string_ends_a_hypothesis_as_a_stopping_criterion_does(torch, models):
    """Every fourth id is a letter x, and the second of them is the end."""
    theirs, config, params = models("qwen2", 0)
    prompts = random_prompts(0)
    width = max(map(len, prompts))

    def is_over(ids: Any, scores: Any, **_: Any) -> Any:
        return (ids[:, width:] % 4 == 0).sum(dim=1) >= 2

    _, found = generate(torch, theirs, prompts, num_beams=4, stopping_criteria=[is_over])
    wanted = [until_end(row, letters=2) for row in found.sequences[:, width:].tolist()]
    stops = stop_tables({"x": 2}, [b"y" if i % 4 else b"x" for i in range(VOCAB)], VOCAB)
    texts, found = find(config, params, prompts, SearchSettings(4, NUM_NEW, END_IDS), stops)
    assert texts == wanted
    assert sum(text[-1] not in END_IDS for text in texts) > 2
    assert found.is_finished.sum() > 2


# --- what it must not depend on ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 4])
def test_other_prompts_of_the_batch_do_not_matter(models, num_beams):
    _, config, params = models("qwen2", 0)
    prompts, settings = random_prompts(0), SearchSettings(num_beams, NUM_NEW, END_IDS, 1.2)
    wanted, _ = find(config, params, prompts, settings)
    others = [*random_prompts(1)[:5], *reversed(prompts[:3])]
    assert find(config, params, others, settings)[0][5:] == wanted[2::-1]


@pytest.mark.slow
def test_devices_do_not_matter(models):
    _, config, params = models("qwen2", 0)
    prompts, settings = random_prompts(0), SearchSettings(4, NUM_NEW, END_IDS, 1.2)
    wanted, _ = find(config, params, prompts, settings)
    assert find(config, params, prompts, settings, mesh_shape=(2, 2, 2))[0] == wanted


@pytest.mark.slow
def test_caches_that_grow_hold_what_they_held(models, monkeypatch):
    _, config, params = models("qwen2", 0)
    prompts, settings = random_prompts(0), SearchSettings(4, NUM_NEW, END_IDS, 1.2)
    wanted, _ = find(config, params, prompts, settings)
    monkeypatch.setattr(sampler, "SMALLEST_CACHE", 4)
    compiled.cache_clear()
    found, _ = find(config, params, prompts, settings)
    compiled.cache_clear()
    assert found == wanted


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_are_never_written(models):
    _, config, params = models("qwen2", 0)
    texts, _ = find(config, params, random_prompts(0), SearchSettings(4, 4, (5,), 1.2, 20))
    assert max(max(text) for text in texts) < 20


# --- for the hardware it is meant for ------------------------------------------------------------


@pytest.mark.slow
def test_it_compiles_for_a_slice_and_moves_no_log_probabilities():
    num_rows, num_beams, num_prompt, num_new = 16, 4, 512, 512
    config = dataclasses.replace(preset("qwen2.5-7b"), num_hidden_layers=1)
    grid = tpu_mesh("v5e:4x4", 1, 4, 4)
    layout = rollout_layout(grid)
    place = jax.jit(partial(decode.decode_params, config, layout))
    params = qwen.abstract_params(config, training_layout(grid))
    weights = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(place, params),
        place.lower(params).compile().output_shardings,
    )

    def shaped(letters: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout.activation(letters))

    settings = SearchSettings(num_beams, num_new, (1, 2), 1.2, config.vocab_size - 7)
    lowered = jax.jit(partial(search, config, layout, settings)).lower(
        weights,
        decode.Prompts(shaped("P T", num_rows, num_prompt), shaped("P", num_rows)),
        StopTables(
            jax.ShapeDtypeStruct((1, 19, config.vocab_size), jnp.int16),
            jax.ShapeDtypeStruct((1,), jnp.int16),
        ),
    )
    text = lowered.compile().as_text()
    names = re.findall(r"body=(%[\w.\-]+)", text)
    assert names
    starts = [text.index(f"\n{name} (") for name in names]
    body = "\n".join(text[start : text.index("\n}", start)] for start in starts)
    moved = re.findall(r"= (.*) (?:all-gather|all-reduce|all-to-all)(?:-start)?\(", body)
    shapes = re.findall(r"[a-z0-9]+\[([0-9,]+)\]", "\n".join(moved))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    # Activations of all rows at most, as in a rollout; log-probabilities of all ids are far more.
    assert max(sizes) <= num_rows * num_beams * config.hidden_size
    # Nor is a row of them sorted.
    sorts = re.findall(r"= (.*) sort\(", body)
    rows = [int(shape.split(",")[-1]) for shape in re.findall(r"\[([0-9,]+)\]", "\n".join(sorts))]
    assert max(rows, default=0) <= BLOCK * settings.num_candidates
