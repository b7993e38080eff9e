"""The sampler draws from the distribution it reports; a row's text depends on that row alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING, mesh_of, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlrm.model import lora, qwen
from jlrm.model.lora import LoRA
from jlrm.rl.distribution import Distribution, log_distribution
from jlrm.runtime.mesh import rollout_layout, training_layout
from jlrm.sampling import decode, sampler
from jlrm.sampling.decode import Prompts
from jlrm.sampling.sampler import Rollout, SamplerSettings, generate, rollout_keys, sample
from jlrm.sampling.stops import StopTables, stop_tables

pytestmark = pytest.mark.slow  # whole models are compiled

NUM_PROMPTS, NUM_ROLLOUTS, NUM_PROMPT, NUM_NEW = 8, 2, 6, 12
END_IDS = tuple(range(0, 96, 12))  # so many that completions have many lengths
NO_STOPS = stop_tables({}, [], 96)
FAST = {"xla_backend_optimization_level": 0}  # these programs are compiled more often than run
SHALLOW = tiny_config(num_hidden_layers=1)
PLAIN, FOUR_IDS = Distribution(), Distribution(num_ids=4)


@functools.cache
def random_params(config: qwen.QwenConfig, mesh_shape: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """Return weights without any zero or one left, and a head that makes peaked distributions."""
    abstract = qwen.abstract_params(config, training_layout(mesh_of(*mesh_shape)))
    rng = np.random.default_rng(0)

    def make(path: Any, leaf: Any) -> jax.Array:
        is_norm, is_table = path[-1].key == "scale", path[0].key in ("embed", "head")
        scale = 0.4 if is_table else 0.3
        value = float(is_norm) + scale * rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    return jax.tree.map_with_path(make, abstract)


def random_prompts(num_prompts: int = NUM_PROMPTS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return right-padded prompts of every length from 1 up, padded with 0."""
    lengths = np.arange(num_prompts, dtype=np.int32) % NUM_PROMPT + 1
    prompts = np.random.default_rng(seed).integers(0, 96, size=(num_prompts, NUM_PROMPT))
    is_token = np.arange(NUM_PROMPT)[None] < lengths[:, None]
    return np.where(is_token, prompts, 0).astype(np.int32), lengths


@functools.cache
def compiled(
    config: qwen.QwenConfig, settings: SamplerSettings, mesh_shape: tuple[int, int, int]
) -> Any:
    layout = rollout_layout(mesh_of(*mesh_shape))

    def run(params: Any, *arguments: Any) -> Rollout:
        weights = decode.decode_params(config, layout, params)
        return generate(config, layout, settings, weights, *arguments)

    return jax.jit(run, compiler_options=FAST)


def draw(
    prompts: np.ndarray,
    lengths: np.ndarray,
    keys: jax.Array | None = None,
    *,
    config: qwen.QwenConfig = SHALLOW,
    distribution: Distribution = PLAIN,
    max_new_tokens: int = NUM_NEW,
    num_slots: int = 0,
    stop_ids: tuple[int, ...] = (),
    stops: StopTables = NO_STOPS,
    mesh_shape: tuple[int, int, int] = (1, 1, 1),
) -> Rollout:
    """Run the sampler and return NumPy arrays, prompts and rollouts in one axis."""
    settings = SamplerSettings(distribution, max_new_tokens, stop_ids, num_slots)
    program = compiled(config, settings, mesh_shape)
    keys = grid_keys(len(prompts)) if keys is None else keys
    params = random_params(config, mesh_shape)
    found = program(params, Prompts(prompts, lengths), keys, stops)
    return Rollout(*(np.asarray(x).reshape(-1, *x.shape[2:]) for x in found))


def grid_keys(
    num_prompts: int = NUM_PROMPTS, num_rollouts: int = NUM_ROLLOUTS, seed: int = 0, step: int = 0
) -> jax.Array:
    return rollout_keys(seed, jnp.int32(step), jnp.arange(num_prompts), num_rollouts)


