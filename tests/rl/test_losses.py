"""The policy loss equals trl, verl and a float64 oracle, and is blind to padding and partition."""

from __future__ import annotations

import itertools
import json
import typing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jlrm.config import LossConfig
from jlrm.rl.losses import (
    KL_ESTIMATORS,
    SURROGATES,
    PolicyTargets,
    averaged_log_ratio,
    completion_mask,
    covariance_tokens,
    importance_weights,
    k3,
    policy_loss,
    sequence_log_ratio,
    token_weights,
)
from jlrm.runtime.settings import from_dict

RECORD = json.loads((GOLDEN / "grpo.json").read_text())
CASES = {case["name"]: case for case in RECORD["cases"]}
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "fixed_length")


class Mapping(NamedTuple):
    """A recorded case in the words of this project."""

    settings: LossConfig
    is_on_policy: bool
    width: int  # columns of the batch, which `fixed_length` divides by


def loss_of(**settings: Any) -> LossConfig:
    """Return the settings of a loss that has no KL and no entropy term unless they are given."""
    return LossConfig(**{"kl_weight": 0.0, "entropy_weight": 0.0, **settings})


def as_ours(case: dict[str, Any]) -> Mapping:
    """Return the case in our words."""
    settings, num_columns = case["settings"], len(RECORD["inputs"]["mask"][0])
    if set(settings) == {"kl_loss_type"}:
        kind = settings["kl_loss_type"]
        estimator = {"k3": "low_var"}.get(kind[:2], kind)  # theirs has bounds under either name
        correction = "k2" if kind.endswith("+") else "none"
        only_kl = loss_of(kl_weight=1.0, kl_estimator=estimator, kl_correction=correction)
        return Mapping(only_kl, True, num_columns)
    convert = trl_as_ours if case["package"] == "trl" else verl_as_ours
    return convert(settings, num_columns)


def trl_as_ours(settings: dict[str, Any], num_columns: int) -> Mapping:
    kind = settings["loss_type"]
    aggregation = {
        "grpo": "sequence_mean",
        "sapo": "sequence_mean",
        "bnpo": "token_mean",  # of one micro-batch
        "dapo": "token_mean",
        "dr_grpo": "fixed_length",
        "cispo": "token_mean",
    }[kind]
    # Their epsilon_high of CISPO is the cap itself, and there is no lower one.
    is_cispo = kind == "cispo"
    # A smaller delta would also act on positive advantages, which `dual_clip` leaves alone.
    assert settings["delta"] is None or settings["delta"] >= 1 + settings["epsilon_high"]
    importance = settings["vllm_importance_sampling_mode"] or "token_truncate"
    loss = loss_of(
        surrogate=kind if kind in SURROGATES else "ppo",
        clip_low=1.0 if is_cispo else settings["epsilon"],
        clip_high=settings["epsilon_high"] - is_cispo,
        dual_clip=settings["delta"] or 0.0,
        ratio=settings["importance_sampling_level"],
        kl_weight=settings["beta"],
        kl_correction="ratio" if settings["use_bias_correction_kl"] else "none",
        aggregation=aggregation,
        importance_cap=settings["vllm_importance_sampling_clip_max"] or 0.0,
        importance_ratio=importance.split("_")[0],
        importance_outside=importance.split("_")[1],
        mask_truncated=settings["mask_truncated_completions"],
    )
    return Mapping(loss, settings["policy"] == "on", settings["max_completion_length"])


def verl_as_ours(settings: dict[str, Any], num_columns: int) -> Mapping:
    mode, given = settings["loss_mode"], settings["covariance"]
    threshold = str(settings["rollout_is_threshold"] or 0.0).split("_")
    loss = loss_of(
        surrogate=mode if mode in SURROGATES else "ppo",
        clip_low=settings["clip_ratio_low"],
        clip_high=settings["clip_ratio_high"],
        dual_clip=settings["clip_ratio_c"] if mode == "vanilla" else 0.0,
        ratio="sequence" if mode in ("gspo", "geo_mean") else "token",
        covariance_share=given.get("clip_cov_ratio", given.get("kl_cov_ratio", 0.0)),
        covariance_low=given.get("clip_cov_lb", 0.0),
        covariance_high=given.get("clip_cov_ub", 0.0),
        covariance_kl=given.get("ppo_kl_coef", 0.0),
        kl_weight=settings["kl_loss_coef"] if settings["use_kl_loss"] else 0.0,
        kl_estimator="low_var",
        entropy_weight=settings["entropy_coeff"],
        aggregation={
            "token-mean": "token_mean",
            "seq-mean-token-mean": "sequence_mean",
            "seq-mean-token-sum": "sequence_sum",
            "seq-mean-token-sum-norm": "fixed_length",
        }["seq-mean-token-mean" if mode == "geo_mean" else settings["loss_agg_mode"]],
        importance_cap=float(threshold[-1]),
        importance_floor=float(threshold[0]) if len(threshold) == 2 else 0.0,
        importance_outside="mask" if len(threshold) == 2 else "truncate",
        importance_ratio=settings["rollout_is"],
    )
    return Mapping(loss, settings["policy"] == "on", settings["loss_scale_factor"] or num_columns)


