"""The distribution equals a float64 reference; chunks equal the whole, gradients included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlrm.mesh import training_layout
from jlrm.rl import logprobs
from jlrm.rl.logprobs import Distribution, completion_logps, log_distribution

DISTRIBUTIONS = {
    "plain": Distribution(),
    "cold": Distribution(temperature=0.7),
    "greedy": Distribution(temperature=0.0),
    "top_k": Distribution(top_k=50),
    "top_p": Distribution(top_p=0.9),
    "top_k_p": Distribution(top_k=50, top_p=0.9),
    "all": Distribution(temperature=0.7, top_k=50, top_p=0.9, num_ids=900),
    "all_hot": Distribution(temperature=2.5, top_k=50, top_p=0.95),
}
each_distribution = pytest.mark.parametrize(
    "distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS
)

FAST = {"xla_backend_optimization_level": 0}  # these programs are compiled more often than run
log_probs_of = jax.jit(log_distribution, static_argnums=1, compiler_options=FAST)


def is_kept(log_probs: np.ndarray) -> np.ndarray:
    return np.asarray(log_probs) > -1e29


def reference(logits: np.ndarray, distribution: Distribution, slack: float = 0.0) -> np.ndarray:
    """Return one row in float64, -inf where cut off; `slack` is added to top-p."""
    logits = logits.astype(np.float64) / (distribution.temperature or 1.0)
    if distribution.num_ids:
        logits[distribution.num_ids :] = -np.inf
    if distribution.top_k:
        smallest = np.sort(logits)[-min(distribution.top_k, len(logits))]
        logits = np.where(logits >= smallest, logits, -np.inf)
    if distribution.top_p < 1:
        probs = np.exp(logits - logits.max())
        values, inverse = np.unique(logits, return_inverse=True)
        mass = np.bincount(inverse, weights=probs / probs.sum())
        mass_above = np.concatenate([np.cumsum(mass[::-1])[::-1][1:], [0.0]])
        is_cut = (mass_above >= distribution.top_p + slack) & (values < logits.max())
        logits = np.where(is_cut[inverse], -np.inf, logits)
    shifted = logits - logits.max()
    return shifted - np.log(np.sum(np.exp(shifted)))


def random_logits(shape: tuple[int, ...], scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, size=shape).astype(np.float32)


@each_distribution
@pytest.mark.parametrize("vocab_size", [1000, 151936])
def test_equals_a_float64_reference(distribution, vocab_size):
    for logits in random_logits((4 if vocab_size == 1000 else 1, vocab_size)):
        found = np.asarray(log_probs_of(logits[None], distribution))[0]
        kept = is_kept(found)
        # Where a sum of float32 probabilities passes top-p is uncertain by its rounding.
        few, many = (np.isfinite(reference(logits, distribution, s)) for s in (-1e-5, 1e-5))
        assert np.all(few <= kept) and np.all(kept <= many)
        assert many.sum() - few.sum() <= max(2, 0.01 * kept.sum())
        both = few & kept
        np.testing.assert_allclose(
            found[both], reference(logits, distribution)[both], rtol=1e-5, atol=5e-5
        )
        assert np.sum(np.exp(found[kept].astype(np.float64))) == pytest.approx(1.0, abs=1e-5)
        if distribution.num_ids:
            assert not kept[distribution.num_ids :].any()


@each_distribution
def test_keeps_ties_with_the_last_id_kept(distribution):
    # 60 ids share each value, and no sum of probabilities is near a bound.
    logits = np.tile(np.arange(-4.0, 4.0, 0.5, dtype=np.float32), 60)
    found = log_probs_of(logits[None], distribution)[0]
    wanted = reference(logits, distribution)
    assert np.array_equal(is_kept(found), np.isfinite(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(np.asarray(found)[finite], wanted[finite], rtol=1e-5)


@pytest.mark.parametrize("top_k", [0, 1, 50])
@pytest.mark.parametrize("top_p", [0.001, 0.9, 0.999, 1.0])
def test_keeps_what_transformers_keeps(torch, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits((16, 1000))
    scores = TemperatureLogitsWarper(0.7)(None, torch.tensor(logits, dtype=torch.float64))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    wanted = torch.log_softmax(scores, dim=-1).numpy()
    found = np.asarray(log_probs_of(logits, Distribution(0.7, top_k, top_p)))
    assert np.array_equal(is_kept(found), np.isfinite(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=1e-5, atol=1e-5)


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = random_logits((2, 7))
    found = log_probs_of(logits, Distribution(top_k=50))
    np.testing.assert_allclose(found, jax.nn.log_softmax(logits), rtol=1e-6)


def test_a_top_p_just_below_one_leaves_top_k_as_it_is():
    """Where rounding keeps the sum of probabilities below top-p, every id of the top-k stays."""
    logits = random_logits((512, 400))  # rounding does so in some forty of these rows
    top_p = float(np.nextafter(np.float32(1), np.float32(0)))
    program = jax.jit(lambda x: log_distribution(x, Distribution(top_k=50, top_p=top_p)))
    assert np.all(is_kept(program(logits)).sum(axis=1) <= 50)


def test_batch_axes_are_free():
    logits = random_logits((2, 3, 40))
    distribution = Distribution(0.7, 5, 0.9)
    found = log_probs_of(logits, distribution)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(
            found[index], log_probs_of(logits[index], distribution), rtol=1e-6
        )


@each_distribution
def test_keep_adds_its_id_to_those_kept(distribution):
    logits = random_logits((64, 1000))
    keep = np.random.default_rng(1).integers(0, distribution.num_ids or 1000, size=64)
    without = np.asarray(log_probs_of(logits, distribution))
    found = np.asarray(log_probs_of(logits, distribution, keep))
    rows = np.arange(64)
    wanted = is_kept(without)
    if wanted.sum() < 64 * (distribution.num_ids or 1000):
        assert not wanted[rows, keep].all(), "no row tests anything"
    wanted[rows, keep] = True
    assert np.array_equal(is_kept(found), wanted)
    scaled = logits.astype(np.float64) / (distribution.temperature or 1.0)
    normaliser = np.log(np.sum(np.exp(scaled) * wanted, axis=1))
    np.testing.assert_allclose(
        found[rows, keep], scaled[rows, keep] - normaliser, rtol=1e-5, atol=1e-5
    )


@each_distribution
def test_gradients_are_those_of_a_softmax_over_the_kept_ids(distribution):
    logits, keep = random_logits((8, 1000)), np.arange(8)
    rows = np.arange(8)

    def total(logits: jax.Array) -> jax.Array:
        return jnp.sum(log_distribution(logits, distribution, keep)[rows, keep])

    found = np.asarray(jax.jit(jax.grad(total), compiler_options=FAST)(jnp.asarray(logits)))
    log_probs = np.asarray(log_probs_of(logits, distribution, keep), np.float64)
    wanted = -np.exp(np.maximum(log_probs, -1e3))
    wanted[rows, keep] += 1
    np.testing.assert_allclose(found, wanted / (distribution.temperature or 1.0), atol=1e-5)
    assert not found[~is_kept(log_probs)].any()


def ordinary_floats() -> st.SearchStrategy[float]:
    """Floats of every magnitude and sign; subnormal ones are flushed to zero by the CPU."""
    return st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


threshold_of = jax.jit(logprobs._largest_threshold)


@settings(deadline=None, max_examples=300)
@given(
    values=st.lists(
        st.one_of(ordinary_floats(), st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 2e-38])),
        min_size=16,
        max_size=16,
    ),
    wanted=st.integers(1, 16),
)
@example(values=[0.0, -0.0] * 8, wanted=9)
@example(values=[-1.5] * 16, wanted=16)
@example(values=[-3.4028234663852886e38] + [3.4028234663852886e38] * 15, wanted=16)
@example(values=[-2e-38, 2e-38] + [0.0] * 14, wanted=15)
def test_the_threshold_is_exactly_the_kth_largest_value(values, wanted):
    row = np.array([values], np.float32)
    found = threshold_of(row, np.ones((1, 16), np.int32), wanted)
    assert found.shape == (1, 1)
    assert found[0, 0] == np.sort(row[0])[-wanted]


@settings(deadline=None, max_examples=100)
@given(
    values=st.lists(ordinary_floats(), min_size=16, max_size=16),
    weights=st.lists(st.integers(0, 9), min_size=16, max_size=16),
    wanted=st.integers(1, 60),
)
def test_the_threshold_is_the_largest_whose_weights_reach_the_wanted(values, weights, wanted):
    row = np.array(values, np.float32)
    weights = np.array(weights, np.int32)
    found = threshold_of(row[None], weights[None], wanted)[0, 0]
    reached = [v for v in row if weights[row >= v].sum() >= wanted]
    assert found == (max(reached) if reached else row.min())


def test_neighbouring_floats_are_told_apart():
    base = np.float32(-1.7)
    values = np.array([np.nextafter(base, np.float32(0)), base, np.nextafter(base, np.float32(-9))])
    for top_k in (1, 2):
        kept = is_kept(log_probs_of(values[None].astype(np.float32), Distribution(top_k=top_k)))
        assert kept.tolist() == [[index < top_k for index in range(3)]]


def is_program(value: object) -> bool:
    return hasattr(value, "eqns")


def primitives(jaxpr: jax.extend.core.Jaxpr) -> set[str]:
    """Return the names of all primitives in a program and its inner programs."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(leaf):
                found |= primitives(getattr(leaf, "jaxpr", leaf))
    return found