def is_drawn(found: Rollout) -> np.ndarray:
    return np.arange(found.tokens.shape[1])[None] < found.lengths[:, None]


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "distribution"),
    [
        ("qwen2_tied", PLAIN),
        ("qwen2_tied", Distribution(temperature=0.0)),
        ("qwen2_tied", Distribution(top_k=5)),
        ("qwen2_untied", Distribution(temperature=0.7, num_ids=90)),
        ("qwen2_untied", Distribution(top_p=0.9)),
        ("qwen3", PLAIN),
        ("qwen3", Distribution(temperature=0.7, top_k=20, top_p=0.9, num_ids=90)),
    ],
)
def test_sampled_log_probabilities_are_the_teacher_forced_ones(architecture, distribution):
    check_teacher_forcing(tiny_config(architecture), distribution)


@pytest.mark.slow
def test_top_k_50_of_a_vocabulary_of_several_blocks():
    config = tiny_config(vocab_size=1100, num_hidden_layers=1)
    check_teacher_forcing(config, Distribution(top_k=50))


# Against float64 each of the two programs is off by at most 7.9e-6 here, so they differ by up to
# twice that; on a processor with AVX-512 and jax 0.10 by 1.14e-5, at a value of -3.2.
LOGP_ROUNDING = 2e-6


def check_teacher_forcing(config: qwen.QwenConfig, distribution: Distribution) -> None:
    prompts, prompt_lengths = random_prompts()
    found = draw(
        prompts,
        prompt_lengths,
        config=config,
        distribution=distribution,
        stop_ids=tuple(range(0, config.vocab_size, 12)),
        stops=stop_tables({}, [], config.vocab_size),
    )
    assert len(set(found.lengths.tolist())) > 2
    repeated = (np.repeat(x, NUM_ROLLOUTS, axis=0) for x in (prompts, prompt_lengths))
    logp = score(config, distribution, *repeated, found.tokens)
    drawn = is_drawn(found)
    sampled, forced = found.logps[drawn], logp[drawn]
    np.testing.assert_allclose(sampled, forced, rtol=max(ROUNDING, LOGP_ROUNDING), atol=1e-5)
    assert np.abs(sampled - forced).mean() < 3e-6  # rounding has no direction, a mistake has one
    assert np.all(found.logps[~drawn] == 0) and np.all(found.tokens[~drawn] == 0)
    if distribution.num_ids:
        assert found.tokens.max() < distribution.num_ids
    if distribution.top_k:
        assert found.logps.min() > -20, "an id beyond the cut was drawn"


def score(
    config: qwen.QwenConfig,
    distribution: Distribution,
    prompts: np.ndarray,
    prompt_lengths: np.ndarray,
    tokens: np.ndarray,
) -> np.ndarray:
    """Return the log-probability of every token of completions from one forward pass over all."""
    rows = np.concatenate([prompts, np.zeros_like(tokens)], axis=1)
    at = prompt_lengths[:, None] + np.arange(tokens.shape[1])
    np.put_along_axis(rows, at, tokens, axis=1)
    logits = np.take_along_axis(forward(config)(rows), at[..., None] - 1, axis=1)
    log_probs = np.asarray(log_distribution(jnp.asarray(logits), distribution))
    return np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


@functools.cache
def forward(config: qwen.QwenConfig) -> Any:
    """Return a function from rows of ids to the logits after every one of them."""
    layout = rollout_layout(mesh_of(1, 1, 1))

    def run(params: Any, rows: jax.Array) -> jax.Array:
        weights = decode.decode_params(config, layout, params)
        hidden, _ = decode.prefill(config, layout, weights, rows)
        return jnp.einsum("BTD,VD->BTV", hidden, qwen.head(config, params))

    program = jax.jit(run, compiler_options=FAST)
    return lambda rows: np.asarray(program(random_params(config), rows))


@pytest.mark.slow
def test_temperature_zero_takes_the_most_likely_id_of_the_full_forward_pass():
    config = tiny_config()
    prompts, lengths = random_prompts()
    greedy = Distribution(temperature=0.0)
    keys = grid_keys(num_rollouts=1)
    found = draw(prompts, lengths, keys, config=config, distribution=greedy, max_new_tokens=5)
    rows = np.concatenate([prompts, np.zeros((NUM_PROMPTS, 5), np.int32)], axis=1)
    for offset in range(5):  # without a cache: the whole row again for each token
        logits = forward(config)(rows)[np.arange(NUM_PROMPTS), lengths + offset - 1]
        ids = np.argmax(logits, axis=-1)
        assert np.array_equal(ids, found.tokens[:, offset])
        rows[np.arange(NUM_PROMPTS), lengths + offset] = ids