MAPPED = {name: as_ours(case) for name, case in CASES.items()}


class Inputs(NamedTuple):
    """The array arguments of `row_loss`."""

    logp: Any
    entropy: Any
    old_logp: Any
    ref_logp: Any
    advantages: Any
    mask: Any
    weights: Any
    is_singled: Any


def recorded_inputs(name: str) -> Inputs:
    """Return the recorded inputs, widened by columns of padding where the case asks for it."""
    ours, advantages = MAPPED[name], np.array(CASES[name]["advantages"])
    recorded = {name: np.array(value) for name, value in RECORD["inputs"].items()}
    extra = ours.width - recorded["mask"].shape[1]

    def widen(name: str, fill: Any) -> jax.Array:
        return jnp.asarray(np.pad(recorded[name], ((0, 0), (0, extra)), constant_values=fill))

    mask = widen("mask", False)
    if ours.settings.mask_truncated:
        mask = mask.at[recorded["truncated_rows"]].set(False)
    logp = widen("logp", -7.0)
    old_logp = logp if ours.is_on_policy else widen("old_logp", -1.0)
    weights = token_weights(mask, ours.settings.aggregation)
    if ours.settings.importance_cap:
        log_ratio = old_logp - widen("sampler_logp", -2.0)
        rows = jnp.zeros(mask.shape, jnp.int32)
        weights = weights * importance_weights(ours.settings, log_ratio, mask, rows)
    # theirs are those of the policy, and so of the old one on policy
    singled = covariance_tokens(ours.settings, np.array(logp), advantages, np.array(mask), 0)
    arrays = logp, widen("entropy", 9.0), old_logp, widen("ref_logp", -3.0)
    return Inputs(*arrays, jnp.asarray(advantages), mask, weights, jnp.asarray(singled))


def row_loss(
    settings: LossConfig, logp, entropy, old_logp, ref_logp, advantages, mask, weights, is_singled
) -> tuple[Any, Any]:
    """The loss of rows that are one completion each, with one advantage each."""
    ratios = None
    if settings.ratio == "sequence":
        own = averaged_log_ratio(settings, logp - old_logp, jnp.asarray(advantages)[:, None])
        ratios = sequence_log_ratio(own, mask, jnp.zeros(logp.shape, jnp.int32))
    advantages = jnp.broadcast_to(jnp.asarray(advantages)[:, None], logp.shape)
    targets = PolicyTargets(
        old_logp, ref_logp, advantages, mask, weights, ratios, is_singled=is_singled
    )
    return policy_loss(settings, logp, entropy, targets)


value_and_grads = jax.jit(
    jax.value_and_grad(row_loss, argnums=(1, 2), has_aux=True),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},  # compiled more often than run
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPED)
def test_loss_gradient_and_metrics_equal_the_reference_packages(name):
    case, ours = CASES[name], MAPPED[name]
    inputs = recorded_inputs(name)
    if ours.settings.kl_weight == 0:
        inputs = inputs._replace(ref_logp=None)
    (loss, sums), (gradient, _) = value_and_grads(ours.settings, *inputs)
    num_columns = np.array(case["gradient"]).shape[1]
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(loss, case["loss"], **close)
    np.testing.assert_allclose(gradient[:, :num_columns], case["gradient"], **close)
    assert not np.any(gradient[:, num_columns:])

    means = {metric: float(value / sums["num_tokens"]) for metric, value in sums.items()}
    theirs = case["metrics"]
    wanted = {
        "entropy": theirs.get("entropy"),
        "kl": theirs.get("kl", theirs.get("kl_loss")),
        "approx_kl": theirs.get("actor/ppo_kl"),
    }
    if ours.settings.surrogate == "kl_cov":  # theirs is the mean of magnitudes
        wanted["old_logp_gap"] = wanted.pop("approx_kl")
    if ours.settings.ratio == "token":  # TRL averages a sequence's over rows, we over tokens
        wanted |= {
            metric: theirs.get(metric) for metric in ("clip_ratio/low_mean", "clip_ratio/high_mean")
        }
    for metric, value in wanted.items():
        if value is not None:
            assert means[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
    if "actor/pg_clipfrac" in theirs and ours.settings.surrogate == "ppo":
        clipped = means["clip_ratio/low_mean"] + means["clip_ratio/high_mean"]
        assert clipped == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-5)


