"""Judgements on the host: each completion is decoded, read and paid once, into one record.

This is the side of a rollout that knows text. Rewards, metrics, the held-out set and the tables of
judgements all use the records made here, so they can't disagree on what a response says. Everything
a response can be is data here; only a reward that raises stops the run, with the row that caused
it. Each process decodes and pays its share of the completions, and then all know all records.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jlrm.config import RewardConfig, RunError, UsageError
from jlrm.data.batches import Example
from jlrm.data.comparisons import AnswerList, Comparison
from jlrm.data.tokenizer import decode
from jlrm.judgement import plugins, rewards
from jlrm.judgement.notes import PluginContext, TrainerState
from jlrm.judgement.plugins import Plugin
from jlrm.judgement.rewards import Gold, Terms
from jlrm.judgement.verdict import Verdict, is_consistent, swap_preference
from jlrm.runtime import hosts
from jlrm.training.setup import Run


@dataclass(frozen=True)
class Judgement:
    """What a judge wrote on one row, what the reward reads in it, and what that earns."""

    response: str
    verdict: Verdict
    terms: Terms
    # The verdict prefers what gold prefers; of a list, the share of its pairs in which it does.
    # None: the row has no label.
    is_right: bool | float | None
    logged: dict[str, Any] = field(default_factory=dict)  # by plug-ins, for the table

    @property
    def reward(self) -> float | None:
        """The sum of the terms that apply; None where none does, or only the one for length."""
        is_paid = any(self.terms[name] is not None for name in self.terms.keys() - {"overlong"})
        return rewards.total(self.terms) if is_paid else None

    def table_row(self) -> dict[str, Any]:
        """Return the record as columns of a table that people read."""
        both = self.verdict.score_1, self.verdict.score_2, *self.verdict.rest
        scores = [float(score) for score in both if score is not None]
        return {
            "response": self.response,
            "reasoning": self.verdict.reasoning,
            "verdict": scores if both[0] is not None else None,
            "status": self.verdict.status,
            "is_right": self.is_right,
            **{f"rewards/{name}": value for name, value in self.terms.items()},
            "reward": self.reward,
        }


class Judged(NamedTuple):
    """The records of a batch of completions, and the metrics that plug-ins logged for it."""

    judgements: list[Judgement]
    logged: list[tuple[str, float]]  # a name may occur more than once


def rewards_of(judgements: Sequence[Judgement]) -> Float[np.ndarray, " B"]:
    """Return the reward of each judgement, NaN where none applies."""
    paid = [each.reward for each in judgements]
    return np.array([np.nan if reward is None else reward for reward in paid], np.float32)


def terms_of(judgements: Sequence[Judgement]) -> dict[str, Float[np.ndarray, " B"]]:
    """Return each term of the reward by name, NaN where it does not apply."""
    values = {name: [each.terms[name] for each in judgements] for name in judgements[0].terms}
    return {name: np.array(each, np.float32) for name, each in values.items()}


def mean_reward(judgements: Sequence[Judgement]) -> float:
    """Return the mean over the judgements that a reward applies to; NaN where there is none."""
    paid = rewards_of(judgements)
    paid = paid[~np.isnan(paid)]
    return float(paid.mean()) if len(paid) else float("nan")


def mean_logged(logged: Sequence[tuple[str, float]], taken: Collection[str]) -> dict[str, float]:
    """Return the mean of what plug-ins logged under each name.

    Raises:
      RunError: a name that is `taken` by a metric of ours.
    """
    values: dict[str, list[float]] = {}
    for name, value in logged:
        if name in taken:
            raise RunError(
                f"A reward logs the metric {name!r}, which a run logs itself. Choose another name."
            )
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


def judge(
    run: Run,
    examples: Sequence[Example],
    ids: Sequence[Sequence[int]],
    state: TrainerState,
    group_size: int = 1,
) -> Judged:
    """Return the record of every completion, each process making those of its share of the groups.

    Args:
      ids: of each completion.
      state: what plug-ins are told of the stage.

    Raises:
      UsageError: a label that the reward can't use.
      RunError: a reward function raised. Both name the row; the other processes end with it.
    """
    groups = hosts.share(len(examples) // group_size)
    mine = slice(groups.start * group_size, groups.stop * group_size)
    context = PluginContext(state)
    judgements = judge_responses(
        run.config.reward,
        run.data.plugins,
        examples[mine],
        decode(run.policy.tokenizer, ids[mine]),
        ids[mine],
        run.config.sampling.max_new_tokens,
        context,
        group_size if run.config.data.gold == "majority" else 0,
        group_size // 2 if run.config.data.judging == "single" else 0,
    )
    parts = hosts.gather("rewards", Judged(judgements, context.numbers()))
    return Judged(
        [each for part in parts for each in part.judgements],
        [each for part in parts for each in part.logged],
    )


def judge_responses(
    config: RewardConfig,
    loaded: Sequence[Plugin],
    examples: Sequence[Example],
    responses: Sequence[str],
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    context: PluginContext | None = None,
    electorate: int = 0,
    per_answer: int = 0,
) -> list[Judgement]:
    """Read responses, given as text and as token ids, and pay them by our terms and by plug-ins.

    What plug-ins log is kept in `context`. Our terms compare with the gold of each row or, where
    there is an `electorate`, with the majority of so many responses that stand together. Where
    answers are judged alone, `per_answer` responses to one stand before as many to the other. The
    record of each then holds the score of the other one's at the same place.
    """
    verdicts = [
        rewards.read(
            config, example.prompt, response, 1 if per_answer else len(example.comparison.answers)
        )
        for example, response in zip(examples, responses, strict=True)
    ]
    others = beside(verdicts, per_answer) if per_answer else [()] * len(verdicts)
    golds: list[Gold | None] = [
        (each.comparison.scores, each.comparison.preference) for each in examples
    ]
    if electorate:
        golds = majorities(examples, verdicts, electorate)
    judgements = [
        _judgement(config, example, response, (verdict, own), gold, (len(row_ids), max_tokens))
        for example, response, verdict, own, gold, row_ids in zip(
            examples, responses, verdicts, others, golds, ids, strict=True
        )
    ]
    if per_answer:
        judgements = [_paired(*each) for each in zip(examples, judgements, others, strict=True)]
    if not (loaded and examples):
        return judgements
    context = context or PluginContext()
    columns = [
        {
            **example.comparison.record(),
            "prompt": example.prompt,
            "completion": response,
            "completion_ids": row_ids,
        }
        for example, response, row_ids in zip(examples, responses, ids, strict=True)
    ]
    paid = plugins.pay(loaded, columns, context)
    logged = context.by_row(len(columns))
    return [
        dataclasses.replace(
            each, terms={**each.terms, **dict(zip(paid, values, strict=True))}, logged=row
        )
        for each, row, *values in zip(judgements, logged, *paid.values(), strict=True)
    ]


def beside(verdicts: Sequence[Verdict], size: int) -> list[Sequence[Verdict]]:
    """Return for each verdict those on the other answer of its pair, that of its number first."""
    found: list[Sequence[Verdict]] = []
    for start in range(0, len(verdicts), size):
        other = start + size if start // size % 2 == 0 else start - size
        theirs = verdicts[other : other + size]
        found += [[*theirs[i:], *theirs[:i]] for i in range(size)]
    return found


def _paired(example: Example, judgement: Judgement, others: Sequence[Verdict]) -> Judgement:
    """Return the record with the pair of scores that it makes with the first of the others."""
    verdict = judgement.verdict.beside(others[0])
    is_right = verdict.preference == example.comparison.label
    return dataclasses.replace(judgement, verdict=verdict, is_right=is_right)


def majorities(
    examples: Sequence[Example], verdicts: Sequence[Verdict], size: int
) -> list[Gold | None]:
    """Return what most verdicts of each group of `size` prefer, for the order of each row.

    A verdict in the other order counts for the same answer. None where no preference has more
    verdicts than every other.
    """

    def turned(example: Example, preference: int | None) -> int | None:
        return swap_preference(preference) if example.comparison.is_swapped else preference

    found: list[Gold | None] = []
    for start in range(0, len(examples), size):
        group = list(zip(examples[start:][:size], verdicts[start:][:size], strict=True))
        votes = Counter(turned(example, each.preference) for example, each in group)
        del votes[None]
        (first, most), (_, second) = [*votes.most_common(2), (None, 0), (None, 0)][:2]
        for example, _ in group:
            found.append((None, turned(example, first)) if most > second else None)
    return found


def _judgement(
    config: RewardConfig,
    example: Example,
    response: str,
    verdicts: tuple[Verdict, Sequence[Verdict]],
    gold: Gold | None,
    tokens: tuple[int, int],
) -> Judgement:
    row, (verdict, others), (num_tokens, max_tokens) = example.comparison, verdicts, tokens
    if gold is None:
        return Judgement(response, verdict, dict.fromkeys(rewards.TERMS), right(row, verdict))
    known: dict[str, Any] = dict(zip(("gold", "preference"), gold, strict=True))
    pay = partial(rewards.pay_beside, others=others) if others else rewards.pay
    if isinstance(row, AnswerList):
        golds = {places: (pair.scores, pair.preference) for places, pair in row.pairs().items()}
        pay, known = rewards.pay_list, {"golds": golds}
    try:
        terms = pay(config, verdict, **known, num_tokens=num_tokens, max_tokens=max_tokens)
    except UsageError as error:
        raise UsageError(f"Row {row.id}: {error}") from None
    except Exception as error:
        raise RunError(f"The reward of row {row.id} failed: {error}") from error
    return Judgement(response, verdict, terms, right(row, verdict))


def right(row: Comparison, verdict: Verdict) -> bool | float | None:
    """Return whether a verdict prefers what gold does; of a list, in which share of its pairs.

    None where there is no gold.
    """
    if not isinstance(row, AnswerList):
        return None if row.label is None else verdict.preference == row.label
    pairs = row.pairs().items()
    return float(np.mean([verdict.of_pair(*i).preference == pair.label for i, pair in pairs]))


def compare_orders(
    config: RewardConfig, judgements: Sequence[Judgement], partner: Sequence[int]
) -> list[Judgement]:
    """Add the term `swap_consistency`; `partner` is each row's judgement of the other order."""
    paid = [
        rewards.withhold(config, each.terms, each.verdict, judgements[other].verdict)
        for each, other in zip(judgements, partner, strict=True)
    ]
    return [
        dataclasses.replace(each, terms={**each.terms, "swap_consistency": value})
        for each, value in zip(judgements, paid, strict=True)
    ]