def test_ids_beyond_the_tokenizer_are_never_drawn():
    prompts, lengths = random_prompts()
    assert draw(prompts, lengths, distribution=FOUR_IDS).tokens.max() == 3
    assert draw(prompts, lengths).tokens.max() > 3


# --- 8-bit weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen2_untied", "qwen3"])
def test_8_bit_weights_draw_from_the_policy_they_stand_for(architecture):
    """The rounded one: drawing from what the integers stand for gives the same."""
    config = tiny_config(architecture)
    layout = rollout_layout(mesh_of(1, 1, 1))
    full = decode.decode_params(config, layout, random_params(config))
    narrow = decode.decode_params(config, layout, random_params(config), "int8")
    rounded = decode.dequantise(config, narrow)
    program = jax.jit(
        functools.partial(generate, config, layout, SamplerSettings(PLAIN, NUM_NEW, ()))
    )
    arguments = Prompts(*random_prompts()), grid_keys(), NO_STOPS
    found = jax.tree.map(np.asarray, program(narrow, *arguments))
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    program = jax.jit(
        functools.partial(generate, untied, layout, SamplerSettings(PLAIN, NUM_NEW, ()))
    )
    wanted = jax.tree.map(np.asarray, program(rounded, *arguments))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-5, atol=1e-5)
    for layer, before in zip(narrow["layers"], full["layers"], strict=True):
        for name in ("q", "o"):
            stored, original = layer["attn"][name], np.asarray(before["attn"][name])
            assert stored.values.dtype == np.int8 and stored.values.shape == original.shape
            error = np.abs(np.asarray(decode.dequantise(config, stored)) - original)
            assert error.max() > 0 and np.all(error <= np.asarray(stored.scale) * 0.501)
    assert layer["attn"]["o"].scale.shape == (1, 1, config.hidden_size)


# --- where a completion ends ---------------------------------------------------------------------

PIECES = [b"a", b"b", b"ab", b"ba", b"xb", b"aab", b" ", "é".encode(), b"", b"-", b"--", b"bxa"]


def test_a_completion_ends_with_a_stop_id_a_stop_string_or_the_limit():
    """The text is that of an endless run, cut where the rules say; what follows is zeros."""
    token_bytes = [PIECES[token % len(PIECES)] for token in range(90)]
    strings = {"ab": 3, "--": 2}
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    assert np.all(endless.lengths == NUM_NEW) and not endless.is_finished.any()
    stop_ids = int(endless.tokens[2, 5]), int(endless.tokens[9, 0])
    stops = stop_tables(strings, token_bytes, 96)
    found = draw(prompts, lengths, stop_ids=stop_ids, stops=stops)
    token_bytes += [b""] * 6
    reasons = []
    for row, tokens in enumerate(endless.tokens.tolist()):
        length, reason = end_of(tokens, token_bytes, strings, stop_ids)
        reasons.append(reason)
        assert found.lengths[row] == length
        assert found.is_finished[row] == (reason != "limit")
        assert found.tokens[row].tolist() == tokens[:length] + [0] * (NUM_NEW - length)
        np.testing.assert_allclose(
            found.logps[row, :length], endless.logps[row, :length], atol=1e-5
        )
        assert not found.logps[row, length:].any()
    assert set(reasons) == {"limit", *strings, *stop_ids}


@pytest.mark.slow
def test_stop_strings_count_behind_the_end_of_the_reasoning():
    token_bytes = [PIECES[token % len(PIECES)] for token in range(90)] + [b""] * 6
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    stops = stop_tables({"ab": 2}, token_bytes, 96, after="--")
    found = draw(prompts, lengths, stops=stops)
    reasons = set()
    for row, tokens in enumerate(endless.tokens.tolist()):
        length, reason = end_of(tokens, token_bytes, {"ab": 2}, (), after="--")
        assert (found.lengths[row], found.is_finished[row]) == (length, reason != "limit")
        reasons.add(reason)
    assert reasons == {"limit", "ab"}


