"""An optimiser step is the same however its rows are ordered, cut and spread over devices."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, tiny_config

from jlrm import update
from jlrm.config import OptimizerConfig
from jlrm.mesh import training_layout
from jlrm.model import qwen
from jlrm.rl.logprobs import Distribution
from jlrm.rl.losses import PolicyLoss, policy_loss, token_weights
from jlrm.update import PolicyBatch, Sequences, TrainState

NUM_ROWS, NUM_PROMPT, NUM_NEW, END = 16, 5, 6, 7
CONFIG = tiny_config()
DISTRIBUTION = Distribution(temperature=0.8, top_k=40, top_p=0.95, num_ids=90)
SETTINGS = PolicyLoss(kl_weight=0.1, entropy_weight=0.05, dual_clip=3.0)
FAST = {"xla_backend_optimization_level": 0}  # these programs are compiled more often than run
ADAMW = OptimizerConfig(learning_rate=1e-2, eps=1e-3, clip_norm=0.5)
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 2)]
ONE = (1, 1, 1)


@functools.cache
def layout_of(mesh_shape: tuple[int, int, int]) -> Any:
    return training_layout(mesh_of(*mesh_shape))


@functools.cache
def optimizer_of(name: str) -> optax.GradientTransformation:
    """Return AdamW with clipping, or plain descent, whose step shows the gradient itself."""
    return update.make_optimizer(ADAMW, 10) if name == "adamw" else optax.sgd(1.0)


def initial_state(optimizer: str, mesh_shape: tuple[int, int, int] = ONE) -> TrainState:
    """Return the state before the first step, with weights that have no zero or one left."""
    layout = layout_of(mesh_shape)
    rng = np.random.default_rng(0)

    def make(path: Any, leaf: Any) -> jax.Array:
        value = float(path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    params = jax.tree.map_with_path(make, qwen.abstract_params(CONFIG, layout))
    return update.init_state(CONFIG, layout, optimizer_of(optimizer), params)


def random_sequences(seed: int = 0) -> Sequences:
    """Return ragged prompts and completions; a completion that is not full-length has an END."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, NUM_PROMPT + 1, size=NUM_ROWS)
    lengths = rng.integers(1, NUM_NEW + 1, size=NUM_ROWS)
    prompts = rng.integers(8, 90, size=(NUM_ROWS, NUM_PROMPT))
    tokens = rng.integers(8, 90, size=(NUM_ROWS, NUM_NEW))
    tokens[np.arange(NUM_ROWS), lengths - 1] = END
    prompts[np.arange(NUM_PROMPT)[None] >= prompt_lengths[:, None]] = 0
    tokens[np.arange(NUM_NEW)[None] >= lengths[:, None]] = 0
    return Sequences(*(x.astype(np.int32) for x in (prompts, prompt_lengths, tokens, lengths)))


@functools.cache
def random_batch() -> PolicyBatch:
    """Return a batch whose ratios are on both sides of the clip, with one row wholly masked."""
    rng = np.random.default_rng(1)
    sequences = random_sequences()
    logp = np.asarray(score(1)(initial_state("sgd").params, sequences)[0])
    mask = update.batch_mask(sequences, jnp.arange(NUM_ROWS) != 3)
    old_logp, ref_logp = (
        (logp + rng.normal(0.0, 0.4, size=logp.shape)).astype(np.float32) for _ in range(2)
    )
    advantages = rng.normal(size=NUM_ROWS).astype(np.float32)
    return PolicyBatch(
        sequences, old_logp, ref_logp, advantages, np.asarray(mask), np.asarray(token_weights(mask))
    )


@functools.cache
def score(num_micro: int) -> Callable[..., Any]:
    fixed = (CONFIG, layout_of(ONE), DISTRIBUTION, num_micro)
    return jax.jit(functools.partial(update.score, *fixed), compiler_options=FAST)


@functools.cache
def grpo(num_micro: int, optimizer: str = "sgd", mesh_shape: Any = ONE) -> Callable[..., Any]:
    fixed = (CONFIG, layout_of(mesh_shape), DISTRIBUTION, SETTINGS, optimizer_of(optimizer))
    program = functools.partial(update.grpo_update, *fixed, num_micro)
    return jax.jit(program, compiler_options=FAST)


@functools.cache
def sft(num_micro: int, optimizer: str = "sgd", mesh_shape: Any = ONE) -> Callable[..., Any]:
    fixed = (CONFIG, layout_of(mesh_shape), optimizer_of(optimizer), num_micro)
    return jax.jit(functools.partial(update.sft_update, *fixed), compiler_options=FAST)


