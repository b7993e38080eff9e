"""Losses of pairs: a text that is preferred, and another of the same prompt.

Both stand whole in one packed row, the preferred one as sequence 2i and the other as 2i+1, so that
a pair is known where its tokens are. A loss is a mean over the pairs of the optimiser batch: each
row adds its own pairs, divided by the number of all. Letters as in mesh.py, with C over the targets
of a packed row, which has room for C sequences and C / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jlrm.config import DPOConfig
from jlrm.rl.losses import sequence_sums


class RewardTargets(NamedTuple):
    """What a reward model needs to know of the targets of packed rows."""

    is_last: Bool[Array, "*rows C"]  # where a sequence ends, and is scored
    label: Int[Array, "*rows C"]  # 1, 2, or 0 for a tie; of pairs in two sequences always 1
    num_items: Float[Array, ""]  # comparisons of the whole optimiser batch


class PairTargets(NamedTuple):
    """What DPO needs to know of the targets of packed rows beside their log-probabilities."""

    ref_logp: Float[Array, "*rows C"] | None  # None: nothing is compared with
    mask: Bool[Array, "*rows C"]
    num_pairs: Float[Array, ""]  # of the whole optimiser batch


PairLoss = Callable[[DPOConfig, Float[Array, "B pairs"]], Float[Array, "B pairs"]]


def sigmoid(settings: DPOConfig, margin: Float[Array, "B pairs"]) -> Float[Array, "B pairs"]:
    """Return `-(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)`.

    DPO (arXiv 2305.18290, Eq. 7), with a share s of wrong preferences (arXiv 2306.02858, cDPO).
    """
    smoothing, scaled = settings.label_smoothing, settings.beta * margin
    return -(1 - smoothing) * jax.nn.log_sigmoid(scaled) - smoothing * jax.nn.log_sigmoid(-scaled)


def ipo(settings: DPOConfig, margin: Float[Array, "B pairs"]) -> Float[Array, "B pairs"]:
    """Return `(m - 1 / (2 beta))^2` (IPO, arXiv 2310.12036, Eq. 17)."""
    return jnp.square(margin - 1 / (2 * settings.beta))


# A new loss of pairs is one function above and one line here; `DPOConfig.loss` lists the names.
PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "ipo": ipo}


def dpo_loss(
    settings: DPOConfig,
    logp: Float[Array, "B C"],
    targets: PairTargets,
    sequence: Int[Array, "B C"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the part that these rows have in the mean loss over pairs, and in means over pairs.

    The margin m of a pair is how much more likely, in nats, the preferred text has become against
    the reference than the other has. Metrics have the names of TRL's trainer.
    """
    logps = sequence_sums(logp, targets.mask, sequence)
    ratios = logps
    if targets.ref_logp is not None:
        ratios = logps - sequence_sums(targets.ref_logp, targets.mask, sequence)
    is_pair = sequence_sums(jnp.ones_like(logp), targets.mask, sequence)[:, ::2] > 0
    chosen, rejected = settings.beta * ratios[:, ::2], settings.beta * ratios[:, 1::2]
    margin = ratios[:, ::2] - ratios[:, 1::2]
    values = {
        "loss": PAIR_LOSSES[settings.loss](settings, margin),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (margin > 0).astype(jnp.float32),
        "logps/chosen": logps[:, ::2],
        "logps/rejected": logps[:, 1::2],
    }
    means = {
        name: jnp.sum(jnp.where(is_pair, value, 0.0)) / targets.num_pairs
        for name, value in values.items()
    }
    return means.pop("loss"), means


def bradley_terry(
    scores: Float[Array, "B C 1"], targets: RewardTargets, sequence: Int[Array, "B C"]
) -> tuple[Float[Array, "B pairs"], ...]:
    """Return the loss `-log sigmoid(m)` of each pair of sequences, its margin m, and where one is.

    Source: arXiv 2203.02155, Eq. 1.
    """
    sums = sequence_sums(scores[..., 0], targets.is_last, sequence)
    is_there = sequence_sums(jnp.ones_like(scores[..., 0]), targets.is_last, sequence)
    margin = sums[:, ::2] - sums[:, 1::2]
    return -jax.nn.log_sigmoid(margin), margin, is_there[:, ::2] > 0


def cross(
    scores: Float[Array, "B C 2"], targets: RewardTargets, sequence: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], ...]:
    """Return the same of sequences that hold both answers, each with a score of its own."""
    sign = jnp.where(targets.label == 1, 1.0, -1.0)
    margin = sign * (scores[..., 0] - scores[..., 1])
    return -jax.nn.log_sigmoid(margin), margin, targets.is_last


def classes(
    scores: Float[Array, "B C 3"], targets: RewardTargets, sequence: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], ...]:
    """Return the cross-entropy of the label, and how far its score is above all others."""
    is_label = jax.nn.one_hot(targets.label, scores.shape[-1], dtype=bool)
    own = jnp.sum(jnp.where(is_label, scores, 0.0), -1)
    others = jnp.max(jnp.where(is_label, -jnp.inf, scores), -1)
    return jax.nn.logsumexp(scores, -1) - own, own - others, targets.is_last


# By `RewardModelConfig.kind`.
REWARD_LOSSES = {"bradley_terry": bradley_terry, "cross": cross, "classes": classes}


def reward_loss(
    kind: str,
    scores: Float[Array, "B C labels"],
    targets: RewardTargets,
    sequence: Int[Array, "B C"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the part that these rows have in the mean loss over comparisons, and in other means.

    `accuracy` is the share of comparisons whose margin is above 0: a tie of scores is wrong.
    """
    losses, margin, is_item = REWARD_LOSSES[kind](scores, targets, sequence)
    values = {"loss": losses, "margin": margin, "accuracy": (margin > 0).astype(jnp.float32)}
    means = {
        name: jnp.sum(jnp.where(is_item, value, 0.0)) / targets.num_items
        for name, value in values.items()
    }
    return means.pop("loss"), means
