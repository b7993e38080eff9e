"""A step on pairs whose prompt stands once is the step of the plain form, whatever the packing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING, mesh_of, plain_states, tiny_config
from training.test_update import FAST, ONE, check_same, initial_state, optimizer_of

from jlrm.config import DPOConfig
from jlrm.model import qwen
from jlrm.rl.distribution import Distribution
from jlrm.rl.preferences import PairTargets
from jlrm.runtime.mesh import training_layout
from jlrm.training import packing, update
from jlrm.training.packing import Group
from jlrm.training.recipes.pair_programs import scored_group
from jlrm.training.recipes.reward_model import reward_targets

pytestmark = pytest.mark.slow  # whole models are compiled

CONFIG = tiny_config()
SETTINGS = DPOConfig(beta=0.3, label_smoothing=0.1)
NUM_PAIRS, LONGEST = 5, 36


@functools.cache
def layout_of(shape: tuple[int, int, int]) -> Any:
    return training_layout(mesh_of(*shape))


@functools.cache
def pairs() -> list[Group]:
    rng = np.random.default_rng(2)
    ids = lambda least, most: rng.integers(8, 90, rng.integers(least, most)).tolist()  # noqa: E731
    return [Group(ids(1, 20), [[*ids(1, 16), 7], [*ids(1, 16), 7]]) for _ in range(NUM_PAIRS)]


@functools.cache
def plain(config: qwen.QwenConfig, has_reference: bool) -> tuple[Any, Any]:
    """Return loss and gradients of whole sequences, a prompt for each, and a dense softmax."""
    sequences = [(group.prompt, ids) for group in pairs() for ids in group.completions]
    tokens = np.zeros((len(sequences), LONGEST), np.int32)
    is_target = np.zeros_like(tokens, bool)
    for row, here, (prompt, ids) in zip(tokens, is_target, sequences, strict=True):
        row[: len(prompt) + len(ids)] = [*prompt, *ids]
        here[len(prompt) : len(prompt) + len(ids)] = True

    def sums(params: Any) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
        hidden = plain_states(
            config, layout_of(ONE), params, tokens, positions, np.ones_like(is_target)
        )
        logits = jnp.einsum("BTD,VD->BTV", hidden, qwen.head(config, params))[:, :-1]
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2)[..., 0]
        return jnp.sum(jnp.where(is_target[:, 1:], logp, 0.0), axis=1)

    ref = sums(reference(config)) if has_reference else jnp.zeros(len(sequences))

    def loss(params: Any) -> jax.Array:
        ratios = sums(params) - ref
        margin = SETTINGS.beta * (ratios[::2] - ratios[1::2])
        smoothing = SETTINGS.label_smoothing
        terms = (1 - smoothing) * jnp.logaddexp(0, -margin) + smoothing * jnp.logaddexp(0, margin)
        return jnp.mean(terms)

    return jax.value_and_grad(loss)(initial_state("sgd", ONE, config).params)


def reference(config: qwen.QwenConfig, shape: tuple[int, int, int] = ONE) -> Any:
    """Return other weights than the state's."""
    return jax.tree.map(lambda x: 0.9 * x, initial_state("sgd", shape, config).params)


