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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrm import cluster, commands, groups, hosts, packing, report, tracking, update
from jlrm.config import Config, load, to_dict
from jlrm.data import batches
from jlrm.data.comparisons import describe_dropped, write_dropped
from jlrm.groups import Drawn
from jlrm.heldout import Evaluation, make_evaluation
from jlrm.judging import make_sampler, sampled_rows
from jlrm.loop import Outcome, Stage
from jlrm.mesh import compiler_options
from jlrm.model.qwen import Params
from jlrm.packing import Group
from jlrm.programs import GRPOPrograms, Minibatch, grpo_programs, pack_minibatch
from jlrm.rl.losses import token_weights
from jlrm.run import Run, grpo_params, initial_params, open_run
from jlrm.update import TrainState

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
    if hosts.is_main():
        tracking.summary(run.dir, summary)
        report.write_report(run.dir)
        run.mirror.push()
    return summary


def sft(run: Run, evaluate: Evaluation) -> Outcome:
    """Imitate written judgements; the loss is on the judgement alone."""
    config = run.config.sft
    examples = batches.encode_targets(
        run.train, run.tokenizer, config.max_target_tokens, run.end_ids[0], run.config.reward.scale
    )
    if examples.dropped:
        log.warning("sft: left out %s", describe_dropped(examples.dropped))
    if hosts.is_main():
        write_dropped(examples.dropped, run.dir / "dropped_sft.jsonl")
    longest, num_devices = examples.longest, run.mesh.size
    batch_tokens = sum(longest) * -(-config.batch_size // num_devices)
    sizes = packing.row_sizes(*longest, batch_tokens, config.pack_tokens, run.training.platform)
    optimizer = update.make_optimizer(config.optimizer, config.steps)
    rate = update.learning_rate(config.optimizer, config.steps)
    step_fn = jax.jit(
        partial(update.sft_update, run.model, run.training, optimizer),
        donate_argnums=0,
        compiler_options=compiler_options(run.mesh),
    )
    initial = partial(initial_params, run)
    with Stage(run, "sft", config.steps, optimizer, initial, evaluate) as stage:
        if run.config.model.path:
            stage.evaluate_start()
        for step in stage:
            seed, position = run.config.run.seed, stage.position
            rows = batches.batch_rows(seed, position, config.batch_size, len(examples))
            chosen = examples.take(rows)
            packed = packing.pack(
                [Group(e.prompt_ids, [e.target_ids]) for e in chosen], sizes, num_devices
            )
            with stage.timed("update"):
                weights = token_weights(packed.is_target.reshape(1, -1))
                weights = weights.reshape(packed.is_target.shape)
                stage.state, values = step_fn(
                    stage.state, *packing.to_devices(run.training, (packed.rows, weights))
                )
                values = _floats(values)
            num_tokens = sum(len(e.prompt_ids) + len(e.target_ids) for e in chosen)
            values |= packed.metrics
            stage.finish({**values, **_floats({"learning_rate": rate(step)})}, num_tokens)
    return stage.outcome()


def grpo(run: Run, evaluate: Evaluation) -> Outcome:
    """Train by GRPO; the weights it begins from are also the frozen reference."""
    config = run.config.grpo
    width, _ = run.train.longest
    sample = make_sampler(run, run.distribution, width, config.rollouts)
    programs = grpo_programs(
        run.config, run.model, run.training, run.rollout, run.distribution, width
    )
    initial = partial(grpo_params, run)
    with Stage(run, "grpo", config.steps, programs.optimizer, initial, evaluate) as stage:
        reference = None
        if config.kl_weight:
            reference = programs.freeze(initial() if stage.is_resumed else stage.state.params)
        if run.config.model.path and not run.config.sft.steps:
            stage.evaluate_start()

        def begin(position: int) -> groups.Started:
            return groups.start(run, sample, programs.lay_out(stage.state.params), position)

        started = None
        for step in stage:
            is_last = step + 1 == config.steps
            with stage.timed("rollout"):
                started = started or begin(stage.position)
                ahead = None
                if config.ahead == "stale" and not is_last:
                    ahead = begin(stage.position + 1)
            drawn = groups.draw(run, begin, started, stage.timed)
            batch = drawn.batch
            parts = _minibatches(run, programs.sizes, drawn)
            with stage.timed("logprobs"):
                parts, gap = _logprobs(run, programs, stage.state.params, reference, parts)
            with stage.timed("update"):
                stage.state, reports = _optimise(programs, stage.state, parts, config.epochs)
            if config.ahead == "next" and not is_last:
                ahead = begin(stage.position + drawn.num_draws)
            started = ahead
            with stage.timed("update"):
                values = _means(reports)  # waits for the devices
            update_gap = values.pop("old_logp_gap")
            values |= drawn.metrics
            values["rollout/logprob_gap"] = update_gap if gap is None else gap
            values |= _floats({"learning_rate": programs.rate(int(stage.state.step) - 1)})
            values |= _means([part.packing for part in parts])
            every = run.config.run.completions_every
            if every and hosts.is_main() and (step % every == 0 or is_last):
                judgements = sampled_rows(run, *batch)
                stage.tracker.log_completions(step + 1, judgements)
            stage.finish(values, drawn.num_tokens, drawn.num_draws)
    return stage.outcome()


def _minibatches(run: Run, sizes: list[int], drawn: Drawn) -> list[Minibatch]:
    """Pack the batch, a minibatch of whole groups at a time; old log-probabilities are sampled."""
    config, batch, num_rollouts = run.config.grpo, drawn.batch, run.config.grpo.rollouts
    is_kept = drawn.is_learned
    if config.mask_truncated:
        is_kept = is_kept & batch.sampled.is_finished
    parts = []
    for chosen in np.split(np.arange(len(batch.examples)), config.minibatches):
        sampled = batch.sampled.take(chosen.tolist())
        whole = [
            Group(batch.examples[chosen[i]].prompt_ids, sampled.ids[i : i + num_rollouts])
            for i in range(0, len(chosen), num_rollouts)
        ]
        about = sampled.logps, batch.advantages[chosen], is_kept[chosen]
        parts.append(pack_minibatch(run.training, sizes, whole, *about, config.aggregation))
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
    config, gap = run.config.grpo, None
    if config.epochs * config.minibatches > 1 or config.importance_cap:
        scored = [_with(part, old_logp=programs.score(params, part.rows)[0]) for part in parts]
        gap = _mean_gap(parts, scored)
        if config.importance_cap:
            scored = [
                _weighed(*pair, config.importance_cap) for pair in zip(parts, scored, strict=True)
            ]
        parts = scored
    if reference is not None:
        parts = [_with(part, ref_logp=programs.score(reference, part.rows)[0]) for part in parts]
    return jax.block_until_ready(parts), gap


def _with(part: Minibatch, **targets: Any) -> Minibatch:
    return part._replace(targets=part.targets._replace(**targets))


def _weighed(sampled: Minibatch, scored: Minibatch, cap: float) -> Minibatch:
    """Weigh tokens by how much likelier the policy makes them than the sampler did, up to `cap`.

    Truncated importance sampling (https://fengyao.notion.site/off-policy-rl).
    """
    ratio = jnp.exp(scored.targets.old_logp - sampled.targets.old_logp)
    return _with(scored, weights=scored.targets.weights * jnp.minimum(ratio, cap))


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


def _means(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    reports = jax.device_get(reports)
    return {name: float(np.mean([each[name] for each in reports])) for name in reports[0]}


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
    cluster.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    began = time.monotonic()
    config = load(args.config, args.overrides)
    with hosts.joined(args, to_dict(config), config.run.host_timeout):
        summary = train(config)
    if not hosts.is_main():
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
