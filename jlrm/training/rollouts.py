"""Groups of judgements that GRPO compares: sampled, judged, and given their advantages.

A group is the R rollouts of a prompt, or with `data.orders: both` the 2R rollouts of a pair in both
orders, or with `data.judging: single` those of both answers of a pair. A group of equal rewards
teaches nothing. `grpo.zero_variance` keeps it (no advantage, but KL and entropy count), takes it
out of the loss, or draws the next prompts until there are enough others (dynamic sampling, DAPO,
arXiv 2503.14476, section 3.2), at most `grpo.max_draws` batches a step. What was drawn and not
learned from is counted. The position in the data, one integer, advances by the number of batches
drawn.

A completion that no reward applies to (each gave None) has the reward NaN here. It is no part of
its group's baseline and no part of the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jlrm.config import Config, RunError
from jlrm.data import audit, batches
from jlrm.data.audit import Draws
from jlrm.data.batches import Example
from jlrm.data.comparisons import AnswerList, Comparison
from jlrm.data.tokenizer import token_bytes
from jlrm.judgement.notes import TrainerState
from jlrm.model.qwen import Params
from jlrm.rl.advantages import advantages, is_informative
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
    terms_of,
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


# sample(weights from `decode_params`, prompts, position) starts the devices and returns at once;
# the function that it returns waits for the completions.
SampleFn = Callable[[Params, Sequence[Example], int], Callable[[], Sampled]]


def make_sampler(
    config: Config, policy: TextPolicy, width: int, num_rollouts: int, *, is_greedy: bool = False
) -> SampleFn:
    """Return the sampler of a step's groups; prompts have at most `width` tokens."""
    sampling = config.sampling
    spelled = token_bytes(policy.tokenizer) if sampling.stop_strings else []
    generate = make_generator(
        policy,
        rollout_settings(config, policy, is_greedy=is_greedy),
        training_stops(config, policy, spelled),
        config.run.seed,
        num_rollouts,
        width,
    )

    def sample(
        weights: Params, examples: Sequence[Example], position: int
    ) -> Callable[[], Sampled]:
        # Keys go by the place in the batch: a row that stands in it twice is drawn twice.
        places = np.arange(len(examples))
        begun = generate(weights, [each.prompt_ids for each in examples], places, position)

        def collect() -> Sampled:
            ids, logps, lengths, is_finished = fetch(begun, len(examples))
            written = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
            return Sampled(written, *map(np.asarray, (logps, lengths, is_finished)))

        return collect

    return sample


def one_after_the_other(*samplers: SampleFn) -> SampleFn:
    """Return what draws what each of the samplers does, the rows of one behind those of another."""

    def sample(
        weights: Params, examples: Sequence[Example], position: int
    ) -> Callable[[], Sampled]:
        begun = [each(weights, examples, position) for each in samplers]
        return lambda: join_sampled([collect() for collect in begun])

    return sample


def table_rows(batch: RolloutBatch) -> list[dict[str, Any]]:
    """Return one plain row per judgement, for people to read.

    Raises:
      RunError: a plug-in logs a column that is one of ours.
    """
    rows = [
        {
            "id": example.comparison.id,
            "order": "swapped" if example.comparison.is_swapped else "given",
            "question": example.comparison.question,
            "answer_1": example.comparison.answer_1,
            "answer_2": example.comparison.answer_2,
            "prompt": example.prompt,
            "gold": list(example.comparison.scores or ()),
            "label": example.comparison.label,
            **_listed(example.comparison),
            **judgement.table_row(),
            "advantage": float(advantage),
        }
        for example, judgement, advantage in zip(
            batch.examples, batch.judgements, batch.advantages, strict=True
        )
    ]
    logged = [judgement.logged for judgement in batch.judgements]
    return [row | extra for row, extra in zip(rows, _extra_columns(logged, rows[0]), strict=True)]


def _listed(row: Comparison) -> dict[str, Any]:
    """Return what a list has in a table besides, or in place of, what a pair has."""
    if not isinstance(row, AnswerList):
        return {}
    return {"answers": list(row.answers), "gold": [] if row.is_ranked else list(row.golds)}


