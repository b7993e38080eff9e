"""The distribution equals a float64 reference; the chunked, spread head equals the plain one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jlrm.rl import distribution as distributions
from jlrm.rl import logprobs
from jlrm.rl.distribution import Distribution, log_distribution
from jlrm.rl.logprobs import completion_logps, summed_token_loss
from jlrm.runtime.mesh import training_layout

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_batch_axes_are_free():
    logits = random_logits((2, 3, 40))
    distribution = Distribution(0.7, 5, 0.9)
    found = log_probs_of(logits, distribution)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(
            found[index], log_probs_of(logits[index], distribution), rtol=1e-6
        )


@pytest.mark.slow
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


@pytest.mark.slow
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


@jax.jit
def threshold_of(values: jax.Array, weights: jax.Array, wanted: float) -> jax.Array:
    vocabulary = distributions.Vocabulary(values.shape[-1])
    return distributions._largest_threshold(values, weights, wanted, vocabulary)


@pytest.mark.slow
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


@pytest.mark.slow
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


COLLECTIVES = {
    "all_gather",
    "all_to_all",
    "pmax",
    "pmin",
    "ppermute",
    "psum",
    "psum_invariant",
    "reduce_scatter",
}


def is_program(value: object) -> bool:
    return hasattr(value, "eqns")


def programs(equation: Any) -> list[Any]:
    """Return the programs inside an equation."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if is_program(leaf)]


def equations(program: Any) -> list[Any]:
    """Return all equations of a program and of its inner programs."""
    found = []
    for equation in program.eqns:
        found.append(equation)
        for inner in programs(equation):
            found += equations(inner)
    return found


def primitives(program: Any) -> set[str]:
    return {equation.primitive.name for equation in equations(program)}


def test_needs_no_sort():
    sorting = {"sort", "top_k", "approx_top_k"}
    logits = jnp.zeros((2, 100))
    distribution = Distribution(0.7, 50, 0.9)
    program = jax.make_jaxpr(lambda x: log_distribution(x, distribution))(logits)
    assert not primitives(program.jaxpr) & sorting
    # The walk would see one, hidden in a loop as the bisection is.
    hidden = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: jax.lax.top_k(row, 5)[0], x))(logits)
    assert primitives(hidden.jaxpr) & sorting


# --- the head ------------------------------------------------------------------------------------

SMALL = {
    "plain": Distribution(),
    "cold": Distribution(temperature=0.7, num_ids=90),
    "top_k": Distribution(top_k=20),
    "top_p": Distribution(top_p=0.8),
    "all": Distribution(temperature=0.7, top_k=20, top_p=0.9, num_ids=90),
}
MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
NUM_ROWS, NUM_TOKENS, WIDTH = 8, 7, 16
each_small_distribution = pytest.mark.parametrize("distribution", SMALL.values(), ids=SMALL)
each_mesh = pytest.mark.parametrize("mesh_shape", MESHES)


