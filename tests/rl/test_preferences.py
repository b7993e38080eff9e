"""Losses of pairs against float64 NumPy, by value and by gradient, and what they are made of."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlrm.config import DPOConfig
from jlrm.rl.preferences import (
    PairTargets,
    RewardTargets,
    dpo_loss,
    reward_loss,
    sequence_sums,
)

NUM_TARGETS = 16
LENGTHS = [[3, 2, 1, 5], [4, 4]]  # of the sequences of two rows: chosen, rejected, chosen, ...


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return log-probabilities, the reference's, mask and sequence numbers; padding is not 0."""
    rng = np.random.default_rng(0)
    logp, ref = -3 * rng.random((2, 2, NUM_TARGETS)).astype(np.float32)
    sequence = np.zeros((2, NUM_TARGETS), np.int32)
    mask = np.zeros((2, NUM_TARGETS), bool)
    for row, lengths in enumerate(LENGTHS):
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        sequence[row, : len(numbers)], mask[row, : len(numbers)] = numbers, True
    return logp, ref, mask, sequence


def oracle(settings: DPOConfig, logp: Any, ref: Any) -> tuple[float, dict[str, float]]:
    """Return loss and metrics in float64, pair by pair."""
    logp, ref = np.asarray(logp, np.float64), np.asarray(ref, np.float64)
    sums, ratios = [], []
    for row, lengths in enumerate(LENGTHS):
        for a, b in itertools.pairwise(np.cumsum([0, *lengths])):
            sums.append(logp[row, a:b].sum())
            ratios.append((logp - ref)[row, a:b].sum())
    chosen, rejected = np.array(ratios[::2]), np.array(ratios[1::2])
    margin, s = chosen - rejected, settings.label_smoothing
    loss = np.square(margin - 1 / (2 * settings.beta))
    if settings.loss == "sigmoid":
        scaled = settings.beta * margin
        loss = (1 - s) * np.log1p(np.exp(-scaled)) + s * np.log1p(np.exp(scaled))
    return loss.mean(), {
        "rewards/chosen": settings.beta * chosen.mean(),
        "rewards/rejected": settings.beta * rejected.mean(),
        "rewards/margins": settings.beta * margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "logps/chosen": np.mean(sums[::2]),
        "logps/rejected": np.mean(sums[1::2]),
    }


SETTINGS = {
    "sigmoid": DPOConfig(beta=0.3),
    "smoothed": DPOConfig(beta=0.3, label_smoothing=0.2),
    "ipo": DPOConfig(beta=0.3, loss="ipo"),
}


@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_of_pairs_is_what_float64_says(name, has_reference):
    settings, (logp, ref, mask, sequence) = SETTINGS[name], rows()
    targets = PairTargets(ref if has_reference else None, mask, np.float32(3))
    of_logp = lambda logp: dpo_loss(settings, logp, targets, sequence)  # noqa: E731
    (loss, means), gradient = jax.value_and_grad(of_logp, has_aux=True)(jnp.asarray(logp))
    reference = ref if has_reference else np.zeros_like(ref)
    wanted, metrics = oracle(settings, logp, reference)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert means.keys() == metrics.keys()
    for metric, value in metrics.items():
        np.testing.assert_allclose(means[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)
    # Central differences of the oracle, in float64.
    for place in np.ndindex(logp.shape):
        nudge = np.zeros(logp.shape)
        nudge[place] = 1e-5
        ends = [oracle(settings, logp + sign * nudge, reference)[0] for sign in (1, -1)]
        np.testing.assert_allclose(gradient[place], (ends[0] - ends[1]) / 2e-5, atol=1e-6)
        assert mask[place] or gradient[place] == 0


def test_a_pair_counts_the_same_wherever_it_stands():
    logp, ref, mask, sequence = rows()

    def loss(here: slice) -> Any:
        targets = PairTargets(ref[here], mask[here], np.float32(3))
        return dpo_loss(SETTINGS["sigmoid"], logp[here], targets, sequence[here])[0]

    parts = [loss(slice(0, 1)), loss(slice(1, 2))]
    np.testing.assert_allclose(loss(slice(2)), sum(parts), rtol=1e-6)


def test_sums_of_sequences_leave_out_what_is_masked():
    logp, _, mask, sequence = rows()
    sums = sequence_sums(logp, mask, sequence)
    np.testing.assert_allclose(sums[0, 1], logp[0, 3:5].sum(), rtol=1e-6)
    assert not sums[1, 2:].any()


@pytest.mark.parametrize("kind", ["bradley_terry", "cross", "classes"])
def test_a_reward_model_s_loss_is_what_float64_says(kind):
    _, _, mask, sequence = rows()
    num_scores = {"bradley_terry": 1, "cross": 2, "classes": 3}[kind]
    scores = np.random.default_rng(1).normal(size=(*mask.shape, num_scores)).astype(np.float32)
    ends = [(row, end - 1) for row, own in enumerate(LENGTHS) for end in np.cumsum(own)]
    is_last = np.zeros_like(mask)
    is_last[tuple(zip(*ends, strict=True))] = True
    label = np.arange(mask.size, dtype=np.int32).reshape(mask.shape) % 2 + 1
    if kind == "classes":
        label = label - 1 + label % 3 // 2
    at = np.array([scores[place] for place in ends], np.float64)
    labels = np.array([label[place] for place in ends])
    if kind == "bradley_terry":
        margin = at[::2, 0] - at[1::2, 0]
        losses = np.log1p(np.exp(-margin))
    elif kind == "cross":
        margin = np.where(labels == 1, 1, -1) * (at[:, 0] - at[:, 1])
        losses = np.log1p(np.exp(-margin))
    else:
        own = np.take_along_axis(at, labels[:, None], 1)[:, 0]
        losses = np.log(np.exp(at).sum(1)) - own
        margin = own - np.array([np.delete(a, b).max() for a, b in zip(at, labels, strict=True)])
    targets = RewardTargets(is_last, label, np.float32(len(losses)))
    of_scores = lambda scores: reward_loss(kind, scores, targets, sequence)  # noqa: E731
    (loss, means), gradient = jax.value_and_grad(of_scores, has_aux=True)(jnp.asarray(scores))
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(means["margin"], margin.mean(), rtol=1e-5)
    np.testing.assert_allclose(means["accuracy"], (margin > 0).mean())
    assert np.all((np.abs(gradient).sum(-1) > 0) == is_last)
