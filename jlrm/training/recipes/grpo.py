"""GRPO, step by step as `train.py` numbers it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from jlrm.config import Config, GRPOConfig, LossConfig
from jlrm.model import lora
from jlrm.model.qwen import Params
from jlrm.rl.losses import completion_mask, covariance_tokens, importance_weights
from jlrm.runtime import hosts
from jlrm.runtime.mesh import host_array, replicate
from jlrm.training import packing, rollouts
from jlrm.training.heldout import EvaluateFn
from jlrm.training.packing import Group
from jlrm.training.programs import (
    GRPOPrograms,
    Known,
    Minibatch,
    grpo_calls,
    grpo_programs,
    needs_old_logprobs,
    pack_minibatch,
    weighs_policy_alone,
)
from jlrm.training.rollouts import StepBatch, make_sampler, table_rows
from jlrm.training.scoring import mean_logged
from jlrm.training.setup import Run, initial_params
from jlrm.training.stage import Stage, StageResult, floats, means
from jlrm.training.update import TrainState


def grpo(run: Run, evaluate: EvaluateFn) -> StageResult:
    """Train by GRPO; the weights it begins from are also the frozen reference."""
    config, (width, _) = run.config.grpo, run.data.train.longest
    sample = make_sampler(run.config, run.policy, width, config.rollouts)
    programs = grpo_programs(run.config, run.policy, width)
    initial = partial(initial_params, run, "grpo")
    with Stage(run, "grpo", programs.optimizer, initial, evaluate, _names(run.config)) as stage:
        stage.compile_ahead(lambda: grpo_calls(run.config, run.policy, width, programs))
        reference = None
        if config.has_reference:
            first = initial(stage.state.base) if stage.is_resumed else stage.state.params
            reference = programs.freeze(first)
        stage.evaluate_start()

        def begin(position: int) -> rollouts.Started:
            weights = programs.lay_out(stage.state.weights)
            return rollouts.start(run, sample, weights, position, stage.stream)

        started = None
        if stage.carried:
            started = rollouts.restored(run, stage.carried, stage.stream)
        for step in stage:
            is_last = step + 1 == config.steps

            # 1, 2. Take prompts, and sample a group of judgements for each.
            with stage.timed("rollout"):
                started = started or begin(stage.position)
                ahead = None
                if config.ahead == "stale" and not is_last:
                    ahead = begin(stage.position + 1)

            # 3, 4. Read verdicts, pay rewards, compare each judgement with its group.
            drawn = rollouts.draw(run, begin, started, stage.timed, stage.progress)
            parts, is_trained = _minibatches(run, programs.sizes, drawn, step)

            # 5. Log-probabilities of the reference, and of the policy where they are needed.
            with stage.timed("logprobs"):
                parts, gap = _logprobs(run, programs, stage.state, reference, parts)
                if config.advantage.kl_weight:
                    parts, drawn = less_divergence(run, parts, drawn)

            # 6. Optimise. The next rollout is dispatched before anything here waits for the update.
            with stage.timed("update"):
                stage.state, reports = _optimise(programs, stage.state, parts, config.epochs)
            if config.ahead == "next" and not is_last:
                ahead = begin(stage.position + drawn.num_draws)
            started = ahead
            # The weights that a stale one is drawn from are no more: a checkpoint holds it.
            stage.carry = None
            if started is not None and config.ahead == "stale":
                stage.carry = partial(rollouts.saved, started)
            with stage.timed("update"):
                num_tokens = [part.num_tokens for part in parts] * config.epochs
                # Waits for the devices.
                values = merged(reports, num_tokens, config.loss.aggregation)

            # 7. Log; where it is time, judge the held-out set and save.
            own_gap = values.pop("old_logp_gap", None)
            gap = own_gap if gap is None else gap
            values |= {} if gap is None else {"rollout/logprob_gap": gap}
            values |= floats({"learning_rate": programs.rate(max(int(stage.state.step) - 1, 0))})
            values |= _of_batch(config, drawn, parts)
            values |= mean_logged(drawn.batch.logged, values)
            _log_completions(run, stage, step, drawn)
            learned = [(part.rows, part.targets) for part in parts]
            stage.finish(values, drawn.num_tokens, learned, drawn.draws(is_trained))
    return stage.outcome()


def _names(config: Config) -> list[str]:
    """Return the programs of a step, for people to read."""
    has_logprobs = config.grpo.has_reference or needs_old_logprobs(config)
    return ["rollout", *(["log-probabilities"] if has_logprobs else []), "update"]


def _of_batch(config: GRPOConfig, drawn: StepBatch, parts: list[Minibatch]) -> dict[str, float]:
    """Return what is logged of a batch and its packing."""
    values = drawn.metrics | means([part.packing for part in parts])
    if num_skipped := config.minibatches - len(parts):
        values["minibatches/skipped"] = num_skipped
    return values


def _log_completions(run: Run, stage: Stage, step: int, drawn: StepBatch) -> None:
    """Write the judgements of this step for people to read, if its turn has come."""
    every, is_last = run.config.run.completions_every, step + 1 == run.config.grpo.steps
    if every and hosts.is_main() and (step % every == 0 or is_last):
        stage.tracker.log_completions(step + 1, table_rows(drawn.batch))


def _minibatches(
    run: Run, sizes: list[int], drawn: StepBatch, step: int
) -> tuple[list[Minibatch], Bool[np.ndarray, " B"]]:
    """Pack the batch, a minibatch of whole groups at a time; old log-probabilities are sampled.

    Also returns which rows of the batch are trained on.

    A minibatch with nothing to learn from is left out: a step on it would have no gradient, and yet
    weight decay and momentum would move the weights.
    """
    config, batch, num_rollouts = run.config.grpo, drawn.batch, run.config.grpo.rollouts
    is_kept = drawn.is_learned
    if config.loss.mask_truncated:
        is_kept = is_kept & batch.sampled.is_finished
    parts, is_trained = [], np.zeros_like(is_kept)
    for chosen in np.split(np.arange(len(batch.examples)), config.minibatches):
        sampled = batch.sampled.take(chosen.tolist())
        whole = [
            Group(batch.examples[chosen[i]].prompt_ids, sampled.ids[i : i + num_rollouts])
            for i in range(0, len(chosen), num_rollouts)
        ]
        known = Known(sampled.logps, batch.advantages[chosen], is_kept[chosen])
        if config.loss.singles_out:
            mask = completion_mask(sampled.lengths, sampled.logps.shape[1])
            mask &= known.is_kept[:, None]
            seed = run.config.run.seed, step, len(parts)
            singled = covariance_tokens(config.loss, *known[:2], mask, seed)
            known = known._replace(is_singled=singled)
        if has_gradient(config.loss, known) or (config.advantage.kl_weight and any(known.is_kept)):
            is_trained[chosen] = known.is_kept
            part = pack_minibatch(run.policy, sizes, whole, known, config.loss.aggregation)
            numbers = np.where(part.completion < 0, -1, chosen[part.completion])
            parts.append(part._replace(completion=numbers))
    return parts, is_trained


def has_gradient(loss: LossConfig, known: Known) -> bool:
    """Return whether the loss of these completions has a gradient.

    It has none where all are out of the loss, and without the KL and the entropy term none where no
    advantage is left. All hosts know all completions, so they agree.
    """
    advantages = known.advantages[known.is_kept]
    has_other_terms = bool(loss.kl_weight or loss.entropy_weight)
    return bool(advantages.any()) or (has_other_terms and len(advantages) > 0)


def _logprobs(
    run: Run,
    programs: GRPOPrograms,
    state: TrainState,
    reference: Params | None,
    parts: list[Minibatch],
) -> tuple[list[Minibatch], float | None]:
    """Add old and reference log-probabilities; return how far the sampler's are from the old ones.

    With a single optimiser step the sampler's own are the old ones, and that step measures the gap
    itself.
    """
    gap = None
    if parts and needs_old_logprobs(run.config):
        weights = state.weights
        scored = [_with(part, old_logp=programs.logprobs(weights, part.rows)[0]) for part in parts]
        gap = _mean_gap(parts, scored)
        if run.config.grpo.loss.importance_cap:
            pairs = zip(parts, scored, strict=True)
            scored = [_weighed(run.config, *pair) for pair in pairs]
        parts = scored
    if reference is not None:
        # Adapters have the policy's own base, which an update gives back as it was: no second copy.
        frozen = lora.join(state.base, reference)
        parts = [_with(part, ref_logp=programs.logprobs(frozen, part.rows)[0]) for part in parts]
    return jax.block_until_ready(parts), gap


def less_divergence(
    run: Run, parts: list[Minibatch], drawn: StepBatch
) -> tuple[list[Minibatch], StepBatch]:
    """Lower rewards by the policy's distance from the reference, and compare them again."""
    layout, distance = run.policy.training, np.zeros(len(drawn.is_learned))
    for part in parts:
        assert part.targets.ref_logp is not None
        gap = replicate(layout, part.targets.old_logp - part.targets.ref_logp)
        is_target = part.completion >= 0
        np.add.at(distance, part.completion[is_target], host_array(gap)[is_target])
    penalty = run.config.grpo.advantage.kl_weight * distance
    gains = rollouts.advantages_of(run, drawn, penalty)
    compared = []
    for part in parts:
        placed = np.where(part.completion < 0, np.float32(0), gains[part.completion])
        compared.append(_with(part, advantages=packing.to_devices(layout, placed)))
    values = drawn.metrics | {"rewards/kl/mean": -float(penalty.mean())}
    return compared, drawn._replace(batch=drawn.batch._replace(advantages=gains), metrics=values)