def example_of(num_ids: int = 96, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Return states, a head that makes peaked distributions, tokens and two weights a token."""
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(NUM_ROWS, NUM_TOKENS, WIDTH)), dtype),
        jnp.asarray(rng.normal(size=(num_ids, WIDTH)) * 0.6, jnp.float32),
        jnp.asarray(rng.integers(0, min(num_ids, 90), size=(NUM_ROWS, NUM_TOKENS))),
        jnp.asarray(rng.normal(size=(NUM_ROWS, NUM_TOKENS, 2)), jnp.float32),
    )


def placed(mesh_shape: tuple[int, int, int], states: Any, head: Any) -> tuple[Any, Any, Any]:
    """Return the training layout, and states and head as they lie in it where that is possible."""
    layout = training_layout(mesh_of(*mesh_shape))
    states = jax.device_put(states, layout.activation("B T -"))
    if head.shape[0] % (mesh_shape[1] * mesh_shape[2]) == 0:
        head = jax.device_put(head, layout.param("VD"))
    return layout, states, head


@pytest.fixture
def small_chunks(monkeypatch, request):
    """Three positions a chunk, which do not divide the seven, whatever the mesh."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    num_devices = math.prod(params.get("mesh_shape", (1,)))
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 3 * NUM_ROWS // num_devices)


def naive_scores(distribution: Distribution, states: Any, head: Any, tokens: Any) -> Any:
    """Return log-probabilities and entropy from all logits at once."""
    logits = jnp.einsum(
        "BCD,VD->BCV", states, head.astype(states.dtype), preferred_element_type=jnp.float32
    )
    log_probs = log_distribution(logits, distribution, tokens)
    logp = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    # Cut-off ids add nothing; entr() of their zero has a gradient of NaN in some jax versions.
    terms = jnp.where(log_probs > -1e20, jnp.exp(log_probs) * log_probs, 0.0)
    return logp, -jnp.sum(terms, axis=-1)


def token_loss(logp: jax.Array, entropy: jax.Array, weights: jax.Array) -> Any:
    """Return a loss with a curvature, in which entropy counts."""
    terms = weights[..., 0] * jnp.exp(0.3 * logp) + weights[..., 1] * entropy * logp
    return jnp.sum(terms), {"entropy": jnp.sum(entropy), "positions": jnp.sum(entropy > 0)}


def gradients_of(loss: Callable[..., Any], *arguments: Any) -> Any:
    """Return ((value, sums), gradients by states and head) of `3 · loss`."""

    def scaled(states: jax.Array, head: jax.Array) -> Any:
        value, sums = loss(states, head)
        return 3.0 * value, sums

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True), compiler_options=FAST)(
        *arguments
    )


def assert_near(found: Any, wanted: Any, bound: float = 1e-5) -> None:
    """Compare trees; the bound is relative to the largest number of each array."""

    def compare(a: jax.Array, b: jax.Array) -> None:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(np.abs(b).max(), 1e-30))

    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(compare, found, wanted)


@pytest.mark.slow
@each_small_distribution
@each_mesh
@pytest.mark.parametrize("count", [NUM_TOKENS, 3, 0])
def test_scores_equal_the_plain_head(small_chunks, distribution, mesh_shape, count):
    states, head, tokens, _ = example_of()
    wanted = naive_scores(distribution, states, head, tokens)
    layout, states, head = placed(mesh_shape, states, head)
    program = jax.jit(
        lambda *args: completion_logps(*args, distribution, layout), compiler_options=FAST
    )
    found = program(states, head, tokens, jnp.int32(count))
    is_real = np.broadcast_to(np.arange(NUM_TOKENS) < count, tokens.shape)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.float32
        assert_near(one, np.where(is_real, other, 0.0))


@pytest.mark.slow
@each_small_distribution
@each_mesh
@pytest.mark.parametrize("num_ids", [96, 93])
def test_loss_and_gradients_equal_those_of_the_plain_head(
    small_chunks, distribution, mesh_shape, num_ids
):
    states, head, tokens, weights = example_of(num_ids)
    count = 5
    is_real = (jnp.arange(NUM_TOKENS) < count)[None, :]
    weights = jnp.where(is_real[..., None], weights, 0.0)

    def plain(states: jax.Array, head: jax.Array) -> Any:
        scores = naive_scores(distribution, states, head, tokens)
        return token_loss(*(jnp.where(is_real, x, 0.0) for x in scores), weights)

    wanted = gradients_of(plain, states, head)
    layout, states, head = placed(mesh_shape, states, head)

    def spread(states: jax.Array, head: jax.Array) -> Any:
        arguments = (states, head, tokens, jnp.int32(count), weights, distribution, layout)
        return summed_token_loss(token_loss, *arguments)

    found = gradients_of(spread, states, head)
    assert_near(found, wanted)
    assert found[0][1]["positions"] == NUM_ROWS * count
    assert not np.any(np.asarray(found[1][0])[:, count:])
    undifferentiated = jax.jit(spread, compiler_options=FAST)(states, head)
    assert_near(undifferentiated, (wanted[0][0] / 3, wanted[0][1]))