def sft_weights(sequences: Sequences) -> np.ndarray:
    return np.asarray(token_weights(update.batch_mask(sequences)))


def check_same(found: Any, wanted: Any, atol: float = 1e-5) -> None:
    """Compare states and metrics leaf by leaf, whatever devices they lie on."""
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=1e-5, atol=atol, err_msg=jax.tree_util.keystr(path)
        ),
        found,
        wanted,
    )


# --- invariance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_micro", [2, 4])
def test_a_grpo_step_does_not_depend_on_micro_batches(num_micro):
    state = initial_state("sgd")
    check_same(grpo(num_micro)(state, random_batch()), grpo(1)(state, random_batch()))


def test_a_sft_step_does_not_depend_on_micro_batches():
    state, sequences = initial_state("sgd"), random_sequences()
    weights = sft_weights(sequences)
    check_same(sft(4)(state, sequences, weights), sft(1)(state, sequences, weights))


@pytest.mark.parametrize("num_micro", [1, 4])
def test_a_step_does_not_depend_on_the_order_of_rows(num_micro):
    order = np.random.default_rng(2).permutation(NUM_ROWS)
    state, batch = initial_state("sgd"), random_batch()
    shuffled = jax.tree.map(lambda x: x[order], batch)
    check_same(grpo(num_micro)(state, shuffled), grpo(num_micro)(state, batch))
    arguments = batch.sequences, batch.weights
    shuffled = jax.tree.map(lambda x: x[order], arguments)
    check_same(sft(num_micro)(state, *shuffled), sft(num_micro)(state, *arguments))


def take_steps(mesh_shape: tuple[int, int, int]) -> tuple[TrainState, list[Any]]:
    """Take three optimiser steps on batches that differ."""
    state, batch = initial_state("adamw", mesh_shape), random_batch()
    num_micro = 1 if mesh_shape == ONE else 2
    history = []
    for step in range(3):
        advantages = np.roll(batch.advantages, step)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = grpo(num_micro, "adamw", mesh_shape)(
            state, batch._replace(advantages=advantages)
        )
        history.append(metrics)
        is_same = jax.tree.map(
            lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), state, shardings
        )
        assert all(jax.tree.leaves(is_same)), "a step moved the state to another layout"
    return state, history


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_several_devices_take_the_steps_of_one(mesh_shape):
    state, metrics = take_steps(ONE)
    assert state.step == 3
    found, found_metrics = take_steps(mesh_shape)
    check_same(found.params, state.params)
    check_same(found_metrics, metrics)
    assert found.step == 3


def test_several_devices_take_the_sft_step_of_one():
    sequences = random_sequences()
    weights = sft_weights(sequences)
    wanted = sft(1)(initial_state("sgd"), sequences, weights)
    found = sft(2, "sgd", (2, 2, 2))(initial_state("sgd", (2, 2, 2)), sequences, weights)
    check_same(found, wanted)


@pytest.mark.parametrize("num_micro", [2, 4])
def test_scores_of_parts_come_back_in_the_order_of_rows(num_micro):
    params, sequences = initial_state("sgd").params, random_sequences()
    check_same(score(num_micro)(params, sequences), score(1)(params, sequences))


# --- what a step learns from ---------------------------------------------------------------------


def test_a_grpo_step_reports_the_loss_of_its_scores_and_the_norm_of_its_gradient():
    state, batch = initial_state("sgd"), random_batch()
    after, metrics = grpo(1)(state, batch)
    logp, entropy = score(1)(state.params, batch.sequences)
    loss, sums = policy_loss(SETTINGS, logp, entropy, *batch[1:])
    num_tokens = int(batch.mask.sum())
    wanted = {name: value / num_tokens for name, value in sums.items() if name != "num_tokens"}
    wanted["loss"] = loss
    gap = np.abs(np.asarray(logp) - batch.old_logp)[batch.mask]
    wanted["old_logp_gap"] = gap.mean()
    gradient = jax.tree.map(jnp.subtract, state.params, after.params)
    wanted["grad_norm"] = optax.global_norm(gradient)
    check_same(metrics, wanted, atol=1e-6)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