def end_of(
    tokens: Sequence[int],
    token_bytes: Sequence[bytes],
    strings: dict[str, int],
    stop_ids: Sequence[int],
    after: str = "",
) -> tuple[int, Any]:
    text = b""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return index + 1, token
        for byte in token_bytes[token]:
            text += bytes([byte])
            _, found, counted = text.rpartition(after.encode()) if after else (b"", b"-", text)
            for string, count in strings.items():
                if found and counted.count(string.encode()) >= count:
                    return index + 1, string
    return len(tokens), "limit"


def test_an_end_in_the_very_last_place_is_an_end():
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    row = next(i for i, tokens in enumerate(endless.tokens) if tokens[-1] not in tokens[:-1])
    found = draw(prompts, lengths, stop_ids=(int(endless.tokens[row, -1]),))
    assert found.lengths[row] == NUM_NEW and found.is_finished[row]
    assert np.array_equal(found.tokens[row], endless.tokens[row])


@pytest.fixture
def num_steps(monkeypatch):
    """A list that grows by one with each decoding step that runs."""
    step, steps = decode.decode_step, []

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: steps.append(1))
        return step(*arguments)

    monkeypatch.setattr(decode, "decode_step", counted)
    compiled.cache_clear()  # the programs before this one don't count
    yield steps
    compiled.cache_clear()


@pytest.mark.parametrize("longest", [1, 4])
def test_the_loop_stops_with_its_last_row(num_steps, longest):
    """A batch whose longest completion has n tokens costs n - 1 decoding steps."""
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    jax.effects_barrier()
    num_steps.clear()
    stop_ids = tuple({int(token) for token in endless.tokens[:, longest - 1]})
    found = draw(prompts, lengths, stop_ids=stop_ids)
    jax.effects_barrier()
    assert found.is_finished.all() and found.lengths.max() <= longest
    assert len(num_steps) == found.lengths.max() - 1


# --- slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
def test_rollouts_do_not_depend_on_how_many_run_at_once(num_slots):
    setting = {
        "keys": grid_keys(num_rollouts=8),
        "config": tiny_config(),
        "stop_ids": END_IDS,
        "stops": stop_tables({"ab": 1}, [PIECES[i % len(PIECES)] for i in range(90)], 96),
    }
    prompts, lengths = random_prompts()
    wanted = draw(prompts, lengths, **setting)
    assert len(set(wanted.lengths.tolist())) > 5
    check_equal(draw(prompts, lengths, **setting, num_slots=num_slots), wanted)


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_a_rollout_begins_where_the_first_one_ends(num_steps, num_slots):
    """The steps are those of a queue: no slot waits while its prompt has rollouts left."""
    prompts, lengths = random_prompts()
    keys = grid_keys(num_rollouts=8)
    found = draw(prompts, lengths, keys, stop_ids=END_IDS, num_slots=num_slots)
    jax.effects_barrier()
    longest = 0
    for of_prompt in found.lengths.reshape(NUM_PROMPTS, 8).tolist():
        slots = [0] * num_slots
        for length in of_prompt:
            slots[slots.index(min(slots))] += length
        longest = max(longest, *slots)
    assert len(num_steps) == longest - 1


def test_rollouts_of_full_length_fit_one_slot():
    """A ring is written over and over, and what its slot has drawn fills the whole history."""
    prompts, lengths = random_prompts()
    keys = grid_keys(num_rollouts=3)
    wanted = draw(prompts, lengths, keys)
    assert np.all(wanted.lengths == NUM_NEW)
    check_equal(draw(prompts, lengths, keys, num_slots=1), wanted)
    check_equal(draw(prompts, lengths, keys, num_slots=2), wanted)


@pytest.mark.parametrize("num_slots", [0, 2])
def test_caches_that_grow_hold_what_they_held(monkeypatch, num_slots):
    setting = {
        "keys": grid_keys(num_rollouts=3),
        "stop_ids": END_IDS[:2],
        "max_new_tokens": 21,
        "num_slots": num_slots,
    }
    prompts, lengths = random_prompts()
    compiled.cache_clear()
    wanted = draw(prompts, lengths, **setting)
    monkeypatch.setattr(sampler, "SMALLEST_CACHE", 6)
    assert sampler.cache_sizes(21) == [6, 11, 21]
    compiled.cache_clear()
    found = draw(prompts, lengths, **setting)
    compiled.cache_clear()
    check_equal(found, wanted)
    assert wanted.lengths.max() > 11 > 6 > wanted.lengths.min()


