"""What a GRPO step holds beside each of its programs, as the loop of training/grpo.py keeps it."""

from __future__ import annotations

from collections.abc import Mapping

from jlrm.config import Config
from jlrm.planning.memory import (
    BATCH,
    LAID_OUT,
    MOMENTS,
    REFERENCE,
    WEIGHTS,
    Held,
    Point,
    laid_out_bytes,
    total,
)
from jlrm.sampling.policy import Network


def grpo_points(
    config: Config, network: Network, kinds: Mapping[str, Held]
) -> dict[str, list[Point]]:
    """Return the moments of each phase; `kinds` are the arguments of the stage's programs."""
    grpo = config.grpo
    held = {kind: kinds["update"][kind] for kind in (WEIGHTS, MOMENTS)}
    moments = {MOMENTS: held[MOMENTS]}
    one = kinds["update"][BATCH]
    others, batch = {BATCH: (grpo.minibatches - 1) * one}, {BATCH: grpo.minibatches * one}
    reference = {}
    if "logprobs_reference" in kinds:
        reference = {REFERENCE: kinds["logprobs_reference"][REFERENCE]}
    always = {**held, **reference}
    laid_out = {LAID_OUT: laid_out_bytes(network, config.sampling.weights == "int8")}
    during = _during_rollout(config, network, always, laid_out, batch)
    return {
        "load": [
            Point("init_optimizer", {}),
            Point("", always),
            # A run that goes on reads its first weights once more, for the reference.
            *([Point("freeze", moments), Point("freeze", held)] if reference else []),
        ],
        "rollout": [Point("lay_out", {**moments, **reference}), Point("rollout", during)],
        "logprobs": [*_logprobs(kinds, held, reference, batch), Point("", total(always, batch))],
        "update": [
            Point("update", total(reference, laid_out if grpo.ahead == "next" else {}, others))
        ],
        "evaluation": [Point("evaluation", always)],
        "checkpoint": [Point("", always) if grpo.ahead == "none" else Point("rollout", during)],
    }


def _during_rollout(
    config: Config, network: Network, always: Held, laid_out: Held, batch: Held
) -> Held:
    """Return what is there while a rollout runs, with what has been dispatched behind it."""
    during = dict(always)
    if config.grpo.ahead != "none":  # evaluation's weights, or those of a second rollout
        behind = {LAID_OUT: laid_out_bytes(network, False)}
        during = total(during, max(behind, laid_out, key=lambda kinds: kinds[LAID_OUT]))
    return total(during, batch) if config.grpo.ahead == "stale" else during


def _logprobs(kinds: Mapping[str, Held], held: Held, reference: Held, batch: Held) -> list[Point]:
    """Return the moments at which log-probabilities are computed, one minibatch at a time."""
    beside = {
        "logprobs_reference": held,
        "logprobs_policy": {MOMENTS: held[MOMENTS], **reference},
    }
    return [
        Point(name, {**others, BATCH: batch[BATCH] - kinds[name][BATCH]})
        for name, others in beside.items()
        if name in kinds
    ]