def test_a_grpo_step_makes_rewarded_completions_likelier():
    state, batch = initial_state("sgd"), random_batch()
    before, _ = score(1)(state.params, batch.sequences)
    for sign in (1.0, -1.0):
        advantages = np.where(np.arange(NUM_ROWS) == 0, sign, 0.0).astype(np.float32)
        on_policy = batch._replace(old_logp=before, ref_logp=before, advantages=advantages)
        gradient = jax.tree.map(jnp.subtract, grpo(1)(state, on_policy)[0].params, state.params)
        params = jax.tree.map(lambda x, g: x + 0.01 * g, state.params, gradient)
        after, _ = score(1)(params, batch.sequences)
        change = np.sum(np.where(batch.mask, after - before, 0.0), axis=1)
        assert sign * change[0] > 0


def test_several_sft_steps_lower_the_loss():
    state, sequences = initial_state("adamw"), random_sequences()
    losses = []
    for step in range(5):
        assert state.step == step
        state, metrics = sft(1, "adamw")(state, sequences, sft_weights(sequences))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_sft_loss_is_the_mean_over_target_tokens_alone():
    state, sequences = initial_state("sgd"), random_sequences()
    _, metrics = sft(1)(state, sequences, sft_weights(sequences))
    program = functools.partial(update.score, CONFIG, layout_of(ONE), Distribution(), 1)
    logp, _ = jax.jit(program, compiler_options=FAST)(state.params, sequences)
    is_target = np.arange(NUM_NEW)[None] < sequences.lengths[:, None]
    np.testing.assert_allclose(metrics["loss"], -np.asarray(logp)[is_target].mean(), rtol=1e-5)


def test_the_end_token_is_learned():
    state, sequences = initial_state("sgd"), random_sequences()
    weights = sft_weights(sequences)
    without = weights.copy()
    without[np.arange(NUM_ROWS), sequences.lengths - 1] = 0
    gradients = [
        np.asarray(state.params["final_norm"]["scale"] - after.params["final_norm"]["scale"])
        for after, _ in (sft(1)(state, sequences, w) for w in (weights, without))
    ]
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3


def test_what_padding_holds_changes_nothing():
    state, batch = initial_state("sgd"), random_batch()
    sequences = batch.sequences
    is_prompt = np.arange(NUM_PROMPT)[None] < sequences.prompt_lengths[:, None]
    is_target = np.arange(NUM_NEW)[None] < sequences.lengths[:, None]
    assert not is_prompt.all() and not is_target.all()
    dirty = sequences._replace(
        prompts=np.where(is_prompt, sequences.prompts, 50),
        tokens=np.where(is_target, sequences.tokens, 60),
    )
    weights = sft_weights(sequences)
    check_same(sft(1)(state, dirty, weights), sft(1)(state, sequences, weights), atol=1e-6)
    found = grpo(1)(
        state,
        batch._replace(
            sequences=dirty,
            old_logp=np.where(is_target, batch.old_logp, np.inf),
            ref_logp=np.where(is_target, batch.ref_logp, -np.inf),
        ),
    )
    check_same(found, grpo(1)(state, batch), atol=1e-6)


def test_a_masked_row_teaches_nothing():
    state, batch = initial_state("sgd"), random_batch()
    assert not batch.mask[3].any()
    tokens, old_logp = batch.sequences.tokens.copy(), batch.old_logp.copy()
    tokens[3], old_logp[3] = 33, -40.0
    advantages = np.where(np.arange(NUM_ROWS) == 3, 99.0, batch.advantages).astype(np.float32)
    changed = batch._replace(
        sequences=batch.sequences._replace(tokens=tokens),
        old_logp=old_logp,
        advantages=advantages,
    )
    check_same(grpo(1)(state, changed), grpo(1)(state, batch), atol=1e-6)


# --- optimiser -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_learning_rates(schedule, warmup_steps):
    num_steps, peak = 12, 0.5
    config = OptimizerConfig(learning_rate=peak, schedule=schedule, warmup_steps=warmup_steps)
    rates = [float(update.learning_rate(config, num_steps)(step)) for step in range(num_steps + 1)]
    warmup = [peak * (step + 1) / warmup_steps for step in range(warmup_steps)]
    rest = num_steps - warmup_steps
    after = {
        "constant": lambda done: peak,
        "linear": lambda done: peak * (1 - done),
        "cosine": lambda done: peak * (1 + math.cos(math.pi * done)) / 2,
    }[schedule]
    wanted = warmup + [after(step / rest) for step in range(rest + 1)]
    np.testing.assert_allclose(rates, wanted, atol=1e-7)
    assert rates[0] > 0 and max(rates) == pytest.approx(peak)