def consistency(judgements: Sequence[Judgement], partner: Sequence[int]) -> float:
    """Return the share of judgements, in percent, whose partner names the same answer.

    A verdict that is missing, on either side, is not consistent.
    """
    preferences = [each.verdict.preference for each in judgements]
    same = [
        is_consistent(preference, swap_preference(preferences[other]))
        for preference, other in zip(preferences, partner, strict=True)
    ]
    return 100 * float(np.mean(same))


def parse_rate(judgements: Sequence[Judgement]) -> float:
    """Return the share of responses, in percent, in which the reward reads a verdict."""
    return 100 * float(np.mean([each.verdict.status == "ok" for each in judgements]))


def metrics(
    judgements: Sequence[Judgement], lengths: np.ndarray, is_finished: np.ndarray
) -> dict[str, float]:
    """Return the metrics of a batch of judgements; agreement and parse rate in percent.

    The mean of a term is over the rows it applies to; a term that applies to none is left out, and
    so are `reward` and `reward_std` where no row is paid, and agreement where no row has a label.
    """
    paid = rewards_of(judgements)
    paid = paid[~np.isnan(paid)]
    known = [each.is_right for each in judgements if each.is_right is not None]
    values = {
        **({"reward": float(paid.mean())} if len(paid) else {}),
        **({"reward_std": float(paid.std(ddof=1))} if len(paid) > 1 else {}),
        **({"judge/agreement": 100 * float(np.mean(known))} if known else {}),
        "judge/parse_rate": parse_rate(judgements),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": 1 - float(is_finished.mean()),
    }
    for name in judgements[0].terms:
        applied = [each.terms[name] for each in judgements if each.terms[name] is not None]
        if applied:
            term = np.array(applied, np.float64)
            values |= {
                f"rewards/{name}/mean": float(term.mean()),
                f"rewards/{name}/std": float(term.std()),
            }
    return values
