"""Train a judge: `python -m jlrm.train --config FILE [section.key=value ...]`.

SFT, where asked for, imitates written judgements. Then each GRPO step does this:

 1. Take P comparisons; which ones is a function of the seed and of the batches drawn before.
 2. Lay the weights out for decoding and sample R judgements of each, with their log-probabilities.
 3. Read the verdicts and pay the rewards, term by term.
 4. Advantage: a judgement's reward against the others of its group. (1 to 4: groups.py)
 5. Log-probabilities: of the frozen reference, and of the policy where the sampler's will not do.
 6. One or more optimiser steps on the clipped policy loss with KL and entropy terms.
 7. Log; now and then judge the held-out set, and save.

Where this differs from JudgeLRM as published (each is a setting): rewards treat both answers alike
and read the completion alone; token means are global instead of per device; the loss is not divided
by an accumulation count without accumulation; overlong prompts are skipped instead of raising. With
one optimiser step per rollout the old log-probabilities are the sampler's own, so the ratio
corrects for whatever the two programs differ by; that gap is logged as `rollout/logprob_gap`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlrm import commands, groups, report, tracking, update
from jlrm.config import Config, load
from jlrm.data import batches
from jlrm.data.batches import Example
from jlrm.data.comparisons import describe_dropped, write_dropped
from jlrm.groups import Drawn
from jlrm.judging import (
    Evaluation,
    Sampled,
    SampleFn,
    make_evaluation,
    make_sampler,
    sampled_rows,
)
from jlrm.loop import Outcome, Stage
from jlrm.mesh import global_array, host_array
from jlrm.model import qwen
from jlrm.model.qwen import Params
from jlrm.rl.losses import PolicyLoss, token_weights
from jlrm.run import Run, grpo_params, initial_params, is_main_process, open_run
from jlrm.update import PolicyBatch, Sequences, TrainState

log = logging.getLogger(__name__)


def train(config: Config, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Run every stage that the config asks for, going on from where the run directory stands.

    Returns:
      The content of `summary.json`: held-out metrics per stage, and what the run cost.
    """
    run = open_run(config, devices)
    evaluate = make_evaluation(run)
    outcomes: dict[str, Outcome] = {}
    if config.sft.steps:
        outcomes["sft"] = sft(run, evaluate)
    if config.grpo.steps:
        outcomes["grpo"] = grpo(run, evaluate)
    first = next(iter(outcomes.values()))
    summary: dict[str, Any] = {"start": first.start} if first.start else {}
    summary |= {stage: outcome.evaluation for stage, outcome in outcomes.items()}
    summary |= {
        "steps": config.sft.steps + config.grpo.steps,
        "seconds": round(sum(outcome.seconds for outcome in outcomes.values()), 1),
        "tokens": sum(outcome.num_tokens for outcome in outcomes.values()),
    }
    if is_main_process():
        tracking.summary(run.dir, summary)
        report.write_report(run.dir)
    return summary


def sft(run: Run, evaluate: Evaluation) -> Outcome:
    """Imitate written judgements; the loss is on the judgement alone."""
    config = run.config.sft
    encoded = batches.encode_targets(
        run.train, run.tokenizer, config.max_target_tokens, run.end_ids[0], run.config.reward.scale
    )
    if encoded.dropped:
        log.warning("sft: left out %s", describe_dropped(encoded.dropped))
    if is_main_process():
        write_dropped(encoded.dropped, run.dir / "dropped_sft.jsonl")
    examples = encoded.examples
    widths = max(len(e.prompt_ids) for e in examples), max(len(e.target_ids) for e in examples)
    optimizer = update.make_optimizer(config.optimizer, config.steps)
    rate = update.learning_rate(config.optimizer, config.steps)
    step_fn = jax.jit(
        partial(update.sft_update, run.model, run.training, optimizer, config.micro_batches),
        donate_argnums=0,
    )
    initial = partial(initial_params, run)
    with Stage(run, "sft", config.steps, optimizer, initial, evaluate) as stage:
        if run.config.model.path:
            stage.evaluate_start()
        for step in stage:
            seed, position = run.config.run.seed, stage.position
            rows = batches.batch_rows(seed, position, config.batch_size, len(examples))
            chosen = [examples[row] for row in rows]
            sequences = _to_devices(run, chosen, *widths)
            with stage.timed("update"):
                weights = token_weights(update.batch_mask(sequences))
                stage.state, values = step_fn(stage.state, sequences, weights)
                values = _floats(values)
            num_tokens = sum(len(e.prompt_ids) + len(e.target_ids) for e in chosen)
            stage.finish({**values, **_floats({"learning_rate": rate(step)})}, num_tokens)
    return stage.outcome()