def random_inputs(aggregation: str = "token_mean", num_rows: int = 6, seed: int = 0) -> Inputs:
    """Return rows of many lengths, one wholly masked, with ratios far outside the clip."""
    rng = np.random.default_rng(seed)
    shape = (num_rows, 5)
    mask = np.arange(5)[None] < rng.integers(1, 6, size=num_rows)[:, None]
    mask[1] = False
    logp = -rng.uniform(0.05, 3.0, size=shape)
    arrays = (
        logp,
        rng.uniform(0.0, 2.0, size=shape),
        logp + rng.normal(0.0, 0.8, size=shape),
        logp + rng.normal(0.0, 0.8, size=shape),
        rng.normal(0.0, 2.0, size=num_rows),
        mask,
    )
    inputs = [jnp.asarray(x, None if x.dtype == bool else jnp.float32) for x in arrays]
    weights = jnp.asarray(token_weights(inputs[-1], aggregation))
    return Inputs(*inputs, weights, is_singled=jnp.asarray(rng.random(shape) < 0.4))


def ppo_gain(settings: LossConfig, ratio: float, advantage: float) -> float:
    within = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
    if advantage >= 0:
        return min(ratio, within) * advantage
    # the pessimistic one of two losses, but no worse than the dual clip
    gain = max(ratio, within) * advantage
    return max(gain, settings.dual_clip * advantage) if settings.dual_clip else gain


def gain_of(
    settings: LossConfig, ratio: float, log_ratio: float, advantage: float, is_singled: bool
) -> float:
    """Return what a token gains, by the formula of the surrogate's paper."""
    if settings.surrogate == "sapo":
        tau = settings.gate_positive if advantage > 0 else settings.gate_negative
        return 4 / tau / (1 + np.exp(-tau * (ratio - 1))) * advantage
    if settings.surrogate == "geo_mean":
        return ratio * advantage
    if settings.surrogate == "kl_cov":
        return ratio * advantage - is_singled * settings.covariance_kl * abs(log_ratio)
    gain = ppo_gain(settings, ratio, advantage)
    is_taken = settings.surrogate == "clip_cov" and is_singled and gain == ratio * advantage
    return 0.0 if is_taken else gain


def mean_ratio_of(settings: LossConfig, log_ratio: np.ndarray, advantage: float) -> float:
    if settings.surrogate == "geo_mean":  # clipped where that makes the objective smaller
        sign = np.sign(advantage)
        clipped = np.clip(log_ratio, -settings.clip_low, settings.clip_high)
        log_ratio = sign * np.minimum(sign * log_ratio, sign * clipped)
    return np.exp(np.mean(log_ratio)) if len(log_ratio) else 1.0


def kl_of(settings: LossConfig, logp: float, ref: float, ratio: float) -> float:
    difference = ref - logp
    kl = {
        "k1": -difference,
        "abs": abs(difference),
        "k2": difference**2 / 2,
        "k3": np.exp(difference) - difference - 1,
        "low_var": np.exp(difference) - difference - 1,
    }[settings.kl_estimator]
    return kl * ratio if settings.kl_correction == "ratio" else kl


def oracle(settings: LossConfig, inputs: Inputs) -> float:
    """Return the loss in float64, row by row and token by token, by the papers' formulas."""
    rows = []
    for i, (logp, entropy, old, ref, advantage, mask) in enumerate(zip(*inputs[:6], strict=True)):
        length = int(mask.sum())
        mean_ratio = mean_ratio_of(settings, (logp - old)[:length], advantage)
        terms = []
        for t in range(length):
            log_ratio = logp[t] - old[t]
            ratio = mean_ratio if settings.ratio == "sequence" else np.exp(log_ratio)
            gain = gain_of(settings, ratio, log_ratio, advantage, inputs.is_singled[i, t])
            kl = kl_of(settings, logp[t], ref[t], ratio)
            terms.append(-gain + settings.kl_weight * kl - settings.entropy_weight * entropy[t])
        rows.append(terms)
    num_rows, num_columns = inputs.mask.shape
    if settings.aggregation == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if settings.aggregation == "sequence_mean":
        return sum(sum(terms) / max(len(terms), 1) for terms in rows) / num_rows
    if settings.aggregation == "sequence_sum":
        return sum(map(sum, rows)) / num_rows
    return sum(map(sum, rows)) / (num_rows * num_columns)


