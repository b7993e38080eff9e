"""The held-out set in training: judged and counted by the code of `python -m jlrm.evaluate`.

Both orders of every pair are asked. The figures are those of the benchmark `pairs` by its rule of
three classes, which is JudgeLM's, so that

    python -m jlrm.evaluate --model RUN@STEP --benchmark pairs --data HELDOUT
        --policy aggregation=first_order

finds the same again. A verdict that is missing is wrong, and no pair with one is consistent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from jlrm.data.batches import Example
from jlrm.evaluation.benchmarks import pairs
from jlrm.evaluation.games import Game
from jlrm.evaluation.policies import policy_of
from jlrm.evaluation.reading import count, judged_items, reader
from jlrm.judges import local
from jlrm.model.qwen import Params
from jlrm.sampling import writer
from jlrm.sampling.decode import decode_params
from jlrm.training.scoring import compare_orders, judge
from jlrm.training.setup import Run

EvaluateFn = Callable[[Params], dict[str, float]]

POLICY = policy_of("pairs", ["aggregation=first_order"])
# Metrics of the benchmark that are kept: our names.
METRICS = {
    "agreement": "agreement",
    "f1": "f1",
    "consistency": "swap_consistency",
    "delta_bias": "delta_bias",
}


def make_evaluation(run: Run) -> EvaluateFn:
    """Return weights -> held-out metrics; programs are compiled at first use.

    Shares are in percent: agreement and macro F1 (of the given order), swap_consistency,
    delta_bias, parse_rate; reward and mean_length (tokens) are means over both orders.
    """
    half = len(run.heldout) // 2
    examples = run.heldout.take(range(2 * half))
    items = pairs.items([each.comparison for each in examples[:half]], "the held-out set")
    games = [Game(item, *order) for order in ((0, 1), (1, 0)) for item in items]
    asked = [_named(*each) for each in zip(examples, games, strict=True)]
    write, read = _writer(run), reader("lenient", run.config.reward.scale)
    lay_out = jax.jit(partial(decode_params, run.model, run.rollout))

    def evaluate(params: Params) -> dict[str, float]:
        written = {each.example.comparison.id: each for each in write(lay_out(params), asked)}
        answers = {name: local.answer(run.tokenizer, each) for name, each in written.items()}
        judged, _ = judged_items(games, answers, read)
        metrics = pairs.BENCHMARK.score(judged, POLICY)
        ids = [written[game.id].completions[0] for game in games]
        return {
            **{ours: metrics[theirs] for theirs, ours in METRICS.items()},
            "parse_rate": 100 * (1 - count(judged, None) / len(games)),
            "reward": _reward(run, examples, ids),
            "mean_length": float(np.mean([len(row) for row in ids])),
        }

    return evaluate


def _writer(run: Run) -> writer.Writer:
    settings, (longest, _) = run.config.sampling, run.heldout.longest
    decoding = writer.DecodingSettings(
        settings.max_new_tokens,
        settings.eval_batch_size,
        run.config.run.seed,
        settings.eval_temperature,
        stop_strings=settings.stop_strings,
    )
    of_model = run.model, run.rollout, run.tokenizer, run.end_ids
    return writer.make_writer(*of_model, decoding, [longest])


def _named(example: Example, game: Game) -> Example:
    """Return the example under the name of its game, which is unique."""
    row = dataclasses.replace(example.comparison, id=game.id)
    return dataclasses.replace(example, comparison=row)


def _reward(run: Run, examples: list[Example], ids: list[list[int]]) -> float:
    judged, half = judge(run, examples, ids), len(examples) // 2
    if run.config.reward.swap_consistency:
        partner = [*range(half, 2 * half), *range(half)]
        judged = compare_orders(run.config.reward, judged, partner)
    return float(judged.rewards.mean())
