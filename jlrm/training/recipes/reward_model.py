"""A reward model: the policy with a head of scores, trained on which answer is better.

By `reward_model.kind` each answer is scored alone (Bradley-Terry: the question stands once before
both), or both in the judge's prompt, with two scores or three classes. Its head is a leaf `score`
in the place of the vocabulary's. It writes no text, so the held-out set is judged by its scores
(evaluation/scored.py), in both orders as ever; each verdict counts as parsed.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrm.config import UsageError
from jlrm.data import audit, batches
from jlrm.data.audit import Draws
from jlrm.data.batches import Example, Examples
from jlrm.data.comparisons import describe_dropped
from jlrm.evaluation import scored
from jlrm.evaluation.benchmarks import pairs
from jlrm.evaluation.games import Game, GameVerdict, ItemVerdicts, both_orders, game_verdict
from jlrm.judgement.notes import TrainerState
from jlrm.model import lora, qwen
from jlrm.model.qwen import Params
from jlrm.rl.preferences import RewardTargets
from jlrm.sampling.scores import Scorer
from jlrm.training import packing
from jlrm.training.heldout import METRICS, POLICY, EvaluateFn
from jlrm.training.packing import Group
from jlrm.training.recipes.pair_programs import (
    reward_calls,
    reward_programs,
    scored_group,
    scoring,
)
from jlrm.training.recipes.pair_texts import left_out_without_winner
from jlrm.training.recipes.preference import pairs_of
from jlrm.training.setup import Run, initial_params
from jlrm.training.stage import Stage, StageResult, floats

log = logging.getLogger(__name__)


def reward_model(run: Run, evaluate: EvaluateFn) -> StageResult:
    """Train a reward model; `evaluate`, which judges by text, is not for it."""
    config, read = run.config.reward_model, examples_of(run)
    policy = scoring(run.policy, config.kind)
    scoring_run = dataclasses.replace(run, policy=policy)
    programs = reward_programs(run.config, policy, read.longest)
    evaluate, initial = make_scored_evaluation(scoring_run), partial(_initial, run, policy)
    optimizer = programs.optimizer
    with Stage(scoring_run, "reward_model", optimizer, initial, evaluate, ["update"]) as stage:
        stage.num_rows = len(read)
        prompt, target = read.longest
        calls = partial(reward_calls, run.config, policy, prompt, programs, target)
        stage.compile_ahead(calls)
        for step in stage:
            seed, position = run.config.run.seed, stage.position
            rows = batches.batch_rows(seed, position, config.batch_size, len(read), stage.stream)
            chosen = read.take(rows)
            groups = [_group(config.kind, each) for each in chosen]
            packed = packing.pack(groups, programs.sizes, policy.mesh.size, is_whole=True)
            with stage.timed("update"):
                labels = [label for e in chosen if (label := e.comparison.label) is not None]
                targets = reward_targets(packed, groups, labels)
                learned = packing.to_devices(policy.training, (packed.rows, targets))
                stage.state, values = programs.update(stage.state, *learned)
                values = floats(values)
            values |= packed.metrics
            values |= floats({"learning_rate": programs.rate(step)})
            num_tokens = packed.num_tokens
            draws = Draws(len(read), [rows.tolist()], [[audit.TRAINED] * len(rows)])
            stage.finish(values, num_tokens, [learned], draws)
    return stage.outcome()


def examples_of(run: Run) -> Examples:
    """Return the training rows that say something to the kind of reward model."""
    kind, rows = run.config.reward_model.kind, run.data.train
    if kind == "bradley_terry":
        return pairs_of(run, "reward_model", "answers")
    told = (0, 1, 2) if kind == "classes" else (1, 2)
    is_told = rows.rows.flags("rows with a winner", lambda row: row.label in told)
    dropped = left_out_without_winner(rows.rows, is_told)
    if not is_told.any():
        raise UsageError(
            f"reward_model has nothing to compare: of {len(rows)} rows are left out "
            f"{describe_dropped(dropped)}. reward_model.kind=classes learns from ties too."
        )
    if dropped:
        log.warning("reward_model: left out %s", describe_dropped(dropped))
    return rows.select(np.flatnonzero(is_told))


def _group(kind: str, example: Example) -> Group:
    """Return what is scored of an example."""
    is_pair = kind == "bradley_terry"
    return scored_group(
        example.prompt_ids, [example.target_ids, example.other_ids] if is_pair else []
    )


def reward_targets(packed: packing.Packed, groups: list[Group], labels: list[int]) -> RewardTargets:
    """Return where sequences end in packed rows, and the label of each."""
    lengths = np.array([len(ids) for group in groups for ids in group.completions])
    is_last = packed.is_target & (packed.offset == lengths[packed.completion] - 1)
    per_group = len(groups[0].completions)
    label = packed.take(np.repeat(np.array(labels, np.int32), per_group))
    return RewardTargets._make((is_last, label, np.array(len(groups), np.float32)))


def _initial(run: Run, policy: Any, base: Params) -> Params:
    """Return what the stage before trained, with a head that scores everything alike."""
    params = initial_params(run, "reward_model", base)
    abstract = qwen.abstract_params(policy.model, policy.training)
    wanted, _ = lora.split(policy.model.lora, abstract)
    head = wanted["score"]
    make = jax.jit(partial(jnp.zeros, head.shape, head.dtype), out_shardings=head.sharding)
    return {name: make() if name == "score" else params[name] for name in wanted}


def make_scored_evaluation(run: Run) -> EvaluateFn:
    """Return weights, when, state -> held-out metrics of a reward model, as `heldout` has them."""
    policy, heldout = run.policy, run.data.heldout
    given = heldout.take(range(len(heldout) // 2))
    items = pairs.items([each.comparison for each in given], "the held-out set")
    games, scale = both_orders(items), run.config.reward.scale
    texts = scored.game_texts(
        policy.tokenizer, policy.model.num_labels, run.config.data.prompt, scale, policy.end_ids[0]
    )(games)
    score = Scorer(policy, run.config.sampling.eval_batch_size)

    def evaluate(params: Params, when: str, state: TrainerState) -> dict[str, float]:
        found = scored.given(score(params, [ids for own in texts for ids in own]))
        verdicts = [_verdict(*each) for each in zip(games, found, strict=True)]
        judged = [
            ItemVerdicts(item, (verdicts[2 * i], verdicts[2 * i + 1]))
            for i, item in enumerate(items)
        ]
        benchmark = pairs.BENCHMARK.metrics(judged, POLICY)
        return {
            **{ours: benchmark[theirs] for theirs, ours in METRICS.items()},
            "pairs": float(len(items)),
            "parse_rate": 100.0,
        }

    return evaluate


def _verdict(game: Game, given: scored.GivenScores) -> GameVerdict:
    if given.scores is None:
        return GameVerdict(game.first, game.second, given.preference, None, "ok")
    return game_verdict(game, given.scores)
