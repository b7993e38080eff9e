"""Advantages: what each reward is worth beside the others of its group and of the batch.

Three steps, each chosen by data, `AdvantageConfig`: a baseline is subtracted, the difference is
divided by a deviation, and what remains may be whitened over the batch. No value network is needed
(GRPO, arXiv 2402.03300, Section 4.1). Named methods are choices of these steps: config/presets.py.

NaN is a completion without a reward. It counts in no baseline and no deviation and gets 0, as in
TRL. All is computed in float64 from float32 rewards: the mean of equal rewards is then exact, so
that a group of them gets exactly 0, and not a rounding error divided by `eps`.

G groups, R completions of each: the rollouts of a prompt or, where both orders of a pair make a
group, those of one order and then those of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jlrm.config import AdvantageConfig


class Paid(NamedTuple):
    """One reward of each completion of some groups."""

    rewards: Float[np.ndarray, "G R"]  # 0 where there is none
    is_paid: Bool[np.ndarray, "G R"]
    lengths: Int[np.ndarray, "G R"]  # of completions, in tokens
    greedy: Float[np.ndarray, "G R"]  # reward of the greedy completion of the same prompt, or 0


def group_mean(paid: Paid) -> Float[np.ndarray, "G 1"]:
    """Return the mean reward of the group (GRPO)."""
    return _mean(paid.rewards, paid.is_paid, axis=1)


def leave_one_out(paid: Paid) -> Float[np.ndarray, "G R"]:
    """Return the mean reward of the others of the group (RLOO, arXiv 2402.14740, Section 3.3)."""
    num_others = paid.is_paid.sum(axis=1, keepdims=True) - 1
    total = paid.rewards.sum(axis=1, keepdims=True)
    # The only one of its group is compared with itself.
    return np.where(num_others > 0, (total - paid.rewards) / np.maximum(num_others, 1), total)


def length_weighted(paid: Paid) -> Float[np.ndarray, "G 1"]:
    """Return the group's mean weighted by length (OPO, arXiv 2505.23585, Eq. 10)."""
    return _mean(paid.rewards, paid.is_paid * paid.lengths, axis=1)


def greedy(paid: Paid) -> Float[np.ndarray, "G R"]:
    """Return the reward of the prompt's greedy completion (ReMax, arXiv 2310.10505, Eq. 4)."""
    return paid.greedy


def nothing(paid: Paid) -> Float[np.ndarray, "G R"]:
    """Return 0 (REINFORCE++, arXiv 2501.03262, where whitening over the batch comes after)."""
    return np.zeros_like(paid.rewards)


# A new baseline is one function above and a line here; `AdvantageConfig.baseline` lists the names.
BASELINES: dict[str, Callable[[Paid], np.ndarray]] = {
    "group": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted": length_weighted,
    "greedy": greedy,
    "none": nothing,
}


def advantages(
    config: AdvantageConfig,
    terms: Mapping[str, Float[np.ndarray, "G R"]],
    lengths: Int[np.ndarray, "G R"] | None = None,
    num_orders: int = 1,
    greedy: Mapping[str, Float[np.ndarray, "G R"]] | None = None,
) -> Float[np.ndarray, "G R"]:
    """Return the advantage of each completion.

    Args:
      terms: rewards by name, each compared by itself; the results are summed with the weights of
        `term_weights`, 1 unless given. One total reward, or its terms (GDPO, arXiv 2601.05242).
      lengths: of completions, in tokens; None: all alike.
      num_orders: how many equal parts a group has, one for each order of its pair. Rewards are
        compared within the whole group, within its parts, or both, which are then summed (EIS-GRPO,
        arXiv 2505.13346), as `orders` says.
      greedy: for the baseline of that name, the same of the greedy completion of each one's prompt.
        Where that earns nothing (NaN) it counts as 0.
    """
    rewards = {
        name: np.asarray(each, np.float32).astype(np.float64) for name, each in terms.items()
    }
    shape = next(iter(rewards.values())).shape
    lengths = np.ones(shape, np.int64) if lengths is None else np.asarray(lengths)
    total = np.zeros(shape)
    for name, values in rewards.items():
        weight = config.term_weights.get(name, 1.0)
        beside = np.nan_to_num(greedy[name]) if greedy else np.zeros(shape)
        for num_parts in _parts(config, num_orders):
            parts = (x.reshape(shape[0] * num_parts, -1) for x in (values, lengths, beside))
            total += weight * _compared(config, *parts).reshape(shape)
    is_paid = np.any([~np.isnan(each) for each in rewards.values()], axis=0)
    return _whitened(config, total, is_paid, lengths).astype(np.float32)


