"""Judging on the host: from examples to sampled judgements, their verdicts and their rewards.

This is the side of a rollout that knows text. Everything a completion can be is data here; only a
reward that raises stops the run, with the row that caused it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jlrm import mesh, rollout, stops
from jlrm.config import RewardConfig, RunError, UsageError
from jlrm.data import batches
from jlrm.data.batches import Example
from jlrm.data.tokenizer import decode, token_bytes
from jlrm.judge import rewards
from jlrm.judge.verdict import Verdict, parse
from jlrm.model import qwen
from jlrm.model.qwen import Params
from jlrm.rl.logprobs import Distribution
from jlrm.rollout import Rollout, Sampler
from jlrm.run import Run
from jlrm.update import Sequences


class Sampled(NamedTuple):
    """Completions of a batch of examples, on the devices and on the host."""

    sequences: Sequences
    rollout: Rollout
    texts: list[str]
    lengths: Int[np.ndarray, " B"]
    is_finished: Bool[np.ndarray, " B"]


@dataclass(frozen=True)
class Judgements:
    """Verdicts and rewards of a batch, one entry per completion."""

    verdicts: list[Verdict]
    terms: list[dict[str, float]]
    rewards: Float[np.ndarray, " B"]
    is_right: Float[np.ndarray, " B"]  # 1 where the verdict prefers what gold prefers

    def first(self, num_rows: int) -> Judgements:
        """Return the first rows alone, without those that only fill a batch."""
        return Judgements(
            self.verdicts[:num_rows],
            self.terms[:num_rows],
            self.rewards[:num_rows],
            self.is_right[:num_rows],
        )


Evaluation = Callable[[Params], dict[str, float]]
SampleFn = Callable[[Params, Sequence[Example], np.ndarray, np.ndarray, int], Sampled]


def make_sampler(run: Run, distribution: Distribution, width: int) -> SampleFn:
    """Compile-once sampler: `sample(params, examples, prompt_ids, rollout_index, step)`.

    `params` come from `qwen.decode_params`; `width` is the fixed prompt width in tokens.
    """
    config = run.config
    sampler = Sampler(distribution, config.sampling.max_new_tokens, run.end_ids)
    spelled = token_bytes(run.tokenizer) if config.sampling.stop_strings else []
    tables = stops.stop_tables(config.sampling.stop_strings, spelled, run.model.vocab_size)
    replicated = run.rollout.replicated()
    table = mesh.global_array(tables.tables, replicated)
    accept = mesh.global_array(tables.accept, replicated)
    rows, cells = run.training.activation("B"), run.training.activation("B T")
    generate = jax.jit(
        partial(rollout.generate, run.model, run.rollout, sampler),
        out_shardings=Rollout._make([cells, cells, rows, rows]),
    )
    keys = jax.jit(partial(rollout.rollout_keys, config.run.seed))

    def sample(
        params: Params,
        examples: Sequence[Example],
        prompt_ids: np.ndarray,
        rollout_index: np.ndarray,
        step: int,
    ) -> Sampled:
        tokens, lengths = batches.pad([example.prompt_ids for example in examples], width)
        prompts = mesh.global_array(tokens, cells), mesh.global_array(lengths, rows)
        result = generate(
            params, *prompts, keys(np.int32(step), prompt_ids, rollout_index), table, accept
        )
        ids, counts = mesh.host_array(result.tokens), mesh.host_array(result.lengths)
        texts = decode(run.tokenizer, [row[:count] for row, count in zip(ids, counts, strict=True)])
        sequences = Sequences(*prompts, result.tokens, result.lengths)
        return Sampled(sequences, result, texts, counts, mesh.host_array(result.is_finished))

    return sample


def judge(
    config: RewardConfig, examples: Sequence[Example], sampled: Sampled, max_tokens: int
) -> Judgements:
    """Score every completion against its example's gold.

    Raises:
      UsageError: a gold that the reward can't use.
      RunError: a reward function raised. Both name the row.
    """
    terms, verdicts = [], []
    for example, text, length in zip(examples, sampled.texts, sampled.lengths, strict=True):
        try:
            terms.append(
                rewards.score(
                    config,
                    prompt=example.prompt,
                    completion=text,
                    gold=example.comparison.gold,
                    num_tokens=int(length),
                    max_tokens=max_tokens,
                )
            )
        except UsageError as error:
            raise UsageError(f"Row {example.comparison.id}: {error}") from None
        except Exception as error:
            raise RunError(f"The reward of row {example.comparison.id} failed: {error}") from error
        verdicts.append(parse(text, min_score=config.min_score, max_score=config.max_score))
    preferred = [verdict.preference for verdict in verdicts]
    gold = [gold_preference(example) for example in examples]
    return Judgements(
        verdicts=verdicts,
        terms=terms,
        rewards=np.array([rewards.total(term) for term in terms], np.float32),
        is_right=np.array([a == b for a, b in zip(preferred, gold, strict=True)], np.float32),
    )


def gold_preference(example: Example) -> int:
    """Return which answer gold prefers, 0 for a tie."""
    first, second = example.comparison.gold
    return 0 if first == second else 1 if first > second else 2


def metrics(judged: Judgements, sampled: Sampled) -> dict[str, float]:
    """Return the metrics of a batch of judgements; agreement and parse rate in percent."""
    is_parsed = np.array([verdict.status == "ok" for verdict in judged.verdicts])
    found = {
        "reward": float(judged.rewards.mean()),
        "reward_std": float(judged.rewards.std(ddof=1)),
        "judge/agreement": 100 * float(judged.is_right.mean()),
        "judge/parse_rate": 100 * float(is_parsed.mean()),
        "completions/mean_length": float(sampled.lengths.mean()),
        "completions/clipped_ratio": 1 - float(sampled.is_finished.mean()),
    }
    for name in judged.terms[0]:
        values = np.array([term[name] for term in judged.terms])
        found |= {
            f"rewards/{name}/mean": float(values.mean()),
            f"rewards/{name}/std": float(values.std()),
        }
    return found


def make_evaluation(run: Run) -> Evaluation:
    """Return weights -> held-out metrics (`evaluate_heldout`), compiled at first use."""
    distribution = Distribution(run.config.sampling.eval_temperature, num_ids=len(run.tokenizer))
    sample = make_sampler(run, distribution, max(len(e.prompt_ids) for e in run.heldout))
    decode = jax.jit(partial(qwen.decode_params, run.model, run.rollout))
    return lambda params: evaluate_heldout(run, sample, decode(params))


def evaluate_heldout(run: Run, sample: SampleFn, params: Params) -> dict[str, float]:
    """Judge both orders of every held-out pair and return their metrics, shares in percent.

    Agreement is of the given order; `swap_consistency` is the share of pairs whose two verdicts
    name the same answer. A pair with a verdict missing is not consistent.
    """
    size = run.config.sampling.eval_batch_size
    max_tokens = run.config.sampling.max_new_tokens
    parts: list[Judgements] = []
    num_tokens = 0
    for start in range(0, len(run.heldout), size):
        part = run.heldout[start : start + size]
        padded = [*part, *[part[-1]] * (size - len(part))]
        prompt_ids = np.arange(start, start + size, dtype=np.int32)
        sampled = sample(params, padded, prompt_ids, np.zeros(size, np.int32), 0)
        num_tokens += int(sampled.lengths[: len(part)].sum())
        parts.append(judge(run.config.reward, padded, sampled, max_tokens).first(len(part)))
    verdicts = [verdict for part in parts for verdict in part.verdicts]
    half = len(run.heldout) // 2
    forward = [verdict.preference for verdict in verdicts[:half]]
    unswapped = {1: 2, 2: 1, 0: 0, None: None}
    back = [unswapped[verdict.preference] for verdict in verdicts[half:]]
    same = [a is not None and a == b for a, b in zip(forward, back, strict=True)]
    return {
        "agreement": 100 * float(np.concatenate([part.is_right for part in parts])[:half].mean()),
        "parse_rate": 100 * float(np.mean([verdict.status == "ok" for verdict in verdicts])),
        "swap_consistency": 100 * float(np.mean(same)),
        "reward": float(np.concatenate([part.rewards for part in parts]).mean()),
        "mean_length": num_tokens / len(run.heldout),
    }


def sampled_rows(
    examples: Sequence[Example], sampled: Sampled, judged: Judgements, advantages: np.ndarray
) -> list[dict[str, Any]]:
    """Return one plain row per judgement, for people to read."""
    rows = zip(
        examples,
        sampled.texts,
        judged.verdicts,
        judged.terms,
        judged.rewards,
        advantages,
        strict=True,
    )
    return [
        {
            "id": example.comparison.id,
            "prompt": example.prompt,
            "completion": text,
            "gold": list(example.comparison.gold),
            "verdict": None if verdict.status != "ok" else [verdict.score_1, verdict.score_2],
            "status": verdict.status,
            **{f"rewards/{name}": value for name, value in terms.items()},
            "reward": float(reward),
            "advantage": float(advantage),
        }
        for example, text, verdict, terms, reward, advantage in rows
    ]