def _extra_columns(
    logged: Sequence[dict[str, Any]], taken: Collection[str]
) -> list[dict[str, Any]]:
    """Return what plug-ins logged by row, each column of one type: a table has no mixed ones."""
    columns = {name: [row.get(name) for row in logged] for name in dict.fromkeys(chain(*logged))}
    for name, values in columns.items():
        if name in taken:
            raise RunError(
                f"A reward logs the column {name!r}, which the table of completions has already. "
                "Choose another name."
            )
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            columns[name] = [None if value is None else str(value) for value in values]
    return [{name: values[i] for name, values in columns.items()} for i in range(len(logged))]


Timed = Callable[[str], AbstractContextManager[None]]


class RolloutBatch(NamedTuple):
    """A rollout batch, group by group."""

    examples: list[Example]
    sampled: Sampled
    judgements: list[Judgement]
    advantages: Float[np.ndarray, " B"]
    logged: Sequence[tuple[str, float]] = ()  # metrics of plug-ins, of all that was drawn
    greedy: Sequence[Judgement] = ()  # of the greedy completion of each prompt


class StepBatch(NamedTuple):
    """The batch of a step, all that was drawn for it, and metrics of that."""

    batch: RolloutBatch
    is_learned: Bool[np.ndarray, " B"]  # False: out of the loss
    num_rows: int  # that are drawn from: pairs, under both orders
    drawn: list[list[int]]  # which of them, batch by batch: a group of each
    chosen: Int[np.ndarray, " groups"]  # of all groups drawn, those in `batch`
    num_tokens: int
    metrics: dict[str, float]

    @property
    def num_draws(self) -> int:
        return len(self.drawn)

    def draws(self, is_trained: Bool[np.ndarray, " B"]) -> Draws:
        """Return what became of the rows drawn, if these of the batch were trained on."""
        fates = np.full(sum(map(len, self.drawn)), audit.DISCARDED, dtype=object)
        by_group = is_trained.reshape(len(self.chosen), -1).any(axis=1)
        fates[self.chosen] = np.where(by_group, audit.TRAINED, audit.SKIPPED)
        ends = np.cumsum([len(rows) for rows in self.drawn])[:-1]
        return Draws(self.num_rows, self.drawn, [part.tolist() for part in np.split(fates, ends)])


class Started(NamedTuple):
    """A rollout that is under way on the devices."""

    position: int
    rows: list[int]  # or pairs
    prompts: list[Example]
    collect: Callable[[], Sampled]


def start(run: Run, sample: SampleFn, weights: Params, position: int, stream: int) -> Started:
    """Begin the rollout of the batch at a position in the data."""
    numbers, prompts = _prompts(run, position, stream)
    # What is collected for a checkpoint is collected again by the next step.
    collect = functools.cache(sample(weights, prompts, position))
    return Started(position, numbers, prompts, collect)


def saved(started: Started) -> dict[str, Any]:
    """Return a rollout as JSON holds it, for a checkpoint; waits for it."""
    ids, logps, _, is_finished = started.collect()
    return {
        "position": started.position,
        "ids": ids,
        "logps": [row[: len(each)].tolist() for row, each in zip(logps, ids, strict=True)],
        "width": logps.shape[1],
        "is_finished": is_finished.tolist(),
    }


def restored(run: Run, content: dict[str, Any], stream: int) -> Started:
    """Return the rollout that `saved` has made JSON of: what it was drawn from is no more."""
    ids: list[list[int]] = content["ids"]
    logps = np.zeros((len(ids), content["width"]), np.float32)
    for row, each in zip(logps, content["logps"], strict=True):
        row[: len(each)] = each
    lengths = np.array([len(each) for each in ids], np.int32)
    sampled = Sampled(ids, logps, lengths, np.array(content["is_finished"], bool))
    position = content["position"]
    return Started(position, *_prompts(run, position, stream), lambda: sampled)