# --- the shared prefix ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_rollouts", [3, 8])
@pytest.mark.parametrize("architecture", ["qwen2_untied", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_of_one_prompt_are_those_of_copies_of_it(architecture, temperature, num_rollouts):
    setting = {
        "config": tiny_config(architecture),
        "distribution": Distribution(temperature),
        "stop_ids": END_IDS,
    }
    prompts, lengths = random_prompts()
    keys = grid_keys(num_rollouts=num_rollouts)
    shared = draw(prompts, lengths, keys, **setting)
    copies = (np.repeat(x, num_rollouts, axis=0) for x in (prompts, lengths))
    # As many copies at a time as there are prompts: one program draws them all.
    batches = zip(*(np.split(x, num_rollouts) for x in copies), strict=True)
    alone = [
        draw(*batch, own, **setting)
        for batch, own in zip(batches, keys.reshape(num_rollouts, -1, 1), strict=True)
    ]
    check_equal(shared, Rollout(*map(np.concatenate, zip(*alone, strict=True))))


def check_equal(found: Rollout, wanted: Rollout) -> None:
    assert np.array_equal(found.tokens, wanted.tokens)
    assert np.array_equal(found.lengths, wanted.lengths)
    assert np.array_equal(found.is_finished, wanted.is_finished)
    np.testing.assert_allclose(
        found.logps, wanted.logps, rtol=max(ROUNDING, LOGP_ROUNDING), atol=1e-5
    )


# --- what a row depends on -----------------------------------------------------------------------


def test_a_completion_does_not_depend_on_its_neighbours_or_its_padding():
    prompts, lengths = random_prompts()
    keys = grid_keys()
    whole = draw(prompts, lengths, keys, stop_ids=END_IDS)
    rows = np.array([6, 1, 3])
    wide = np.full((3, NUM_PROMPT + 5), 95, np.int32)
    for row, source in enumerate(rows):
        wide[row, : lengths[source]] = prompts[source, : lengths[source]]
    second = keys[rows, 1:]
    found = draw(wide, lengths[rows], second, stop_ids=END_IDS, max_new_tokens=20)
    for row, source in enumerate(rows * NUM_ROLLOUTS + 1):
        length = whole.lengths[source]
        assert found.tokens[row, :length].tolist() == whole.tokens[source, :length].tolist()
        if whole.is_finished[source]:
            assert found.lengths[row] == length
        np.testing.assert_allclose(
            found.logps[row, :length], whole.logps[source, :length], atol=1e-5
        )


@pytest.mark.parametrize("pad_id", [12, 95])
def test_the_padding_id_changes_nothing_even_if_it_ends_completions(pad_id):
    prompts, lengths = random_prompts()
    is_token = np.arange(NUM_PROMPT)[None] < lengths[:, None]
    assert 12 in END_IDS and 95 not in END_IDS
    wanted = draw(prompts, lengths, stop_ids=END_IDS)
    found = draw(np.where(is_token, prompts, pad_id), lengths, stop_ids=END_IDS)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_id_zero_can_be_drawn_and_can_end():
    """Finished rows are filled with id 0, which is an ordinary id elsewhere."""
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths, distribution=FOUR_IDS).tokens.tolist()
    found = draw(prompts, lengths, distribution=FOUR_IDS, stop_ids=(0,))
    wanted = [tokens.index(0) + 1 if 0 in tokens else NUM_NEW for tokens in endless]
    assert found.lengths.tolist() == wanted
    assert min(wanted) < NUM_NEW


def test_keys_are_addressed_by_seed_step_prompt_and_rollout():
    def keys(seed: int, step: int, prompts: Sequence[int]) -> np.ndarray:
        found = rollout_keys(seed, jnp.int32(step), jnp.array(prompts), 5)
        return np.asarray(jax.random.key_data(found))

    prompts = np.arange(7)
    grid = [keys(seed, step, prompts) for seed in (0, 1, 2) for step in (0, 1, 2)]
    every = np.concatenate(grid).reshape(9 * 7 * 5, -1)
    assert len(np.unique(every, axis=0)) == len(every)
    order = np.random.default_rng(0).permutation(7)
    assert np.array_equal(keys(1, 2, prompts[order]), keys(1, 2, prompts)[order])
    fewer = rollout_keys(1, jnp.int32(2), jnp.array(prompts), 3)
    assert np.array_equal(jax.random.key_data(fewer), keys(1, 2, prompts)[:, :3])


@pytest.mark.parametrize("changed", ["seed", "step", "keys"])
def test_another_key_gives_another_text(changed):
    prompts, lengths = np.full((NUM_PROMPTS, 6), 5, np.int32), np.full(NUM_PROMPTS, 6, np.int32)
    first = draw(prompts, lengths, grid_keys()).tokens
    assert np.array_equal(first, draw(prompts, lengths, grid_keys()).tokens)
    if changed == "keys":  # equal prompts, other prompt ids and rollout indices
        assert len(np.unique(first, axis=0)) == NUM_PROMPTS * NUM_ROLLOUTS
    else:
        other = draw(prompts, lengths, grid_keys(**{changed: 1})).tokens
        assert np.all(np.any(first != other, axis=1))


def test_tokens_are_drawn_independently():
    """Of a model that makes four ids alike: all come equally often, after each other too."""
    program = compiled(SHALLOW, SamplerSettings(FOUR_IDS, NUM_NEW, ()), (1, 1, 1))
    flat = jax.tree.map(jnp.zeros_like, random_params(SHALLOW))
    prompts, lengths = random_prompts()
    tokens = np.concatenate(
        [
            np.asarray(
                program(flat, Prompts(prompts, lengths), grid_keys(seed=seed), NO_STOPS).tokens
            )
            for seed in range(20)
        ]
    ).reshape(-1, NUM_NEW)
    check_frequencies(np.bincount(tokens.ravel(), minlength=4), np.full(4, 1 / 4))
    pairs = tokens[:, :-1] * 4 + tokens[:, 1:]
    check_frequencies(np.bincount(pairs.ravel(), minlength=16), np.full(16, 1 / 16))
    neighbours = tokens[:-1] * 4 + tokens[1:]  # rows of the same prompt among them
    check_frequencies(np.bincount(neighbours.ravel(), minlength=16), np.full(16, 1 / 16))


@pytest.mark.parametrize("num_slots", [0, 1])
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (2, 2, 2), (1, 1, 2), (1, 4, 2)])
def test_several_devices_draw_what_one_draws(mesh_shape, num_slots):
    prompts, lengths = random_prompts()
    setting = {
        "distribution": Distribution(0.7, 20, 0.9, num_ids=90),
        "stop_ids": END_IDS,
        "stops": stop_tables({"ab": 1}, [PIECES[i % len(PIECES)] for i in range(90)], 96),
        "config": tiny_config(),
    }
    one = draw(prompts, lengths, **setting)
    assert len(set(one.lengths.tolist())) > 2
    several = draw(prompts, lengths, **setting, mesh_shape=mesh_shape, num_slots=num_slots)
    check_equal(several, one)


