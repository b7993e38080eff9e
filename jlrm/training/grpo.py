"""GRPO, step by step as `train.py` numbers it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrm.config import Config
from jlrm.model.qwen import Params
from jlrm.rl.losses import importance_weights
from jlrm.runtime import hosts
from jlrm.training import rollouts
from jlrm.training.heldout import EvaluateFn
from jlrm.training.packing import Group
from jlrm.training.programs import (
    GRPOPrograms,
    Known,
    Minibatch,
    grpo_programs,
    needs_old_logprobs,
    pack_minibatch,
)
from jlrm.training.rollouts import StepBatch, make_sampler, table_rows
from jlrm.training.setup import Run, initial_params
from jlrm.training.stage import Stage, StageResult, floats, means
from jlrm.training.update import TrainState

log = logging.getLogger(__name__)


def grpo(run: Run, evaluate: EvaluateFn) -> StageResult:
    """Train by GRPO; the weights it begins from are also the frozen reference."""
    config, (width, _) = run.config.grpo, run.data.train.longest
    sample = make_sampler(run.config, run.policy, width)
    programs = grpo_programs(run.config, run.policy, width)
    initial = partial(initial_params, run, "grpo")
    with Stage(run, "grpo", programs.optimizer, initial, evaluate, _names(run.config)) as stage:
        reference = None
        if config.loss.kl_weight:
            reference = programs.freeze(initial() if stage.is_resumed else stage.state.params)
        stage.evaluate_start()

        def begin(position: int) -> rollouts.Started:
            return rollouts.start(run, sample, programs.lay_out(stage.state.params), position)

        started = None
        for step in stage:
            is_last = step + 1 == config.steps

            # 1, 2. Take prompts, and sample a group of judgements for each.
            with stage.timed("rollout"):
                started = started or begin(stage.position)
                ahead = None
                if config.ahead == "stale" and not is_last:
                    ahead = begin(stage.position + 1)

            # 3, 4. Read verdicts, pay rewards, compare each judgement with its group.
            drawn = rollouts.draw(run, begin, started, stage.timed)
            parts = _minibatches(run, programs.sizes, drawn)

            # 5. Log-probabilities of the reference, and of the policy where they are needed.
            with stage.timed("logprobs"):
                parts, gap = _logprobs(run, programs, stage.state.params, reference, parts)

            # 6. Optimise. The next rollout is dispatched before anything here waits for the update.
            with stage.timed("update"):
                stage.state, reports = _optimise(programs, stage.state, parts, config.epochs)
            if config.ahead == "next" and not is_last:
                ahead = begin(stage.position + drawn.num_draws)
            started = ahead
            with stage.timed("update"):
                values = means(reports)  # waits for the devices

            # 7. Log; where it is time, judge the held-out set and save.
            update_gap = values.pop("old_logp_gap")
            values["rollout/logprob_gap"] = update_gap if gap is None else gap
            values |= drawn.metrics | means([part.packing for part in parts])
            values |= floats({"learning_rate": programs.rate(int(stage.state.step) - 1)})
            _log_completions(run, stage, step, drawn)
            stage.finish(values, drawn.num_tokens, drawn.num_draws)
    return stage.outcome()


def _names(config: Config) -> list[str]:
    """Return the programs of a step, for people to read."""
    has_logprobs = config.grpo.loss.kl_weight or needs_old_logprobs(config)
    return ["rollout", *(["log-probabilities"] if has_logprobs else []), "update"]


def _log_completions(run: Run, stage: Stage, step: int, drawn: StepBatch) -> None:
    """Write the judgements of this step for people to read, if its turn has come."""
    every, is_last = run.config.run.completions_every, step + 1 == run.config.grpo.steps
    if every and hosts.is_main() and (step % every == 0 or is_last):
        stage.tracker.log_completions(step + 1, table_rows(drawn.batch))


def _minibatches(run: Run, sizes: list[int], drawn: StepBatch) -> list[Minibatch]:
    """Pack the batch, a minibatch of whole groups at a time; old log-probabilities are sampled."""
    config, batch, num_rollouts = run.config.grpo, drawn.batch, run.config.grpo.rollouts
    is_kept = drawn.is_learned
    if config.loss.mask_truncated:
        is_kept = is_kept & batch.sampled.is_finished
    parts = []
    for chosen in np.split(np.arange(len(batch.examples)), config.minibatches):
        sampled = batch.sampled.take(chosen.tolist())
        whole = [
            Group(batch.examples[chosen[i]].prompt_ids, sampled.ids[i : i + num_rollouts])
            for i in range(0, len(chosen), num_rollouts)
        ]
        known = Known(sampled.logps, batch.advantages[chosen], is_kept[chosen])
        parts.append(
            pack_minibatch(run.policy.training, sizes, whole, known, config.loss.aggregation)
        )
    return parts


def _logprobs(
    run: Run,
    programs: GRPOPrograms,
    params: Params,
    reference: Params | None,
    parts: list[Minibatch],
) -> tuple[list[Minibatch], float | None]:
    """Add old and reference log-probabilities; return how far the sampler's are from the old ones.

    With a single optimiser step the sampler's own are the old ones, and that step measures the gap
    itself.
    """
    gap, cap = None, run.config.grpo.loss.importance_cap
    if needs_old_logprobs(run.config):
        scored = [_with(part, old_logp=programs.logprobs(params, part.rows)[0]) for part in parts]
        gap = _mean_gap(parts, scored)
        if cap:
            scored = [_weighed(*pair, cap) for pair in zip(parts, scored, strict=True)]
        parts = scored
    if reference is not None:
        parts = [_with(part, ref_logp=programs.logprobs(reference, part.rows)[0]) for part in parts]
    return jax.block_until_ready(parts), gap


def _with(part: Minibatch, **targets: Any) -> Minibatch:
    return part._replace(targets=part.targets._replace(**targets))


def _weighed(sampled: Minibatch, scored: Minibatch, cap: float) -> Minibatch:
    """Weigh tokens by how much likelier the policy makes them than the sampler did, up to `cap`."""
    correction = importance_weights(scored.targets.old_logp, sampled.targets.old_logp, cap)
    return _with(scored, weights=scored.targets.weights * correction)


def _mean_gap(sampled: list[Minibatch], scored: list[Minibatch]) -> float:
    total = num_tokens = 0.0
    for before, after in zip(sampled, scored, strict=True):
        mask = before.targets.mask
        gap = jnp.abs(before.targets.old_logp - after.targets.old_logp)
        total += float(jnp.sum(gap, where=mask))
        num_tokens += int(jnp.sum(mask))
    return total / max(num_tokens, 1)


def _optimise(
    programs: GRPOPrograms, state: TrainState, parts: list[Minibatch], epochs: int
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """Take an optimiser step on every minibatch, `epochs` times; return the metrics of each."""
    reports = []
    for part in parts * epochs:
        state, metrics = programs.update(state, part.rows, part.targets)
        reports.append(metrics)
    return state, reports