def finite_differences(function: Any, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        gradient[index] = (function(high) - function(low)) / (2 * step)
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("ratio", "dual_clip", "kl_weight", "entropy_weight"),
    itertools.product(("token", "sequence"), (0.0, 1.5), (0.0, 0.3), (0.0, 0.2)),
)
def test_value_and_gradients_equal_a_float64_oracle(
    aggregation, ratio, dual_clip, kl_weight, entropy_weight
):
    settings = LossConfig(
        clip_low=0.15,
        clip_high=0.25,
        dual_clip=dual_clip,
        ratio=ratio,
        aggregation=aggregation,
        kl_weight=kl_weight,
        entropy_weight=entropy_weight,
    )
    assert_equals_the_oracle(settings, random_inputs(aggregation))


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("surrogate", "ratio"),
    [
        ("sapo", "token"),
        ("sapo", "sequence"),
        ("geo_mean", "sequence"),
        ("clip_cov", "token"),
        ("kl_cov", "token"),
    ],
)
def test_other_surrogates_equal_a_float64_oracle(aggregation, surrogate, ratio):
    settings = loss_of(
        surrogate=surrogate,
        ratio=ratio,
        aggregation=aggregation,
        clip_low=0.15,
        clip_high=0.25,
        gate_positive=1.3,
        gate_negative=2.1,
        covariance_kl=0.4,
        kl_weight=0.2,
    )
    assert_equals_the_oracle(settings, random_inputs(aggregation))


@pytest.mark.slow
@pytest.mark.parametrize("correction", ["none", "ratio"])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_estimates_of_the_divergence_equal_a_float64_oracle(estimator, correction):
    settings = loss_of(kl_weight=0.7, kl_estimator=estimator, kl_correction=correction)
    assert_equals_the_oracle(settings, random_inputs())


@pytest.mark.slow
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_an_estimate_may_have_the_gradient_of_k2(estimator):
    inputs = random_inputs()._replace(advantages=jnp.zeros(6))
    found, wanted, k2 = (
        value_and_grads(loss_of(kl_weight=0.7, **given), *inputs)
        for given in (
            {"kl_estimator": estimator, "kl_correction": "k2"},
            {"kl_estimator": estimator},
            {"kl_estimator": "k2"},
        )
    )
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-6)
    np.testing.assert_allclose(found[1][0], k2[1][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{"surrogate": "kl_cov"}, {"kl_estimator": "abs"}])
def test_a_magnitude_has_no_gradient_where_both_policies_agree(settings):
    inputs = random_inputs()._replace(advantages=jnp.zeros(6))
    inputs = inputs._replace(old_logp=inputs.logp, ref_logp=inputs.logp)
    _, (gradient, _) = value_and_grads(loss_of(kl_weight=1.0, **settings), *inputs)
    assert not np.any(gradient)


def test_the_low_variance_estimate_is_bounded():
    """As verl's: log-ratios at 20, values at 10, where it has no gradient."""
    reference = jnp.array([-1.0, 0.0, 5.0, 3e3])
    value, gradient = jax.value_and_grad(lambda x: KL_ESTIMATORS["low_var"](x, reference).sum())(
        jnp.zeros(4)
    )
    np.testing.assert_allclose(value, np.exp(-1) + 0 + 10 + 10, rtol=1e-6)
    np.testing.assert_allclose(gradient, [1 - np.exp(-1), 0, 0, 0], rtol=1e-6)


def assert_equals_the_oracle(settings: LossConfig, inputs: Inputs) -> None:
    (loss, _), gradients = value_and_grads(settings, *inputs)
    wide = Inputs(*(np.asarray(x, None if x.dtype == bool else np.float64) for x in inputs))
    np.testing.assert_allclose(loss, oracle(settings, wide), rtol=1e-5)
    for name, gradient in zip(("logp", "entropy"), gradients, strict=True):
        wanted = finite_differences(
            lambda x, name=name: oracle(settings, wide._replace(**{name: x})),
            getattr(wide, name),
        )
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_the_dual_clip_bounds_losses_of_negative_advantages_only():
    mask = jnp.ones((2, 1), bool)
    logp, zeros = jnp.full((2, 1), jnp.log(10.0)), jnp.zeros((2, 1))
    sign = jnp.array([1.0, -1.0])

    def losses(dual_clip: float) -> np.ndarray:
        settings = loss_of(dual_clip=dual_clip)
        return np.array(
            [
                row_loss(settings, logp, zeros, zeros, None, sign, mask, weights, mask)[0]
                for weights in jnp.eye(2)[..., None]
            ]
        )

    np.testing.assert_allclose(losses(0.0), [-1.2, 10.0], rtol=1e-6)
    np.testing.assert_allclose(losses(3.0), [-1.2, 3.0], rtol=1e-6)
    np.testing.assert_allclose(losses(1.1), [-1.2, 1.2], rtol=1e-6)  # the clip is the larger loss