# --- drawing one id ------------------------------------------------------------------------------


def check_frequencies(counts: np.ndarray, probs: np.ndarray) -> None:
    """Fail if a chi-square test rejects `probs` at five standard deviations."""
    assert np.all(counts[probs == 0] == 0), "an impossible id was drawn"
    counts, probs = counts[probs > 0], probs[probs > 0]
    expected = counts.sum() * probs
    assert expected.min() >= 5, "too few draws for the test to be valid"
    statistic, degrees = np.sum((counts - expected) ** 2 / expected), len(counts) - 1
    # Wilson and Hilferty: the cube root of a chi-square is nearly normal.
    spread = 2 / (9 * degrees)
    assert (statistic / degrees) ** (1 / 3) < 1 - spread + 5 * spread**0.5


@functools.partial(jax.jit, static_argnums=(0, 2))
def sample_rows(mesh_shape: tuple, logits: jax.Array, distribution: Distribution, key: jax.Array):
    uniform = jax.random.uniform(key, logits.shape[:1])
    return sample(rollout_layout(mesh_of(*mesh_shape)), logits, distribution, uniform)


def sample_many(
    log_probs: np.ndarray, num_draws: int, mesh_shape: tuple[int, int, int] = (1, 1, 1)
) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(log_probs, jnp.float32), (num_draws, len(log_probs)))
    return np.asarray(sample_rows(mesh_shape, rows, Distribution(), jax.random.key(0))[0])


