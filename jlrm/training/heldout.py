"""The held-out set in training: judged like a rollout, counted like a benchmark.

Both orders of every pair are asked, or both answers, and then their scores compared
(`data.judging`). Lists are asked as given and in the reverse order, and their pairs count. A
response is read as the reward reads it, so `parse_rate` and
`agreement` mean here what `judge/parse_rate` and `judge/agreement` mean in a step's metrics, and
`run.best_metric` can't rank a format that the reward calls malformed. A verdict that is missing is
wrong, and no pair with one is consistent.

The figures are those of the benchmark `pairs` by its rule of three classes, which is JudgeLM's, so

    python -m jlrm.evaluate --model RUN@STEP --benchmark pairs --data HELDOUT
        --policy aggregation=first_order --parser strict

gives the same again. (Under reward.mode=judgelrm that holds for whole scores: the authors' reward
reads no decimals, `strict` does. The default parser, `lenient`, also reads what no reward pays.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jlrm.config import RunError
from jlrm.data.batches import Example
from jlrm.data.comparisons import AnswerList, Comparison
from jlrm.evaluation.benchmarks import pairs
from jlrm.evaluation.benchmarks.registry import policy_of
from jlrm.evaluation.games import Game, GameVerdict, ItemVerdicts, game_verdict
from jlrm.judgement.notes import TrainerState
from jlrm.judgement.verdict import Verdict
from jlrm.model.qwen import Params
from jlrm.reports.tracking import progress_bar
from jlrm.runtime import hosts
from jlrm.sampling import writer
from jlrm.sampling.generate import lay_out_program
from jlrm.training.programs import heldout_decoding
from jlrm.training.scoring import (
    Judged,
    Judgement,
    compare_orders,
    judge,
    mean_logged,
    mean_reward,
    parse_rate,
)
from jlrm.training.setup import Run

# evaluate(weights, when, state): `when` is said on the progress bar, e.g. "after sft step 60", and
# `state` is what plug-ins are told.
EvaluateFn = Callable[[Params, str, TrainerState], dict[str, float]]

POLICY = policy_of("pairs", ["aggregation=first_order"])
# Metrics of the benchmark that are kept: our names.
METRICS = {
    "agreement": "agreement",
    "f1": "f1",
    "consistency": "swap_consistency",
    "delta_bias": "delta_bias",
}


def make_evaluation(run: Run) -> EvaluateFn:
    """Return weights, when, state -> held-out metrics; programs are compiled at first use.

    Shares are in percent: agreement and macro F1 (of the given order), swap_consistency,
    delta_bias, parse_rate; `pairs` counts the pairs. reward and mean_length (tokens) are means over
    both orders.
    """
    half = len(run.data.heldout) // 2
    examples = run.data.heldout.take(range(2 * half))
    items = pairs.items([each.comparison for each in examples[:half]], "the held-out set")
    games = [Game(item, *order) for order in ((0, 1), (1, 0)) for item in items]
    asked = [_named(*each) for each in zip(examples, games, strict=True)]
    longest, _ = run.data.heldout.longest
    write = writer.make_writer(run.policy, heldout_decoding(run.config), [longest])
    lay_out = lay_out_program(run.policy.model, run.policy.decoding)

    def evaluate(params: Params, when: str, state: TrainerState) -> dict[str, float]:
        completions = {}
        label = f"judging {half} held-out pairs {when}"
        with progress_bar(label, len(asked), "game", is_shown=hosts.is_main()) as bar:
            for each in write(lay_out(params), asked):
                completions[each.example.comparison.id] = each.completions[0].ids
                bar.update()
        ids = [completions[game.id] for game in games]
        judgements, logged = _judged(run, examples, ids, state)
        if run.config.reward.swap_consistency:
            partner = [*range(half, 2 * half), *range(half)]
            judgements = compare_orders(run.config.reward, judgements, partner)
        mean_length = float(np.mean([len(row) for row in ids]))
        is_listed = run.config.data.judging == "lists"
        values = list_figures(examples, judgements) if is_listed else figures(games, judgements)
        values["mean_length"] = mean_length
        if run.config.run.best_metric == "reward" and np.isnan(values["reward"]):
            raise RunError(
                "No reward applies to any held-out row, and run.best_metric=reward ranks "
                "checkpoints by it. Set another run.best_metric, or pay held-out rows too."
            )
        return values | mean_logged(logged, values)

    return evaluate


def _judged(
    run: Run, examples: Sequence[Example], ids: Sequence[Sequence[int]], state: TrainerState
) -> Judged:
    """Return the records of the held-out set; of answers that are judged alone, pair by pair."""
    if run.config.data.judging != "single":
        return judge(run, examples, ids, state)
    half = len(ids) // 2
    order = [place for i in range(half) for place in (i, half + i)]
    judged = judge(run, [examples[i] for i in order], [ids[i] for i in order], state, 2)
    return judged._replace(judgements=[*judged.judgements[::2], *judged.judgements[1::2]])


def figures(games: Sequence[Game], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the metrics of judgements, one for each game: all as given, then all swapped."""
    half = len(games) // 2
    verdicts = [
        _game_verdict(game, judgement.verdict)
        for game, judgement in zip(games, judgements, strict=True)
    ]
    both = zip(games[:half], verdicts[:half], verdicts[half:], strict=True)
    judged = [ItemVerdicts(game.item, (given, swapped)) for game, given, swapped in both]
    benchmark = pairs.BENCHMARK.metrics(judged, POLICY)
    return {
        **{ours: benchmark[theirs] for theirs, ours in METRICS.items()},
        "pairs": float(half),  # what the shares are of: an interval needs it
        "parse_rate": parse_rate(judgements),
        "reward": mean_reward(judgements),
    }


def list_figures(examples: Sequence[Example], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the metrics of judgements of lists, all as given, then all in the reverse order.

    Shares are of the pairs of all lists. `pairs` counts lists: those of one list hang together.
    """
    half = len(examples) // 2
    rows: list[Comparison] = []
    given: list[Judgement] = []
    swapped: list[Judgement] = []
    for example, one, two in zip(
        examples[:half], judgements[:half], judgements[half:], strict=True
    ):
        row = example.comparison
        assert isinstance(row, AnswerList), "a pair among lists"
        last = len(row.answers) - 1
        for (i, j), pair in row.pairs().items():
            rows.append(pair)
            given.append(replace(one, verdict=one.verdict.of_pair(i, j)))
            swapped.append(replace(two, verdict=two.verdict.of_pair(last - j, last - i)))
    items = pairs.items(rows, "the held-out set")
    games = [Game(item, *order) for order in ((0, 1), (1, 0)) for item in items]
    return {
        **figures(games, given + swapped),
        "pairs": float(half),
        "parse_rate": parse_rate(judgements),
        "reward": mean_reward(judgements),
    }


def _game_verdict(game: Game, verdict: Verdict) -> GameVerdict:
    if verdict.scores is None:
        return GameVerdict(game.first, game.second, None, None, verdict.status)
    return game_verdict(game, verdict.scores)


def _named(example: Example, game: Game) -> Example:
    """Return the example under the name of its game, which is unique."""
    row = replace(example.comparison, id=game.id)
    return replace(example, comparison=row)