@pytest.mark.slow
def test_a_surrogate_sees_ratio_1_and_log_probability_0_in_padding(monkeypatch):
    seen = []
    monkeypatch.setitem(SURROGATES, "ppo", lambda _, tokens: seen.append(tokens) or tokens.logp)
    inputs = random_inputs()
    row_loss(loss_of(), *inputs)
    (tokens,), is_padding = seen, ~np.asarray(inputs.mask)
    assert np.all(np.asarray(tokens.ratio)[is_padding] == 1.0)
    assert np.all(np.asarray(tokens.logp)[is_padding] == 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_cispo_weighs_each_log_probability_by_its_clipped_ratio(aggregation):
    settings = loss_of(surrogate="cispo", clip_low=0.15, clip_high=0.25, aggregation=aggregation)
    inputs = random_inputs(aggregation)
    (loss, _), (gradient, _) = value_and_grads(settings, *inputs)
    logp, old_logp, advantages, weights = (
        np.asarray(x, np.float64)
        for x in (inputs.logp, inputs.old_logp, inputs.advantages[:, None], inputs.weights)
    )
    pull = -weights * np.clip(np.exp(logp - old_logp), 0.85, 1.25) * advantages
    np.testing.assert_allclose(loss, np.sum(pull * logp), rtol=1e-5)
    np.testing.assert_allclose(gradient, pull, rtol=1e-5)  # none for the ratio, none removed
    assert np.all(np.asarray(gradient)[np.asarray(inputs.mask)] != 0)


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [np.inf, -np.inf, 3e38, -3e38])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_what_padding_holds_never_matters(surrogate, ratio, garbage):
    terms = {"kl_weight": 0.1, "entropy_weight": 0.1}
    settings = LossConfig(surrogate=surrogate, ratio=ratio, dual_clip=3.0, **terms)
    inputs = random_inputs()
    arrays = ("logp", "entropy", "old_logp", "ref_logp")
    dirty = {name: jnp.where(inputs.mask, getattr(inputs, name), garbage) for name in arrays}
    clean = value_and_grads(settings, *inputs)
    one_by_one = [value_and_grads(settings, *inputs._replace(**{n: x})) for n, x in dirty.items()]
    for with_garbage in [*one_by_one, value_and_grads(settings, *inputs._replace(**dirty))]:
        jax.tree.map(np.testing.assert_array_equal, with_garbage, clean)