def is_informative(
    config: AdvantageConfig, terms: Mapping[str, Float[np.ndarray, "G R"]], num_orders: int = 1
) -> Bool[np.ndarray, " G"]:
    """Return which groups have two rewards that differ, among those that are compared."""
    found = []
    for values in terms.values():
        parts = values.reshape(len(values), max(_parts(config, num_orders)[:1]), -1)
        # fmax and fmin pass over NaN, and give it where there is nothing else: no comparison holds.
        found.append(np.fmax.reduce(parts, axis=2) > np.fmin.reduce(parts, axis=2))
    return np.any(found, axis=(0, 2))


def _parts(config: AdvantageConfig, num_orders: int) -> tuple[int, ...]:
    """Return into how many parts a group is divided, for each comparison that is made."""
    choices = {"together": (1,), "apart": (num_orders,), "summed": (1, num_orders)}
    return choices[config.orders]


def _compared(
    config: AdvantageConfig,
    rewards: Float[np.ndarray, "G R"],
    lengths: Int[np.ndarray, "G R"],
    greedy: Float[np.ndarray, "G R"],
) -> Float[np.ndarray, "G R"]:
    """Return `(reward - baseline) / (deviation + eps)`.

    The deviation is the sample's (ddof 1), as in TRL (eps 1e-4) and verl (eps 1e-6): of the
    "group", of the whole "batch", or "none" (Dr. GRPO, arXiv 2503.20783, Section 3.2). Where it is
    0 nothing differs, and the advantage is 0.
    """
    is_paid = ~np.isnan(rewards)
    paid = Paid(np.where(is_paid, rewards, 0.0), is_paid, lengths, greedy)
    centred = np.where(is_paid, paid.rewards - BASELINES[config.baseline](paid), 0.0)
    if config.scale == "none":
        return centred
    deviation = _deviation(paid.rewards, is_paid, axis=1 if config.scale == "group" else None)
    return _divided(centred, deviation, config.eps)


def _whitened(
    config: AdvantageConfig,
    values: Float[np.ndarray, "G R"],
    is_paid: Bool[np.ndarray, "G R"],
    lengths: Int[np.ndarray, "G R"],
) -> Float[np.ndarray, "G R"]:
    """Return values of mean 0 and deviation 1 over the batch's completions, or over its tokens."""
    if config.whiten == "none":
        return values
    weights = is_paid * (lengths if config.whiten == "tokens" else 1)
    centred = np.where(is_paid, values - _mean(values, weights), 0.0)
    return _divided(centred, _deviation(values, weights), config.eps)


def _mean(values: np.ndarray, weights: np.ndarray, axis: int | None = None) -> np.ndarray:
    total = np.sum(values * weights, axis=axis, keepdims=True)
    return total / np.maximum(np.sum(weights, axis=axis, keepdims=True), 1)


def _deviation(values: np.ndarray, weights: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the standard deviation of values that occur `weights` times, with ddof 1."""
    squares = np.square(values - _mean(values, weights, axis))
    total = np.sum(squares * weights, axis=axis, keepdims=True)
    return np.sqrt(total / np.maximum(np.sum(weights, axis=axis, keepdims=True) - 1, 1))


def _divided(centred: np.ndarray, deviation: np.ndarray, eps: float) -> np.ndarray:
    is_spread = deviation > 0
    return np.where(is_spread, centred / np.where(is_spread, deviation + eps, 1.0), 0.0)