def grpo(run: Run, evaluate: Evaluation) -> Outcome:
    """Train by GRPO; the weights it begins from are also the frozen reference."""
    config = run.config.grpo
    programs = _grpo_programs(run)
    initial = partial(grpo_params, run)
    with Stage(run, "grpo", config.steps, programs.optimizer, initial, evaluate) as stage:
        reference = None
        if config.kl_weight:
            reference = _frozen(run, initial() if stage.is_resumed else stage.state.params)
        if run.config.model.path and not run.config.sft.steps:
            stage.evaluate_start()
        for step in stage:
            with stage.timed("rollout"):
                weights = programs.decode(stage.state.params)
            drawn = groups.draw(run, programs.sample, weights, stage.position, stage.timed)
            del weights
            batch = drawn.batch
            with stage.timed("logprobs"):
                old_logp, ref_logp, gap = _logprobs(
                    run, programs, stage.state.params, reference, batch.sampled
                )
            with stage.timed("update"):
                stage.state, values = _optimise(
                    run, programs, stage.state, drawn, old_logp, ref_logp
                )
            update_gap = values.pop("old_logp_gap")
            values |= drawn.metrics
            values["rollout/logprob_gap"] = update_gap if gap is None else gap
            values |= _floats({"learning_rate": programs.rate(int(stage.state.step) - 1)})
            every = run.config.run.completions_every
            if every and (step % every == 0 or step + 1 == config.steps):
                judgements = sampled_rows(
                    batch.examples, batch.sampled, batch.judged, batch.advantages
                )
                stage.tracker.log_completions(step + 1, judgements)
            stage.finish(values, drawn.num_tokens, drawn.num_draws)
    return stage.outcome()


class GRPOPrograms(NamedTuple):
    """Everything that a GRPO run compiles."""

    decode: Any  # params -> params laid out for decoding
    sample: SampleFn
    score: Any  # params, sequences -> log-probabilities, entropy
    update: Any  # state, batch -> state, metrics
    optimizer: optax.GradientTransformation
    rate: optax.Schedule


def _grpo_programs(run: Run) -> GRPOPrograms:
    config = run.config.grpo
    num_updates = config.steps * config.epochs * config.minibatches
    optimizer = update.make_optimizer(config.optimizer, num_updates)
    settings = PolicyLoss(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        ratio=config.ratio,
        kl_weight=config.kl_weight,
        entropy_weight=config.entropy_weight,
    )
    fixed = (run.model, run.training, run.distribution)
    step_fn = partial(update.grpo_update, *fixed, settings, optimizer, config.micro_batches)
    num_passes = config.minibatches * config.micro_batches
    width = max(len(example.prompt_ids) for example in run.train)
    return GRPOPrograms(
        decode=jax.jit(partial(qwen.decode_params, run.model, run.rollout)),
        sample=make_sampler(run, run.distribution, width),
        score=jax.jit(partial(update.score, *fixed, num_passes)),
        update=jax.jit(step_fn, donate_argnums=0),
        optimizer=optimizer,
        rate=update.learning_rate(config.optimizer, num_updates),
    )


