"""DPO: what is preferred becomes likelier than the other, measured against the frozen start.

A step:

 1. Take prompts, each with what is preferred and the other. They are written down (the answers of a
    comparison, or its gold verdict and the opposite), or sampled by the policy as it is now: of
    several judgements of a prompt the best paid and the worst paid. A prompt whose judgements are
    paid alike prefers nothing, and is no part of the step.
 2. Pack them: the prompt stands once, before both of its completions.
 3. Log-probabilities of the reference.
 4. One optimiser step on the loss of pairs (rl/preferences.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jlrm.data import audit, batches
from jlrm.data.audit import Draws
from jlrm.data.batches import Examples
from jlrm.data.comparisons import describe_dropped, write_dropped
from jlrm.model import lora
from jlrm.model.qwen import Params
from jlrm.rl.preferences import PairTargets
from jlrm.runtime import hosts
from jlrm.training import packing, replay, scoring
from jlrm.training.heldout import EvaluateFn
from jlrm.training.packing import Group
from jlrm.training.recipes.pair_programs import (
    DPOPrograms,
    dpo_calls,
    dpo_programs,
    longest_pair,
)
from jlrm.training.recipes.pair_texts import encode_pairs
from jlrm.training.rollouts import make_sampler
from jlrm.training.scoring import mean_logged, rewards_of
from jlrm.training.setup import Run, initial_params
from jlrm.training.stage import Stage, StageResult, floats

log = logging.getLogger(__name__)


class PairBatch(NamedTuple):
    """The pairs of a step, what became of the rows they were drawn from, and metrics of that."""

    pairs: list[Group]  # a prompt, what is preferred, and the other
    draws: Draws
    num_tokens: int
    metrics: dict[str, float]
    logged: Sequence[tuple[str, float]] = ()  # by plug-ins


def dpo(run: Run, evaluate: EvaluateFn) -> StageResult:
    """Prefer judgements, verdicts or answers to others, by the settings of the section `dpo`."""
    config, policy = run.config.dpo, run.policy
    examples = pairs_of(run, "dpo", config.pairs) if not config.is_sampled else None
    longest = examples.longest if examples else longest_pair(run.config, run.data.train.longest[0])
    programs, initial = dpo_programs(run.config, policy, longest), partial(initial_params, run)
    draw = partial(_written, run, examples) if examples else _sampled(run, programs)
    names = ["update"] if examples else ["rollout", "update"]
    with Stage(run, "dpo", programs.optimizer, partial(initial, "dpo"), evaluate, names) as stage:
        if examples:
            stage.num_rows = len(examples)
        stage.compile_ahead(lambda: dpo_calls(run.config, policy, longest[0], programs, longest[1]))
        reference = None
        if config.reference == "start":
            base = stage.state.base
            start = initial("dpo", base) if stage.is_resumed else stage.state.params
            reference = programs.freeze(start)
        stage.evaluate_start()
        for _ in stage:
            drawn = draw(stage)
            values, learned = _learn(run, programs, stage, reference, drawn.pairs)
            values |= floats({"learning_rate": programs.rate(max(int(stage.state.step) - 1, 0))})
            values |= drawn.metrics
            values |= mean_logged(drawn.logged, values)
            stage.finish(values, drawn.num_tokens, learned, drawn.draws)
    return stage.outcome()


def _learn(
    run: Run,
    programs: DPOPrograms,
    stage: Stage,
    reference: Params | None,
    pairs: Sequence[Group],
) -> tuple[dict[str, float], list[replay.Batch]]:
    """Take an optimiser step on pairs, or none without any; return metrics and the batch."""
    if not pairs:
        return {"loss": 0.0, "grad_norm": 0.0}, []
    layout = run.policy.training
    packed = packing.pack(pairs, programs.sizes, layout.mesh.size, is_whole=True)
    targets = PairTargets._make((None, packed.is_target, np.array(len(pairs), np.float32)))
    rows, targets = packing.to_devices(layout, (packed.rows, targets))
    if reference is not None:
        with stage.timed("logprobs"):
            frozen = lora.join(stage.state.base, reference)
            ref_logp, _ = programs.logprobs(frozen, rows)
            targets = targets._replace(ref_logp=jax.block_until_ready(ref_logp))
    with stage.timed("update"):
        stage.state, values = programs.update(stage.state, rows, targets)
        values = floats(values)  # waits for the devices
    return values | packed.metrics, [(rows, targets)]


def pairs_of(run: Run, stage: str, kind: str) -> Examples:
    """Return the training rows as pairs, and say which were left out."""
    settings, policy = getattr(run.config, stage), run.policy
    limit, end, scale = settings.max_target_tokens, policy.end_ids[0], run.config.reward.scale
    examples = encode_pairs(run.data.train, policy.tokenizer, kind, limit, end, scale, stage)
    if examples.dropped:
        log.warning("%s: left out %s", stage, describe_dropped(examples.dropped))
    if hosts.is_main():
        write_dropped(examples.dropped, run.directory.path / f"dropped_{stage}.jsonl")
    return examples


def _written(run: Run, examples: Examples, stage: Stage) -> PairBatch:
    """Return the pairs at the stage's position in the data."""
    seed, size = run.config.run.seed, run.config.dpo.batch_size
    rows = batches.batch_rows(seed, stage.position, size, len(examples), stage.stream)
    pairs = [
        Group(each.prompt_ids, [each.target_ids, each.other_ids]) for each in examples.take(rows)
    ]
    num_tokens = sum(len(pair.prompt) + sum(len(ids) for ids in pair.completions) for pair in pairs)
    draws = Draws(len(examples), [rows.tolist()], [[audit.TRAINED] * size])
    return PairBatch(pairs, draws, num_tokens, {})


