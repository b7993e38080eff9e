"""Group-relative advantages equal trl and verl, and are zero where there is nothing to learn."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from jlrm.rl.advantages import group_advantages

RECORD = json.loads((GOLDEN / "grpo.json").read_text())
SCALES = ("group", "batch", "none")


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rewards and recorded advantages of a case, both by group."""
    (case,) = (case for case in RECORD["cases"] if case["name"] == name)
    shape = (-1, RECORD["inputs"]["group_size"])
    rewards = np.array(RECORD["inputs"]["rewards"]).reshape(shape)
    return rewards, np.array(case["advantages"]).reshape(shape)


def advantages(rewards: np.ndarray, scale: str = "group", eps: float = 1e-6) -> np.ndarray:
    return np.asarray(group_advantages(jnp.asarray(rewards, jnp.float32), scale, eps))


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
    np.testing.assert_allclose(advantages(rewards, scale, eps), wanted, rtol=2e-6)


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
    np.testing.assert_allclose(group_advantages(rewards), wanted, rtol=1e-5)