@pytest.mark.slow
def test_gradients_equal_differences_of_the_loss_in_float64():
    """An oracle that shares no code: NumPy, along random directions of states and head."""
    states, head, tokens, weights = example_of()
    layout = training_layout(mesh_of(2, 2, 2))

    def oracle(states: np.ndarray, head: np.ndarray) -> float:
        logits = states @ head.T / 0.7
        log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        logp = np.take_along_axis(log_probs, np.asarray(tokens)[..., None], axis=-1)[..., 0]
        entropy = -np.sum(np.exp(log_probs) * log_probs, axis=-1)
        scale = np.asarray(weights, np.float64)
        return np.sum(scale[..., 0] * np.exp(0.3 * logp) + scale[..., 1] * entropy * logp)

    def loss(states: jax.Array, head: jax.Array) -> Any:
        distribution = Distribution(temperature=0.7)
        count = jnp.int32(NUM_TOKENS)
        return summed_token_loss(
            token_loss, states, head, tokens, count, weights, distribution, layout
        )

    (value, _), gradients = gradients_of(loss, states, head)
    point = [np.asarray(x, np.float64) for x in (states, head)]
    assert value == pytest.approx(3 * oracle(*point), rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = [rng.normal(size=x.shape) for x in point]
        step = 1e-5
        ends = [
            oracle(*(x + sign * step * d for x, d in zip(point, direction, strict=True)))
            for sign in (1, -1)
        ]
        slope = sum(
            np.sum(np.asarray(g, np.float64) * d) for g, d in zip(gradients, direction, strict=True)
        )
        # Along such directions the slope's standard deviation is the gradient's norm.
        norm = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients))
        wanted = 3 * (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(wanted, rel=0, abs=1e-5 * norm)


@pytest.mark.slow
@each_mesh
def test_bfloat16_states_make_bfloat16_logits_and_gradients(small_chunks, mesh_shape):
    """A float32 head is rounded to the states' type, as the model's other weights are."""
    states, head, tokens, weights = example_of(dtype=jnp.bfloat16)
    distribution = SMALL["all"]

    def plain(states: jax.Array, head: jax.Array) -> Any:
        return token_loss(*naive_scores(distribution, states, head, tokens), weights)

    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    (value, sums), wanted = gradients_of(plain, states.astype(jnp.float32), rounded)
    layout, states, head = placed(mesh_shape, states, head)

    def spread(states: jax.Array, head: jax.Array) -> Any:
        arguments = (states, head, tokens, NUM_TOKENS, weights, distribution, layout)
        return summed_token_loss(token_loss, *arguments)

    found, gradients = gradients_of(spread, states, head)
    assert_near(found, (value, sums))
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.float32]
    assert_near(gradients, wanted, 2**-8)


@each_mesh
def test_nothing_to_score_has_no_loss_and_no_gradient(mesh_shape):
    states, head, tokens, weights = example_of()
    layout, states, head = placed(mesh_shape, states, head)

    def loss(states: jax.Array, head: jax.Array) -> Any:
        arguments = (states, head, tokens, jnp.int32(0), weights, Distribution(), layout)
        return summed_token_loss(token_loss, *arguments)

    for leaf in jax.tree.leaves(gradients_of(loss, states, head)):
        assert not np.any(np.asarray(leaf))


@pytest.mark.slow
def test_data_may_be_integers_and_masks_and_gets_no_gradient(small_chunks, mesh):
    states, head, tokens, weights = example_of()
    data = {"mask": tokens > 40, "choice": tokens % 2, "weights": weights}
    layout = training_layout(mesh)

    def loss(logp: jax.Array, entropy: jax.Array, data: dict[str, jax.Array]) -> Any:
        chosen = jnp.where(data["choice"] == 1, data["weights"][..., 0], data["weights"][..., 1])
        return jnp.sum(jnp.where(data["mask"], chosen * logp, 0.0)), {}

    def total(states: jax.Array, weights: jax.Array) -> jax.Array:
        arguments = {**data, "weights": weights}, Distribution(), layout
        return summed_token_loss(loss, states, head, tokens, NUM_TOKENS, *arguments)[0]

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(states, weights)
    logp, _ = naive_scores(Distribution(), states, head, tokens)
    wanted, _ = loss(logp, logp, data)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    assert np.any(np.asarray(gradients[0])) and not np.any(np.asarray(gradients[1]))


