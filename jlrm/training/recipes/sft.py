"""SFT on written judgements; the loss is on the judgement alone.

Reasoning before the scores makes the judge that thinks (the paper's SFT-Think); scores first, with
rows swapped by chance, the recipe of JudgeLM (its Judge-SFT).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial

from jlrm.data import audit, batches
from jlrm.data.audit import Draws
from jlrm.data.batches import Encode, Example, Examples
from jlrm.data.comparisons import Comparison, describe_dropped, write_dropped
from jlrm.rl.losses import token_weights
from jlrm.runtime import hosts
from jlrm.training import packing
from jlrm.training.heldout import EvaluateFn
from jlrm.training.packing import Group
from jlrm.training.programs import sft_calls, sft_programs
from jlrm.training.setup import Run, initial_params
from jlrm.training.stage import Stage, StageResult, floats

log = logging.getLogger(__name__)


def sft(run: Run, evaluate: EvaluateFn) -> StageResult:
    """Imitate written judgements; the loss is on the judgement alone."""
    config, policy = run.config.sft, run.policy
    examples = batches.encode_targets(
        presented(run),
        policy.tokenizer,
        config.max_target_tokens,
        policy.end_ids[0],
        run.config.reward.scale,
        config.reasoning,
        run.config.data,
    )
    if examples.dropped:
        log.warning("sft: left out %s", describe_dropped(examples.dropped))
    if hosts.is_main():
        write_dropped(examples.dropped, run.directory.path / "dropped_sft.jsonl")
    programs, num_devices = sft_programs(run.config, policy, examples.longest), policy.mesh.size
    initial = partial(initial_params, run, "sft")
    with Stage(run, "sft", programs.optimizer, initial, evaluate, ["update"]) as stage:
        stage.num_rows = len(examples)
        prompt, target = examples.longest
        stage.compile_ahead(lambda: sft_calls(run.config, policy, prompt, programs, target))
        stage.evaluate_start()
        for step in stage:
            seed, position = run.config.run.seed, stage.position
            rows = batches.batch_rows(
                seed, position, config.batch_size, len(examples), stage.stream
            )
            chosen = examples.take(rows)
            packed = packing.pack(
                [Group(e.prompt_ids, [e.target_ids]) for e in chosen],
                programs.sizes,
                num_devices,
            )
            with stage.timed("update"):
                weights = token_weights(packed.is_target.reshape(1, -1))
                weights = weights.reshape(packed.is_target.shape)
                learned = packing.to_devices(policy.training, (packed.rows, weights))
                stage.state, values = programs.update(stage.state, *learned)
                values = floats(values)
            num_tokens = sum(len(e.prompt_ids) + len(e.target_ids) for e in chosen)
            values |= packed.metrics
            values |= floats({"learning_rate": programs.rate(step)})
            draws = Draws(len(examples), [rows.tolist()], [[audit.TRAINED] * len(rows)])
            stage.finish(values, num_tokens, [learned], draws)
    return stage.outcome()


def presented(run: Run) -> Examples:
    """Return the training rows, a share of them with their answers in the other order, and a share
    with their reference answer in the prompt.

    The seed and the row decide, so every epoch presents a row in the same way.
    """
    config, train, seed = run.config.sft, run.data.train, run.config.run.seed
    rows, encode = train.rows, train.encode
    if config.swap:
        mine = [
            row.mirrored() if row.chance(seed, "swap") < config.swap else row for row in rows.mine
        ]
        rows = dataclasses.replace(rows, mine=mine)
    if config.reference:
        encode = _with_references(run, encode)
    return dataclasses.replace(train, rows=rows, encode=encode)


def _with_references(run: Run, encode: Encode) -> Encode:
    """Return what tokenises prompts, some of which show their row's reference answer."""
    config, seed = run.config.sft, run.config.run.seed
    name, scale = run.config.data.prompt, run.config.reward.scale
    is_single = run.config.data.judging == "single"
    show = batches.prompt_encoder(
        run.policy.tokenizer, name, scale, has_reference=True, is_single=is_single
    )

    def is_shown(row: Comparison) -> bool:
        return bool(row.reference) and row.chance(seed, "reference") < config.reference

    def encode_rows(rows: Sequence[Comparison]) -> list[Example]:
        shown = iter(show([row for row in rows if is_shown(row)]))
        others = iter(encode([row for row in rows if not is_shown(row)]))
        return [next(shown if is_shown(row) else others) for row in rows]

    return encode_rows