def test_a_run_shorter_than_its_warmup_only_warms_up():
    config = OptimizerConfig(learning_rate=0.5, schedule="linear", warmup_steps=10)
    rates = [float(update.learning_rate(config, 4)(step)) for step in range(4)]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.15, 0.2], rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_the_optimizer_is_that_of_torch(torch, clip_norm):
    config = OptimizerConfig(
        learning_rate=0.05,
        schedule="cosine",
        warmup_steps=2,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.3,
        clip_norm=clip_norm,
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)), "scale": rng.normal(size=3)}
    params = {name: value.astype(np.float32) for name, value in params.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    reference = torch.optim.AdamW(
        theirs.values(), betas=(config.b1, config.b2), eps=config.eps, weight_decay=0.3
    )
    optimizer, rate = update.make_optimizer(config, 5), update.learning_rate(config, 5)
    opt_state = optimizer.init(params)
    for step in range(5):
        gradients = {
            name: rng.normal(0.0, 0.1 + step / 5, size=value.shape).astype(np.float32)
            for name, value in params.items()
        }
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        reference.param_groups[0]["lr"] = float(rate(step))
        reference.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(
                params[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_moments_lie_as_their_parameters_do(mesh_shape):
    state = initial_state("adamw", mesh_shape)
    moments = optax.tree_utils.tree_get_all_with_path(state.opt_state, "mu")
    moments += optax.tree_utils.tree_get_all_with_path(state.opt_state, "nu")
    assert len(moments) == 2
    num_split = 0
    for _, moment in moments:
        for leaf, param in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert leaf.shape == param.shape
            assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim)
            num_split += not leaf.sharding.is_fully_replicated
    assert num_split > 10
    abstract = update.abstract_state(CONFIG, layout_of(mesh_shape), optimizer_of("adamw"))
    jax.tree.map(check_placement, state, abstract)


def check_placement(array: jax.Array, abstract: jax.ShapeDtypeStruct) -> None:
    assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype)
    assert array.sharding.is_equivalent_to(abstract.sharding, array.ndim)


# --- memory --------------------------------------------------------------------------------------

WIDE = tiny_config(
    vocab_size=151936, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)
WIDE_LOGITS = 8 * 64 * 151936


def largest_array(program: Callable[..., Any], *arguments: Any) -> int:
    """Return the number of elements of the largest array in the compiled program."""
    hlo = jax.jit(program, compiler_options=FAST).lower(*arguments).compile().as_text()
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def wide_arguments() -> tuple[Any, Sequences, jax.ShapeDtypeStruct]:
    """Return abstract weights, sequences and one array of a number per completion token."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    sequences = Sequences(integers((8, 16)), integers((8,)), integers((8, 64)), integers((8,)))
    params = qwen.abstract_params(WIDE, layout_of(ONE))
    return params, sequences, jax.ShapeDtypeStruct((8, 64), jnp.float32)


def test_scoring_never_holds_all_logits():
    params, sequences, _ = wide_arguments()
    program = functools.partial(update.score, WIDE, layout_of(ONE), DISTRIBUTION, 1)
    assert largest_array(program, params, sequences) < WIDE_LOGITS


def test_a_grpo_step_never_holds_all_logits_nor_a_reference_it_does_not_use():
    _, sequences, numbers = wide_arguments()
    batch = PolicyBatch(
        sequences,
        old_logp=numbers,
        ref_logp=None,
        advantages=jax.ShapeDtypeStruct((8,), jnp.float32),
        mask=jax.ShapeDtypeStruct((8, 64), bool),
        weights=numbers,
    )
    optimizer = optimizer_of("adamw")
    state = update.abstract_state(WIDE, layout_of(ONE), optimizer)
    program = functools.partial(
        update.grpo_update,
        WIDE,
        layout_of(ONE),
        Distribution(),
        PolicyLoss(entropy_weight=0.001),
        optimizer,
        1,
    )
    assert largest_array(program, state, batch) < WIDE_LOGITS
    _, metrics = jax.eval_shape(program, state, batch)
    assert "kl" not in metrics and "entropy" in metrics


def test_the_search_for_all_logits_would_find_them():
    params, sequences, weights = wide_arguments()

    def naive(params: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(64), tokens.shape)
        mask = jnp.ones(tokens.shape, bool)
        hidden = qwen.hidden_states(WIDE, layout_of(ONE), params, tokens, positions, mask)
        log_probs = jax.nn.log_softmax(hidden @ params["embed"].T, axis=-1)
        logp = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * logp)

    assert largest_array(naive, params, sequences.tokens, weights) >= WIDE_LOGITS
    assert largest_array(jax.grad(naive), params, sequences.tokens, weights) >= WIDE_LOGITS