def test_needs_no_sort():
    sorting = {"sort", "top_k", "approx_top_k"}
    logits = jnp.zeros((2, 100))
    distribution = Distribution(0.7, 50, 0.9)
    program = jax.make_jaxpr(lambda x: log_distribution(x, distribution))(logits)
    assert not primitives(program.jaxpr) & sorting
    # The walk would see one, hidden in a loop as the bisection is.
    hidden = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: jax.lax.top_k(row, 5)[0], x))(logits)
    assert primitives(hidden.jaxpr) & sorting


def random_states(num_rows: int = 4, num_tokens: int = 7, num_ids: int = 96, width: int = 16):
    """Return hidden states, a head that makes peaked distributions, and tokens."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(num_rows, num_tokens, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(num_ids, width)) * 0.6, jnp.float32),
        jnp.asarray(rng.integers(0, num_ids, size=(num_rows, num_tokens))),
    )


SMALL = {
    "plain": Distribution(),
    "cold": Distribution(temperature=0.7, num_ids=90),
    "all": Distribution(temperature=0.7, top_k=20, top_p=0.9),
}


@pytest.mark.parametrize("distribution", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize(
    ("chunk", "shape"), [(1, (1, 1, 1)), (3, (1, 1, 1)), (7, (1, 1, 1)), (3, (2, 2, 1))]
)
def test_chunks_equal_the_whole_with_gradients(monkeypatch, distribution, chunk, shape):
    hidden, head, tokens = random_states()
    tokens = jnp.minimum(tokens, (distribution.num_ids or 96) - 1)
    layout = training_layout(mesh_of(*shape))
    rows_per_device = 4 // layout.num_batch_shards()
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 96 * rows_per_device * chunk)
    cotangents = np.random.default_rng(1).normal(size=(2, *tokens.shape)).astype(np.float32)

    def chunked(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return completion_logps(hidden, head, tokens, distribution, layout)

    def naive(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs = log_distribution(hidden @ head.T, distribution, tokens)
        logp = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        # Cut-off ids add nothing; entr() of their zero has a gradient of NaN in some jax versions.
        terms = jnp.where(log_probs > -1e20, jnp.exp(log_probs) * log_probs, 0.0)
        return logp, -jnp.sum(terms, axis=-1)

    def with_gradients(function):
        def run(hidden, head, logp_cotangent, entropy_cotangent):
            values, pull = jax.vjp(function, hidden, head)
            return values, pull((logp_cotangent, entropy_cotangent))

        return jax.jit(run, compiler_options=FAST)(hidden, head, *cotangents)

    program = str(jax.make_jaxpr(chunked)(hidden, head))
    assert f"f32[4,{chunk},96]" in program
    assert (chunk == 7) == ("f32[4,7,96]" in program)
    found, wanted = with_gradients(chunked), with_gradients(naive)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_entropy_is_that_of_the_kept_ids(mesh):
    """A head of zeros makes every id alike: entropy is the log of how many there are."""
    hidden, head, tokens = random_states()
    layout = training_layout(mesh)

    def entropy(distribution: Distribution, head: jax.Array) -> np.ndarray:
        program = jax.jit(lambda h: completion_logps(hidden, h, tokens, distribution, layout)[1])
        return np.asarray(program(head))

    flat = jnp.zeros_like(head)
    np.testing.assert_allclose(entropy(Distribution(), flat), np.log(96), rtol=1e-5)
    few = entropy(Distribution(num_ids=10), flat)
    np.testing.assert_allclose(few[np.asarray(tokens) < 10], np.log(10), rtol=1e-5)
    distribution = Distribution(temperature=0.7, top_k=20, top_p=0.9)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    found = entropy(distribution, head)
    for index in np.ndindex(*tokens.shape):
        log_probs = reference(logits[index], distribution)
        if np.isfinite(log_probs[tokens[index]]):
            kept = np.isfinite(log_probs)
            wanted = -np.sum(np.exp(log_probs[kept]) * log_probs[kept])
            assert found[index] == pytest.approx(wanted, rel=1e-4)


def test_a_token_that_left_the_kept_ids_has_a_finite_log_probability_and_gradient(mesh):
    hidden, head, tokens = random_states()
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)
    tokens = jnp.argmin(logits, axis=-1)  # as far out as can be
    layout = training_layout(mesh)

    def total(head: jax.Array) -> jax.Array:
        logp, entropy = completion_logps(hidden, head, tokens, Distribution(1.0, 5, 0.9), layout)
        return jnp.sum(logp) + jnp.sum(entropy)

    value, gradient = jax.jit(jax.value_and_grad(total))(head)
    assert -1e3 < value < 0
    assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)