def test_blocks_of_a_vocabulary_that_is_spread_over_devices():
    logits = np.random.default_rng(0).normal(0.0, 2.0, size=2600).astype(np.float32)
    one, several = (sample_many(logits, 2000, shape) for shape in ((1, 1, 1), (1, 2, 2)))
    assert np.array_equal(one, several) and one.max() > 2600 * 3 // 4


@pytest.mark.parametrize("distribution", [PLAIN, Distribution(0.7, 30, 0.95, 550), FOUR_IDS])
def test_the_log_probability_is_that_of_the_drawn_id(distribution):
    logits = np.random.default_rng(0).normal(0.0, 4.0, size=(64, 1300)).astype(np.float32)
    ids, logps = sample_rows((1, 1, 1), logits, distribution, jax.random.key(1))
    wanted = np.take_along_axis(
        np.asarray(log_distribution(jnp.asarray(logits), distribution)),
        np.asarray(ids)[:, None],
        axis=1,
    )[:, 0]
    np.testing.assert_allclose(logps, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("num_ids", [5, 511, 512, 513, 1300])
def test_draws_have_their_probabilities(num_ids):
    rng = np.random.default_rng(num_ids)
    logits = rng.normal(0.0, 1.0, size=num_ids)
    probs = np.exp(logits) / np.exp(logits).sum()
    ids = sample_many(np.log(probs), 20_000)
    group = np.arange(num_ids) * 50 // num_ids  # neighbours, so that each has enough draws
    check_frequencies(
        np.bincount(group[ids], minlength=group[-1] + 1)[np.unique(group)],
        np.bincount(group, weights=probs)[np.unique(group)],
    )


def test_draws_are_of_possible_ids_at_the_edges_of_blocks():
    probs = np.zeros(1300)
    probs[[0, 1, 510, 511, 512, 700, 1023, 1024, 1299]] = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    probs /= probs.sum()
    log_probs = np.where(probs > 0, np.log(np.maximum(probs, 1e-9)), -1e30)
    counts = np.bincount(sample_many(log_probs, 20_000), minlength=1300)
    check_frequencies(counts, probs)


def test_draws_after_cut_offs_have_the_reported_probabilities():
    logits = np.random.default_rng(0).normal(0.0, 2.0, size=600).astype(np.float32)
    log_probs = log_distribution(logits[None], Distribution(0.7, 30, 0.95))[0]
    probs = np.where(np.asarray(log_probs) > -1e29, np.exp(np.asarray(log_probs, np.float64)), 0)
    ids = sample_many(np.asarray(log_probs), 40_000)
    check_frequencies(np.bincount(ids, minlength=600), probs / probs.sum())


invert = jax.jit(sampler._invert)


@pytest.mark.parametrize(
    ("mass", "target", "index"),
    [
        ([0.5, 0.5], 0.0, 0),
        ([0.5, 0.5], 0.25, 0),
        ([0.5, 0.5], 0.5, 1),  # a bound belongs to the entry it opens
        ([0.0, 0.0, 1.0, 0.0], 0.0, 2),
        ([0.5, 0.0, 0.5, 0.0], 0.5, 2),
        ([0.5, 0.0, 0.5, 0.0], 1.0, 2),  # rounding has put the target at the end
        ([0.5, 0.5, 0.0, 0.0], 1.5, 1),  # or past it
        ([0.0, 0.0, 1.0, 1.0], -1e-8, 2),  # or before the beginning
    ],
)
def test_inverting_a_cumulative_sum(mass, target, index):
    found, rest = invert(np.array([mass], np.float32), np.array([target], np.float32))
    assert found.tolist() == [index]
    np.testing.assert_allclose(rest[0], target - np.sum(mass[:index]), atol=1e-7)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.01, 0.2, 0.9]))
