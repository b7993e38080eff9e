"""An optimiser step is the same however its groups are packed, ordered, cut and spread."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of, plain_packing, tiny_config

from jlrm.config import LossConfig, OptimizerConfig
from jlrm.model import qwen
from jlrm.model.visibility import Packing
from jlrm.rl.distribution import Distribution, log_distribution
from jlrm.rl.losses import (
    PolicyTargets,
    averaged_log_ratio,
    completion_mask,
    policy_loss,
    sequence_log_ratio,
    token_weights,
)
from jlrm.runtime.mesh import training_layout
from jlrm.training import packing, update
from jlrm.training.packing import Group, Packed, Rows
from jlrm.training.update import TrainState

pytestmark = pytest.mark.slow  # whole models are compiled

NUM_GROUPS, NUM_ROLLOUTS, NUM_PROMPT, NUM_NEW, END = 6, 3, 20, 16, 7
NUM_ROWS = NUM_GROUPS * NUM_ROLLOUTS
CONFIG = tiny_config()
DISTRIBUTION = Distribution(temperature=0.8, top_k=40, top_p=0.95, num_ids=90)
SETTINGS = LossConfig(kl_weight=0.1, entropy_weight=0.05, dual_clip=3.0)
FAST = {"xla_backend_optimization_level": 0}  # these programs are compiled more often than run
ADAMW = OptimizerConfig(learning_rate=1e-2, eps=1e-3, clip_norm=0.5)
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 2)]
ONE = (1, 1, 1)
ONE_PASS, SEVERAL_PASSES = [512], [128]


class Batch(NamedTuple):
    """A minibatch on the host; everything but prompts is by completion."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]  # by group
    old_logp: np.ndarray
    ref_logp: np.ndarray
    advantages: np.ndarray
    is_kept: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for group in self.completions for ids in group])

    @property
    def mask(self) -> np.ndarray:
        return completion_mask(self.lengths, NUM_NEW) & self.is_kept[:, None]

    def groups(self) -> list[Group]:
        return [Group(*group) for group in zip(self.prompts, self.completions, strict=True)]

    def plain(self) -> Batch:
        """The same with the prompt once for every completion."""
        pairs = zip(self.prompts, self.completions, strict=True)
        alone = [(prompt, [ids]) for prompt, group in pairs for ids in group]
        return self._replace(prompts=[p for p, _ in alone], completions=[c for _, c in alone])

    def shuffled(self, order: np.ndarray) -> Batch:
        """The same groups in another order."""
        rows = np.arange(len(self.lengths)).reshape(len(order), -1)[order].reshape(-1)
        arrays = (array[rows] for array in self[2:])
        return Batch(
            [self.prompts[i] for i in order], [self.completions[i] for i in order], *arrays
        )


@functools.cache
def layout_of(mesh_shape: tuple[int, int, int]) -> Any:
    return training_layout(mesh_of(*mesh_shape))


@functools.cache
def optimizer_of(name: str) -> optax.GradientTransformation:
    """Return AdamW with clipping, or plain descent, whose step shows the gradient itself."""
    return update.make_optimizer(ADAMW, 10) if name == "adamw" else optax.sgd(1.0)


def initial_state(
    optimizer: str, mesh_shape: tuple[int, int, int] = ONE, config: qwen.QwenConfig = CONFIG
) -> TrainState:
    """Return the state before the first step, with weights that have no zero or one left."""
    layout = layout_of(mesh_shape)
    rng = np.random.default_rng(0)

    def make(path: Any, leaf: Any) -> jax.Array:
        value = float(path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(np.float32), leaf.sharding)

    params = jax.tree.map_with_path(make, qwen.abstract_params(config, layout))
    return update.init_state(config, layout, optimizer_of(optimizer), params)


def random_batch(
    num_groups: int = NUM_GROUPS,
    num_rollouts: int = NUM_ROLLOUTS,
    config: qwen.QwenConfig = CONFIG,
) -> Batch:
    """Return ragged groups whose ratios are on both sides of the clip, one completion masked."""
    rng = np.random.default_rng(1)

    def ids(most: int) -> list[int]:
        return rng.integers(8, 90, size=rng.integers(1, most + 1)).tolist()

    prompts = [ids(NUM_PROMPT) for _ in range(num_groups)]
    completions = [[[*ids(NUM_NEW - 1), END] for _ in range(num_rollouts)] for _ in prompts]
    num_rows = num_groups * num_rollouts
    kept = np.arange(num_rows) != 3 if num_rows > 3 else np.ones(num_rows, bool)
    empty = np.zeros((num_rows, NUM_NEW), np.float32)
    batch = Batch(prompts, completions, empty, empty, rng.normal(size=num_rows), kept)
    packed, params = pack(batch), initial_state("sgd", ONE, config).params
    logp = by_completion(packed, score(config)(params, packed.rows)[0], num_rows)
    old_logp, ref_logp = (
        (logp + rng.normal(0.0, 0.4, size=logp.shape)).astype(np.float32) for _ in range(2)
    )
    return batch._replace(
        old_logp=old_logp, ref_logp=ref_logp, advantages=batch.advantages.astype(np.float32)
    )