@functools.cache
def programs(config: qwen.QwenConfig, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    fixed = config, layout_of(shape)
    logprobs = functools.partial(update.logprobs, *fixed, Distribution())
    step = functools.partial(update.dpo_update, *fixed, SETTINGS, optimizer_of("sgd"))
    return jax.jit(logprobs, compiler_options=FAST), jax.jit(step, compiler_options=FAST)


def take(
    size: int,
    shape: tuple[int, int, int] = ONE,
    config: qwen.QwenConfig = CONFIG,
    has_reference: bool = True,
) -> Any:
    """Take a step of plain descent at rate 1: the weights move by the gradient."""
    layout, (logprobs, step) = layout_of(shape), programs(config, shape)
    packed = packing.pack(pairs(), [size], layout.mesh.size, is_whole=True)
    targets = PairTargets._make((None, packed.is_target, np.array(NUM_PAIRS, np.float32)))
    rows, targets = packing.to_devices(layout, (packed.rows, targets))
    if has_reference:
        targets = targets._replace(ref_logp=logprobs(reference(config, shape), rows)[0])
    state, metrics = step(initial_state("sgd", shape, config), rows, targets)
    return state, metrics, packed


@pytest.mark.parametrize(
    ("architecture", "has_reference"), [("qwen2_untied", True), ("qwen3", True), ("qwen3", False)]
)
def test_a_prompt_that_stands_once_gives_the_step_of_the_plain_form(architecture, has_reference):
    config = tiny_config(architecture)
    state, metrics, packed = take(512, config=config, has_reference=has_reference)
    loss, gradients = plain(config, has_reference)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=0, atol=1e-6 + ROUNDING)
    moved = jax.tree.map(jnp.subtract, initial_state("sgd", ONE, config).params, state.params)
    check_same(moved, gradients, atol=1e-5)
    num_plain = sum(len(g.prompt) + len(ids) for g in pairs() for ids in g.completions)
    assert packed.num_tokens < num_plain - sum(len(g.prompt) for g in pairs())


@pytest.mark.parametrize(("size", "shape"), [(128, ONE), (512, (1, 8, 1)), (128, (2, 2, 2))])
def test_a_step_does_not_depend_on_passes_nor_devices(size, shape):
    whole, other = take(512), take(size, shape)
    check_same(other[:2], whole[:2])
    num_passes = int(other[2].rows.num_passes)
    assert num_passes > 1 or shape != ONE


@pytest.mark.parametrize("architecture", ["qwen2_untied", "qwen3"])
def test_a_question_that_stands_once_gives_the_step_of_the_plain_reward_model(architecture):
    """Bradley-Terry over whole sequences, each scored at its last token, without packing."""
    config = tiny_config(architecture, num_labels=1)
    layout, state = layout_of(ONE), initial_state("sgd", ONE, config)
    head = np.random.default_rng(4).normal(size=state.params["score"].shape).astype(np.float32)
    state = state._replace(params={**state.params, "score": jnp.asarray(head)})
    before = jax.tree.map(jnp.copy, state.params)
    groups = [scored_group(pair.prompt, pair.completions) for pair in pairs()]
    packed = packing.pack(groups, [512], 1, is_whole=True)
    targets = reward_targets(packed, groups, [1] * NUM_PAIRS)
    rows, targets = packing.to_devices(layout, (packed.rows, targets))
    step = functools.partial(
        update.reward_update, config, layout, "bradley_terry", optimizer_of("sgd")
    )
    state, metrics = jax.jit(step, compiler_options=FAST)(state, rows, targets)

    sequences = [[*pair.prompt, *ids] for pair in pairs() for ids in pair.completions]
    last = jnp.array([len(sequence) - 1 for sequence in sequences])
    tokens = np.array([[*ids, *[0] * (LONGEST - len(ids))] for ids in sequences], np.int32)

    def loss(params: Any) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
        seen = np.ones(tokens.shape, bool)
        hidden = plain_states(config, layout, params, tokens, positions, seen)
        ends = hidden[jnp.arange(len(sequences)), last]
        scores = (ends @ params["score"])[:, 0]
        return jnp.mean(jnp.logaddexp(0, scores[1::2] - scores[::2]))

    wanted, gradients = jax.value_and_grad(loss)(before)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=0, atol=1e-6 + ROUNDING)
    assert abs(wanted - np.log(2)) > 0.01, "all are scored alike"
    check_same(jax.tree.map(jnp.subtract, before, state.params), gradients, atol=1e-5)
    num_plain = sum(map(len, sequences))
    assert packed.num_tokens < num_plain - sum(len(pair.prompt) for pair in pairs()) + len(last)
