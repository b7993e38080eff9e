"""Groups of judgements that GRPO compares: sampled, judged, and given their advantages.

A group is the R rollouts of a prompt, or with `data.orders: both` the 2R rollouts of a pair in both
orders. A group of equal rewards teaches nothing. `grpo.zero_variance` keeps it (no advantage, but
KL and entropy count), takes it out of the loss, or draws the next prompts until there are enough
others (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2), at most `grpo.max_draws` batches a
step. What was drawn and not learned from is counted. The position in the data, one integer,
advances by the number of batches drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jlrm.config import Config
from jlrm.data import batches
from jlrm.data.batches import Example
from jlrm.data.tokenizer import token_bytes
from jlrm.model.qwen import Params
from jlrm.rl.advantages import group_advantages
from jlrm.sampling.generate import fetch, make_generator
from jlrm.sampling.policy import TextPolicy
from jlrm.training.programs import rollout_settings, training_stops
from jlrm.training.scoring import (
    Judgement,
    compare_orders,
    consistency,
    judge,
    metrics,
    rewards_of,
)
from jlrm.training.setup import Run


class Sampled(NamedTuple):
    """Completions on the host, prompt by prompt."""

    ids: list[list[int]]
    logps: Float[np.ndarray, "B T"]  # of the sampling distribution, nats
    lengths: Int[np.ndarray, " B"]
    is_finished: Bool[np.ndarray, " B"]

    def take(self, rows: Sequence[int]) -> Sampled:
        """Return some of the rows, in this order."""
        arrays = (array[np.asarray(rows, np.int64)] for array in self[1:])
        return Sampled([self.ids[r] for r in rows], *arrays)


def join_sampled(parts: Sequence[Sampled]) -> Sampled:
    """Return the rows of all parts, one after the other."""
    return Sampled(
        [row for part in parts for row in part.ids],
        *(np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)),
    )


# sample(weights from `decode_params`, prompts, their numbers in the data, position) starts the
# devices and returns at once; the function that it returns waits for the completions.
SampleFn = Callable[[Params, Sequence[Example], np.ndarray, int], Callable[[], Sampled]]


def make_sampler(config: Config, policy: TextPolicy, width: int) -> SampleFn:
    """Return the sampler of a step's groups; prompts have at most `width` tokens."""
    sampling = config.sampling
    spelled = token_bytes(policy.tokenizer) if sampling.stop_strings else []
    generate = make_generator(
        policy,
        rollout_settings(config, policy),
        training_stops(config, policy, spelled),
        config.run.seed,
        config.grpo.rollouts,
        width,
    )

    def sample(
        weights: Params, examples: Sequence[Example], numbers: np.ndarray, step: int
    ) -> Callable[[], Sampled]:
        begun = generate(weights, [example.prompt_ids for example in examples], numbers, step)

        def collect() -> Sampled:
            ids, logps, lengths, is_finished = fetch(begun, len(examples))
            written = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
            return Sampled(written, *map(np.asarray, (logps, lengths, is_finished)))

        return collect

    return sample


def table_rows(batch: RolloutBatch) -> list[dict[str, Any]]:
    """Return one plain row per judgement, for people to read."""
    return [
        {
            "id": example.comparison.id,
            "order": "swapped" if example.comparison.is_swapped else "given",
            "question": example.comparison.question,
            "answer_1": example.comparison.answer_1,
            "answer_2": example.comparison.answer_2,
            "prompt": example.prompt,
            "gold": list(example.comparison.scores or ()),
            "label": example.comparison.label,
            **judgement.table_row(),
            "advantage": float(advantage),
        }
        for example, judgement, advantage in zip(
            batch.examples, batch.judgements, batch.advantages, strict=True
        )
    ]


Timed = Callable[[str], AbstractContextManager[None]]


class RolloutBatch(NamedTuple):
    """A rollout batch, group by group."""

    examples: list[Example]
    sampled: Sampled
    judgements: list[Judgement]
    advantages: Float[np.ndarray, " B"]


class StepBatch(NamedTuple):
    """The batch of a step, how many batches were drawn for it, and metrics of all of them."""

    batch: RolloutBatch
    is_learned: Bool[np.ndarray, " B"]  # False: out of the loss
    num_draws: int
    num_tokens: int
    metrics: dict[str, float]


class Started(NamedTuple):
    """A rollout that is under way on the devices."""

    position: int
    prompts: list[Example]
    collect: Callable[[], Sampled]


def start(run: Run, sample: SampleFn, weights: Params, position: int) -> Started:
    """Begin the rollout of the batch at a position in the data."""
    config, data = run.config.grpo, run.config.data
    pick = batches.pair_rows if data.orders == "both" else batches.batch_rows
    rows = pick(run.config.run.seed, position, config.prompts, len(run.data.train))
    prompts = run.data.train.take(rows)
    return Started(position, prompts, sample(weights, prompts, rows, position))


