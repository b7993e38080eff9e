"""Judging on the host: from examples to sampled judgements, their verdicts and their rewards.

This is the side of a rollout that knows text. Everything a completion can be is data here; only a
reward that raises stops the run, with the row that caused it. Each process decodes and scores its
share of the completions; what it found, a few numbers a row, is then known to all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jlrm.config import RewardConfig, RunError, UsageError
from jlrm.data.batches import Example
from jlrm.data.tokenizer import decode
from jlrm.judgement import rewards
from jlrm.judgement.plugins import Plugin
from jlrm.judgement.rewards import Terms
from jlrm.judgement.verdict import STATUSES, Verdict, is_consistent, parse, swap_preference
from jlrm.runtime import hosts
from jlrm.training.setup import Run


@dataclass(frozen=True)
class Judgements:
    """Verdicts and rewards of a batch, one entry per completion."""

    verdicts: list[Verdict]  # without their reasoning
    terms: list[Terms]
    is_right: Float[np.ndarray, " B"]  # 1 where the verdict prefers what gold prefers

    @property
    def rewards(self) -> Float[np.ndarray, " B"]:
        """The sum of the terms of each completion."""
        return np.array([rewards.total(terms) for terms in self.terms], np.float32)

    def take(self, rows: Sequence[int]) -> Judgements:
        """Return some of the rows, in this order."""
        return Judgements(
            [self.verdicts[row] for row in rows],
            [self.terms[row] for row in rows],
            self.is_right[np.asarray(rows, np.int64)],
        )


def concatenate(parts: Sequence[Judgements]) -> Judgements:
    """Return the rows of all parts, one after the other."""
    return Judgements(
        [verdict for part in parts for verdict in part.verdicts],
        [terms for part in parts for terms in part.terms],
        np.concatenate([part.is_right for part in parts]),
    )


def judge(
    run: Run, examples: Sequence[Example], ids: Sequence[Sequence[int]], group_size: int = 1
) -> Judgements:
    """Score every completion against its example's label, each process its share of the groups.

    Args:
      ids: of each completion.

    Raises:
      UsageError: a label that the reward can't use.
      RunError: a reward function raised. Both name the row; the other processes end with it.
    """
    groups = hosts.share(len(examples) // group_size)
    mine = slice(groups.start * group_size, groups.stop * group_size)
    texts = decode(run.tokenizer, ids[mine])
    judged = score_rows(
        run.config.reward,
        run.plugins,
        examples[mine],
        texts,
        ids[mine],
        run.config.sampling.max_new_tokens,
    )
    if hosts.count() == 1:
        return judged
    names = [*rewards.TERMS, *(plugin.name for plugin in run.plugins)]
    parts = hosts.gather("rewards", _numbers(judged, names))
    return _from_numbers(np.concatenate(parts), names)


def _numbers(judged: Judgements, names: Sequence[str]) -> Float[np.ndarray, "B C"]:
    """Write judgements as numbers, NaN for what is missing."""
    rows = [
        [
            STATUSES.index(verdict.status),
            *(verdict.scores or (None, None)),
            is_right,
            *(terms[name] for name in names),
        ]
        for verdict, is_right, terms in zip(
            judged.verdicts, judged.is_right, judged.terms, strict=True
        )
    ]
    return np.array(rows, np.float64).reshape(len(rows), 4 + len(names))


def _from_numbers(table: Float[np.ndarray, "B C"], names: Sequence[str]) -> Judgements:
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in table]
    return Judgements(
        [Verdict(row[1], row[2], STATUSES[int(row[0] or 0)], "") for row in rows],
        [dict(zip(names, row[4:], strict=True)) for row in rows],
        table[:, 3].astype(np.float32),
    )


def score_rows(
    config: RewardConfig,
    plugins: Sequence[Plugin],
    examples: Sequence[Example],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    max_tokens: int,
) -> Judgements:
    """Score completions, given as text and as token ids, by our own terms and by plug-ins."""
    terms: list[Terms] = []
    verdicts: list[Verdict] = []
    for example, text, row_ids in zip(examples, texts, ids, strict=True):
        row = example.comparison
        try:
            terms.append(
                rewards.score(
                    config,
                    prompt=example.prompt,
                    completion=text,
                    gold=row.scores,
                    preference=row.preference,
                    num_tokens=len(row_ids),
                    max_tokens=max_tokens,
                )
            )
        except UsageError as error:
            raise UsageError(f"Row {row.id}: {error}") from None
        except Exception as error:
            raise RunError(f"The reward of row {row.id} failed: {error}") from error
        verdict = parse(text, min_score=config.min_score, max_score=config.max_score)
        verdicts.append(dataclasses.replace(verdict, reasoning=""))
    if plugins and examples:
        columns = [
            {
                **e.comparison.record(),
                "prompt": e.prompt,
                "completion": text,
                "completion_ids": row_ids,
            }
            for e, text, row_ids in zip(examples, texts, ids, strict=True)
        ]
        for plugin in plugins:
            for term, value in zip(terms, plugin.score(columns), strict=True):
                term[plugin.name] = value
    labels = [example.comparison.label for example in examples]
    is_right = [v.preference == label for v, label in zip(verdicts, labels, strict=True)]
    return Judgements(verdicts, terms, np.array(is_right, np.float32))


def compare_orders(config: RewardConfig, judged: Judgements, partner: Sequence[int]) -> Judgements:
    """Add the term `swap_consistency`; `partner` is each row's judgement of the other order."""
    terms = [
        {
            **term,
            "swap_consistency": rewards.withhold(config, term, verdict, judged.verdicts[other]),
        }
        for term, verdict, other in zip(judged.terms, judged.verdicts, partner, strict=True)
    ]
    return dataclasses.replace(judged, terms=terms)


def consistency(verdicts: Sequence[Verdict], partner: Sequence[int]) -> float:
    """Return the share of verdicts, in percent, whose partner names the same answer.

    A verdict that is missing, on either side, is not consistent.
    """
    same = [
        is_consistent(verdict.preference, swap_preference(verdicts[other].preference))
        for verdict, other in zip(verdicts, partner, strict=True)
    ]
    return 100 * float(np.mean(same))


def metrics(judged: Judgements, lengths: np.ndarray, is_finished: np.ndarray) -> dict[str, float]:
    """Return the metrics of a batch of judgements; agreement and parse rate in percent.

    The mean of a term is over the rows it applies to; a term that applies to none is left out.
    """
    is_parsed = np.array([verdict.status == "ok" for verdict in judged.verdicts])
    paid = judged.rewards
    found = {
        "reward": float(paid.mean()),
        "reward_std": float(paid.std(ddof=1)),
        "judge/agreement": 100 * float(judged.is_right.mean()),
        "judge/parse_rate": 100 * float(is_parsed.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": 1 - float(is_finished.mean()),
    }
    for name in judged.terms[0]:
        values = np.array([t[name] for t in judged.terms if t[name] is not None], np.float64)
        if len(values):
            found |= {
                f"rewards/{name}/mean": float(values.mean()),
                f"rewards/{name}/std": float(values.std()),
            }
    return found