@example(seed=0, share=0.2)
def test_rounding_of_the_running_sum_never_leads_to_an_impossible_entry(seed, share):
    """Targets at the very bounds of entries, where sums in another order differ by a rounding."""
    rng = np.random.default_rng(seed)
    mass = rng.random((64, 512)) * (rng.random((64, 512)) < share)
    mass[:, rng.integers(512)] = 0.5
    mass = mass.astype(np.float32)
    rows = np.arange(64)
    bounds = np.asarray(jnp.cumsum(mass, axis=-1))[rows, rng.integers(0, 512, size=64)]
    for direction in (-np.inf, 0.0, np.inf):
        target = np.nextafter(bounds, np.float32(direction)) if direction else bounds
        index = np.asarray(invert(mass, target)[0])
        assert np.all(mass[rows, index] > 0)


# --- memory --------------------------------------------------------------------------------------


def operations(program: Any, shape: str, *arguments: Any) -> set[str]:
    """Return which operations in bodies of loops produce an array of this shape."""
    hlo = program.lower(*arguments).compile().as_text()
    found = set()
    for name in re.findall(r"while\(.*?body=(%?[\w.\-]+)", hlo):
        start = re.search(rf"^{re.escape(name)} \(", hlo, re.MULTILINE).end()
        body = hlo[start : hlo.index("\n}", start)]
        found |= set(re.findall(rf"%(\S+) = {re.escape(shape)}\{{\S* ", body))
    return {re.sub(r"[.\d]+$", "", name) for name in found}


def test_decoding_does_not_copy_the_cache():
    """The cache passes through the loop; the only operations on all of it are updates in place."""
    prompts, lengths = random_prompts()
    program = compiled(tiny_config(), SamplerSettings(PLAIN, 50, (3,)), (1, 1, 1))
    params = random_params(tiny_config())
    arguments = params, Prompts(prompts, lengths), grid_keys(), NO_STOPS
    allowed = {"get-tuple-element", "bitcast_dynamic-update-slice_fusion"}
    assert operations(program, "f32[8,2,2,50,8]", *arguments) == allowed


def test_a_prefix_is_not_repeated_and_passes_through_the_loop_as_it_is():
    prompts, lengths = random_prompts()
    program = compiled(tiny_config(), SamplerSettings(PLAIN, 50, (3,)), (1, 1, 1))
    params = random_params(tiny_config())
    arguments = params, Prompts(prompts, lengths), grid_keys(), NO_STOPS
    prefix, repeated = "f32[8,2,6,8]", "f32[8,2,2,6,8]"
    assert operations(program, prefix, *arguments) == {"get-tuple-element"}
    assert repeated not in program.lower(*arguments).compile().as_text()


def test_other_prompts_and_keys_compile_nothing():
    program = compiled(SHALLOW, SamplerSettings(PLAIN, NUM_NEW, END_IDS, 1), (1, 1, 1))
    for seed in (0, 1):
        prompts, lengths = random_prompts(seed=seed)
        draw(prompts, lengths, grid_keys(seed=seed), stop_ids=END_IDS, num_slots=1)
    assert program._cache_size() == 1

    @jax.jit
    def swap(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, 9, lambda i, pair: (pair[1], pair[0].at[i].set(1.0)), pair)

    assert "copy" in operations(swap, "f32[16]", (jnp.zeros(16), jnp.ones(16)))


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("has_magnitude", [False, True])
def test_rollouts_are_the_same_with_merged_and_unmerged_adapters(has_magnitude, mesh_shape):
    targets = ("q", "k", "v", "o", "gate", "up", "down")
    config = dataclasses.replace(SHALLOW, lora=LoRA(3, 0.7, targets, has_magnitude, "float32"))
    params, layout = random_params(config, mesh_shape), rollout_layout(mesh_of(*mesh_shape))
    settings = SamplerSettings(PLAIN, NUM_NEW, END_IDS)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
    def draw(form: str, params: Any) -> Rollout:
        weights = decode.decode_params(config, layout, params, form)
        prompts = Prompts(*map(jnp.asarray, random_prompts()))
        return generate(config, layout, settings, weights, prompts, grid_keys(), NO_STOPS)

    merged, beside = draw("full", params), draw("unmerged", params)
    np.testing.assert_array_equal(merged.tokens, beside.tokens)
    np.testing.assert_allclose(merged.logps, beside.logps, atol=2e-4)
    off = draw("full", lora.split(config.lora, params)[1])
    assert np.any(np.asarray(merged.tokens) != np.asarray(off.tokens)), "the adapters do nothing"