def _sampled(run: Run, programs: DPOPrograms) -> Callable[[Stage], PairBatch]:
    """Return what samples judgements and pairs the best paid of each prompt with the worst paid."""
    config, data = run.config.dpo, run.data.train
    sample = make_sampler(run.config, run.policy, data.longest[0], config.rollouts)

    def draw(stage: Stage) -> PairBatch:
        seed, size = run.config.run.seed, config.batch_size
        rows = batches.batch_rows(seed, stage.position, size, len(data), stage.stream)
        with stage.timed("rollout"):
            prompts = data.take(rows)
            sampled = sample(programs.lay_out(stage.state.weights), prompts, stage.position)()
        examples = [prompt for prompt in prompts for _ in range(config.rollouts)]
        with stage.timed("reward"):
            judgements, logged = scoring.judge(
                run, examples, sampled.ids, stage.progress, config.rollouts
            )
        paid = rewards_of(judgements).reshape(size, -1)
        chosen = [best_and_worst(row) for row in paid]
        pairs = [
            Group(prompt.prompt_ids, [sampled.ids[i * config.rollouts + j] for j in pair])
            for i, (prompt, pair) in enumerate(zip(prompts, chosen, strict=True))
            if pair
        ]
        fates = [audit.TRAINED if pair else audit.SKIPPED for pair in chosen]
        metrics = scoring.metrics(judgements, sampled.lengths, sampled.is_finished)
        metrics["frac_reward_zero_std"] = 1 - len(pairs) / size
        num_tokens = sum(len(each.prompt_ids) for each in prompts) + int(sampled.lengths.sum())
        return PairBatch(
            pairs, Draws(len(data), [rows.tolist()], [fates]), num_tokens, metrics, logged
        )

    return draw


def best_and_worst(paid: np.ndarray) -> tuple[int, int] | None:
    """Return the places of the highest and the lowest reward, the first of equal ones.

    None: no two differ. NaN, a completion that no reward applies to, is neither.
    """
    if np.isnan(paid).all() or np.nanmax(paid) == np.nanmin(paid):
        return None
    return int(np.nanargmax(paid)), int(np.nanargmin(paid))