@pytest.mark.slow  # compiles one program for each size of a part
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@hypothesis_settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
def test_parts_of_any_partition_add_up_to_the_whole(aggregation, order, cuts):
    settings = LossConfig(clip_high=0.3, dual_clip=2.0, kl_weight=0.1, entropy_weight=0.1)
    inputs = random_inputs(aggregation)
    whole = value_and_grads(settings, *inputs)
    parts = [
        value_and_grads(settings, *(x[np.array(rows)] for x in inputs))
        for rows in np.split(np.array(order), sorted(cuts))
    ]
    close = {"rtol": 1e-5, "atol": 1e-6}
    totals = jax.tree.map(lambda *values: sum(values), *(part[0] for part in parts))
    jax.tree.map(partial(np.testing.assert_allclose, **close), totals, whole[0])
    gradients = jax.tree.map(lambda *g: np.concatenate(g), *(part[1] for part in parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[np.array(order)], **close),
        gradients,
        whole[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "factor"),
    [
        ("token_mean", 1.0),
        ("sequence_mean", 6 / 7),
        ("sequence_sum", 6 / 7),
        ("fixed_length", 6 / 7),
    ],
)
def test_a_wholly_masked_row_counts_as_a_row_and_as_nothing_else(aggregation, factor):
    settings = LossConfig(kl_weight=0.1, entropy_weight=0.1)
    inputs = random_inputs(aggregation)
    extra = Inputs(*(jnp.concatenate([x, x[:1]]) for x in inputs))
    mask = extra.mask.at[6].set(False)
    extra = extra._replace(mask=mask, weights=token_weights(mask, aggregation))
    (loss, sums), gradients = value_and_grads(settings, *inputs)
    (longer, longer_sums), longer_gradients = value_and_grads(settings, *extra)
    np.testing.assert_allclose(longer, factor * loss, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), longer_sums, sums)
    for a, b in zip(longer_gradients, gradients, strict=True):
        np.testing.assert_allclose(a[:6], factor * b, rtol=1e-5)
        assert not np.any(a[6])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_batch_without_any_token_gives_zeros(aggregation, ratio):
    mask = jnp.zeros((6, 5), bool)
    inputs = random_inputs()._replace(mask=mask, weights=token_weights(mask, aggregation))
    settings = LossConfig(dual_clip=3.0, ratio=ratio, kl_weight=0.1, entropy_weight=0.1)
    everything = value_and_grads(settings, *inputs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(everything))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_follow_the_mask(aggregation):
    mask = completion_mask(np.array([0, 1, 4, 2]), 4)
    assert np.array_equal(mask.astype(int), [[0] * 4, [1, 0, 0, 0], [1] * 4, [1, 1, 0, 0]])
    share = {
        "token_mean": [0, 1 / 7, 1 / 7, 1 / 7],
        "sequence_mean": [0, 1 / 4, 1 / 16, 1 / 8],
        "sequence_sum": [0, 1 / 4, 1 / 4, 1 / 4],
        "fixed_length": [0, 1 / 16, 1 / 16, 1 / 16],
    }[aggregation]
    wanted = np.where(mask, np.array(share)[:, None], 0)
    np.testing.assert_allclose(token_weights(mask, aggregation), wanted, rtol=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_lone_token_carries_the_whole_loss(aggregation):
    assert token_weights(np.ones((1, 1), bool), aggregation) == 1.0


def test_an_unknown_aggregation_is_an_error():
    with pytest.raises(ValueError, match="token-mean"):
        token_weights(jnp.ones((1, 1), bool), "token-mean")


@pytest.mark.slow
def test_clip_metrics_count_tokens_whose_gradient_the_clip_removes():
    ratios = jnp.array([0.5, 0.9, 1.1, 1.5])
    log_ratio = jnp.tile(jnp.log(ratios), (3, 1))
    zeros, mask = jnp.zeros((3, 4)), jnp.ones((3, 4), bool)
    advantages = jnp.array([1.0, -2.0, 0.0])
    inputs = Inputs(log_ratio, zeros, zeros, None, advantages, mask, mask.astype(jnp.float32), mask)
    (_, sums), (gradient, _) = value_and_grads(loss_of(), *inputs)
    assert sums["clip_ratio/high_mean"] == 1  # the 1.5 of the first row
    assert sums["clip_ratio/low_mean"] == 1  # the 0.5 of the second
    assert sums["num_tokens"] == 12
    is_clipped = np.zeros((3, 4), bool)
    is_clipped[0, 3] = is_clipped[1, 0] = is_clipped[2] = True
    assert np.array_equal(np.asarray(gradient) == 0, is_clipped)


def test_a_ratio_on_the_edge_of_the_clip_is_not_counted_as_clipped():
    mask, zeros = jnp.ones((2, 1), bool), jnp.zeros((2, 1))
    inputs = Inputs(zeros, zeros, zeros, None, jnp.array([1.0, -1.0]), mask, zeros, mask)
    (_, sums), _ = value_and_grads(loss_of(clip_low=0.0, clip_high=0.0), *inputs)
    assert sums["clip_ratio/low_mean"] == sums["clip_ratio/high_mean"] == 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_gap_to_old_log_probabilities_is_measured_token_by_token(ratio):
    inputs = random_inputs()
    (_, sums), _ = value_and_grads(loss_of(ratio=ratio), *inputs)
    gaps = np.abs(np.asarray(inputs.logp, np.float64) - np.asarray(inputs.old_logp))
    np.testing.assert_allclose(sums["old_logp_gap"], gaps[np.asarray(inputs.mask)].sum(), rtol=1e-5)


def test_the_loss_asks_for_what_its_settings_need():
    inputs = random_inputs()
    targets = PolicyTargets(inputs.old_logp, None, inputs.logp, inputs.mask, inputs.weights)
    with pytest.raises(ValueError, match=r"kl_weight=0\.1 needs ref_logp"):
        policy_loss(loss_of(kl_weight=0.1), inputs.logp, inputs.entropy, targets)
    with pytest.raises(ValueError, match="needs sequence_log_ratio"):
        policy_loss(loss_of(ratio="sequence"), inputs.logp, inputs.entropy, targets)


@pytest.mark.slow
def test_sequences_of_one_row_have_their_own_mean_log_ratio():
    log_ratio = jnp.array([[1.0, 2.0, 6.0, 5.0, jnp.inf], [8.0, 4.0, 3.0, 1.0, 0.0]])
    sequence = jnp.array([[0, 0, 0, 1, 1], [0, 1, 1, 2, 2]])
    mask = jnp.array([[True, True, True, True, False], [True, True, True, False, False]])
    wanted = [[3.0, 3.0, 3.0, 5.0, 5.0], [8.0, 3.5, 3.5, 0.0, 0.0]]
    np.testing.assert_allclose(sequence_log_ratio(log_ratio, mask, sequence), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [[0.5, 1.0, 2.0, 2.0], [2.0, 0.1, 1.0, 1.0]]),
        ({"importance_floor": 0.4}, [[0.5, 1.0, 2.0, 2.0], [2.0, 0.4, 1.0, 1.0]]),
        ({"importance_outside": "mask"}, [[0.5, 1.0, 0.0, 2.0], [0.0, 0.1, 1.0, 1.0]]),
        (
            {"importance_outside": "mask", "importance_floor": 0.6},
            [[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.0, 1.0]],
        ),
        ({"importance_ratio": "sequence"}, [[0.5, 0.5, 2.0, 2.0], [0.5, 0.5, 0.5, 0.0]]),
        (
            {"importance_ratio": "sequence", "importance_outside": "mask"},
            [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, 0.0]],
        ),
    ],
)
def test_importance_weights_are_ratios_of_probability_within_bounds(settings, wanted):
    ratios = np.array([[0.5, 1.0, 3.0, 2.0], [5.0, 0.1, 1.0, 9.0]])
    mask = np.array([[True] * 4, [True] * 3 + [False]])
    sequence = np.array([[0, 0, 1, 1], [0, 0, 0, 1]])
    settings = loss_of(importance_cap=2.0, **settings)
    arrays = np.log(ratios)[None], mask[None], sequence[None]  # passes of rows
    found = np.asarray(importance_weights(settings, *arrays))[0]
    np.testing.assert_allclose(found[mask], np.array(wanted)[mask], rtol=1e-6)