@pytest.mark.slow
def test_sums_carry_no_gradient(mesh):
    states, head, tokens, weights = example_of()
    layout = training_layout(mesh)

    def of_sums(states: jax.Array) -> jax.Array:
        arguments = (tokens, NUM_TOKENS, weights, Distribution(), layout)
        value, sums = summed_token_loss(token_loss, states, head, *arguments)
        return 0.0 * value + sums["entropy"]

    value, gradient = jax.jit(jax.value_and_grad(of_sums))(states)
    assert value > 0 and not np.any(np.asarray(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("mesh_shape", [(1, 2, 1), (2, 2, 1)])
def test_micro_batches_in_a_scan_add_up(small_chunks, mesh_shape, start):
    """As `update.py` calls it: inside `scan`, with a count that changes from part to part."""
    states, head, tokens, weights = example_of()
    layout = training_layout(mesh_of(*mesh_shape))
    counts = jnp.array([start + 3, start + 5])
    is_real = jnp.arange(NUM_TOKENS)[None, :] < jnp.repeat(counts, NUM_ROWS // 2)[:, None]
    weights = jnp.where(is_real[..., None], weights, 0.0)

    def loss(head: jax.Array, part: Any) -> jax.Array:
        states, tokens, weights, count = part
        arguments = (tokens, count, weights, Distribution(), layout)
        return summed_token_loss(token_loss, states, head, *arguments)[0]

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(2, NUM_ROWS // 2, *x.shape[1:])

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        return total + jax.grad(loss)(head, part), None

    rows = tuple(map(parts, (states, tokens, weights)))
    found, _ = jax.jit(lambda: jax.lax.scan(add, jnp.zeros_like(head), (*rows, counts)))()
    wanted = sum(
        jax.jit(jax.grad(loss))(head, (*(x[i] for x in rows), counts[i])) for i in range(2)
    )
    assert_near(found, wanted)


def compiled_text(program: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(program, compiler_options=FAST).lower(*arguments).compile().as_text()


def array_sizes(hlo: str) -> list[int]:
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 2)])
def test_never_holds_all_logits(mesh_shape):
    layout = training_layout(mesh_of(*mesh_shape))
    num_ids, num_tokens = 15200, 2048
    states = jax.ShapeDtypeStruct((8, num_tokens, WIDTH), jnp.float32)
    head = jax.ShapeDtypeStruct((num_ids, WIDTH), jnp.float32)
    tokens = jax.ShapeDtypeStruct((8, num_tokens), jnp.int32)
    weights = jax.ShapeDtypeStruct((8, num_tokens, 2), jnp.float32)
    distribution = SMALL["all"]

    def loss(states: Any, head: Any, tokens: Any, count: Any, weights: Any) -> Any:
        arguments = (tokens, count, weights, distribution, layout)
        return summed_token_loss(token_loss, states, head, *arguments)

    whole = 8 * num_tokens * num_ids // math.prod(mesh_shape)
    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    score = functools.partial(completion_logps, distribution=distribution, layout=layout)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    inputs = (states, head, tokens, count)
    for hlo in (compiled_text(gradients, *inputs, weights), compiled_text(score, *inputs)):
        assert max(array_sizes(hlo)) <= logprobs.CHUNK_POSITIONS * num_ids < whole / 4


def num_head_products(program: Callable[..., Any], num_ids: int, *arguments: Any) -> int:
    """Count products of matrices in the program, and check that each is one with the head."""
    found = re.findall(
        r"dot_general.*?: \((.*)\) -> (.*)", jax.jit(program).lower(*arguments).as_text()
    )
    assert all(f"{num_ids}x" in line or f"x{num_ids}x" in line for line in map(" ".join, found))
    return len(found)


def test_a_gradient_costs_three_products_and_a_value_one(mesh):
    states, head, tokens, weights = example_of()
    layout = training_layout(mesh)

    def loss(states: jax.Array, head: jax.Array) -> Any:
        arguments = (tokens, NUM_TOKENS, weights, Distribution(), layout)
        return summed_token_loss(token_loss, states, head, *arguments)

    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    assert num_head_products(loss, 96, states, head) == 1
    assert num_head_products(gradients, 96, states, head) == 3


@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (2, 2, 2)])
def test_states_travel_to_the_head_and_not_over_the_data_axis(mesh_shape):
    """Inside the loop no array of the head's width in ids moves between devices."""
    states, head, tokens, weights = example_of(num_ids=4096)
    layout, states, head = placed(mesh_shape, states, head)

    def loss(states: jax.Array, head: jax.Array) -> Any:
        arguments = (tokens, NUM_TOKENS, weights, Distribution(), layout)
        return summed_token_loss(token_loss, states, head, *arguments)

    jaxpr = jax.make_jaxpr(jax.grad(lambda s, h: loss(s, h)[0], argnums=(0, 1)))(states, head)
    inside = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("while", "scan")]
    moved = [
        (equation.primitive.name, equation.params, variable.aval.size)
        for loop in inside
        for body in programs(loop)
        for equation in equations(body)
        if set(equation.params) & {"axes", "axis_name"}
        for variable in equation.invars
        if equation.primitive.name in COLLECTIVES
    ]
    assert {name for name, _, _ in moved} >= {"all_gather", "reduce_scatter"}
    for _, params, size in moved:
        assert "data" not in str(params.get("axes", params.get("axis_name")))
        assert size <= NUM_ROWS * NUM_TOKENS * WIDTH


