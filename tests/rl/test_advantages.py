"""Advantages equal trl and verl, and are zero where there is nothing to learn."""

from __future__ import annotations

import json
import typing
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from jlrm.config import AdvantageConfig
from jlrm.rl import advantages as module
from jlrm.rl.advantages import BASELINES, is_informative

RECORD = json.loads((GOLDEN / "grpo.json").read_text())
SCALES = ("group", "batch", "none")


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards and recorded advantages of a case, both by group."""
    (case,) = (case for case in RECORD["cases"] if case["name"] == name)
    shape = (-1, RECORD["inputs"]["group_size"])
    rewards = np.array(RECORD["inputs"]["rewards"]).reshape(shape)
    return rewards, np.array(case["advantages"]).reshape(shape)


def advantages(rewards: np.ndarray, scale: str = "group", eps: float = 1e-6) -> np.ndarray:
    return by(rewards, scale=scale, eps=eps)


def by(rewards: Any, lengths: Any = None, num_orders: int = 1, **settings: Any) -> np.ndarray:
    """Return advantages of one reward, or of terms by name, by these settings."""
    terms = rewards if isinstance(rewards, dict) else {"reward": rewards}
    return module.advantages(AdvantageConfig(**settings), terms, lengths, num_orders)


def random_rewards(num_prompts: int = 5, num_rollouts: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_prompts, num_rollouts)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "scale", "eps"),
    [
        ("trl/dapo_off", "group", 1e-4),
        ("trl/dapo_off_scale_batch", "batch", 1e-4),
        ("trl/dapo_off_scale_none", "none", 1e-4),
        ("verl/token-mean_off", "group", 1e-6),
        ("verl/dr_grpo_off_scale_8", "none", 1e-6),
    ],
)
def test_equals_the_reference_packages(name, scale, eps):
    rewards, wanted = golden(name)
    np.testing.assert_allclose(advantages(rewards, scale, eps), wanted, rtol=1e-6)


def recorded() -> tuple[np.ndarray, np.ndarray]:
    """Return the recorded rewards and lengths, by group."""
    inputs = RECORD["inputs"]
    shape = (-1, inputs["group_size"])
    rewards = np.array(inputs["rewards"]).reshape(shape)
    return rewards, np.array(inputs["mask"]).sum(axis=1).reshape(shape)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rloo", {"baseline": "leave_one_out", "scale": "none"}),
        ("rloo_vectorized", {"baseline": "leave_one_out", "scale": "none"}),
        ("opo", {"baseline": "length_weighted", "scale": "none"}),
        # The others add 1e-8 to the variance, and we add eps to the deviation.
        (
            "reinforce_plus_plus",
            {"baseline": "none", "scale": "none", "whiten": "tokens", "eps": 0},
        ),
        ("reinforce_plus_plus_baseline", {"scale": "none", "whiten": "tokens", "eps": 0}),
    ],
)
def test_other_estimators_equal_verls(name, settings):
    rewards, lengths = recorded()
    wanted = np.array(RECORD["advantages"][name]).reshape(rewards.shape)
    np.testing.assert_allclose(by(rewards, lengths, **settings), wanted, rtol=1e-6)


def test_the_greedy_completions_reward_is_a_baseline_as_in_verl():
    rewards, lengths = recorded()
    greedy = {"reward": np.array(RECORD["inputs"]["greedy_rewards"]).reshape(rewards.shape)}
    config = AdvantageConfig(baseline="greedy", scale="none")
    wanted = np.array(RECORD["advantages"]["remax"]).reshape(rewards.shape)
    found = module.advantages(config, {"reward": rewards}, lengths, greedy=greedy)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    greedy["reward"][0] = np.nan  # no reward applies to it
    found = module.advantages(config, {"reward": rewards}, lengths, greedy=greedy)
    np.testing.assert_allclose(found, [rewards[0], wanted[1]], rtol=1e-6)


def two_terms() -> dict[str, np.ndarray]:
    rewards, _ = recorded()
    return {"sign": np.where(rewards > -1, 1.0, -1.0), "value": rewards}


GDPO = {"terms": "apart", "term_weights": {"value": 0.5}}


def test_terms_that_are_compared_apart_equal_trls_and_verls():
    rewards, lengths = recorded()
    (case,) = (c for c in RECORD["cases"] if c["name"] == "trl/dapo_off_gdpo")
    trls = np.array(case["advantages"]).reshape(rewards.shape)
    found = by(two_terms(), lengths, **GDPO, whiten="rows", eps=1e-4)
    np.testing.assert_allclose(found, trls, rtol=2e-6)
    verls = np.array(RECORD["advantages"]["gdpo"]).reshape(rewards.shape)
    found = by(two_terms(), lengths, **GDPO, whiten="tokens", eps=1e-6)
    np.testing.assert_allclose(found, verls, rtol=1e-5)  # theirs whitens with another eps


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@settings(deadline=None, max_examples=100)
@given(value=st.floats(-1e4, 1e4, width=32))
def test_uniform_groups_get_exact_zeros(scale, value):
    rewards = np.full((3, 8), value)
    assert np.array_equal(advantages(rewards, scale), np.zeros((3, 8)))


@pytest.mark.parametrize("scale", SCALES)
def test_a_uniform_group_gets_zeros_beside_others(scale):
    # The mean of eight 3.6 in float32 is not 3.6 in every order of summation.
    rewards = random_rewards(3, 8)
    rewards[1] = 3.6
    ours = advantages(rewards, scale)
    assert np.array_equal(ours[1], np.zeros(8))
    assert np.all(np.abs(ours[[0, 2]]) > 0)


def test_a_missing_reward_is_out_of_the_baseline_as_in_trl():
    (case,) = (c for c in RECORD["cases"] if c["name"] == "trl/dapo_off_reward_1_missing")
    rewards, _ = golden("trl/dapo_off")
    rewards.flat[1] = np.nan
    wanted = np.array(case["advantages"]).reshape(rewards.shape)
    np.testing.assert_allclose(advantages(rewards, "group", 1e-4), wanted, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), share=st.floats(0.0, 1.0))
def test_missing_rewards_count_in_nothing(scale, seed, share):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(4, 6)).astype(np.float32)
    rewards[rng.random((4, 6)) < share] = np.nan
    paid = rewards[~np.isnan(rewards)].astype(np.float64)
    wanted = np.zeros((4, 6))
    for row, found in zip(rewards.astype(np.float64), wanted, strict=True):
        own = row[~np.isnan(row)]
        if len(own) < 2:  # nothing to compare it with
            continue
        deviation = {
            "group": own.std(ddof=1) + 1e-6,
            "batch": paid.std(ddof=1) + 1e-6,
            "none": 1.0,
        }[scale]
        found[~np.isnan(row)] = (own - own.mean()) / deviation
    np.testing.assert_allclose(advantages(rewards, scale), wanted, rtol=2e-4, atol=2e-6)


@pytest.mark.slow
def test_without_an_eps_a_uniform_or_missing_group_is_still_zero():
    rewards = np.array([[1.0, 1.0, 1.0], [np.nan, np.nan, np.nan], [np.nan, 5.0, np.nan]])
    for scale in SCALES:
        assert np.array_equal(advantages(rewards, scale, eps=0.0), np.zeros((3, 3)))


@pytest.mark.slow
def test_eps_is_added_to_the_deviation_and_one_degree_of_freedom_is_taken_off():
    rewards = np.array([[0.0, 2.0]])  # deviation sqrt(2) with ddof 1, 1 with ddof 0
    for eps in (1e-6, 0.5, 10.0):
        wanted = np.array([[-1.0, 1.0]]) / (np.sqrt(2.0) + eps)
        np.testing.assert_allclose(advantages(rewards, "group", eps), wanted, rtol=1e-6)
        np.testing.assert_allclose(advantages(rewards, "batch", eps), wanted, rtol=1e-6)
        np.testing.assert_allclose(advantages(rewards, "none", eps), [[-1.0, 1.0]], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_groups_have_mean_zero_and_the_deviation_of_their_scale(scale):
    rewards = random_rewards()
    ours = advantages(rewards, scale, eps=0.0)
    np.testing.assert_allclose(ours.mean(axis=1), 0.0, atol=1e-6)
    deviation = rewards.std(axis=1, ddof=1)
    wanted = {
        "group": np.ones(5),
        "batch": deviation / rewards.std(ddof=1),
        "none": deviation,
    }[scale]
    np.testing.assert_allclose(ours.std(axis=1, ddof=1), wanted, rtol=1e-5)


def oracle(rewards: np.ndarray, lengths: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """Return advantages completion by completion, from the formulas of the papers."""
    found = np.full(rewards.shape, np.nan)
    everyone = [float(r) for r in rewards.flat if not np.isnan(r)]
    for g, group in enumerate(rewards):
        for i, reward in enumerate(group):
            if np.isnan(reward):
                continue
            others = [group[j] for j in range(len(group)) if j != i and not np.isnan(group[j])]
            paid = [*others, reward]
            sizes = [lengths[g][j] for j in range(len(group)) if not np.isnan(group[j])]
            values = [r for r in group if not np.isnan(r)]
            baseline = {
                "group": np.mean(paid),
                "leave_one_out": np.mean(others) if others else reward,
                "length_weighted": np.dot(sizes, values) / np.sum(sizes),
                "greedy": 0.0,  # where none is given
                "none": 0.0,
            }[config.baseline]
            spread = {"group": paid, "batch": everyone, "none": [0.0, 1.0]}[config.scale]
            deviation = np.std(spread, ddof=1) if len(spread) > 1 else 0.0
            deviation = 1.0 if config.scale == "none" else deviation + config.eps
            found[g, i] = (reward - baseline) / deviation if np.ptp(spread) else 0.0
    if config.whiten != "none":
        repeats = lengths if config.whiten == "tokens" else np.ones_like(lengths)
        is_paid = ~np.isnan(found)
        tokens = np.repeat(found[is_paid], repeats[is_paid])
        found = (found - tokens.mean()) / (tokens.std(ddof=1) + config.eps)
    return np.nan_to_num(found)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("whiten", ["none", "rows", "tokens"])
def test_every_choice_equals_an_oracle(baseline, scale, whiten):
    config = AdvantageConfig(baseline=baseline, scale=scale, whiten=whiten, eps=0.01)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rewards = rng.normal(size=(4, 5)).astype(np.float32)
        rewards[rng.random((4, 5)) < 0.2] = np.nan
        rewards[1] = np.nan if seed % 2 else [np.nan, 2.0, np.nan, np.nan, np.nan]
        lengths = rng.integers(1, 30, size=(4, 5))
        found = module.advantages(config, {"reward": rewards}, lengths)
        wanted = oracle(rewards.astype(np.float64), lengths, config)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_each_baseline_of_the_config_is_a_line_of_the_table():
    names = typing.get_args(typing.get_type_hints(AdvantageConfig)["baseline"])
    assert set(names) == set(BASELINES)


@pytest.mark.parametrize("baseline", sorted(BASELINES.keys() - {"greedy", "none"}))
def test_a_uniform_group_and_a_lone_completion_get_zeros_by_every_baseline(baseline):
    rewards = np.array([[0.1, 0.1, 0.1], [np.nan, 5.0, np.nan], [1.0, 2.0, 4.0]])
    lengths = np.array([[3, 7, 9], [2, 4, 6], [1, 5, 9]])
    found = by(rewards, lengths, baseline=baseline, scale="none")
    assert np.array_equal(found[:2], np.zeros((2, 3))) and np.all(found[2] != 0)


def test_both_orders_of_a_pair_are_compared_together_apart_or_both():
    """EIS-GRPO is the sum of both comparisons."""
    rewards = random_rewards(3, 8)
    together = by(rewards, num_orders=2)
    apart = by(rewards, num_orders=2, orders="apart")
    np.testing.assert_array_equal(together, by(rewards))
    np.testing.assert_array_equal(apart, by(rewards.reshape(6, 4)).reshape(3, 8))
    summed = by(rewards, num_orders=2, orders="summed")
    np.testing.assert_allclose(summed, together + apart, rtol=1e-5, atol=1e-6)


def test_a_judge_that_is_right_in_one_order_alone_learns_from_both_only():
    """Within an order nothing differs: only the comparison of both orders sees the bias."""
    rewards = np.array([[1.0, 1.0, 0.0, 0.0]])
    terms = {"reward": rewards}
    for orders, is_seen in (("together", True), ("apart", False), ("summed", True)):
        config = AdvantageConfig(orders=orders)
        assert np.any(module.advantages(config, terms, num_orders=2)) == is_seen
        assert is_informative(config, terms, num_orders=2).tolist() == [is_seen]


def test_a_group_teaches_where_two_of_its_rewards_or_of_one_of_its_terms_differ():
    first = np.array([[1.0, 0.0], [1.0, 1.0], [np.nan, 1.0], [np.nan, np.nan]])
    second = np.array([[0.0, 1.0], [2.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    total = {"reward": first + second}
    assert is_informative(AdvantageConfig(), total).tolist() == [False] * 4
    apart = {"first": first, "second": second}
    found = is_informative(AdvantageConfig(terms="apart"), apart)
    assert found.tolist() == [True, False, False, True]


def test_the_scale_of_a_term_does_not_matter_where_terms_are_compared_apart():
    terms = two_terms()
    larger = {**terms, "value": 1000.0 * terms["value"]}
    apart = {"terms": "apart", "eps": 0.0}
    np.testing.assert_allclose(by(larger, **apart), by(terms, **apart), rtol=1e-5, atol=1e-6)
    summed = [by(sum(each.values()), eps=0.0) for each in (larger, terms)]
    assert not np.allclose(*summed, atol=0.05)


def test_a_term_that_does_not_apply_to_a_row_is_out_of_that_terms_baseline_alone():
    terms = {"a": np.array([[1.0, 3.0, np.nan]]), "b": np.array([[np.nan, np.nan, 7.0]])}
    found = by(terms, terms="apart", scale="none")
    np.testing.assert_array_equal(found, [[-1.0, 1.0, 0.0]])


@pytest.mark.parametrize("scale", SCALES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_permuting_rewards_permutes_advantages(scale, seed):
    rng = np.random.default_rng(seed)
    rewards = random_rewards()
    prompts, rollouts = rng.permutation(5), rng.permutation(6)
    permuted = advantages(rewards[prompts][:, rollouts], scale)
    wanted = advantages(rewards, scale)[prompts][:, rollouts]
    np.testing.assert_allclose(permuted, wanted, rtol=1e-5, atol=1e-6)


def test_group_scale_looks_at_its_own_group_only():
    rewards = random_rewards()
    others = rewards.copy()
    others[1:] *= 7.0
    assert np.array_equal(advantages(rewards)[0], advantages(others)[0])
    assert not np.allclose(advantages(rewards, "batch")[0], advantages(others, "batch")[0])


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_the_unit_of_rewards_does_not_matter(scale):
    rewards = random_rewards()
    in_other_units = advantages(100.0 * rewards + 5.0, scale, eps=0.0)
    np.testing.assert_allclose(
        in_other_units, advantages(rewards, scale, eps=0.0), rtol=1e-3, atol=1e-5
    )


def test_without_an_eps_it_is_verls():
    """1e-6 is added to the deviation: too little to see where rewards differ as ours do."""
    rewards = np.array([[0.0, 2e-6]], np.float32)
    deviation = np.std(rewards, ddof=1)
    wanted = (rewards - rewards.mean()) / (deviation + 1e-6)
    np.testing.assert_allclose(advantages(rewards), wanted, rtol=1e-5)