def _logprobs(
    run: Run, programs: GRPOPrograms, params: Params, reference: Params | None, sampled: Sampled
) -> tuple[Any, Any, float | None]:
    """Return old and reference log-probabilities, and how far the sampler's are from the old ones.

    With a single optimiser step the sampler's own are the old ones, and that step measures the gap
    itself.
    """
    old_logp, gap = sampled.rollout.logps, None
    if run.config.grpo.epochs * run.config.grpo.minibatches > 1:
        old_logp, _ = programs.score(params, sampled.sequences)
        is_token = host_array(update.batch_mask(sampled.sequences))
        gap = float(
            np.abs(host_array(old_logp) - host_array(sampled.rollout.logps))[is_token].mean()
        )
    if reference is None:
        return old_logp, None, gap
    ref_logp, _ = programs.score(reference, sampled.sequences)
    return old_logp, jax.block_until_ready(ref_logp), gap


def _optimise(
    run: Run,
    programs: GRPOPrograms,
    state: TrainState,
    drawn: Drawn,
    old_logp: Any,
    ref_logp: Any,
) -> tuple[TrainState, dict[str, float]]:
    """Take `epochs` passes of `minibatches` optimiser steps; return the mean of their metrics."""
    config, by_row = run.config.grpo, run.training.activation("B")
    batch, is_kept = drawn.batch, drawn.is_learned
    if config.mask_truncated:
        is_kept = is_kept & batch.sampled.is_finished
    sequences = batch.sampled.sequences
    whole = (
        sequences,
        old_logp,
        ref_logp,
        global_array(batch.advantages, by_row),
        update.batch_mask(sequences, global_array(is_kept, by_row)),
    )
    per_step = []
    for _ in range(config.epochs):
        for i in range(config.minibatches):
            part = _minibatch(run, whole, i)
            weighted = PolicyBatch(*part, weights=token_weights(part[-1], config.aggregation))
            state, values = programs.update(state, weighted)
            per_step.append(_floats(values))
    return state, {name: float(np.mean([v[name] for v in per_step])) for name in per_step[0]}


def _minibatch(run: Run, whole: Any, i: int) -> Any:
    """Return the i-th part of a rollout batch, of whole groups, spread over all devices."""
    config = run.config.grpo
    if config.minibatches == 1:
        return whole
    size = config.prompts * config.rollouts // config.minibatches

    def cut(x: jax.Array) -> jax.Array:
        letters = " ".join(["B", *["T"] * (x.ndim - 1)])
        return jax.device_put(x[i * size : (i + 1) * size], run.training.activation(letters))

    return jax.tree.map(cut, whole)


def _frozen(run: Run, params: Params) -> Params:
    """Copy weights in compute precision: the originals are given up to the first update."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def copy(params: Params) -> Params:
        # Without a copy, a cast that changes nothing would give back the very same buffers.
        return jax.tree.map(jnp.copy, qwen.to_compute_dtype(run.model, params))

    return jax.jit(copy, out_shardings=shardings)(params)


def _to_devices(
    run: Run, examples: Sequence[Example], prompt_width: int, target_width: int
) -> Sequences:
    cells, rows = run.training.activation("B T"), run.training.activation("B")
    prompts, prompt_lengths = batches.pad([e.prompt_ids for e in examples], prompt_width)
    targets, lengths = batches.pad([e.target_ids for e in examples], target_width)
    arrays = (prompts, cells), (prompt_lengths, rows), (targets, cells), (lengths, rows)
    return Sequences(*(global_array(value, sharding) for value, sharding in arrays))


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(values).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", required=True, help="YAML file; configs/ holds ready ones")
    parser.add_argument(
        "--json", action="store_true", help="print summary.json on stdout at the end"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="change a setting"
    )
    args = parser.parse_intermixed_args(argv)
    began = time.monotonic()
    config = load(args.config, args.overrides)
    summary = train(config)
    if not is_main_process():
        return
    if args.json:
        print(json.dumps(summary))
        return
    columns = ["stage", "agreement", "parse_rate", "swap_consistency", "reward", "mean_length"]
    rows = [{"stage": name, **summary[name]} for name in ("sft", "grpo") if name in summary]
    print(tracking.table(rows, columns))
    print(f"{time.monotonic() - began:.0f} s. Report: {config.run.dir}/report.html")


if __name__ == "__main__":
    sys.exit(commands.run(main))