@pytest.mark.slow
def test_entropy_is_that_of_the_kept_ids(mesh):
    """A head of zeros makes every id alike: entropy is the log of how many there are."""
    states, head, tokens, _ = example_of()
    layout = training_layout(mesh)

    def entropy(distribution: Distribution, head: jax.Array) -> np.ndarray:
        arguments = (tokens, NUM_TOKENS, distribution, layout)
        program = jax.jit(lambda head: completion_logps(states, head, *arguments)[1])
        return np.asarray(program(head))

    flat = jnp.zeros_like(head)
    np.testing.assert_allclose(entropy(Distribution(), flat), np.log(96), rtol=1e-5)
    few = entropy(Distribution(num_ids=10), flat)
    np.testing.assert_allclose(few, np.log(10), rtol=1e-5)
    distribution = Distribution(temperature=0.7, top_k=20, top_p=0.9)
    logits = np.asarray(states, np.float64) @ np.asarray(head, np.float64).T
    found = entropy(distribution, head)
    for index in np.ndindex(*tokens.shape):
        log_probs = reference(logits[index], distribution)
        if np.isfinite(log_probs[tokens[index]]):
            kept = np.isfinite(log_probs)
            wanted = -np.sum(np.exp(log_probs[kept]) * log_probs[kept])
            assert found[index] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@each_mesh
def test_a_token_that_left_the_kept_ids_has_a_finite_log_probability_and_gradient(mesh_shape):
    states, head, _, weights = example_of()
    tokens = jnp.argmin(jnp.einsum("BCD,VD->BCV", states, head), axis=-1)  # as far out as can be
    layout, states, head = placed(mesh_shape, states, head)

    def negative(logp: jax.Array, entropy: jax.Array, weights: jax.Array) -> Any:
        return jnp.sum(logp) + jnp.sum(entropy), {"lowest": jnp.sum(logp)}

    def loss(states: jax.Array, head: jax.Array) -> Any:
        arguments = (tokens, NUM_TOKENS, weights, Distribution(1.0, 5, 0.9), layout)
        return summed_token_loss(negative, states, head, *arguments)

    (value, _), gradients = gradients_of(loss, states, head)
    assert -1e4 < value < 0
    for gradient in gradients:
        assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)