def _prompts(run: Run, position: int, stream: int) -> tuple[list[int], list[Example]]:
    """Return which rows (or pairs) stand at a position in the data, and their prompts."""
    config, data = run.config.grpo, run.config.data
    pick = batches.pair_rows if data.prompts_of_row == 2 else batches.batch_rows
    rows = pick(run.config.run.seed, position, config.prompts, len(run.data.train), stream)
    prompts = run.data.train.take(rows)
    together = data.prompts_of_row
    return (rows[::together] // together).tolist(), prompts


def draw(
    run: Run, begin: Callable[[int], Started], started: Started, timed: Timed, state: TrainerState
) -> StepBatch:
    """Wait for the batch of a step and judge it; under "resample" begin the next ones as needed."""
    config = run.config.grpo
    is_resampling = config.zero_variance == "resample"
    drawn: list[RolloutBatch] = []
    rows: list[list[int]] = []
    num_informative = 0
    for i in range(config.max_draws if is_resampling else 1):
        if i:
            with timed("rollout"):
                started = begin(started.position + 1)
        rows.append(started.rows)
        drawn.append(_finish(run, started, timed, state))
        num_informative += int(_is_informative(run, drawn[-1]).sum())
        if num_informative >= _num_groups(run):
            break
    batch, chosen = drawn[0], np.arange(_num_groups(run))
    if is_resampling:
        batch, chosen = _choose(run, drawn)
    is_learned = np.ones(_num_groups(run), bool)
    if config.zero_variance != "keep":
        is_learned = _is_informative(run, batch)
    by_row = np.repeat(is_learned, len(batch.examples) // len(is_learned))
    by_row &= ~np.isnan(rewards_of(batch.judgements))
    values = _metrics(run, drawn, is_learned)
    num_rows = len(run.data.train) // run.config.data.prompts_of_row
    return StepBatch(batch, by_row, num_rows, rows, chosen, _num_tokens(drawn), values)


def _finish(run: Run, started: Started, timed: Timed, state: TrainerState) -> RolloutBatch:
    config, prompts = run.config.grpo, started.prompts
    with timed("rollout"):
        sampled = started.collect()
    examples = [example for example in prompts for _ in range(config.rollouts)]
    sampled, others = sampled.take(range(len(examples))), sampled.ids[len(examples) :]
    with timed("reward"):
        group_size = len(examples) // _num_groups(run)
        judgements, logged = judge(run, examples, sampled.ids, state, group_size)
        if run.config.reward.swap_consistency:
            judgements = compare_orders(run.config.reward, judgements, _partner(run))
        greedy: list[Judgement] = []
        if others:
            greedy = judge(run, prompts, others, state, run.config.data.prompts_of_row).judgements
            if run.config.reward.swap_consistency:
                partner = [i ^ 1 for i in range(len(greedy))]  # orders of a pair stand together
                greedy = compare_orders(run.config.reward, greedy, partner)
        gains = _advantages(run, judgements, sampled.lengths, greedy=greedy)
    return RolloutBatch(examples, sampled, judgements, gains, logged, greedy)


def _advantages(
    run: Run,
    judgements: Sequence[Judgement],
    lengths: Int[np.ndarray, " B"],
    is_counted: Bool[np.ndarray, " B"] | bool = True,
    penalty: Float[np.ndarray, " B"] | None = None,
    greedy: Sequence[Judgement] = (),
) -> Float[np.ndarray, " B"]:
    config, shape = run.config.grpo.advantage, (_num_groups(run), -1)
    grouped = _terms(run, judgements, is_counted)
    if penalty is not None:
        grouped = {name: each - penalty.reshape(shape) for name, each in grouped.items()}
    beside = None
    if greedy:
        of_each = [judgement for judgement in greedy for _ in range(run.config.grpo.rollouts)]
        beside = _terms(run, of_each)
    num_orders, lengths = run.config.data.prompts_of_row, lengths.reshape(shape)
    return advantages(config, grouped, lengths, num_orders, beside).reshape(-1)


def advantages_of(
    run: Run, drawn: StepBatch, penalty: Float[np.ndarray, " B"]
) -> Float[np.ndarray, " B"]:
    """Return the advantages of a step's batch whose rewards are lowered by so much."""
    is_counted = drawn.is_learned if run.config.grpo.zero_variance == "resample" else True
    judgements, lengths = drawn.batch.judgements, drawn.batch.sampled.lengths
    return _advantages(run, judgements, lengths, is_counted, penalty, drawn.batch.greedy)


def _terms(
    run: Run, judgements: Sequence[Judgement], is_counted: Bool[np.ndarray, " B"] | bool = True
) -> dict[str, Float[np.ndarray, "groups size"]]:
    """Return what is compared, group by group: the rewards, or each term of them."""
    paid = {"reward": rewards_of(judgements)}
    if run.config.grpo.advantage.terms == "apart":
        paid = terms_of(judgements)
    shape = (_num_groups(run), -1)
    return {name: np.where(is_counted, each, np.nan).reshape(shape) for name, each in paid.items()}


def _partner(run: Run) -> list[int]:
    """Return for each row that of the same rollout of the same pair in the other order."""
    num_rollouts = run.config.grpo.rollouts
    rows = np.arange(run.config.grpo.prompts * num_rollouts)
    is_first = (rows // num_rollouts) % 2 == 0
    return np.where(is_first, rows + num_rollouts, rows - num_rollouts).tolist()


def _num_groups(run: Run) -> int:
    return run.config.grpo.prompts // run.config.data.prompts_of_row


def _is_informative(run: Run, batch: RolloutBatch) -> Bool[np.ndarray, " groups"]:
    """Return which groups have two rewards that differ."""
    paid = _terms(run, batch.judgements)
    return is_informative(run.config.grpo.advantage, paid, run.config.data.prompts_of_row)


def _choose(run: Run, drawn: list[RolloutBatch]) -> tuple[RolloutBatch, Int[np.ndarray, " groups"]]:
    """Return the first groups that teach something, filled up by others if there are too few.

    Also returns which they are, of all that were drawn.

    Advantages are those of the choice: what fills up is out of the loss, and so counts in no
    deviation over the batch (`grpo.advantage`).
    """
    is_useful = np.concatenate([_is_informative(run, batch) for batch in drawn])
    # A stable sort: informative groups first, each kind in the order it was drawn.
    groups = np.sort(np.argsort(~is_useful, kind="stable")[: _num_groups(run)])
    size = len(drawn[0].examples) // _num_groups(run)
    rows = (groups[:, None] * size + np.arange(size)).reshape(-1)

    examples = [example for batch in drawn for example in batch.examples]
    sampled = join_sampled([batch.sampled for batch in drawn]).take(rows.tolist())
    judgements = [judgement for batch in drawn for judgement in batch.judgements]
    chosen = [judgements[row] for row in rows]
    gains = _advantages(run, chosen, sampled.lengths, np.repeat(is_useful[groups], size))
    logged = [each for batch in drawn for each in batch.logged]
    batch = RolloutBatch([examples[row] for row in rows], sampled, chosen, gains, logged)
    return batch, groups


def _num_tokens(drawn: list[RolloutBatch]) -> int:
    prompts = sum(len(example.prompt_ids) for batch in drawn for example in batch.examples)
    return prompts + sum(int(batch.sampled.lengths.sum()) for batch in drawn)


def _metrics(run: Run, drawn: list[RolloutBatch], is_learned: np.ndarray) -> dict[str, float]:
    """Return metrics of all that was drawn: they describe the policy, not what was chosen."""
    judgements = [judgement for each in drawn for judgement in each.judgements]
    lengths = np.concatenate([each.sampled.lengths for each in drawn])
    is_finished = np.concatenate([each.sampled.is_finished for each in drawn])
    is_useful = np.concatenate([_is_informative(run, each) for each in drawn])
    values = metrics(judgements, lengths, is_finished)
    values["frac_reward_zero_std"] = 1 - float(is_useful.mean())
    config = run.config
    # Otherwise our own terms pay every completion.
    if config.reward.mode == "none" or config.data.gold == "majority":
        values["completions/unpaid_ratio"] = float(np.isnan(rewards_of(judgements)).mean())
    if run.config.data.orders == "both":
        share = [consistency(each.judgements, _partner(run)) for each in drawn]
        values["judge/swap_consistency"] = float(np.mean(share))
    if run.config.grpo.zero_variance != "keep":
        values["groups/draws"] = len(drawn)
        values["groups/masked"] = int(np.sum(~is_learned))
        values["groups/discarded"] = len(is_useful) - _num_groups(run)
    return values