def pack(batch: Batch, sizes: Sequence[int] = ONE_PASS, num_rows: int = 1) -> Packed:
    return packing.pack(batch.groups(), sizes, num_rows)


def by_completion(packed: Packed, values: Any, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Undo `Packed.take`."""
    found = np.zeros((num_rows, NUM_NEW), np.float32)
    where = packed.is_target
    found[packed.completion[where], packed.offset[where]] = np.asarray(values)[where]
    return found


def targets_of(packed: Packed, batch: Batch, aggregation: str = "token_mean") -> PolicyTargets:
    return PolicyTargets(
        packed.take(batch.old_logp),
        packed.take(batch.ref_logp),
        packed.take(batch.advantages),
        packed.take(batch.is_kept),
        packed.take(token_weights(batch.mask, aggregation)),
    )


@functools.cache
def score(config: qwen.QwenConfig = CONFIG, distribution: Distribution = DISTRIBUTION) -> Any:
    program = functools.partial(update.logprobs, config, layout_of(ONE), distribution)
    return jax.jit(program, compiler_options=FAST)


def scores(batch: Batch, sizes: Sequence[int] = ONE_PASS, params: Any = None) -> Any:
    params = initial_state("sgd").params if params is None else params
    return score()(params, pack(batch, sizes).rows)


@functools.cache
def grpo(
    optimizer: str = "sgd",
    mesh_shape: Any = ONE,
    settings: LossConfig = SETTINGS,
    config: qwen.QwenConfig = CONFIG,
) -> Callable[..., Any]:
    fixed = (config, layout_of(mesh_shape), DISTRIBUTION, settings, optimizer_of(optimizer))
    return jax.jit(functools.partial(update.grpo_update, *fixed), compiler_options=FAST)


def grpo_step(
    batch: Batch,
    sizes: Sequence[int] = ONE_PASS,
    *program: Any,
    state: TrainState | None = None,
    **options: Any,
) -> Any:
    """Take one step on a batch; by default plain descent on one device."""
    mesh_shape = options.get("mesh_shape", ONE)
    state = initial_state(*(program or ("sgd",)), mesh_shape) if state is None else state
    packed = pack(batch, sizes, math.prod(mesh_shape))
    arrays = packing.to_devices(layout_of(mesh_shape), (packed.rows, targets_of(packed, batch)))
    return grpo(*program, **options)(state, *arrays)


@functools.cache
def sft(optimizer: str = "sgd", mesh_shape: Any = ONE) -> Callable[..., Any]:
    fixed = (CONFIG, layout_of(mesh_shape), optimizer_of(optimizer))
    return jax.jit(functools.partial(update.sft_update, *fixed), compiler_options=FAST)


def sft_step(
    batch: Batch,
    sizes: Sequence[int] = ONE_PASS,
    mesh_shape: Any = ONE,
    weights: np.ndarray | None = None,
    state: TrainState | None = None,
) -> Any:
    packed = pack(batch, sizes, math.prod(mesh_shape))
    if weights is None:
        weights = token_weights(completion_mask(batch.lengths, NUM_NEW))
    arrays = packing.to_devices(layout_of(mesh_shape), (packed.rows, packed.take(weights)))
    return sft(mesh_shape=mesh_shape)(state or initial_state("sgd", mesh_shape), *arrays)


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


@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen3"])
@pytest.mark.parametrize("num_rollouts", [1, 3, 8])
def test_a_shared_prompt_gives_the_step_of_repeated_ones(architecture, num_rollouts):
    config = tiny_config(architecture)
    batch = random_batch(4, num_rollouts, config)
    state = initial_state("sgd", ONE, config)
    shared, plain = (
        grpo_step(each, sizes, state=state, config=config)
        for each, sizes in ((batch, [640]), (batch.plain(), [1024]))
    )
    np.testing.assert_allclose(shared[1]["loss"], plain[1]["loss"], atol=1e-6)
    check_same(shared, plain)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_grpo_step_does_not_depend_on_the_number_of_passes(ratio):
    batch, options = random_batch(), {"settings": dataclasses.replace(SETTINGS, ratio=ratio)}
    several, one = grpo_step(batch, SEVERAL_PASSES, **options), grpo_step(batch, **options)
    assert int(pack(batch, SEVERAL_PASSES).rows.num_passes) > 1
    check_same(several, one)


@pytest.mark.parametrize(
    ("mesh_shape", "architecture"),
    [
        (ONE, "qwen2_tied"),
        ((2, 2, 2), "qwen2_tied"),
        ((1, 2, 2), "qwen2_tied"),
        ((2, 2, 2), "qwen3_moe"),
    ],
    ids=str,
)
def test_layers_gradients_summed_in_place_are_those_summed_pass_by_pass(mesh_shape, architecture):
    """On devices that share norm scales between some, and with two slices all weights."""
    config, batch = tiny_config(architecture), random_batch(60, 2)
    assert int(pack(batch, SEVERAL_PASSES, math.prod(mesh_shape)).rows.num_passes) > 1
    apart = dataclasses.replace(config, remat="none")
    state = initial_state("sgd", ONE, apart)
    wanted = grpo_step(batch, SEVERAL_PASSES, state=state, config=apart)
    assert config.remat == "full"
    state = initial_state("sgd", mesh_shape, config)
    found = grpo_step(batch, SEVERAL_PASSES, state=state, config=config, mesh_shape=mesh_shape)
    check_same(found, wanted)


def test_a_sft_step_does_not_depend_on_the_number_of_passes():
    batch = random_batch().plain()
    check_same(sft_step(batch, SEVERAL_PASSES), sft_step(batch, [1024]))


@pytest.mark.parametrize("sizes", [ONE_PASS, SEVERAL_PASSES])
def test_a_step_does_not_depend_on_the_order_of_groups(sizes):
    order = np.random.default_rng(2).permutation(NUM_GROUPS)
    batch = random_batch()
    check_same(grpo_step(batch.shuffled(order), sizes), grpo_step(batch, sizes))
    check_same(sft_step(batch.shuffled(order), sizes), sft_step(batch, sizes))


def take_steps(mesh_shape: tuple[int, int, int]) -> tuple[TrainState, list[Any]]:
    """Take three optimiser steps on batches that differ."""
    state, batch = initial_state("adamw", mesh_shape), random_batch()
    history = []
    for step in range(3):
        each = batch._replace(advantages=np.roll(batch.advantages, step))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = grpo_step(each, [128], "adamw", state=state, mesh_shape=mesh_shape)
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
    batch = random_batch()
    check_same(sft_step(batch, [128], (2, 2, 2)), sft_step(batch))


def test_scores_do_not_depend_on_packing():
    batch = random_batch()
    wanted = [by_completion(pack(batch), x) for x in scores(batch)]
    for each, sizes in ((batch, SEVERAL_PASSES), (batch.plain(), [1024])):
        found = [by_completion(pack(each, sizes), x) for x in scores(each, sizes)]
        check_same(found, wanted, atol=2e-6)


def test_scores_are_those_of_each_sequence_alone():
    batch, state = random_batch(), initial_state("sgd")
    logp = by_completion(pack(batch), scores(batch)[0])
    pairs = [(p, c) for p, g in zip(batch.prompts, batch.completions, strict=True) for c in g]
    positions = np.arange(128)[None]

    @jax.jit
    def states(params, tokens, mask):
        packing = plain_packing(mask)
        return qwen.hidden_states(CONFIG, layout_of(ONE), params, tokens, positions, packing)

    for row, (prompt, completion) in enumerate(pairs):
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(prompt) + len(completion)] = [*prompt, *completion]
        hidden = states(state.params, tokens, positions < len(prompt) + len(completion))
        logits = hidden[0, len(prompt) - 1 :][: len(completion)] @ state.params["embed"].T
        wanted = log_distribution(logits, DISTRIBUTION, keep=np.array(completion))
        wanted = np.asarray(wanted)[np.arange(len(completion)), completion]
        np.testing.assert_allclose(logp[row, : len(completion)], wanted, rtol=1e-5, atol=1e-5)


# --- what a step learns from ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surrogate", "ratio"), [("ppo", "token"), ("ppo", "sequence"), ("geo_mean", "sequence")]
)
def test_a_grpo_step_reports_the_loss_of_its_scores_and_the_norm_of_its_gradient(surrogate, ratio):
    settings = dataclasses.replace(SETTINGS, surrogate=surrogate, ratio=ratio)
    state, batch = initial_state("sgd"), random_batch()
    after, metrics = grpo_step(batch, state=state, settings=settings)
    packed = pack(batch)
    logp, entropy = (x[0] for x in scores(batch))
    targets = jax.tree.map(lambda x: jnp.asarray(x[0]), targets_of(packed, batch))
    own = averaged_log_ratio(settings, logp - targets.old_logp, targets.advantages)
    ratios = sequence_log_ratio(own, targets.mask, jnp.asarray(packed.rows.sequence[0]))
    targets = targets._replace(sequence_log_ratio=ratios)
    loss, sums = policy_loss(settings, logp, entropy, targets)
    num_tokens = int(batch.mask.sum())
    wanted = {name: value / num_tokens for name, value in sums.items() if name != "num_tokens"}
    wanted["loss"] = loss
    gradient = jax.tree.map(jnp.subtract, state.params, after.params)
    wanted["grad_norm"] = optax.global_norm(gradient)
    check_same(metrics, wanted, atol=1e-6)
    if ratio == "token":
        assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


@pytest.mark.parametrize(
    ("value", "sizes", "optimizer"),
    [(np.nan, ONE_PASS, "sgd"), (np.inf, SEVERAL_PASSES, "adamw"), (1e38, ONE_PASS, "adamw")],
)
def test_a_step_that_is_not_finite_leaves_the_state_as_it_is(value, sizes, optimizer):
    state, batch = initial_state(optimizer), random_batch()
    advantages = np.where(np.arange(NUM_ROWS) == 1, value, batch.advantages).astype(np.float32)
    spoilt = batch._replace(advantages=advantages)
    before = jax.tree.map(np.array, state)
    after, metrics = grpo_step(spoilt, sizes, optimizer, state=state)
    assert not np.isfinite(metrics["loss"] + metrics["grad_norm"])
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, after)))
    taken, _ = grpo_step(batch, sizes, optimizer, state=state)
    assert taken.step == before.step + 1
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), before.params, taken.params)
    assert jax.tree.all(moved)


def test_a_grpo_step_makes_rewarded_completions_likelier():
    state, batch = initial_state("sgd"), random_batch()
    before = by_completion(pack(batch), scores(batch)[0])
    for sign in (1.0, -1.0):
        advantages = np.where(np.arange(NUM_ROWS) == 0, sign, 0.0).astype(np.float32)
        on_policy = batch._replace(old_logp=before, ref_logp=before, advantages=advantages)
        after_step = grpo_step(on_policy, state=state)[0].params
        gradient = jax.tree.map(jnp.subtract, after_step, state.params)
        params = jax.tree.map(lambda x, g: x + 0.01 * g, state.params, gradient)
        after = by_completion(pack(batch), scores(batch, params=params)[0])
        change = np.sum(np.where(batch.mask, after - before, 0.0), axis=1)
        assert sign * change[0] > 0


def test_several_sft_steps_lower_the_loss():
    state, batch = initial_state("adamw"), random_batch()
    packed = pack(batch)
    weights = packed.take(token_weights(completion_mask(batch.lengths, NUM_NEW)))
    losses = []
    for step in range(5):
        assert state.step == step
        state, metrics = sft("adamw")(state, packed.rows, weights)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_the_sft_loss_is_the_mean_over_target_tokens_alone():
    state, batch = initial_state("sgd"), random_batch()
    _, metrics = sft_step(batch, state=state)
    logp, _ = score(distribution=Distribution())(state.params, pack(batch).rows)
    wanted = -np.asarray(logp)[pack(batch).is_target].mean()
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)


def test_the_end_token_is_learned():
    state, batch = initial_state("sgd"), random_batch()
    weights = token_weights(completion_mask(batch.lengths, NUM_NEW))
    without = weights.copy()
    without[np.arange(NUM_ROWS), batch.lengths - 1] = 0
    gradients = [
        np.asarray(state.params["final_norm"]["scale"] - after.params["final_norm"]["scale"])
        for after, _ in (sft_step(batch, weights=w, state=state) for w in (weights, without))
    ]
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3


@pytest.mark.parametrize("sizes", [ONE_PASS, SEVERAL_PASSES])
def test_what_padding_holds_changes_nothing(sizes):
    state, batch = initial_state("sgd"), random_batch()
    packed = pack(batch, sizes)
    targets = targets_of(packed, batch)
    is_slot = packed.rows.packing.group > 0
    assert not is_slot.all() and not packed.is_target.all()
    rows = packed.rows._replace(
        tokens=np.where(is_slot, packed.rows.tokens, 50),
        positions=np.where(is_slot, packed.rows.positions, 9),
        targets=np.where(packed.is_target, packed.rows.targets, 60),
    )
    dirty = targets._replace(
        old_logp=np.where(packed.is_target, targets.old_logp, np.inf),
        ref_logp=np.where(packed.is_target, targets.ref_logp, -np.inf),
    )
    check_same(grpo()(state, rows, dirty), grpo()(state, packed.rows, targets), atol=1e-6)
    weights = packed.take(token_weights(batch.mask))
    check_same(sft()(state, rows, weights), sft()(state, packed.rows, weights), atol=1e-6)


def test_a_masked_completion_teaches_nothing():
    batch = random_batch()
    assert not batch.mask[3].any()
    old_logp = batch.old_logp.copy()
    old_logp[3] = -40.0
    completions = [list(group) for group in batch.completions]
    completions[1][0] = [33] * len(completions[1][0])
    advantages = np.where(np.arange(NUM_ROWS) == 3, 99.0, batch.advantages).astype(np.float32)
    changed = batch._replace(completions=completions, old_logp=old_logp, advantages=advantages)
    check_same(grpo_step(changed), grpo_step(batch), atol=1e-6)


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


def test_moments_in_half_precision_are_near_those_in_full():
    gradients = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    steps, moments = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(learning_rate=0.1, b2=0.99, mu_dtype=dtype, nu_dtype=dtype)
        optimizer = update.make_optimizer(config, 20)
        params = jnp.ones((3, 4))
        opt_state = optimizer.init(params)
        for gradient in gradients:
            updates, opt_state = optimizer.update(jnp.asarray(gradient), opt_state, params)
        steps[dtype] = np.asarray(updates)
        moments[dtype] = [optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")]
        assert all(moment.dtype == dtype for moment in moments[dtype])
    np.testing.assert_allclose(steps["bfloat16"], steps["float32"], rtol=0.05, atol=2e-3)
    assert np.any(steps["bfloat16"] != steps["float32"])


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
WIDE_LOGITS = 512 * 151936


def largest_array(program: Callable[..., Any], *arguments: Any) -> int:
    """Return the number of elements of the largest array in the compiled program."""
    hlo = jax.jit(program, compiler_options=FAST).lower(*arguments).compile().as_text()
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def wide_rows() -> Rows:
    """Return the shapes of one pass of one row."""
    cells = jax.ShapeDtypeStruct((1, 1, 512), jnp.int32)
    per_row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    per_pass, number = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    packing_ = Packing(cells, cells, per_row)
    return Rows(cells, cells, packing_, cells, cells, cells, per_pass, number)


def test_scoring_never_holds_all_logits():
    params = qwen.abstract_params(WIDE, layout_of(ONE))
    program = functools.partial(update.logprobs, WIDE, layout_of(ONE), DISTRIBUTION)
    assert largest_array(program, params, wide_rows()) < WIDE_LOGITS


def test_a_grpo_step_never_holds_all_logits_nor_a_reference_it_does_not_use():
    numbers = jax.ShapeDtypeStruct((1, 1, 512), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 512), bool)
    targets = PolicyTargets(numbers, None, numbers, mask, numbers)
    optimizer = optimizer_of("adamw")
    state = update.abstract_state(WIDE, layout_of(ONE), optimizer)
    settings = LossConfig(kl_weight=0.0, entropy_weight=0.001)
    fixed = (WIDE, layout_of(ONE), Distribution(), settings, optimizer)
    program = functools.partial(update.grpo_update, *fixed)
    assert largest_array(program, state, wide_rows(), targets) < WIDE_LOGITS
    _, metrics = jax.eval_shape(program, state, wide_rows(), targets)
    assert "kl" not in metrics and "entropy" in metrics


def test_the_search_for_all_logits_would_find_them():
    params = qwen.abstract_params(WIDE, layout_of(ONE))
    weights = jax.ShapeDtypeStruct((1, 512), jnp.float32)

    def naive(params: Any, rows: Rows, weights: jax.Array) -> jax.Array:
        tokens, positions, packed = jax.tree.map(lambda x: x[0], rows[:3])
        hidden = qwen.hidden_states(WIDE, layout_of(ONE), params, tokens, positions, packed)
        log_probs = jax.nn.log_softmax(hidden @ params["embed"].T, axis=-1)
        logp = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * logp)

    assert largest_array(naive, params, wide_rows(), weights) >= WIDE_LOGITS
    assert largest_array(jax.grad(naive), params, wide_rows(), weights) >= WIDE_LOGITS
