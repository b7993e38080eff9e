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


def sequence_sums(
    values: Float[Array, "B C"], mask: Bool[Array, "B C"], sequence: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """Return for each row the sums over its sequences, by their number; 0 where there is none."""

    def sums(values: Array, mask: Array, sequence: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(mask, values, 0.0), sequence, len(sequence))

    return jax.vmap(sums)(values, mask, sequence)
