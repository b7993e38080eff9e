"""The sampler draws from the distribution it reports; a row's text depends on that row alone."""

from __future__ import annotations

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

from jlrm import rollout, update
from jlrm.mesh import rollout_layout, training_layout
from jlrm.model import qwen
from jlrm.rl.logprobs import Distribution, log_distribution
from jlrm.rollout import Rollout, Sampler, generate, rollout_keys, sample
from jlrm.stops import StopTables, stop_tables

NUM_ROWS, NUM_PROMPT, NUM_NEW = 16, 6, 12
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


def random_prompts(num_rows: int = NUM_ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return right-padded prompts of every length from 1 up, padded with 0."""
    lengths = np.arange(num_rows, dtype=np.int32) % NUM_PROMPT + 1
    prompts = np.random.default_rng(seed).integers(0, 96, size=(num_rows, NUM_PROMPT))
    is_token = np.arange(NUM_PROMPT)[None] < lengths[:, None]
    return np.where(is_token, prompts, 0).astype(np.int32), lengths


@functools.cache
def compiled(config: qwen.QwenConfig, sampler: Sampler, mesh_shape: tuple[int, int, int]) -> Any:
    layout = rollout_layout(mesh_of(*mesh_shape))

    def run(params: Any, *arguments: jax.Array) -> Rollout:
        return generate(
            config, layout, sampler, qwen.decode_params(config, layout, params), *arguments
        )

    return jax.jit(run, compiler_options=FAST)


def draw(
    prompts: np.ndarray,
    lengths: np.ndarray,
    keys: jax.Array | None = None,
    *,
    config: qwen.QwenConfig = SHALLOW,
    distribution: Distribution = PLAIN,
    max_new_tokens: int = NUM_NEW,
    stop_ids: tuple[int, ...] = (),
    stops: StopTables = NO_STOPS,
    mesh_shape: tuple[int, int, int] = (1, 1, 1),
) -> Rollout:
    """Run the sampler and return NumPy arrays."""
    program = compiled(config, Sampler(distribution, max_new_tokens, stop_ids), mesh_shape)
    keys = row_keys(len(prompts)) if keys is None else keys
    params = random_params(config, mesh_shape)
    found = program(params, prompts, lengths, keys, stops.tables, stops.accept)
    return Rollout(*map(np.asarray, found))


def row_keys(num_rows: int = NUM_ROWS, seed: int = 0, step: int = 0) -> jax.Array:
    rows = jnp.arange(num_rows)
    return rollout_keys(seed, jnp.int32(step), rows // 2, rows % 2)


def is_drawn(found: Rollout) -> np.ndarray:
    return np.arange(found.tokens.shape[1])[None] < found.lengths[:, None]


# --- log-probabilities ---------------------------------------------------------------------------


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
    layout = training_layout(mesh_of(1, 1, 1))
    sequences = update.Sequences(prompts, prompt_lengths, found.tokens, found.lengths)
    score = jax.jit(
        functools.partial(update.score, config, layout, distribution, 1), compiler_options=FAST
    )
    logp, _ = score(random_params(config), sequences)
    drawn = is_drawn(found)
    sampled, forced = found.logps[drawn], np.asarray(logp)[drawn]
    np.testing.assert_allclose(sampled, forced, rtol=max(ROUNDING, LOGP_ROUNDING), atol=1e-5)
    assert np.abs(sampled - forced).mean() < 3e-6  # rounding has no direction, a mistake has one
    assert np.all(found.logps[~drawn] == 0) and np.all(found.tokens[~drawn] == 0)
    if distribution.num_ids:
        assert found.tokens.max() < distribution.num_ids
    if distribution.top_k:
        assert found.logps.min() > -20, "an id beyond the cut was drawn"


def test_temperature_zero_takes_the_most_likely_id_of_the_full_forward_pass():
    config = tiny_config()
    layout = training_layout(mesh_of(1, 1, 1))
    params = random_params(config)
    prompts, lengths = random_prompts()
    greedy = Distribution(temperature=0.0)
    found = draw(prompts, lengths, config=config, distribution=greedy, max_new_tokens=5)

    @jax.jit
    def most_likely(rows: jax.Array, at: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
        hidden = qwen.hidden_states(
            config, layout, params, rows, positions, jnp.ones(rows.shape, bool)
        )
        return jnp.argmax(hidden[jnp.arange(len(rows)), at] @ params["embed"].T, axis=-1)

    rows = np.concatenate([prompts, np.zeros((NUM_ROWS, 5), np.int32)], axis=1)
    for offset in range(5):  # without a cache: the whole row again for each token
        ids = np.asarray(most_likely(rows, lengths + offset - 1))
        assert np.array_equal(ids, found.tokens[:, offset])
        rows[np.arange(NUM_ROWS), lengths + offset] = ids


def test_ids_beyond_the_tokenizer_are_never_drawn():
    prompts, lengths = random_prompts()
    assert draw(prompts, lengths, distribution=FOUR_IDS).tokens.max() == 3
    assert draw(prompts, lengths).tokens.max() > 3


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


def end_of(
    tokens: Sequence[int],
    token_bytes: Sequence[bytes],
    strings: dict[str, int],
    stop_ids: Sequence[int],
) -> tuple[int, Any]:
    text = b""
    for index, token in enumerate(tokens):
        text += token_bytes[token]
        if token in stop_ids:
            return index + 1, token
        for string, count in strings.items():
            if text.count(string.encode()) >= count:
                return index + 1, string
    return len(tokens), "limit"


def test_an_end_in_the_very_last_place_is_an_end():
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    row = next(i for i, tokens in enumerate(endless.tokens) if tokens[-1] not in tokens[:-1])
    found = draw(prompts, lengths, stop_ids=(int(endless.tokens[row, -1]),))
    assert found.lengths[row] == NUM_NEW and found.is_finished[row]
    assert np.array_equal(found.tokens[row], endless.tokens[row])


@pytest.mark.parametrize("longest", [1, 4])
def test_the_loop_stops_with_its_last_row(monkeypatch, longest):
    """A batch whose longest completion has n tokens costs n - 1 decoding steps."""
    prompts, lengths = random_prompts()
    endless = draw(prompts, lengths)
    stop_ids = tuple({int(token) for token in endless.tokens[:, longest - 1]})
    step, num_steps = qwen.decode_step, []

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: num_steps.append(1))
        return step(*arguments)

    monkeypatch.setattr(qwen, "decode_step", counted)
    compiled.cache_clear()  # the programs before this one don't count
    found = draw(prompts, lengths, stop_ids=stop_ids)
    jax.effects_barrier()
    compiled.cache_clear()
    assert found.is_finished.all() and found.lengths.max() <= longest
    assert len(num_steps) == found.lengths.max() - 1


# --- what a row depends on -----------------------------------------------------------------------


def test_a_row_does_not_depend_on_its_neighbours_or_its_padding():
    prompts, lengths = random_prompts()
    keys = row_keys()
    whole = draw(prompts, lengths, keys, stop_ids=END_IDS)
    rows = np.array([6, 1, 3])
    wide = np.full((3, NUM_PROMPT + 5), 95, np.int32)
    for row, source in enumerate(rows):
        wide[row, : lengths[source]] = prompts[source, : lengths[source]]
    found = draw(wide, lengths[rows], keys[rows], stop_ids=END_IDS, max_new_tokens=20)
    for row, source in enumerate(rows):
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
    def keys(seed: int, step: int, prompts: Sequence[int], rollouts: Sequence[int]) -> np.ndarray:
        arrays = jnp.array(prompts), jnp.array(rollouts)
        return np.asarray(jax.random.key_data(rollout_keys(seed, jnp.int32(step), *arrays)))

    prompts, rollouts = np.divmod(np.arange(35), 5)
    grid = [keys(seed, step, prompts, rollouts) for seed in (0, 1, 2) for step in (0, 1, 2)]
    every = np.concatenate(grid)
    assert len(np.unique(every, axis=0)) == len(every)
    order = np.random.default_rng(0).permutation(35)
    shuffled = keys(1, 2, prompts[order], rollouts[order])
    assert np.array_equal(shuffled, keys(1, 2, prompts, rollouts)[order])


@pytest.mark.parametrize("changed", ["seed", "step", "keys"])
def test_another_key_gives_another_text(changed):
    prompts, lengths = np.full((NUM_ROWS, 6), 5, np.int32), np.full(NUM_ROWS, 6, np.int32)
    first = draw(prompts, lengths, row_keys()).tokens
    assert np.array_equal(first, draw(prompts, lengths, row_keys()).tokens)
    if changed == "keys":  # equal prompts, other prompt ids and rollout indices
        assert len(np.unique(first, axis=0)) == NUM_ROWS
    else:
        other = draw(prompts, lengths, row_keys(**{changed: 1})).tokens
        assert np.all(np.any(first != other, axis=1))


def test_tokens_are_drawn_independently():
    """Of a model that makes four ids alike: all come equally often, after each other too."""
    program = compiled(SHALLOW, Sampler(FOUR_IDS, NUM_NEW, ()), (1, 1, 1))
    flat = jax.tree.map(jnp.zeros_like, random_params(SHALLOW))
    prompts, lengths = random_prompts()
    tokens = np.concatenate(
        [
            program(
                flat, prompts, lengths, row_keys(seed=seed), NO_STOPS.tables, NO_STOPS.accept
            ).tokens
            for seed in range(20)
        ]
    )
    check_frequencies(np.bincount(tokens.ravel(), minlength=4), np.full(4, 1 / 4))
    pairs = tokens[:, :-1] * 4 + tokens[:, 1:]
    check_frequencies(np.bincount(pairs.ravel(), minlength=16), np.full(16, 1 / 16))
    neighbours = tokens[:-1] * 4 + tokens[1:]  # rows of the same prompt among them
    check_frequencies(np.bincount(neighbours.ravel(), minlength=16), np.full(16, 1 / 16))


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (2, 2, 2), (1, 1, 2)])
def test_several_devices_draw_what_one_draws(mesh_shape):
    prompts, lengths = random_prompts()
    setting = {
        "distribution": Distribution(0.7, 20, 0.9, num_ids=90),
        "stop_ids": END_IDS,
        "stops": stop_tables({"ab": 1}, [PIECES[i % len(PIECES)] for i in range(90)], 96),
        "config": tiny_config(),
    }
    one = draw(prompts, lengths, **setting)
    assert len(set(one.lengths.tolist())) > 2
    several = draw(prompts, lengths, **setting, mesh_shape=mesh_shape)
    assert np.array_equal(several.tokens, one.tokens)
    assert np.array_equal(several.lengths, one.lengths)
    assert np.array_equal(several.is_finished, one.is_finished)
    np.testing.assert_allclose(several.logps, one.logps, atol=1e-5)


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


def sample_many(log_probs: np.ndarray, num_draws: int, seed: int = 0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), num_draws)
    rows = jnp.broadcast_to(jnp.asarray(log_probs, jnp.float32), (num_draws, len(log_probs)))
    program = jax.jit(sample, static_argnums=1)
    return np.asarray(program(rows, Distribution(), keys))


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


invert = jax.jit(rollout._invert)


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
    program = compiled(tiny_config(), Sampler(PLAIN, 50, (3,)), (1, 1, 1))
    params = random_params(tiny_config())
    arguments = params, prompts, lengths, row_keys(), NO_STOPS.tables, NO_STOPS.accept
    allowed = {"get-tuple-element", "bitcast_dynamic-update-slice_fusion"}
    assert operations(program, "f32[16,2,56,8]", *arguments) == allowed

    @jax.jit
    def swap(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, 9, lambda i, pair: (pair[1], pair[0].at[i].set(1.0)), pair)

    assert "copy" in operations(swap, "f32[16]", (jnp.zeros(16), jnp.ones(16)))