def test_an_impossible_token_has_a_weight_all_the_same():
    log_ratio = jnp.array([[jnp.inf, -jnp.inf]])
    mask, sequence = jnp.ones((1, 2), bool), jnp.arange(2)[None]
    for outside, wanted in (("truncate", [2.0, 0.0]), ("mask", [0.0, 0.0])):
        settings = loss_of(importance_cap=2.0, importance_outside=outside)
        assert importance_weights(settings, log_ratio, mask, sequence).tolist() == [wanted]


def covariance_of(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return log-probabilities, advantages, a mask, and the covariance of each token."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7)[None] < rng.integers(1, 8, size=9)[:, None]
    logp, advantages = rng.normal(size=(9, 7)), rng.normal(size=9)
    gains = np.repeat(advantages[:, None], 7, axis=1)
    covariance = (gains - gains[mask].mean()) * (logp - logp[mask].mean())
    return logp, advantages, mask, np.where(mask, covariance, np.nan)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_largest_covariances_are_singled_out(share):
    logp, advantages, mask, covariance = covariance_of()
    settings = loss_of(surrogate="kl_cov", covariance_share=share)
    chosen = covariance_tokens(settings, logp, advantages, mask, 0)
    assert chosen.sum() == max(int(share * mask.sum()), 1)
    assert not np.any(chosen & ~mask)
    if share < 1:
        assert covariance[chosen].min() > covariance[mask & ~chosen].max()


def test_some_covariances_between_bounds_are_singled_out_by_chance():
    logp, advantages, mask, covariance = covariance_of()
    settings = loss_of(
        surrogate="clip_cov", covariance_share=0.1, covariance_low=0.1, covariance_high=0.9
    )
    is_between = (covariance > 0.1) & (covariance < 0.9)
    choices = [covariance_tokens(settings, logp, advantages, mask, (1, i)) for i in range(60)]
    assert all(chosen.sum() == int(0.1 * mask.sum()) for chosen in choices)
    assert np.array_equal(np.any(choices, axis=0), is_between)  # each at some time, no other
    again = covariance_tokens(settings, logp, advantages, mask, (1, 3))
    assert np.array_equal(again, choices[3]) and not np.array_equal(again, choices[4])


@pytest.mark.parametrize("surrogate", ["clip_cov", "kl_cov"])
def test_where_there_is_nothing_to_single_out_nothing_is(surrogate):
    logp, advantages, mask, _ = covariance_of()
    settings = loss_of(surrogate=surrogate, covariance_low=50.0, covariance_high=60.0)
    assert not covariance_tokens(settings, logp, advantages, np.zeros_like(mask), 0).any()
    chosen = covariance_tokens(settings, logp, advantages, mask, 0)
    assert chosen.sum() == (surrogate == "kl_cov")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_token_beyond_the_clip_of_the_geometric_mean_leaves_the_others_their_gradient(
    aggregation,
):
    log_ratio = jnp.array([[0.0, 0.5, 0.1], [0.0, -0.5, 0.1]])
    mask, zeros = jnp.ones((2, 3), bool), jnp.zeros((2, 3))
    weights = token_weights(np.ones((2, 3), bool), aggregation)
    advantages = jnp.array([1.0, -1.0])
    inputs = Inputs(log_ratio, zeros, zeros, None, advantages, mask, weights, mask)
    settings = loss_of(surrogate="geo_mean", ratio="sequence", clip_low=0.4, clip_high=0.4)
    (_, sums), (gradient, _) = value_and_grads(settings, *inputs)
    assert np.array_equal(np.asarray(gradient) == 0, log_ratio == jnp.array([[0.5], [-0.5]]))
    assert sums["clip_ratio/high_mean"] == sums["clip_ratio/low_mean"] == 1


def with_importance(inputs: Inputs, importance: Any) -> PolicyTargets:
    """Return the targets of `row_loss`, with weights of the surrogate alone."""
    advantages = jnp.broadcast_to(inputs.advantages[:, None], inputs.logp.shape)
    arrays = inputs.old_logp, inputs.ref_logp, advantages, inputs.mask, inputs.weights
    return PolicyTargets(*arrays, importance=importance, is_singled=inputs.is_singled)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", list(SURROGATES))
def test_importance_weighs_the_surrogate_and_no_other_term(surrogate):
    """As TRL and verl: the weight multiplies the policy loss before KL and entropy are added."""
    inputs = random_inputs()
    old, mask = np.asarray(inputs.old_logp), np.asarray(inputs.mask)
    sampled = old + np.random.default_rng(3).normal(0.0, 1.0, old.shape).astype(np.float32)
    capped, rows = loss_of(importance_cap=1.3), jnp.zeros(mask.shape, jnp.int32)
    importance = importance_weights(capped, inputs.old_logp - sampled, inputs.mask, rows)
    settings = loss_of(kl_weight=0.3, entropy_weight=0.2, surrogate=surrogate)
    loss, sums = policy_loss(
        settings, inputs.logp, inputs.entropy, with_importance(inputs, importance)
    )
    alone = loss_of(surrogate=surrogate)
    tokens = jax.vmap(  # the surrogate of each token, by a loss that has no other term
        lambda weights: policy_loss(
            alone,
            inputs.logp,
            inputs.entropy,
            with_importance(inputs, None)._replace(weights=weights.reshape(old.shape)),
        )[0]
    )(jnp.eye(old.size))
    weights = np.minimum(np.exp(old.astype(np.float64) - sampled), 1.3)
    gap = np.asarray(inputs.ref_logp, np.float64) - np.asarray(inputs.logp)
    kl, entropy = np.exp(gap) - gap - 1, np.asarray(inputs.entropy, np.float64)
    wanted = weights * np.reshape(tokens, old.shape) + 0.3 * kl - 0.2 * entropy
    wanted = np.sum(np.asarray(inputs.weights) * np.where(mask, wanted, 0.0))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    plain, plain_sums = policy_loss(
        settings, inputs.logp, inputs.entropy, with_importance(inputs, None)
    )
    assert abs(float(plain - loss)) > 1e-4
    assert jax.tree.map(float, sums) == jax.tree.map(float, plain_sums)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("trl", "trl/dapo_off"),
        ("trl,dr_grpo", "trl/dr_grpo_off"),
        ("trl,gspo", "trl/sequence_off_3e-4_4e-4"),
        ("trl,sapo", "trl/sapo_off"),
        ("trl,cispo", "trl/cispo_off_cap_5.0"),
        ("verl", "verl/token-mean_off"),
        ("verl,gspo", "verl/gspo_off_3e-4_4e-4"),
        ("verl,sapo", "verl/sapo_off"),
        ("judgelrm", "verl/judgelrm_preset_on_before_factor"),
    ],
)
def test_a_preset_is_the_loss_that_was_recorded(preset, name):
    tree = {"run": {"dir": "r"}, "data": {"train": "toy"}, "grpo": {"steps": 1}}
    tree |= {"model": {"preset": "toy", "tokenizer": "toy"}, "preset": preset}
    inputs, given = recorded_inputs(name), from_dict(tree).grpo.loss
    (loss, _), (gradient, _) = value_and_grads(given, *inputs)
    wanted = np.array(CASES[name]["gradient"])
    close = {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(loss, CASES[name]["loss"], **close)
    np.testing.assert_allclose(gradient[:, : wanted.shape[1]], wanted, **close)
    assert given.aggregation == MAPPED[name].settings.aggregation


def test_each_name_of_the_config_is_a_line_of_its_table():
    hints = typing.get_type_hints(LossConfig)
    assert set(typing.get_args(hints["surrogate"])) == set(SURROGATES)
    assert set(typing.get_args(hints["kl_estimator"])) == set(KL_ESTIMATORS)


def test_the_reference_is_measured_even_where_its_weight_is_zero():
    inputs = random_inputs()
    (loss, sums), _ = value_and_grads(loss_of(), *inputs)
    (without, fewer), _ = value_and_grads(loss_of(), *inputs._replace(ref_logp=None))
    assert loss == without
    assert set(sums) - set(fewer) == {"kl"}
    difference = np.asarray(inputs.ref_logp - inputs.logp, np.float64)[np.asarray(inputs.mask)]
    wanted = np.sum(np.exp(difference) - difference - 1)
    np.testing.assert_allclose(sums["kl"], wanted, rtol=1e-5)


@pytest.mark.slow
def test_k3_is_the_divergence_on_average_and_never_negative():
    rng = np.random.default_rng(0)
    policy, reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(2, 50)), jnp.float32))
    estimates = k3(policy, reference)
    assert np.all(np.asarray(estimates) >= 0)
    divergence = jnp.sum(jnp.exp(policy) * (policy - reference))
    np.testing.assert_allclose(jnp.sum(jnp.exp(policy) * estimates), divergence, rtol=1e-5)
    assert not np.any(k3(policy, policy))