def draw(run: Run, begin: Callable[[int], Started], started: Started, timed: Timed) -> StepBatch:
    """Wait for the batch of a step and judge it; under "resample" begin the next ones as needed."""
    config = run.config.grpo
    is_resampling = config.zero_variance == "resample"
    drawn: list[RolloutBatch] = []
    num_informative = 0
    for i in range(config.max_draws if is_resampling else 1):
        if i:
            with timed("rollout"):
                started = begin(started.position + 1)
        drawn.append(_finish(run, started, timed))
        num_informative += int(_is_informative(run, drawn[-1]).sum())
        if num_informative >= _num_groups(run):
            break
    batch = drawn[0] if len(drawn) == 1 else _choose(run, drawn)
    is_learned = np.ones(_num_groups(run), bool)
    if config.zero_variance != "keep":
        is_learned = _is_informative(run, batch)
    by_row = np.repeat(is_learned, len(batch.examples) // len(is_learned))
    values = _metrics(run, drawn, is_learned)
    return StepBatch(batch, by_row, len(drawn), _num_tokens(drawn), values)


def _finish(run: Run, started: Started, timed: Timed) -> RolloutBatch:
    config, prompts = run.config.grpo, started.prompts
    with timed("rollout"):
        sampled = started.collect()
    examples = [example for example in prompts for _ in range(config.rollouts)]
    with timed("reward"):
        judgements = judge(run, examples, sampled.ids, len(examples) // _num_groups(run))
        if run.config.reward.swap_consistency:
            judgements = compare_orders(run.config.reward, judgements, _partner(run))
        grouped = rewards_of(judgements).reshape(_num_groups(run), -1)
        advantages = group_advantages(grouped, config.advantage_scale, config.advantage_eps)
    return RolloutBatch(examples, sampled, judgements, np.asarray(advantages).reshape(-1))


def _partner(run: Run) -> list[int]:
    """Return for each row that of the same rollout of the same pair in the other order."""
    num_rollouts = run.config.grpo.rollouts
    rows = np.arange(run.config.grpo.prompts * num_rollouts)
    is_first = (rows // num_rollouts) % 2 == 0
    return np.where(is_first, rows + num_rollouts, rows - num_rollouts).tolist()


def _num_groups(run: Run) -> int:
    return run.config.grpo.prompts // (2 if run.config.data.orders == "both" else 1)


def _is_informative(run: Run, batch: RolloutBatch) -> Bool[np.ndarray, " groups"]:
    return np.ptp(rewards_of(batch.judgements).reshape(_num_groups(run), -1), axis=1) > 0


def _choose(run: Run, drawn: list[RolloutBatch]) -> RolloutBatch:
    """Return the first groups that teach something, filled up by others if there are too few."""
    is_informative = np.concatenate([_is_informative(run, batch) for batch in drawn])
    # A stable sort: informative groups first, each kind in the order it was drawn.
    groups = np.sort(np.argsort(~is_informative, kind="stable")[: _num_groups(run)])
    size = len(drawn[0].examples) // _num_groups(run)
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)

    examples = [example for batch in drawn for example in batch.examples]
    sampled = join_sampled([batch.sampled for batch in drawn]).take(rows.tolist())
    judgements = [judgement for batch in drawn for judgement in batch.judgements]
    advantages = np.concatenate([batch.advantages for batch in drawn])[rows]
    return RolloutBatch(
        [examples[row] for row in rows], sampled, [judgements[row] for row in rows], advantages
    )


def _num_tokens(drawn: list[RolloutBatch]) -> int:
    prompts = sum(len(example.prompt_ids) for batch in drawn for example in batch.examples)
    return prompts + sum(int(batch.sampled.lengths.sum()) for batch in drawn)


def _metrics(run: Run, drawn: list[RolloutBatch], is_learned: np.ndarray) -> dict[str, float]:
    """Return metrics of all that was drawn: they describe the policy, not what was chosen."""
    judgements = [judgement for each in drawn for judgement in each.judgements]
    lengths = np.concatenate([each.sampled.lengths for each in drawn])
    is_finished = np.concatenate([each.sampled.is_finished for each in drawn])
    is_informative = np.concatenate([_is_informative(run, each) for each in drawn])
    values = metrics(judgements, lengths, is_finished)
    values["frac_reward_zero_std"] = 1 - float(is_informative.mean())
    if run.config.data.orders == "both":
        share = [consistency(each.judgements, _partner(run)) for each in drawn]
        values["judge/swap_consistency"] = float(np.mean(share))
    if run.config.grpo.zero_variance != "keep":
        values["groups/draws"] = len(drawn)
        values["groups/masked"] = int(np.sum(~is_learned))
        values["groups/discarded"] = len(is_informative) - _num_groups(run)
    return values