def _with(part: Minibatch, **targets: Any) -> Minibatch:
    return part._replace(targets=part.targets._replace(**targets))


def _weighed(config: Config, sampled: Minibatch, scored: Minibatch) -> Minibatch:
    """Weigh tokens by how much likelier the policy makes them than the sampler, within bounds."""
    log_ratio = scored.targets.old_logp - sampled.targets.old_logp
    places = scored.targets.mask, scored.rows.sequence
    correction = importance_weights(config.grpo.loss, log_ratio, *places)
    if weighs_policy_alone(config):
        return _with(scored, importance=correction)
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


def merged(
    reports: Sequence[dict[str, Any]], num_tokens: Sequence[int], aggregation: str
) -> dict[str, float]:
    """Return the metrics of a step's updates, on so many tokens each, as one.

    A metric that is a mean over tokens is the mean over the tokens of all of them, and so is the
    loss under "token_mean". Otherwise the loss, and always the norm of the gradient, is the mean
    over updates. Without an update both are 0, and there are no others.
    """
    reports = jax.device_get(list(reports))
    if not reports:
        return {"loss": 0.0, "grad_norm": 0.0}
    by_update = ("grad_norm",) if aggregation == "token_mean" else ("grad_norm", "loss")
    return {
        name: float(
            np.average(
                np.array([each[name] for each in reports], np.float64),
                weights=None if name in by_update else num_tokens,
            )
        )
        for name in reports[0]
    }
